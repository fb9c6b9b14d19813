"""Kinds of errors, by hand and in the table of a comparison, and the score of an image."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import answers, row
from pycocotools.coco import COCO

from fgbg_kd.experiments.result_rows import group
from fgbg_kd.experiments.tables import comparison_tables
from fgbg_kd.experiments.tide import KINDS, detection_errors, image_scores, run_errors, tide
from fgbg_kd.utils.errors import RunError


@pytest.fixture
def truth(tmp_path):
    """An image with two objects of different classes."""
    pytest.importorskip("tidecv")
    boxes = [
        {"id": i, "image_id": 5, "category_id": i, "bbox": [40 * i, 0, 20, 20], "iscrowd": 0}
        for i in (1, 2)
    ]
    images = [{"id": 5, "file_name": "5.png", "height": 100, "width": 200}]
    categories = [{"id": i, "name": str(i)} for i in (1, 2)]
    coco = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    return tmp_path / "truth.json"


def write(path, *detections):
    rows = [
        {"image_id": 5, "category_id": c, "bbox": [x, 0, 20, 20], "score": s}
        for c, x, s in detections
    ]
    path.write_text(json.dumps(rows))
    return path


def test_errors_by_hand(truth, tmp_path):
    right = (2, 80, 0.8)
    # The object of class 1 is detected as class 2, with a higher score than the right detection.
    # AP50 is 0 for class 1 and 50 for class 2.
    wrong_class = detection_errors(truth, write(tmp_path / "a.json", (2, 40, 0.9), right))
    assert wrong_class == {
        **dict.fromkeys(KINDS, 0.0),
        "Cls": 75.0,
        "FalsePos": 25.0,
        "FalseNeg": 25.0,
    }
    background = detection_errors(truth, write(tmp_path / "b.json", (2, 140, 0.9), right))
    assert background["Bkg"] == 25.0 and background["Miss"] == 25.0 and background["Cls"] == 0


def test_nothing_detected_is_nothing_but_misses(truth, tmp_path):
    errors = detection_errors(truth, write(tmp_path / "none.json"))
    assert errors["Miss"] == errors["FalseNeg"] == 100.0 and errors["Bkg"] == 0


def test_errors_of_a_run_are_found_once_on_its_own_test_set(truth, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"DATASETS.TEST_JSON": str(truth)}))
    (tmp_path / "inference").mkdir()
    results = tmp_path / "inference" / "coco_instances_results.json"
    write(results, (1, 40, 0.9), (2, 80, 0.9))
    first = run_errors(tmp_path)
    assert set(first.values()) == {0.0}
    results.unlink()
    assert run_errors(tmp_path) == first


def test_without_tidecv_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tidecv", None)
    with pytest.raises(RunError, match="pip install --no-deps tidecv"):
        tide()


def test_scores_of_images_need_no_info_in_the_file(coco, tmp_path, monkeypatch):
    """pycocotools 2.0.9 and 2.0.10 read dataset["info"] without a default."""
    load = COCO.loadRes
    older = lambda self, results: (self.dataset["info"], load(self, results))[1]  # noqa: E731
    monkeypatch.setattr(COCO, "loadRes", older)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(answers(coco, {3})))
    assert image_scores(Path(coco[0]), file, 0.3)[3] == 1.0


def test_the_table_has_means_and_paired_differences_to_plain():
    def errors(miss):
        return {**dict.fromkeys(KINDS, 1.0), "Miss": miss}

    rows = [
        row(method, seed, 10.0, errors=errors(miss))
        for method, misses in (("plain", (4.0, 6.0)), ("FgBg", (3.0, 5.0)))
        for seed, miss in enumerate(misses)
    ]
    rows += [row("teacher", None, 10.0, errors=errors(1.0)), row("PKD", 0, 10.0)]
    text = comparison_tables(group(rows)["c.yaml"], ["errors"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert table[0] == ["dAP50", *KINDS]
    by_method = {cells[0]: dict(zip(KINDS, cells[1:])) for cells in table[2:]}
    assert list(by_method) == ["teacher", "plain", "FgBg"]  # PKD has no errors in its row
    assert set(by_method["teacher"].values()) == {"1.0"}
    assert by_method["plain"]["Miss"] == "5.0"
    assert by_method["FgBg"]["Miss"] == "4.0 (-1.00 ± 0.00)"


def test_the_table_of_classes_has_the_gain_of_each_class():
    rows = [
        row(method, seed, 10.0, classes={"cat": ap, "dog": 2.0})
        for method, aps in (("plain", (4.0, 6.0)), ("FgBg", (5.0, 8.0)))
        for seed, ap in enumerate(aps)
    ]
    text = comparison_tables(group(rows)["c.yaml"], ["classes"])
    assert re.search(r"\| AP by class *\| cat *\| dog *\|", text)
    assert re.search(r"\| plain *\| 5.0 *\| 2.0 *\|", text)
    assert re.search(r"\| FgBg *\| 6.5 \(\+1.50 ± 6.35\) *\| 2.0 \(\+0.00 ± 0.00\) *\|", text)
    assert comparison_tables(group([row("plain", 0, 10.0)])["c.yaml"], ["classes"]) == ""


def test_the_score_of_an_image_by_hand(coco, tmp_path):
    """Image 3 has three objects: one is found once, one twice, one is missed. There is also a false
    detection with a low score."""
    found = answers(coco, {3})
    assert len(found) == 3
    faint = {**found[0], "bbox": [0, 0, 5, 5], "score": 0.2}
    file = tmp_path / "found.json"
    file.write_text(json.dumps([found[0], found[1], found[1], faint]))
    scores = image_scores(Path(coco[0]), file, 0.3)
    assert scores[3] == pytest.approx(2 * 2 / (2 + 1 + 3))
    assert (
        scores[0] == 1.0 and scores[1] == 0.0
    )  # no object and no detection; an object without a detection
    file.write_text(json.dumps([faint]))
    assert image_scores(Path(coco[0]), file, 0.3)[3] == 0.0

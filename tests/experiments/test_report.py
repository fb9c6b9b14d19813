"""The page about runs: its numbers and pictures, and the page in a browser."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import answers, tiny_cfg
from detectron2 import model_zoo
from detectron2.config import LazyCall, LazyConfig
from detectron2.modeling import build_model

from fgbg_kd import FgBgDistiller, build_teacher
from fgbg_kd.experiments.report import write_report
from fgbg_kd.experiments.report_figures import _thinned
from fgbg_kd.experiments.run_folder import find_runs
from fgbg_kd.utils.errors import RunError

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
AP = {"teacher": 33.25, "plain/seed0": 4.5, "plain/seed1": 5.5, "distilled/seed0": 10.5,
      "distilled/seed1": 12.5}  # fmt: skip
GAINED, LOST = 3, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory, coco):
    """Folders like after training: a teacher, and two seeds of a plain and a distilled student."""
    base = tmp_path_factory.mktemp("runs")
    for name, ap in AP.items():
        folder = base / name
        (folder / "inference").mkdir(parents=True)
        cfg = tiny_cfg(coco, "reported")
        cfg.SEED = int(name[-1]) if name[-1].isdigit() else 0
        cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = str(folder), 101
        torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
        rows = [
            {"iteration": i, "loss_cls": 2 - i / 50, "total_loss": 3.0} for i in range(0, 99, 20)
        ]
        if name.startswith("distilled"):
            cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
            cfg.MODEL.KD.TEACHER.CONFIG = "<b>teacher</b>.yaml"
            cfg.MODEL.KD.TEACHER.WEIGHTS = str(base / "teacher" / "model_final.pth")
            kd = {"loss_kd_fg": 0.5, "kd/fg_gate": 0.4, "kd/bg_gate": 0.1}
            rows = [{**r, **kd} for r in rows]
        metrics = {"AP": ap, "AP50": 2 * ap, "APl": math.nan, "AP-square": 7.25, "AP-stripe": 1.5}
        rows.append({"iteration": 100, **{f"bbox/{k}": v for k, v in metrics.items()}})
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / "config.yaml").write_text(cfg.dump())
        (folder / "log.txt").write_text(
            "----------  -----------\nPyTorch     9.8.7 @/home/me/torch\n----------  -----------\n"
        )
        found = answers(coco, {GAINED} if name.startswith("distilled") else {LOST})
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    return base


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    said = []
    write_report([runs], file, said.append)
    assert any("latency" in text for text in said)
    return file


@pytest.fixture(autouse=True)
def a_cost_that_takes_no_time(monkeypatch):
    """For all pages except the page of the fixture above, which is made earlier."""
    figures = {"parameters_m": 1.0, "gflops": 1.0, "ms_per_image": 1.0}
    monkeypatch.setattr("fgbg_kd.experiments.report.cost", lambda *_: figures)


class Parser(HTMLParser):
    """Rows of tables, texts, images and addresses."""

    def __init__(self, file):
        super().__init__()
        self.rows, self.images, self.addresses, self.text, self.tags = [], [], [], [], []
        self.in_cell = False
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def row(self, name):
        return next(r for r in self.rows if r and r[0] == name)


def test_each_run_has_its_role_group_and_seed(runs):
    found = find_runs([runs])
    assert [(r.role, r.group, r.seed) for r in found] == [
        ("teacher", "teacher", 0),
        ("plain", "plain", 0),
        ("plain", "plain", 1),
        ("distilled", "distilled", 0),
        ("distilled", "distilled", 1),
    ]
    assert {r.group for r in find_runs([runs / "plain"])} == {"plain"}
    assert [r.folder for r in find_runs([runs / "plain" / "seed1", runs / "plain"])] == [
        runs / "plain" / "seed0",
        runs / "plain" / "seed1",
    ]
    with pytest.raises(RunError, match="inference holds no run"):
        find_runs([runs / "teacher" / "inference"])


@pytest.mark.slow
def test_the_page_has_the_numbers_of_the_runs(page):
    html = Parser(page)
    assert html.row("teacher")[1:4] == ["33.25", "–", "66.5"]
    assert html.row("distilled")[1:4] == ["11.50", "10.5, 12.5", "23.0"]
    assert html.row("distilled")[7] == "–"  # no large objects
    parameters = sum(p.numel() for p in build_model(tiny_cfg()).parameters()) / 1e6
    assert html.row("plain")[8] == f"{parameters:.3f}" and float(html.row("plain")[10]) > 0
    assert html.row("square")[1:] == ["7.2", "7.2", "7.2"]
    text = " ".join(html.text)
    assert "+6.5 ± 6.4 AP" in text  # gains of 6 and 7: 12.706 * 0.7071 / 1.4142
    assert html.row("PyTorch")[1:] == ["9.8.7"] * 3 and "/home/me" not in text
    assert html.row("MODEL.META_ARCHITECTURE")[1:] == ["RetinaNet", "RetinaNet", "FgBgDistiller"]
    assert html.row("MODEL.KD.TEACHER.CONFIG") == [
        "MODEL.KD.TEACHER.CONFIG", "–", "–", "<b>teacher</b>.yaml"
    ]  # fmt: skip
    unread = ("SEED", "OUTPUT_DIR", "MODEL.KD.PKD.WEIGHT")
    assert not any(r and r[0] in unread for r in html.rows)


def test_the_page_has_every_curve_and_needs_no_network(page):
    html = Parser(page)
    for name in (
        "loss_cls",
        "loss_kd_fg",
        "total_loss",
        "kd/fg_gate",
        "kd/bg_gate",
        "bbox/AP",
    ):
        assert any(name == text.strip() for text in html.text), name
    assert html.tags.count("svg") == 4  # classes, losses, gates, AP
    assert "link" not in html.tags and "script" not in html.tags
    assert all(a.startswith(("data:", "#")) for a in html.addresses)
    assert "@import" not in page.read_text() and "url(http" not in page.read_text()


def test_the_pictures_are_of_the_images_that_changed_most(page):
    html = Parser(page)
    assert [image["alt"] for image in html.images] == [
        f"{GAINED}.png: F1 0.00 to 1.00 (+1.00)",
        f"{LOST}.png: F1 1.00 to 0.00 (-1.00)",
    ]
    for image in html.images:
        assert picture(image).shape[1] >= 4 * 270  # truth, teacher, plain, distilled


def picture(image):
    data = base64.b64decode(image["src"].partition("base64,")[2])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def test_the_page_has_the_kinds_of_errors(page):
    pytest.importorskip("tidecv")
    html = Parser(page)
    header = next(r for r in html.rows if "FalseNeg" in r)
    distilled = [r for r in html.rows if len(r) == len(header) and r[0] == "distilled"]
    errors = dict(zip(header[1:], map(float, distilled[0][1:])))
    assert errors["Cls"] == errors["Loc"] == errors["FalsePos"] == 0  # its detections are right
    assert errors["Miss"] > 10


def test_the_page_is_written_into_the_folder_of_the_runs(monkeypatch, capsys):
    import report

    written = []
    monkeypatch.setattr(report, "write_report", lambda *arguments: written.append(arguments[:2]))
    for arguments, file in (
        (["runs", "more"], Path("runs/report.html")),
        (["runs", "-o", "mine.html"], Path("mine.html")),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        report.main()
        assert written.pop()[1] == file and capsys.readouterr().out == f"{file}\n"


@pytest.mark.slow
def test_a_page_without_checkpoints_and_detections_says_so(runs, tmp_path):
    for name in ("plain/seed0", "distilled/seed0"):
        shutil.copytree(runs / name, tmp_path / name)
        (tmp_path / name / "model_final.pth").unlink()
        shutil.rmtree(tmp_path / name / "inference")
    write_report([tmp_path], tmp_path / "report.html", print)
    html = Parser(tmp_path / "report.html")
    assert html.row("plain")[8:] == ["–"] * 3 and html.images == []
    text = " ".join(html.text)
    assert "plain: parameters, GFLOPs and time: its checkpoint" in text
    assert "Pictures: [Errno 2]" in text and "coco_instances_results.json" in text


def not_on_the_page(folder) -> str:
    write_report([folder], folder / "report.html", print)
    html = Parser(folder / "report.html")
    return " ".join(html.text).partition("Not on this page")[2].partition("Configuration")[0]


def changed(runs, tmp_path, **changes):
    """A plain and a distilled run with other values of DATASETS."""
    for name in ("plain/seed0", "distilled/seed0"):
        folder = shutil.copytree(runs / name, tmp_path / name)
        cfg = tiny_cfg()
        cfg.merge_from_file(folder / "config.yaml")
        for key, value in changes.items():
            cfg.DATASETS[key] = value
        (folder / "config.yaml").write_text(cfg.dump())


@pytest.mark.slow
def test_without_a_test_set_the_page_is_made_and_says_so(runs, tmp_path):
    changed(runs, tmp_path, TEST=(), TEST_JSON="")
    lacks = not_on_the_page(tmp_path)
    assert "plain: parameters, GFLOPs and time: DATASETS.TEST names 0 sets" in lacks
    assert "Pictures: plain and distilled have no known test set in common" in lacks


@pytest.mark.slow
def test_without_the_test_images_the_page_is_made_and_says_so(runs, tmp_path, coco):
    (tmp_path / "images").mkdir()
    changed(runs, tmp_path, TEST=("gone",), TEST_IMAGES=str(tmp_path / "images"))
    lacks = not_on_the_page(tmp_path)
    assert "distilled: parameters, GFLOPs and time: 12 of 12 images" in lacks
    assert "Pictures: 12 of 12 images" in lacks


@pytest.mark.slow
def test_a_set_of_another_program_is_named(runs, tmp_path):
    changed(runs, tmp_path, TEST=("mine",), TEST_JSON="")
    assert "its test set 'mine' is empty, or not registered here" in not_on_the_page(tmp_path)


@pytest.mark.slow
def test_an_unfinished_run_and_a_run_by_a_python_config_are_on_the_page(runs, tmp_path):
    plain = shutil.copytree(runs / "plain" / "seed0", tmp_path / "plain")
    with open(plain / "metrics.json", "a") as file:
        file.write('\n{"iteration": 10')
    folder = tmp_path / "mine"
    folder.mkdir()
    teacher = LazyCall(build_teacher)(config="x.yaml", weights=str(plain / "model_final.pth"))
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    cfg.model = LazyCall(FgBgDistiller)(student=cfg.model, teacher=teacher, method={})
    cfg.train.seed = 3
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    (folder / "metrics.json").write_text('{"iteration": 9, "total_loss": 1, "bbox/AP": 7.0}\n')
    found = {r.group: r for r in find_runs([tmp_path])}
    assert found["mine"].result == {}  # of 90,000 iterations
    assert (found["mine"].role, found["mine"].seed) == ("distilled", 3)
    assert found["plain"].role == "teacher" and found["plain"].result["AP"] == 4.5
    lacks = not_on_the_page(tmp_path)
    assert "mine, seed 3: its AP" in lacks and "plain, seed 0: its AP" not in lacks
    assert "mine: parameters, GFLOPs and time: its config is Python" in lacks


@pytest.mark.slow
def test_runs_are_compared_with_those_of_their_own_test_set_and_recipe(runs, tmp_path):
    for name in ("plain", "distilled"):
        shutil.copytree(runs / name / "seed0", tmp_path / "a" / name)
        folder = shutil.copytree(runs / name / "seed0", tmp_path / "b" / name)
        text = (folder / "config.yaml").read_text().replace("reported_test", "other_test")
        (folder / "config.yaml").write_text(text)
        rows = (folder / "metrics.json").read_text().replace('"bbox/AP": ', '"bbox/AP": 2')
        (folder / "metrics.json").write_text(rows)
    only = shutil.copytree(runs / "distilled" / "seed0", tmp_path / "longer")
    text = (only / "config.yaml").read_text().replace("MAX_ITER: 101", "MAX_ITER: 100")
    (only / "config.yaml").write_text(text)
    faster = shutil.copytree(runs / "plain" / "seed0", tmp_path / "a" / "faster")
    text = (faster / "config.yaml").read_text()
    (faster / "config.yaml").write_text(re.sub(r"BASE_LR: .*", "BASE_LR: 0.7", text))
    evaluated = shutil.copytree(runs / "plain" / "seed0", tmp_path / "a" / "an_evaluation")
    (evaluated / "metrics.json").unlink()  # an evaluation with the plain config and any weights
    write_report([tmp_path], tmp_path / "report.html", print)
    text = " ".join(" ".join(Parser(tmp_path / "report.html").text).split())
    assert "an_evaluation" not in text
    assert "a/distilled: +6.0 AP over a/plain, one seed" in text
    assert "b/distilled: +186.0 AP over b/plain, one seed" in text
    assert "longer: its gain. It needs a plain run" in text


def test_nothing_detected_is_an_ap_of_zero_and_an_undefined_ap_is_none(runs, tmp_path):
    folder = shutil.copytree(runs / "plain" / "seed0", tmp_path / "plain")
    rows = [{"iteration": 20, "total_loss": 3.0}, {"iteration": 100, "bbox/AP": math.nan}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    assert "AP" not in find_runs([tmp_path])[0].result  # there are detections
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    assert find_runs([tmp_path])[0].result["AP"] == 0.0


@pytest.mark.slow
def test_runs_of_other_seeds_are_no_pair(runs, tmp_path):
    shutil.copytree(runs / "plain" / "seed0", tmp_path / "plain" / "seed0")
    shutil.copytree(runs / "distilled" / "seed1", tmp_path / "distilled" / "seed1")
    lacks = not_on_the_page(tmp_path)
    assert "distilled: its gain. It needs a plain run" in lacks
    assert "Pictures: they need a plain and a distilled run with the same test set" in lacks


def test_of_several_runs_in_one_metrics_file_the_last_is_read(runs, tmp_path):
    folder = shutil.copytree(runs / "plain" / "seed0", tmp_path / "plain")
    with open(folder / "metrics.json", "a") as file:
        file.write('\n{"iteration": 20, "total_loss": 3.0}\n')
    (run,) = find_runs([tmp_path])
    assert run.result == {} and [r["iteration"] for r in run.rows] == [20]


@pytest.mark.slow
def test_runs_of_compare_have_cost_and_pictures_of_the_best_method(runs, tmp_path):
    """The teacher was only evaluated. The pictures are of the best distilled group."""
    shutil.copytree(runs / "plain" / "seed0", tmp_path / "plain" / "seed0")
    for name, ap in (("CWD", 5.0), ("FgBg", 9.0)):
        folder = shutil.copytree(runs / "distilled" / "seed0", tmp_path / name / "seed0")
        (folder / "metrics.json").write_text(
            json.dumps({"iteration": 100, "total_loss": 1.0, "bbox/AP": ap})
        )
    teacher = tmp_path / "as_evaluated"
    teacher.mkdir()
    cfg = tiny_cfg()
    cfg.merge_from_file(runs / "teacher" / "config.yaml")
    cfg.MODEL.WEIGHTS = str(runs / "teacher" / "model_final.pth")
    (teacher / "config.yaml").write_text(cfg.dump())
    (teacher / "done.json").write_text(json.dumps({"AP": 31.25, "APl": None, "memory_mb": 1}))
    write_report([tmp_path], tmp_path / "report.html", print)
    html = Parser(tmp_path / "report.html")
    row = html.row("as_evaluated")
    assert row[1] == "31.25" and row[7] == "–" and float(row[8]) > 0
    text = " ".join(html.text)
    assert "FgBg against plain, seed 0: better on 1, worse on 1 of 12 images" in text
    assert "+4.5 AP" in text and "+0.5 AP" in text and "one seed" in text


def test_a_long_curve_is_drawn_by_means_of_neighbours():
    points = [(i, i % 2) for i in range(10000)]
    thinned = _thinned(points)
    assert len(thinned) == 400 and np.allclose(thinned[:, 1], 0.5, atol=0.03)
    assert np.array_equal(_thinned(points[:7]), points[:7])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_it_from_disk(page, tmp_path):
    shot = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,4000"]
    subprocess.run(
        [*command, f"--screenshot={shot}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    drawn = cv2.imread(str(shot))
    for color in ("#555555", "#0072B2", "#D55E00"):  # teacher, plain, distilled: bars and curves
        bgr = [int(color[i : i + 2], 16) for i in (5, 3, 1)]
        assert (np.abs(drawn.astype(int) - bgr).max(-1) < 6).sum() > 2000, color
    html = Parser(page)
    for image in html.images:
        wanted = picture(image)
        wide = min(wanted.shape[1], 1120)
        scale = wide / wanted.shape[1]
        wanted = cv2.resize(wanted, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        match = cv2.matchTemplate(drawn, wanted, cv2.TM_CCOEFF_NORMED)
        assert match.max() > 0.95

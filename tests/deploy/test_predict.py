"""predict.py reads images like training, overwrites no input, and writes the ids of a file."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_cfg
from detectron2.structures import Boxes, Instances
from PIL import ExifTags, Image
from small import detector, photo

from fgbg_kd.deploy import DeployError, predict
from fgbg_kd.deploy.predict import (
    Video,
    category_ids_in,
    check_not_overwritten,
    find,
    image_ids_in,
    targets,
)
from fgbg_kd.utils.errors import DataError

library = sys.modules[
    "fgbg_kd.deploy.predict"
]  # the module; the package exports a function of this name
ABOUT = {
    "min_size": 64,
    "max_size": 80,
    "input_size": None,
    "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "stripe"}],
    "suppression": {"score": 0.05, "iou": 0.5, "limit": 9},
}


def two_boxes(inputs):
    """A detector that finds a square and a stripe in every image."""
    found = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[1.0, 2, 9, 9]] * 2)))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    return [{"instances": found}]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(library, "open_detector", lambda *_, **__: (two_boxes, ABOUT))


def film(path: Path, frames: int = 2) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    for seed in range(frames):
        writer.write(photo(64, 80, seed))
    writer.release()
    return path


def test_nothing_that_is_read_is_written_over(tmp_path):
    picture, video = tmp_path / "a.png", tmp_path / "film.mp4"
    cv2.imwrite(str(picture), photo(8, 8))
    video.write_bytes(b"film")
    before = {p: p.read_bytes() for p in (picture, video)}
    for inputs, outputs in (
        ([tmp_path], {"output": tmp_path}),
        ([video], {"output": tmp_path / "x" / ".."}),
        ([picture], {"results": picture}),
    ):
        with pytest.raises(DeployError, match="is an input: give another"):
            predict("student.pt", inputs, **outputs)
    labels = tmp_path / "val.json"
    labels.write_text("{}")
    with pytest.raises(DeployError, match="is an input: give another"):
        predict("student.pt", [picture], results=labels, ids=labels)
    assert {p: p.read_bytes() for p in before} == before and labels.read_text() == "{}"


def test_each_image_has_an_id_of_its_own(coco, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(coco[1], folder / "more")
    shutil.copy(f"{coco[1]}/1.png", folder)
    inputs = find([folder])
    assert {Path("1.png"), Path("more/1.png")} < inputs.keys() and len(inputs) == 13
    (tmp_path / "film.avi").touch(), (tmp_path / "film.mp4").touch()
    films = find([tmp_path / "film.avi", tmp_path / "film.mp4"])
    with pytest.raises(DeployError, match="written twice"):
        check_not_overwritten(films, list(targets(films, tmp_path / "o").values()))
    with pytest.raises(DeployError, match="would both be written to 1.png"):
        find([folder / "1.png", folder / "more" / "1.png"])

    content = json.loads(Path(coco[0]).read_text())
    content["images"][3]["file_name"] = "more/1.png"
    places = dict.fromkeys([Path("1.png"), Path("more/1.png")])
    ids = image_ids_in(Path("x.json"), content, places)
    assert ids == {Path("1.png"): 1, Path("more/1.png"): 3}
    with pytest.raises(DeployError, match="no image with the file_name more/2.png"):
        image_ids_in(Path("x.json"), content, {Path("more/2.png"): None})


def test_categories_meet_by_name_or_are_refused_with_both_lists(fake, coco, tmp_path):
    content = json.loads(Path(coco[0]).read_text())
    content["categories"] = [{"id": 0, "name": "stripe"}, {"id": 1, "name": "square"}]
    for annotation in content["annotations"]:
        annotation["category_id"] -= 1
    ids, results = tmp_path / "ids.json", tmp_path / "results.json"
    ids.write_text(json.dumps(content))
    predict("x.pt", [Path(coco[1]) / "3.png"], results=results, ids=ids)
    rows = json.loads(results.read_text())
    assert [(r["image_id"], r["category_id"]) for r in rows] == [(3, 1), (3, 0)]
    content["categories"][1]["name"] = "circle"
    with pytest.raises(DataError) as error:
        category_ids_in(ids, content, ABOUT)
    assert all(name in str(error.value) for name in ("square", "stripe", "circle"))


def test_a_score_under_the_detectors_own_threshold_is_explained(fake, coco, tmp_path):
    said = []
    picture = [Path(coco[1]) / "3.png"]
    predict("x.pt", picture, results=tmp_path / "r.json", score=0.001, say=said.append)
    assert "--score 0.001: the detector itself leaves out scores of 0.05 and less" in said[0]
    assert "SCORE_THRESH_TEST" in said[0]


def test_images_are_upright_as_in_training(fake, tmp_path, monkeypatch):
    exif, seen = Image.Exif(), []
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(photo(40, 60)).save(tmp_path / "x.png", exif=exif)  # OpenCV turns JPEG alone
    see = library.detect
    monkeypatch.setattr(library, "detect", lambda m, a, i, s: seen.append(i) or see(m, a, i, s))
    predict("x.pt", [tmp_path / "x.png"], results=tmp_path / "r.json")
    assert np.array_equal(seen[0], np.rot90(photo(40, 60), -1))


def test_an_image_of_a_format_that_opencv_cannot_write_is_drawn_as_png(fake, tmp_path):
    Image.fromarray(photo(64, 80)).save(tmp_path / "x.pcx")
    predict("x.pt", [tmp_path], output=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.png"]


def test_what_cannot_be_read_or_written_is_named(fake, tmp_path, monkeypatch):
    video, said = film(tmp_path / "film.avi"), []
    with pytest.raises(DeployError, match="cannot be written"):
        Video(video).writer(tmp_path / "no_folder" / "film.mp4", (80, 64))
    with pytest.raises(IsADirectoryError):
        predict("x.pt", [video], results=tmp_path)
    results = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(Video, "__iter__", lambda _: iter([photo(64, 80)]))  # cut off
        predict("x.pt", [video], results=results, say=said.append)
        assert said == [f"{video}: its header counts 2 frames, but only 1 could be read."]
        patch.setattr(Video, "__iter__", lambda _: iter(()))
        with pytest.raises(DataError, match="1 of 1 inputs"):
            predict("x.pt", [video], results=results)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    Image.fromarray(photo(64, 80)).save(damaged / "good.png")
    (damaged / "torn.png").write_bytes((damaged / "good.png").read_bytes()[:60])
    (damaged / "empty.jpg").touch()
    (damaged / "notes.txt").write_text("no image")
    said.clear()
    with pytest.raises(DataError, match="2 of 3 inputs could not be read"):
        predict("x.pt", [damaged], results=results, say=said.append)
    assert "1 files are left out, because they are no images: notes.txt" in said.pop(0)
    assert [("torn.png" in x or "empty.jpg" in x) and "damaged" in x for x in said] == [True] * 2
    assert {r["image_id"] for r in json.loads(results.read_text())} == {"good.png"}


def test_a_folder_gives_all_of_its_images_and_names_what_is_left_out(fake, tmp_path):
    folder, other, said = tmp_path / "folder", tmp_path / "other", []
    for path in (folder / "a.png", other / "b.png"):
        path.parent.mkdir()
        Image.fromarray(photo(64, 80)).save(path)
    (folder / "linked").symlink_to(other)
    (other / "endless").symlink_to(folder)
    (folder / "._a.png").write_bytes(b"metadata of macOS")
    (folder / ".hidden").mkdir()
    Image.fromarray(photo(64, 80)).save(folder / ".hidden" / "a.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    film(folder / "film.avi")
    found = predict("x.pt", [folder], output=tmp_path / "out", say=said.append)
    assert found.images == 2 and (tmp_path / "out" / "linked" / "b.png").is_file()
    (line,) = said
    assert "2 files are left out, because they are no images: film.avi, gone.png" in line
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeployError, match="there is no image in this folder"):
        predict("x.pt", [tmp_path / "empty"])


@pytest.mark.parametrize("name", ["an.gif", "an.webp", "an.png", "an.tiff"])
def test_frames_that_are_not_used_are_told(fake, tmp_path, name):
    first, second = (Image.fromarray(photo(64, 80, seed)) for seed in range(2))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    said = []
    assert predict("x.pt", [tmp_path / name], say=said.append).images == 1
    assert said == [f"{tmp_path / name} has several frames or pages: only the first one is used."]


@pytest.mark.parametrize("source", ["0", "rtsp://10.0.0.1/live", "https://a.org/bus.jpg"])
def test_cameras_and_urls_are_refused_with_what_to_do(source):
    with pytest.raises(DeployError, match="Cameras and URLs are not read: save"):
        predict("x.pt", [Path(source)])


@pytest.mark.parametrize("score", [50, 1.5, -1, float("nan")])
def test_a_score_outside_0_to_1_is_refused(score, tmp_path):
    with pytest.raises(DeployError, match="give a number from 0 to 1"):
        predict("x.pt", [tmp_path], score=score)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_an_image_that_is_too_narrow_is_named_and_left_out(fake, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    said = []
    with pytest.raises(DataError, match="1 of 1 inputs"):
        predict("x.pt", [tmp_path / "thin.png"], say=said.append)
    assert "thin.png" in said[0] and "too narrow" in said[0]


@pytest.mark.parametrize("name", ["a.pgm", "a.pbm"])
def test_a_picture_for_grey_formats_is_drawn_as_png(fake, tmp_path, name):
    Image.new("1" if name == "a.pbm" else "L", (80, 64)).save(tmp_path / name)
    predict("x.pt", [tmp_path / name], output=tmp_path / "out")
    assert (tmp_path / "out" / "a.png").is_file()


def test_the_tool_ends_with_one_line_about_a_wrong_config(tmp_path, monkeypatch):
    config = tmp_path / "student.yaml"
    config.write_text("MODEL: {WEIGHT: x}")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(config), str(film(tmp_path / "x.avi"))])
    with pytest.raises(SystemExit, match="predict: .*no key MODEL.WEIGHT"):
        runpy.run_path(str(ROOT / "tools" / "predict.py"), run_name="__main__")


def test_a_users_module_is_imported_before_anything_else(tmp_path, monkeypatch, capsys):
    import argparse

    from _arguments import add_import_flag

    module = tmp_path / "own_module_of_a_test.py"
    module.write_text("LOADED = True")
    parser = argparse.ArgumentParser()
    add_import_flag(parser)
    assert parser.parse_args([]).imports == []
    args = parser.parse_args(["--import", str(module), "--import", "json"])
    assert args.imports == [str(module), "json"]
    assert sys.modules.pop("own_module_of_a_test").LOADED
    with pytest.raises(SystemExit):
        parser.parse_args(["--import", "no.such.module"])
    assert "no.such.module" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tools_export_evaluate_and_predict(coco, tmp_path, monkeypatch, capsys):
    cfg = tiny_cfg(coco)
    config, weights = tmp_path / "student.yaml", tmp_path / "model.pth"
    config.write_text(cfg.dump())
    torch.save({"model": detector(cfg).state_dict()}, weights)
    file, results = tmp_path / "student.pt", tmp_path / "results.json"

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        return capsys.readouterr().out

    out = run(
        "export.py", "--config-file", config, "--weights", weights, "--output", file, "--evaluate"
    )
    rows = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    (torch_ap,), (file_ap,) = ([float(r[-2])] for r in rows[-2:])
    assert torch_ap == file_ap

    folder = tmp_path / "photos"
    shutil.copytree(coco[1], folder)
    shutil.copytree(coco[1], folder / "more")  # each file name exists twice
    video, out = film(tmp_path / "film.avi"), tmp_path / "predictions"
    run("predict.py", file, folder, video, "--json", results, "--score", "0.1", "--output", out)
    found = json.loads(results.read_text())
    assert {f"film.avi:{i}" for i in range(2)} <= {r["image_id"] for r in found}
    assert {"3.png", "more/3.png"} <= {r["image_id"] for r in found}
    assert {r["category_id"] for r in found} == {1, 2}
    assert min(r["score"] for r in found) >= 0.1
    assert {p.name for p in out.glob("*.*")} == {*(f"{i}.png" for i in range(12)), "film.mp4"}
    assert len(list(out.glob("more/*.png"))) == 12
    assert cv2.VideoCapture(str(out / "film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_a_config_runs_on_the_device_that_is_asked_for(coco, tmp_path):
    cfg = tiny_cfg(coco)
    config, weights = tmp_path / "student.yaml", tmp_path / "model.pth"
    config.write_text(cfg.dump())
    torch.save({"model": detector(cfg).state_dict()}, weights)
    model, _ = library.open_detector(str(config), str(weights), device="meta")
    assert model.device.type == "meta"
    with pytest.raises(DeployError, match="device cuba cannot be used .*: try cpu"):
        library.open_detector(str(config), str(weights), device="cuba")


def test_a_pdf_is_refused_with_what_can_be_read(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n%%EOF\n")
    with pytest.raises(DataError, match=r"a.pdf is neither .*\.jpg.*\.mp4.*page of a PDF"):
        Video(tmp_path / "a.pdf")

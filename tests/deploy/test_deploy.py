import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_cfg, tiny_fcos_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from fgbg_kd import deploy
from fgbg_kd.utils.errors import CheckpointError

SIZES = ((72, 90), (64, 131), (33, 40))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detector(cfg) -> torch.nn.Module:
    """With predictions that differ in score, so that NMS and limits have work to do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        fcos = hasattr(model.head, "ctrness")  # its scores are lower: roots of products
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.3 if fcos else 0.1)
        torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.03)
    return model


def variant(name: str):
    cfg = tiny_fcos_cfg() if name == "FCOS" else tiny_cfg()
    if name == "BGR":
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = "BGR", [10.0, 100.0, 200.0]
    else:
        cfg.INPUT.FORMAT = "RGB"
    if name == "crowded":  # more candidates in a level, and more detections, than are let through
        cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 100
        cfg.TEST.DETECTIONS_PER_IMAGE = 20
        cfg.MODEL.RETINANET.NMS_THRESH_TEST = 0.8
    model = detector(cfg)
    return model, deploy.describe(cfg, model)


def from_function(run, about) -> deploy.ExportedDetector:
    """One without a file."""
    exported = deploy.ExportedDetector.__new__(deploy.ExportedDetector)
    exported.run, exported.about = run, about
    return exported


def assert_same(reference, other, about, sizes=SIZES):
    images = [photo(h, w, seed) for seed, (h, w) in enumerate(sizes)]
    found = deploy.agreement(reference, other, about, images)
    assert found["detections"] > 10
    assert found["partners"] == 1
    assert found["score"] < 1e-5
    assert found["pixels"] < 1e-2


@pytest.mark.parametrize("name", ("RetinaNet", "BGR", "crowded", "FCOS"))
def test_a_deployable_detects_what_the_detector_does(name):
    model, about = variant(name)
    for nms_inside in (True, False):
        about["nms_inside"] = nms_inside
        deployable = deploy.Deployable(model, nms_inside)
        run = lambda image, f=deployable: [x.numpy() for x in f(torch.tensor(image))]  # noqa: E731
        assert_same(model, from_function(run, about), about)


@pytest.mark.parametrize(
    "name, file, nms_inside",
    (
        ("RetinaNet", "a.onnx", True),
        ("RetinaNet", "a.onnx", False),
        ("crowded", "a.pt", True),
        ("FCOS", "a.onnx", True),
        ("FCOS", "a.pt", False),
    ),
)
def test_a_file_detects_what_pytorch_does_in_other_sizes_than_the_example(
    name, file, nms_inside, tmp_path
):
    if file.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    model, about = variant(name)
    path = str(tmp_path / file)
    deploy.export(model, about, path, photo(56, 64), nms_inside)
    exported = deploy.ExportedDetector(path)
    assert exported.about == {**about, "nms_inside": nms_inside}
    assert_same(model, exported, about)


def test_an_image_without_detections_gives_none(tmp_path):
    cfg = tiny_cfg()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    model = detector(cfg)
    boxes, scores, classes = deploy.Deployable(model)(torch.from_numpy(photo(40, 40)))
    assert boxes.shape == (0, 4) and scores.shape == classes.shape == (0,)


def test_suppress_keeps_classes_apart_and_boxes_beyond_the_border():
    box = [-50.0, -50.0, 10.0, 10.0]
    boxes = torch.tensor([box, box, box, [-50.0, -50.0, 9.0, 9.0]])
    scores, classes = torch.tensor([0.5, 0.9, 0.04, 0.8]), torch.tensor([0, 1, 2, 1])
    found = deploy.suppress(boxes, scores, classes, score=0.05, iou=0.5, limit=9)
    assert found[1].tolist() == pytest.approx([0.9, 0.5])
    assert found[2].tolist() == [1, 0]


@pytest.mark.parametrize("mode", ("static", "dynamic"))
def test_int8_is_smaller_and_detects_about_the_same(mode, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, about = variant("RetinaNet")
    source, output = (str(tmp_path / f"{name}.onnx") for name in ("fp32", "int8"))
    deploy.export(model, about, source, photo(64, 64))
    images = [photo(64, 64, seed) for seed in range(3)] if mode == "static" else None
    deploy.quantize(source, output, images)
    assert Path(output).stat().st_size < 0.6 * Path(source).stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]
    quantized = deploy.ExportedDetector(output)
    assert quantized.about["categories"] == about["categories"]
    image = photo(72, 90)
    a, b = (deploy.detect(m, about, image) for m in (model, quantized))
    assert abs(len(a) - len(b)) <= 0.2 * len(a)
    assert (a.scores[:5] - b.scores[:5]).abs().max() < 0.1


def test_int8_that_is_interrupted_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    quantization = pytest.importorskip("onnxruntime.quantization")
    pytest.importorskip("onnx")
    source, output = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    deploy.export(*variant("RetinaNet"), str(source), photo(64, 64))
    output.write_text("the last one")

    def interrupted(_, path, **options):
        Path(path).write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "quantize_dynamic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deploy.quantize(str(source), str(output))
    assert output.read_text() == "the last one"
    assert set(tmp_path.iterdir()) == {source, output}


def test_agreement_sees_a_detector_that_differs():
    model, about = variant("RetinaNet")
    other = detector(tiny_cfg())
    other.input_format = "BGR"
    found = deploy.agreement(model, other, about, [photo(72, 90)])
    assert found["partners"] < 0.99 or found["score"] > 1e-3


def test_categories_are_those_of_the_data_with_their_ids(coco, tmp_path):
    content = json.loads(Path(coco[0]).read_text())
    content["categories"] = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON = ("own",), str(path)
    model, _ = variant("RetinaNet")
    about = deploy.describe(cfg, model)
    assert about["categories"] == [{"id": 4, "name": "four"}, {"id": 9, "name": "nine"}]
    found = Instances((40, 40))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 9.0, 9.0]]))
    found.scores, found.pred_classes = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])
    assert deploy.coco_results(found, about, 17) == [
        {"image_id": 17, "category_id": 9, "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 17, "category_id": 4, "bbox": [0, 0, 9, 9], "score": 0.25},
    ]


@pytest.mark.parametrize("content", (None, {"categories": [{"id": 9, "name": "nine"}]}))
def test_ids_that_the_data_do_not_give_are_not_made_up(content, tmp_path, caplog):
    path, model = tmp_path / "own.json", detector(tiny_cfg())
    if content:
        path.write_text(json.dumps(content))
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON = ("own",), str(path)
    with pytest.raises(
        deploy.DeployError, match="own.json is not there|1 categories for 2 classes"
    ):
        deploy.describe(cfg, model)
    with caplog.at_level("WARNING", logger="fgbg_kd"):
        about = deploy.describe(cfg, model, need_ids=False)
    assert [c["name"] for c in about["categories"]] == ["class 0", "class 1"]
    assert "ids of the classes are not known" in caplog.text


def test_a_good_file_stays_until_the_new_one_is_checked(tmp_path, monkeypatch):
    import export

    (model, about), file = variant("RetinaNet"), tmp_path / "a.pt"
    file.write_bytes(b"good")
    write = lambda m: export.export_checked(m, about, file, [photo(64, 64)], True)  # noqa: E731
    cfg = tiny_cfg()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    with pytest.raises(ValueError, match="not written: it cannot be checked.* --images"):
        write(detector(cfg))
    with monkeypatch.context() as patch:
        bad = {"detections": 9, "partners": 0.5, "score": 0.0, "pixels": 0.0}
        patch.setattr(deploy, "agreement", lambda *_: bad)
        with pytest.raises(ValueError, match="did not do what PyTorch does"):
            write(model)
    assert file.read_bytes() == b"good"
    write(model)
    assert deploy.ExportedDetector(str(file)).about["categories"] == about["categories"]
    assert list(tmp_path.iterdir()) == [file]
    file.unlink(), file.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write(model)


def test_boxes_are_in_the_pixels_of_the_image_that_is_given():
    _, about = variant("RetinaNet")
    seen = []

    def run(image):
        seen.append(image.shape)
        return [np.float32([[10, 20, 30, 40]]), np.float32([0.9]), np.int64([0])]

    exported = from_function(run, {**about, "nms_inside": True})
    found = deploy.detect(exported, about, photo(128, 160))
    assert seen == [(64, 80, 3)]
    assert found.image_size == (128, 160)
    assert found.pred_boxes.tensor.tolist() == [[20, 40, 60, 80]]


def test_files_of_another_origin_are_refused_with_the_reason(tmp_path):
    torn, other = tmp_path / "torn.pt", tmp_path / "other.pt"
    torn.write_bytes(b"no TorchScript")
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), str(other))
    for path, reason in (
        (tmp_path / "gone.onnx", "no such file"),
        (torn, "cannot be read"),
        (other, "tools/export.py"),
    ):
        with pytest.raises(deploy.DeployError, match=reason):
            deploy.ExportedDetector(str(path))
    with pytest.raises(deploy.DeployError, match="in .pt"):
        deploy.export(*variant("RetinaNet"), str(tmp_path / "a.bin"), photo(64, 64))


def test_weights_that_do_not_fill_the_detector_are_not_deployed(teacher_files, tmp_path):
    config = tmp_path / "student.yaml"
    config.write_text(tiny_cfg().dump())
    with pytest.raises(CheckpointError, match="is not a checkpoint of"):
        deploy.load_for_deployment(str(config), teacher_files[1])


def test_predict_never_writes_over_what_it_reads(tmp_path):
    picture, film = tmp_path / "a.png", tmp_path / "film.mp4"
    cv2.imwrite(str(picture), photo(8, 8))
    film.write_bytes(b"film")
    before = {p: p.read_bytes() for p in (picture, film)}
    tool = [sys.executable, str(ROOT / "tools" / "predict.py"), "student.pt"]
    for arguments in (
        [tmp_path, "--output", tmp_path],
        [film, "--output", tmp_path / "x" / ".."],
        [picture, "--json", picture],
    ):
        done = subprocess.run([*tool, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode != 0 and "is an input: give another" in done.stderr
    assert {p: p.read_bytes() for p in before} == before


def test_predict_gives_each_image_an_id_of_its_own(coco, tmp_path):
    import predict

    folder = tmp_path / "photos"
    shutil.copytree(coco[1], folder / "more")
    shutil.copy(f"{coco[1]}/1.png", folder)
    inputs = predict.find([folder])
    assert {Path("1.png"), Path("more/1.png")} < inputs.keys() and len(inputs) == 13
    (tmp_path / "film.avi").touch(), (tmp_path / "film.mp4").touch()
    films = predict.find([tmp_path / "film.avi", tmp_path / "film.mp4"])
    with pytest.raises(deploy.DeployError, match="written twice"):
        predict.check_not_overwritten(films, list(predict.targets(films, tmp_path / "o").values()))
    with pytest.raises(deploy.DeployError, match="would both be 1.png"):
        predict.find([folder / "1.png", folder / "more" / "1.png"])

    content = json.loads(Path(coco[0]).read_text())
    content["images"][3]["file_name"] = "more/1.png"
    (tmp_path / "coco.json").write_text(json.dumps(content))
    ids = predict.ids_in(tmp_path / "coco.json", dict.fromkeys([Path("1.png"), Path("more/1.png")]))
    assert ids == {Path("1.png"): 1, Path("more/1.png"): 3}
    with pytest.raises(deploy.DeployError, match="no image with the file_name more/2.png"):
        predict.ids_in(tmp_path / "coco.json", {Path("more/2.png"): None})


def test_predict_says_what_it_cannot_read_or_write(tmp_path, monkeypatch, capsys):
    import predict

    film, config = tmp_path / "film.avi", tmp_path / "student.yaml"
    about = {"min_size": 64, "max_size": 80, "categories": [{"id": 1, "name": "one"}]}
    nothing = Instances((64, 80), pred_boxes=Boxes(torch.zeros(0, 4)))
    nothing.scores, nothing.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    model = lambda _: [{"instances": nothing}]  # noqa: E731
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    for seed in range(2):
        writer.write(photo(64, 80, seed))
    writer.release()
    with pytest.raises(deploy.DeployError, match="cannot be written"):
        predict.Video(film).writer(tmp_path / "no_folder" / "film.mp4", (80, 64))
    with monkeypatch.context() as patch:
        patch.setattr(deploy, "open_detector", lambda *_, **__: (model, about))
        patch.setattr(sys, "argv", ["predict.py", "x.pt", str(film), "--json", str(tmp_path)])
        with pytest.raises(IsADirectoryError):
            predict.main()
        sys.argv[-1] = str(tmp_path / "results.json")
        patch.setattr(predict.Video, "__iter__", lambda _: iter([photo(64, 80)]))  # cut off
        predict.main()
        assert f"{film}: only 1 of the 2 frames" in capsys.readouterr().err
        patch.setattr(predict.Video, "__iter__", lambda _: iter(()))
        with pytest.raises(predict.Unreadable, match="1 of 1 inputs"):
            predict.main()
    config.write_text("MODEL: {WEIGHT: x}")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(config), str(film)])
    with pytest.raises(SystemExit, match="predict: .*no key MODEL.WEIGHT"):
        runpy.run_path(predict.__file__, run_name="__main__")


def test_the_tools_export_evaluate_and_predict(coco, tmp_path):
    cfg = tiny_cfg(coco)
    model = detector(cfg)
    config, weights = tmp_path / "student.yaml", tmp_path / "model.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    file, results = tmp_path / "student.pt", tmp_path / "results.json"

    def run(tool, *arguments):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    out = run(
        "export.py", "--config-file", config, "--weights", weights, "--output", file, "--evaluate"
    )
    rows = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    (torch_ap,), (file_ap,) = ([float(r[-2])] for r in rows[-2:])
    assert torch_ap == file_ap

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "torn.png").write_bytes((Path(coco[1]) / "0.png").read_bytes()[:60])
    (damaged / "empty.jpg").touch()
    (damaged / "notes.txt").write_text("no image")
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), str(file), str(damaged)]
    done = subprocess.run(
        [*command, f"{coco[1]}/1.png", "--json", str(results), "--score", "0.1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "2 of 3 inputs could not be read" in done.stderr
    assert all(f"{x} is a damaged image" in done.stderr for x in ("torn.png", "empty.jpg"))
    assert {r["image_id"] for r in json.loads(results.read_text())} == {"1.png"}

    folder = tmp_path / "photos"
    shutil.copytree(coco[1], folder)
    shutil.copytree(coco[1], folder / "more")  # names that are there twice

    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    for seed in range(2):
        writer.write(photo(64, 80, seed))
    writer.release()
    out = tmp_path / "predictions"
    run("predict.py", file, folder, film, "--json", results, "--score", "0.1", "--output", out)
    found = json.loads(results.read_text())
    assert {f"film.avi:{i}" for i in range(2)} <= {r["image_id"] for r in found}
    assert {"3.png", "more/3.png"} <= {r["image_id"] for r in found}
    assert {r["category_id"] for r in found} == {1, 2}
    assert min(r["score"] for r in found) >= 0.1
    assert {p.name for p in out.glob("*.*")} == {*(f"{i}.png" for i in range(12)), "film.mp4"}
    assert len(list(out.glob("more/*.png"))) == 12
    assert cv2.VideoCapture(str(out / "film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2

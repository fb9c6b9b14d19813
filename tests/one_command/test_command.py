"""From a teacher's files to a fast detector, in one call."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import detector, faster_rcnn_cfg, save_teacher, tiny_cfg, weights, write_coco
from detectron2.modeling import build_model
from tqdm import tqdm

import fgbg_kd
from fgbg_kd.deploy import open_detector
from fgbg_kd.detectors.load import build_detector
from fgbg_kd.engine import read_config
from fgbg_kd.one_command import command, measure, outcome, plan, students, training
from fgbg_kd.one_command.backbone import backbone_settings
from fgbg_kd.one_command.choose import Wish
from fgbg_kd.one_command.teacher_facts import check_class_order, facts_of
from fgbg_kd.one_command.training import BarRunner, shown_values, teacher_ap
from fgbg_kd.teacher import Teacher, build_teacher
from fgbg_kd.utils.errors import CheckpointError, ConfigError, DataError, RunError, TeacherError
from fgbg_kd.utils.files import sha256_of
from fgbg_kd.utils.packages import installed


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """Two candidates and few runs, so that a table takes a second."""
    two = (students.Candidate("test_resnet", 32, 1), students.Candidate("test_resnet", 64, 1))
    monkeypatch.setattr(students, "CANDIDATES", two)
    monkeypatch.setattr(measure, "_RUNS", 1)


@pytest.fixture
def without_onnx(monkeypatch):
    """The table has PyTorch only. student.onnx is written all the same."""
    monkeypatch.setattr(measure, "has_onnx", lambda: False)


@pytest.fixture
def arguments(teacher_files, coco, tmp_path):
    """The smallest call that trains."""
    return {
        "teacher": teacher_files,
        "train": coco,
        "test": coco,
        "parameters": 0.5,
        "iterations": 20,
        "backbone_weights": "random",
        "output": tmp_path / "out",
        "say": lambda text: None,
    }


@pytest.mark.slow
def test_one_call_goes_from_a_teacher_to_a_file_that_predicts(
    arguments, without_onnx, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    real, ran = BarRunner.run, []

    def run(self, name, config, *rest):  # the plain student is the same run with another config
        ran.append((name, config.name))
        if name == "plain":
            rest[0].mkdir(exist_ok=True)
            untrained = build_detector(read_config(str(config))).state_dict()
            torch.save({"model": untrained}, rest[0] / "model_final.pth")
            return {"AP": 12.345, "AP50": 20.0}
        return real(self, name, config, *rest)

    monkeypatch.setattr(BarRunner, "run", run)

    def sure_of_nothing(cfg):  # so that a student of 20 iterations has detections
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST, cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 0.0, 10

    said, output = [], tmp_path / "out"
    teacher = save_teacher(tmp_path, edit=sure_of_nothing)
    call = arguments | {"teacher": teacher, "compare": True, "say": said.append}
    done = fgbg_kd.distill(**call)
    assert done.taken == "test_resnet, FPN 32, head 1"
    assert [row["name"] for row in done.rows] == ["teacher", "plain", "distilled"]
    assert ran == [("distilled", "distilled.yaml"), ("plain", "student.yaml")]
    assert done.rows[1]["AP"] == pytest.approx(12.345, abs=0.01)
    for row in done.rows:
        assert 0 <= row["AP"] <= row["AP50"] <= 100
        assert min(row["parameters_m"], row["gflops"], row["ms"]) > 0
    assert done.report.is_file() and done.weights.is_file()
    panels = 4  # ground truth, teacher, plain, distilled
    assert cv2.imread(str(done.picture)).shape[1] == panels * (320 + 4)
    _, about = open_detector(str(done.onnx))
    assert [c["name"] for c in about["categories"]] == ["square", "stripe"]
    assert "tools/predict.py" in done.predict and str(done.onnx) in done.predict
    for name, role in (("student", "RetinaNet"), ("distilled", "FgBgDistiller")):
        cfg = read_config(str(output / f"{name}.yaml"))
        assert cfg.MODEL.META_ARCHITECTURE == role and cfg.SOLVER.MAX_ITER == 20
    text = "\n".join(map(str, said))
    assert "MODEL.TIMM.NAME test_resnet: the largest candidate that meets --parameters 0.5" in text
    assert "random weights" in text and "| distilled" in text
    if installed("openvino", "nncf"):
        plain, distilled = done.rows[1:]
        assert min(distilled["openvino_ms"], distilled["int8_ms"]) > 0
        assert 0 <= distilled["int8_AP"] <= 100 and plain["int8_AP"] is None
        (_, about), (_, about8) = map(open_detector, map(str, (done.openvino, done.int8)))
        assert about == about8 and about["nms_inside"]
        assert done.openvino.with_suffix(".bin").stat().st_size < 0.6 * done.onnx.stat().st_size
    else:
        assert done.int8 is None and "pip install -e '.[openvino]'" in text

    before = weights(output / "distilled")
    again = fgbg_kd.distill(**call)  # nothing is trained again
    assert [row["AP"] for row in again.rows] == [row["AP"] for row in done.rows]
    after = weights(output / "distilled")
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    with pytest.raises(RunError, match="a training of another command .*iterations was 20, is 30"):
        fgbg_kd.distill(**call | {"iterations": 30})


def test_a_dry_run_writes_only_the_table(arguments, without_onnx, tmp_path):
    said = []
    changes = {"dry_run": True, "test": (), "say": said.append}
    done = fgbg_kd.distill(**arguments | changes)
    assert done.taken == "test_resnet, FPN 32, head 1" and done.rows == []
    assert [p.name for p in tmp_path.iterdir()] == ["measured_students.json"]
    assert "2 of 12 training images were split off" in done.test_set
    assert "--parameters 0.5 takes test_resnet, FPN 32, head 1." in said
    fgbg_kd.distill(**arguments | changes | {"parameters": None})
    assert any("were measured before" in x for x in said) and "Give --speedup" in said[-2]


def test_the_configs_are_written_before_anything_is_trained(arguments, without_onnx, tmp_path):
    said = []
    done = fgbg_kd.distill(**arguments | {"configs_only": True, "say": said.append})
    assert done.config == tmp_path / "out" / "student.yaml" and done.weights is None
    assert done.taken == "test_resnet, FPN 32, head 1" and done.rows == []
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"plan.json", "student.yaml", "distilled.yaml"}
    assert "The same command trains them." in said[-1]
    assert read_config(str(tmp_path / "out" / "distilled.yaml")).SOLVER.MAX_ITER == 20


@pytest.mark.slow
def test_hours_become_iterations_and_the_users_changes_stay(
    arguments, without_onnx, tmp_path, monkeypatch
):
    """Everything before the training; the training itself is left out."""
    monkeypatch.setattr("fgbg_kd.one_command.plan.seconds_per_step", lambda config, num_gpus: 0.5)
    seen = []
    monkeypatch.setattr("fgbg_kd.one_command.command._train", lambda *a: seen.append(a))
    call = arguments | {"iterations": 0, "hours": 0.1, "compare": True}
    fgbg_kd.distill(**call)
    student = tmp_path / "out" / "student.yaml"
    iterations = read_config(str(student)).SOLVER.MAX_ITER
    assert 330 <= iterations <= 341  # 0.95 * 360 s / (0.5 s + 0.5 s), less the evaluations
    student.write_text(student.read_text().replace("SEED: 0", "SEED: 5"))
    said = []
    fgbg_kd.distill(**call | {"say": said.append})
    assert "SEED: 5" in student.read_text() and "are used as they are" in said[-1]
    student.unlink()
    fgbg_kd.distill(**call)
    assert "SEED: 0" in student.read_text()  # a missing file is written again
    fgbg_kd.distill(**call | {"hours": 0.2})  # nothing is trained yet: a new plan
    assert read_config(str(student)).SOLVER.MAX_ITER > 660 and len(seen) == 4


def test_other_labels_another_device_or_other_gpus_need_another_plan(arguments, tmp_path):
    output, labels = arguments["output"], tmp_path / "labels.json"
    text = open(arguments["train"][0]).read()
    labels.write_text(text)
    train = [str(labels), arguments["train"][1]]
    teacher, test = (list(arguments[k]) for k in ("teacher", "test"))
    asked = command._Asked(teacher, train, test, [], [], Wish(), "resnet18", 0, 0.0, "", "", 1)

    def known(asked=asked):
        return command._known_plan(output, asked.request())

    output.mkdir()
    names = ("student", "distilled")
    for name in names:
        (output / f"{name}.yaml").write_text("")
    configs = {f"{name}.yaml": sha256_of(output / f"{name}.yaml") for name in names}
    content = {"request": asked.request(), "configs": configs, "taken": "x"}
    (output / "plan.json").write_text(json.dumps(content))
    assert known() == {"taken": "x"} and known(asked._replace(device="cpu")) == {}
    assert known(asked._replace(num_gpus=2)) == {}  # another batch
    assert known(asked._replace(compare=True)) == {"taken": "x"}  # the same plan
    assert known(asked._replace(compare=True, hours=1.0)) == {}  # half as long
    (tmp_path / "photos").mkdir()
    with_photos = asked._replace(unlabeled=[str(tmp_path / "photos")])
    (output / "plan.json").write_text(json.dumps(content | {"request": with_photos.request()}))
    assert known(with_photos) == {"taken": "x"}
    (tmp_path / "photos" / "new.jpg").write_text("")
    assert known(with_photos) == {}
    (output / "plan.json").write_text(json.dumps(content))
    labels.write_text(text.replace('"category_id": 1', '"category_id": 2', 1))
    assert known() == {}
    (output / "student.yaml").write_text("SEED: 7")
    with pytest.raises(RunError, match="student.yaml was edited, and this command would"):
        known()
    (output / "distilled").mkdir()
    (output / "distilled" / "metrics.json").write_text("")
    with pytest.raises(RunError, match="a training of another command .data was "):
        known()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_else(device, arguments):
    with pytest.raises(ConfigError, match=f"--device {device} cannot be used here"):
        fgbg_kd.distill(**arguments | {"device": device, "train": ["gone.json", "gone"]})


def test_photos_without_labels_stand_in_the_config_that_distils_only(
    arguments, without_onnx, tmp_path, monkeypatch
):
    monkeypatch.setattr("fgbg_kd.one_command.command._train", lambda *a: None)
    _, photos = write_coco(tmp_path / "photos", 5, seed=4)
    said = []
    fgbg_kd.distill(**arguments | {"unlabeled": photos, "say": said.append})
    assert "5 photos without labels" in said
    text = (tmp_path / "out" / "distilled.yaml").read_text()
    assert "# photos without labels; MODEL.KD.UNLABELED says how they are used" in text
    assert read_config(str(tmp_path / "out" / "distilled.yaml")).DATASETS.UNLABELED == (photos,)
    assert read_config(str(tmp_path / "out" / "student.yaml")).DATASETS.UNLABELED == ()
    monkeypatch.setattr(measure, "measure", None)  # would raise if it were called
    for wrong, message in (("gone", "no such folder"), (str(tmp_path / "out"), "has no photos")):
        changes = {"unlabeled": [wrong], "output": tmp_path / "other"}
        with pytest.raises((ConfigError, DataError), match=message):
            fgbg_kd.distill(**arguments | changes)


def test_labelled_images_are_no_photos_without_labels_and_gpus_share_the_batch(
    arguments, without_onnx, tmp_path, monkeypatch, coco
):
    monkeypatch.setattr("fgbg_kd.one_command.command.check_gpus", lambda number: None)
    _, photos = write_coco(tmp_path / "photos", 5, seed=4)
    shutil.copy(f"{coco[1]}/3.png", f"{photos}/labelled.png")
    real, calls = plan.find_photos, []
    monkeypatch.setattr(plan, "find_photos", lambda *a: calls.append(a) or real(*a))
    said = []
    changes = {"unlabeled": photos, "num_gpus": 3, "configs_only": True, "say": said.append}
    fgbg_kd.distill(**arguments | changes)
    assert "5 photos without labels" in said and len(calls) == 1
    assert read_config(str(tmp_path / "out" / "student.yaml")).SOLVER.IMS_PER_BATCH == 6


@pytest.mark.parametrize("classes", [2, 80])
@pytest.mark.slow
def test_a_two_stage_teacher_has_an_ap_only_for_the_classes_of_the_data(
    classes, arguments, without_onnx, tmp_path, monkeypatch
):
    cfg, said = faster_rcnn_cfg(), []
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    (tmp_path / "rcnn.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "rcnn.pth")
    monkeypatch.setattr("fgbg_kd.one_command.command._train", lambda *a: None)
    files = str(tmp_path / "rcnn.yaml"), str(tmp_path / "rcnn.pth")
    fgbg_kd.distill(**arguments | {"teacher": files})
    found = teacher_ap(tmp_path / "out" / "distilled.yaml", tmp_path / "out", said.append)
    assert found.keys() == ({"AP", "AP50"} if classes == 2 else set())
    assert ("its 80 classes are not the 2 of the data" in said[-1]) == (classes == 80)
    assert "names of its classes are not known" in said[0] and "--classes" in said[0]


@pytest.mark.slow
def test_a_two_stage_teacher_with_as_many_other_classes_has_no_ap(
    arguments, coco, without_onnx, tmp_path, monkeypatch
):
    content = json.loads(open(coco[0]).read())
    content["categories"][0]["name"] = "ring"
    (tmp_path / "rings.json").write_text(json.dumps(content))
    cfg, said = faster_rcnn_cfg((str(tmp_path / "rings.json"), coco[1]), "rings"), []
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    (tmp_path / "rcnn.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "rcnn.pth")
    monkeypatch.setattr("fgbg_kd.one_command.command._train", lambda *a: None)
    files = str(tmp_path / "rcnn.yaml"), str(tmp_path / "rcnn.pth")
    fgbg_kd.distill(**arguments | {"teacher": files})
    assert teacher_ap(tmp_path / "out" / "distilled.yaml", tmp_path / "out", said.append) == {}
    assert "its 2 classes are not the 2 of the data" in said[-1]


def test_the_teacher_is_timed_with_its_own_weights(arguments, tmp_path, monkeypatch):
    """From random weights, an SSD has most of its boxes in NMS, and takes twice as long."""
    seen = {}

    def measured(cache, about, builders, *_):
        seen.update(about, teacher=builders["teacher"]())
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        fgbg_kd.distill(**arguments)
    file = arguments["teacher"][1]
    own = torch.load(file)["model"]["head.cls_score.weight"]
    assert torch.equal(seen["teacher"].head.cls_score.weight, own)
    assert seen["weights"] == sha256_of(file)


@pytest.mark.slow
def test_each_detector_is_timed_at_its_own_test_size(
    arguments, without_onnx, tmp_path, monkeypatch
):
    """The teacher's is 96 pixels, and that of the user's student is 48."""

    def larger(cfg):
        cfg.INPUT.MIN_SIZE_TEST = 96

    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 48
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    seen = []

    def measured(detectors, images, *rest, **options):
        seen.append([min(images[name].shape[:2]) for name in detectors])
        return [{"name": name, "ms": 1.0, "parameters_m": 1.0, "gflops": 1.0} for name in detectors]

    def trained(self, name, config, folder, *rest):
        return {"AP": 1.0, "AP50": 2.0}

    for module in (measure, outcome):
        monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(BarRunner, "run", trained)
    for name in ("onnx", "openvino", "picture", "page"):
        monkeypatch.setattr(command, f"write_{name}", lambda *a, **k: None)
    teacher = save_teacher(tmp_path, edit=larger)
    student = {"student": str(tmp_path / "mine.yaml"), "parameters": None}
    fgbg_kd.distill(**arguments | student | {"teacher": teacher})
    assert seen == [[96, 48], [96, 48]]  # the candidates' table, and the table at the end


def test_the_ap_of_the_teacher_is_of_its_test_size_and_of_its_present_weights(
    arguments, tmp_path, monkeypatch
):
    def larger(cfg):
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 200

    teacher, output, seen = save_teacher(tmp_path, edit=larger), tmp_path / "out", []
    cfg = tiny_cfg(arguments["test"], "own")
    output.mkdir()
    (output / "student.yaml").write_text(cfg.dump())
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher
    (output / "distilled.yaml").write_text(cfg.dump())

    def evaluated(cfg, model):
        seen.append((cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))
        return {"bbox": {"AP": float(len(seen)), "AP50": 50.0}}

    monkeypatch.setattr(training.FgBgTrainer, "test", evaluated)

    def get():
        return teacher_ap(output / "distilled.yaml", output / "teacher", print)["AP"]

    (output / "teacher").mkdir()
    assert get() == get() == 1.0 and seen == [(96, 200)]
    save_teacher(tmp_path, seed=2, edit=larger)  # trained again, with the same path
    assert get() == 2.0


def test_the_picture_shows_each_detector_at_its_own_test_size(arguments, tmp_path, monkeypatch):
    def larger(cfg):
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT = 96, "RGB"

    cfg = tiny_cfg(arguments["test"], "shown")
    (tmp_path / "student.yaml").write_text(cfg.dump())
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = save_teacher(tmp_path, edit=larger)
    (tmp_path / "distilled.yaml").write_text(cfg.dump())
    seen = set()

    def drawn(cfg, record, models, score):
        for name, (own, _) in models.items():
            seen.add((name, own.INPUT.MIN_SIZE_TEST, own.INPUT.FORMAT))
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(outcome, "load_detector", lambda *a: None)
    monkeypatch.setattr(outcome, "draw_side_by_side", drawn)
    outcome.write_picture(tmp_path, ["distilled"], with_teacher=True)
    assert seen == {("teacher", 96, "RGB"), ("distilled", 64, "BGR")}


@pytest.mark.parametrize("workers", [0, 4])
def test_the_time_of_a_step_holds_the_loading_of_images(workers, monkeypatch):
    """A loader gives each process's prefetched batches at once. Later, every fourth step waits."""
    clock = [0.0]

    class Trainer:
        def __init__(self, cfg):
            pass

        def run_step(self):
            at_once = self.iter <= 2 + 2 * workers
            clock[0] += 0.5 + (2.0 if self.iter % 4 == 0 and not at_once else 0.0)

    cfg = SimpleNamespace(
        DATALOADER=SimpleNamespace(NUM_WORKERS=workers), SOLVER=SimpleNamespace(IMS_PER_BATCH=8)
    )
    monkeypatch.setattr(training, "FgBgTrainer", Trainer)
    read = []
    monkeypatch.setattr(training, "read_config", lambda *a: cfg)
    monkeypatch.setattr(training, "load_config", lambda file, opts: read.append(opts) or cfg)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    waits = {0: 2, 4: 2}[workers]  # in steps 4 and 8 of 3 to 8; in 12 and 16 of 11 to 18
    steps = {0: 6, 4: 8}[workers]
    step = training.seconds_per_step(Path("a.yaml"), num_gpus=2)
    assert step == pytest.approx(0.5 + 2 * waits / steps)
    assert read[0][-2:] == ["SOLVER.IMS_PER_BATCH", "4"]  # of one GPU


@pytest.mark.slow
def test_a_step_is_timed_with_the_configs_that_are_trained(
    arguments, without_onnx, monkeypatch, capfd
):
    from fgbg_kd.one_command.training import seconds_per_step

    monkeypatch.setattr("fgbg_kd.one_command.command._train", lambda *a: None)
    fgbg_kd.distill(**arguments)
    assert 0 < seconds_per_step(arguments["output"] / "distilled.yaml") < 60
    out = capfd.readouterr().out
    assert "Conv2d" not in out and "d2." not in out


def test_a_config_of_the_user_is_the_student_with_its_own_schedule(
    arguments, without_onnx, tmp_path, monkeypatch
):
    monkeypatch.setattr("fgbg_kd.one_command.command._train", lambda *a: None)
    cfg = tiny_cfg()
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 24, 77, ()
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    call = {"student": str(tmp_path / "mine.yaml"), "parameters": None, "iterations": 0}
    fgbg_kd.distill(**arguments | call)
    found = read_config(str(tmp_path / "out" / "distilled.yaml"))
    assert found.MODEL.FPN.OUT_CHANNELS == 24 and found.SOLVER.MAX_ITER == 77
    assert found.MODEL.KD.STUDENT == "RetinaNet" and found.DATASETS.TRAIN_JSON


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "META_ARCHITECTURE",
            "FgBgDistiller",
            "mine.yaml is a config that distils .*student alone",
        ),
        ("IMS_PER_BATCH", 7, "IMS_PER_BATCH is 7, which cannot be divided equally among 2 GPUs"),
    ],
)
def test_a_config_of_the_user_that_cannot_be_trained_is_refused_before_the_measurement(
    key, value, message, arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "measure", None)  # would raise if it were called
    monkeypatch.setattr("fgbg_kd.one_command.command.check_gpus", lambda number: None)
    cfg = tiny_cfg()
    (cfg.MODEL if key in cfg.MODEL else cfg.SOLVER)[key] = value
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    call = {"student": str(tmp_path / "mine.yaml"), "parameters": None, "num_gpus": 2}
    with pytest.raises(ConfigError, match=message):
        fgbg_kd.distill(**arguments | call)


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"parameters": None}, ConfigError, "how fast the student must be"),
        ({"parameters": 0.1}, ConfigError, "No candidate has at most 0.1 M parameters: the small"),
        ({"latency": 1e-6}, ConfigError, "No candidate meets .*: the fastest, test_resnet, FPN"),
        ({"hours": 1.0}, ConfigError, "--iterations and --hours both set the length"),
        ({"iterations": -1}, ConfigError, "--iterations is -1: give a number over 0"),
        ({"student": "gone.yaml"}, ConfigError, "--student gone.yaml: there is no such file"),
        ({"student": "resnet1x"}, ConfigError, "--student resnet1x: neither a YAML config here"),
        ({"backbone_weights": "gone.pth"}, ConfigError, "gone.pth: there is no such file"),
        ({"num_gpus": 0}, ConfigError, "--num-gpus is 0: give 1 or more. On a CPU, give 1"),
        ({"num_gpus": 99}, ConfigError, "--num-gpus is 99, but PyTorch finds"),
        ({"teacher": "gone.yaml"}, TeacherError, "gone.yaml is neither a file here nor a name"),
        ({"train": "gone.json"}, DataError, "there is no gone.json"),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(
    changes, kind, message, arguments, without_onnx, tmp_path
):
    said = []
    with pytest.raises(kind, match=message):
        fgbg_kd.distill(**arguments | changes | {"say": said.append})
    assert any("GFLOPs" in x for x in said) or "No candidate" not in message
    assert not (tmp_path / "out" / "plan.json").exists()


def test_other_classes_than_the_teachers_are_refused_before_the_measurement(
    arguments, coco, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "measure", None)  # would raise if it were called
    content = json.loads(open(coco[0]).read())
    content["categories"].append({"id": 3, "name": "ring"})
    (tmp_path / "three.json").write_text(json.dumps(content))
    three = str(tmp_path / "three.json"), coco[1]
    with pytest.raises(DataError, match="different classes"):
        fgbg_kd.distill(**arguments | {"train": three})
    with pytest.raises(TeacherError, match="3 classes, but the teacher has 2"):
        fgbg_kd.distill(**arguments | {"train": three, "test": three})


def test_class_names_of_the_teacher_can_be_given(arguments, without_onnx, tmp_path):
    call = arguments | {"configs_only": True}
    with pytest.raises(TeacherError, match=r"(?s)does not know .'square'.*--classes of distill.py"):
        fgbg_kd.distill(**call, classes=["Square", "stripe"])
    fgbg_kd.distill(**call, classes=["stripe", "square"])
    made = read_config(str(tmp_path / "out" / "distilled.yaml"))
    assert list(made.MODEL.KD.TEACHER.CLASSES) == ["stripe", "square"]


def test_voc_data_need_the_names_of_the_teachers_classes(coco, tmp_path):
    """Their classes have no order, so class i of the student would be another one."""
    (tmp_path / "voc" / "Annotations").mkdir(parents=True)
    teacher = Teacher(detector())
    voc, names = [str(tmp_path / "voc")], ["square", "stripe"]
    with pytest.raises(ConfigError, match="--classes, .* names in the data are square, stripe"):
        check_class_order(teacher, voc, names)
    check_class_order(teacher, list(coco), names)
    check_class_order(teacher, voc, names[:1])
    check_class_order(Teacher(detector(), class_names=names), voc, names)


def test_a_users_module_is_imported_before_anything_is_read(arguments, tmp_path):
    (tmp_path / "names_of_mine.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(ConfigError, match="imported"):
        fgbg_kd.distill(**arguments | {"imports": [str(tmp_path / "names_of_mine.py")]})


def test_configs_of_somebody_else_are_not_overwritten(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "student.yaml").write_text("MODEL: {}\n")
    with pytest.raises(RunError, match="student.yaml was not written by this command"):
        fgbg_kd.distill(**arguments)


def test_weights_of_the_backbone_come_from_a_file_from_timm_or_from_nowhere(
    teacher_files, tmp_path, monkeypatch
):
    facts, said = facts_of(teacher_files[0], build_teacher(*teacher_files)), []
    file = tmp_path / "backbone.pth"
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state, tmp_path / "given.pth")

    def get(given):
        settings, pretrained = backbone_settings("test_resnet", given, facts, file, said.append)
        return {s.key: s.value for s in settings}, pretrained

    settings, pretrained = get(str(tmp_path / "given.pth"))
    assert pretrained and settings["INPUT.FORMAT"] == "RGB"
    assert settings["MODEL.TIMM.WEIGHTS"] == str(tmp_path / "given.pth")
    create = timm.create_model

    def download(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network\nand more")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", download)
    settings, pretrained = get("")
    assert not pretrained and settings["MODEL.TIMM.WEIGHTS"] == ""
    assert settings["MODEL.PIXEL_STD"] == facts.std and not file.exists()
    assert said[-2] == "timm's weights of test_resnet cannot be downloaded (no network)."
    assert "random weights, so it trains longer" in said[-1]
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=0, **o: create(name, **o))
    settings, pretrained = get("")
    assert pretrained and settings["MODEL.TIMM.WEIGHTS"] == str(file) and file.is_file()
    torch.save({"a": torch.zeros(1)}, tmp_path / "given.pth")
    with pytest.raises(CheckpointError, match="lacks"):
        get(str(tmp_path / "given.pth"))


def test_the_bar_shows_loss_gate_and_the_last_ap():
    rows = [{"kd/fg_gate": 0.5, "bbox/AP": 10.0}, {"kd/fg_gate": 0.75}]
    losses = {"total_loss": 1.5, "loss_cls": 0.5, "loss_box_reg": 0.25}
    assert shown_values(losses, rows) == "loss 1.5, gate 0.75, AP 10.00"
    losses |= {"loss_kd_fg": 0.7, "loss_kd_bg": 0.05}
    assert shown_values(losses, []) == "loss 1.5 (detector 0.75, kd_fg 0.7, kd_bg 0.05)"


def test_the_bar_reads_detectron2s_line(tmp_path, monkeypatch):
    line = "eta: 0:00:01  iter: 19  total_loss: 1.5  loss_cls: 0.75  loss_kd_fg: 0.25  time: 0.1"
    runner = BarRunner()
    with tqdm(total=100, file=open(os.devnull, "w"), disable=False) as runner._bar:
        runner._metrics = tmp_path / "metrics.json"
        runner._show("distilled", line)
        assert runner._bar.n == 20
        assert runner._bar.postfix == "loss 1.5 (detector 0.75, kd_fg 0.25)"
        runner._show("distilled", "Inference done 5/12. ...")
        assert runner._bar.postfix == "evaluating, image 5/12"


def test_without_the_repository_the_training_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("fgbg_kd.one_command.training._TRAIN_NET", tmp_path / "train_net.py")
    with pytest.raises(RunError, match="install this package from its repository"):
        BarRunner()


def test_the_tool_passes_its_arguments_on(monkeypatch, capsys):
    import distill

    seen = {}
    monkeypatch.setattr(distill, "distill", lambda **arguments: seen.update(arguments))
    words = ["--teacher", "t.yaml", "t.pth", "--train", "a.json", "a", "--speedup", "3"]
    monkeypatch.setattr(sys, "argv", ["distill.py", *words, "--compare", "--num-gpus", "2"])
    distill.main()
    assert seen["teacher"] == ["t.yaml", "t.pth"] and seen["test"] == ()
    assert (
        seen["num_gpus"] == 2 and seen["speedup"] == 3 and seen["compare"] and not seen["dry_run"]
    )
    monkeypatch.setattr(sys, "argv", ["distill.py", *words, "--test", "a", "b", "c"])
    with pytest.raises(SystemExit):
        distill.main()
    assert "--test: give one or two values" in capsys.readouterr().err

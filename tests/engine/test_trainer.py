"""Training through Detectron2's DefaultTrainer: parity, checkpoints, resume, data, checks."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CLASSES,
    FGBG_OFF,
    detector,
    distiller,
    faster_rcnn,
    losses,
    make_batch,
    make_trainer,
    save_teacher,
    tiny_cfg,
    train,
    weights,
)
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer, load_config
from fgbg_kd.engine.hooks import TeacherCheck
from fgbg_kd.utils.errors import CheckpointError, ConfigError, TeacherError


class StockOnOurData(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return FgBgTrainer.build_train_loader(cfg)


@pytest.mark.parametrize("stock, flip", [(DefaultTrainer, "none"), (StockOnOurData, "horizontal")])
@pytest.mark.parametrize("off", ["both weights 0", "no teacher"])
@pytest.mark.slow
def test_off_is_bit_for_bit_the_plain_detector_of_stock_detectron2(
    coco, distil_cfg, tmp_path, off, stock, flip
):
    """Only augmentation differs: unlike in stock Detectron2, it depends on the data position."""
    if off == "no teacher":
        distil_cfg.MODEL.KD.TEACHER.CONFIG = distil_cfg.MODEL.KD.TEACHER.WEIGHTS = ""
    else:
        distil_cfg.MODEL.KD.FGBG.update({k.upper(): v for k, v in FGBG_OFF.items()})
    plain_cfg = tiny_cfg(coco)
    distil_cfg.INPUT.RANDOM_FLIP = plain_cfg.INPUT.RANDOM_FLIP = flip
    # In each process, TorchScript runs the first calls of fvcore's focal loss unoptimised, with
    # other rounding. This training makes these calls, so that both runs below use the same code.
    train(DefaultTrainer, plain_cfg, tmp_path / "warm", 2)
    train(FgBgTrainer, distil_cfg, tmp_path / "off", 20)
    train(stock, plain_cfg, tmp_path / "stock", 20)
    ours, theirs = weights(tmp_path / "off"), weights(tmp_path / "stock")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert losses(tmp_path / "off") == losses(tmp_path / "stock") != []


def test_distilling_starts_from_the_weights_and_sees_the_data_of_plain_training(
    coco, distil_cfg, tmp_path
):
    distilled = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 5)
    plain = make_trainer(FgBgTrainer, tiny_cfg(coco), tmp_path / "plain", 5)
    start = distilled.model.student.state_dict()
    assert all(torch.equal(start[k], v) for k, v in plain.model.state_dict().items())
    seen = []
    for trainer in (distilled, plain):
        seed_all_rng(1)
        loader = iter(trainer.data_loader)
        seen.append([(x["image_id"], x["image"].sum().item()) for x in next(loader)])
    assert seen[0] == seen[1]


def test_the_checkpoint_is_the_plain_students(coco, distil_cfg, tmp_path):
    trainer = train(FgBgTrainer, distil_cfg, tmp_path / "kd", 3)
    path = tmp_path / "kd" / "model_final.pth"
    saved = torch.load(path, weights_only=True)
    plain = build_model(tiny_cfg()).eval()
    assert saved["model"].keys() == plain.state_dict().keys()
    assert saved["method"].keys() == trainer.model.method.state_dict().keys() != set()
    DetectionCheckpointer(plain).load(str(path))
    student = trainer.model.eval().student
    for model in (plain, student):
        model.test_score_thresh = 0.0
    batch = make_batch()
    with torch.no_grad():
        for a, b in zip(plain(batch), trainer.model(batch)):
            assert len(a["instances"]) > 0
            assert torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.fixture(scope="module")
def first_run(coco, teacher_files, tmp_path_factory):
    """Folder of a distilled run of one iteration."""
    cfg = tiny_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    folder = tmp_path_factory.mktemp("first") / "run"
    train(FgBgTrainer, cfg, folder, 1)
    return folder


def plain_student(cfg):
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32]), "the student: .*channels"),
        (lambda c: c.merge_from_list(["MODEL.RETINANET.NUM_CONVS", 2]), "only this run has: head"),
        (plain_student, "it was distillation, now it is plain training"),
        (lambda c: c.merge_from_list(["MODEL.KD.METHOD", "PKD"]), "METHOD was FgBg, now it is PKD"),
        (lambda c: c.merge_from_list(["SOLVER.OPTIMIZER", "AdamW"]), "another optimizer"),
    ],
    ids=["width", "depth", "plain", "method", "optimizer"],
)
@pytest.mark.slow
def test_a_resume_with_other_settings_is_refused_before_anything_is_filled(
    edit, message, first_run, distil_cfg, tmp_path
):
    shutil.copytree(first_run, tmp_path / "run")
    edit(distil_cfg)
    again = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 5)
    before = {k: v.clone() for k, v in again.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"(?s)--resume: .*{message}.*config.previous.yaml"):
        again.resume_or_load(resume=True)
    assert all(torch.equal(v, before[k]) for k, v in again.model.state_dict().items())


def test_a_plain_run_is_not_resumed_as_a_distilled_one(distil_cfg, coco, tmp_path):
    train(FgBgTrainer, tiny_cfg(coco), tmp_path / "run", 1)
    again = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match="it was plain training, now it is distillation"):
        again.resume_or_load(resume=True)


def test_every_key_that_counts_iterations_scales_with_the_number_of_processes(distil_cfg):
    distil_cfg.SOLVER.REFERENCE_WORLD_SIZE, distil_cfg.SOLVER.IMS_PER_BATCH = 4, 4
    distil_cfg.SOLVER.MAX_ITER, distil_cfg.SOLVER.STEPS = 10, (6,)
    distil_cfg.MODEL.KD.STOP_ITER, distil_cfg.MODEL.KD.WARMUP_ITERS = 8, 2
    distil_cfg.freeze()
    scaled = FgBgTrainer.auto_scale_workers(distil_cfg, 1)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.STEPS) == (40, (24,))
    assert (scaled.MODEL.KD.STOP_ITER, scaled.MODEL.KD.WARMUP_ITERS) == (32, 8)
    assert scaled.SOLVER.REFERENCE_WORLD_SIZE == 1


@pytest.mark.slow
def test_the_first_log_period_shows_losses_and_gate_shares(distil_cfg, tmp_path):
    distil_cfg.SOLVER.BASE_LR = 0.001  # the teacher is random, so a larger one can diverge
    train(FgBgTrainer, distil_cfg, tmp_path / "kd", 20)
    rows = [json.loads(x) for x in (tmp_path / "kd" / "metrics.json").read_text().splitlines()]
    row = next(r for r in rows if "total_loss" in r)
    assert {"loss_kd_fg", "loss_kd_bg", "kd/fg_gate", "kd/bg_gate", "loss_cls"} <= row.keys()


@pytest.mark.slow
def test_a_two_stage_detector_is_built_as_well():
    """Two-stage detectors are trained as teachers."""
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_other_cfg(model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    assert type(FgBgTrainer.build_model(cfg)).__name__ == "GeneralizedRCNN"


def test_adamw_if_asked_for(distil_cfg, tmp_path):
    distil_cfg.SOLVER.OPTIMIZER = "AdamW"
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 2)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    distil_cfg.SOLVER.OPTIMIZER = "Adagrad"
    with pytest.raises(ValueError, match="'Adagrad'"):
        make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 2)


@pytest.mark.slow
def test_a_teacher_under_min_ap_stops_the_run_before_the_first_step(distil_cfg, tmp_path):
    distil_cfg.MODEL.KD.TEACHER.MIN_AP = 99.0
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 5)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(TeacherError, match="MIN_AP 99"):
        trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("value", [-5.0, 101.0, float("nan")])
def test_min_ap_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match="MIN_AP is .*: AP is between 0 and 100"):
        TeacherCheck(value, lambda teacher: {})


def test_min_ap_as_a_share_gives_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        TeacherCheck(0.35, lambda teacher: {})
    assert "For a share of 0.35, set 35" in caplog.text


def test_min_ap_needs_one_set_to_measure_on(distil_cfg, tmp_path):
    distil_cfg.MODEL.KD.TEACHER.MIN_AP = 30.0
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 5)
    trainer.cfg = distil_cfg.clone()
    trainer.cfg.DATASETS.TEST = ("tiny_test", "tiny_train")
    with pytest.raises(TeacherError, match="needs one test set, but DATASETS.TEST names"):
        trainer.train()


def test_min_ap_does_not_measure_a_two_stage_teacher_whose_classes_are_not_matched():
    trainer = SimpleNamespace(model=distiller(detector(), faster_rcnn()), iter=0)
    check = TeacherCheck(30.0, lambda teacher: pytest.fail("measured"))
    check.trainer = trainer
    with pytest.raises(TeacherError, match="cannot measure a GeneralizedRCNN"):
        check.before_train()


def test_the_detections_of_several_test_sets_do_not_overwrite_each_other(coco, tmp_path):
    cfg = tiny_cfg(coco)
    cfg.OUTPUT_DIR = str(tmp_path)
    name = cfg.DATASETS.TEST[0]
    register_datasets(cfg)
    assert FgBgTrainer.build_evaluator(cfg, name)._output_dir == str(tmp_path / "inference")
    cfg.DATASETS.TEST = (name, cfg.DATASETS.TRAIN[0])
    folders = {FgBgTrainer.build_evaluator(cfg, n)._output_dir for n in cfg.DATASETS.TEST}
    assert folders == {str(tmp_path / "inference" / n) for n in cfg.DATASETS.TEST}


def test_the_teacher_is_measured_at_its_own_test_size(distil_cfg, tmp_path, monkeypatch):
    seen = []
    measure = staticmethod(lambda cfg, model: seen.append((cfg.INPUT, model)))
    monkeypatch.setattr(FgBgTrainer, "test", measure)
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 5)
    teacher = trainer.model.teacher
    assert teacher.test_size == (64, distil_cfg.INPUT.MAX_SIZE_TEST)
    teacher.test_size = 96, 200
    trainer.test_teacher(teacher)
    ((found, detector),) = seen
    assert (found.MIN_SIZE_TEST, found.MAX_SIZE_TEST) == (96, 200) and detector is teacher.detector
    assert distil_cfg.INPUT.MIN_SIZE_TEST == trainer.cfg.INPUT.MIN_SIZE_TEST == 64


@pytest.mark.slow
def test_measuring_the_teacher_does_not_change_training(distil_cfg, tmp_path):
    train(FgBgTrainer, distil_cfg, tmp_path / "a", 2)
    distil_cfg.MODEL.KD.TEACHER.MIN_AP = 30.0
    measured = []

    class Trainer(FgBgTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            measured.append(model)
            super().test(cfg, model, evaluators)  # reads all the data, finds nothing
            return {"bbox": {"AP": 40.0}}

    trainer = train(Trainer, distil_cfg, tmp_path / "b", 2)
    assert measured[0] is trainer.model.teacher.detector
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(v, b[k]) for k, v in a.items())


# --- what the student inherits ---


@pytest.mark.slow
def test_inherited_weights_come_after_model_weights_and_not_again_on_resume(distil_cfg, tmp_path):
    kd = distil_cfg.MODEL.KD
    kd.TEACHER.CONFIG, kd.TEACHER.WEIGHTS = save_teacher(tmp_path, channels=16)
    kd.INHERIT = ("fpn", "head")
    distil_cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    start = build_model(tiny_cfg()).state_dict()
    torch.save({"model": start}, distil_cfg.MODEL.WEIGHTS)
    teacher = torch.load(kd.TEACHER.WEIGHTS, weights_only=True)["model"]
    distil_cfg.SOLVER.BASE_LR = 1e-12  # training does not change the weights
    train(FgBgTrainer, distil_cfg, tmp_path / "kd", 1)
    ended = weights(tmp_path / "kd")
    for key in ("head.cls_score.weight", "backbone.fpn_output3.weight"):
        torch.testing.assert_close(ended[key], teacher[key])
    key = next(k for k in ended if k.startswith("backbone.bottom_up") and k.endswith("weight"))
    torch.testing.assert_close(ended[key], start[key])

    # The student has trained further. A resumed run must not reset it.
    last = tmp_path / "kd" / "model_final.pth"
    saved = torch.load(last, weights_only=False)
    saved["model"]["head.cls_score.weight"].fill_(0.125)
    torch.save(saved, last)
    train(FgBgTrainer, distil_cfg, tmp_path / "kd", 2, resume=True)
    value = weights(tmp_path / "kd")["head.cls_score.weight"]
    torch.testing.assert_close(value, torch.full_like(value, 0.125))


# --- the user's data ---


def test_classes_of_data_and_detector_must_agree(coco, tmp_path):
    cfg = tiny_cfg(coco)
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    with pytest.raises(ValueError, match=f"{len(CLASSES)} classes .*NUM_CLASSES {len(CLASSES)}"):
        make_trainer(FgBgTrainer, cfg, tmp_path / "run", 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"TRAIN": ("a", "b")}, "give it one name"),
        ({"TRAIN_JSON": "nowhere.json"}, "no such file"),
        ({"TRAIN_IMAGES": "nowhere"}, "no such folder"),
        ({"TRAIN": ("coco_2017_train",)}, "taken by another set"),
    ],
)
def test_data_that_is_not_there_is_named(coco, change, message):
    cfg = tiny_cfg(coco)
    for key, value in change.items():
        cfg.DATASETS[key] = value
    with pytest.raises(ValueError, match=message):
        register_datasets(cfg)


def test_a_json_without_categories_is_named(coco, tmp_path):
    cfg = tiny_cfg(coco, name="broken")
    path = tmp_path / "broken.json"
    path.write_text("{}")
    cfg.DATASETS.TRAIN_JSON = str(path)
    with pytest.raises(ValueError, match="not a COCO file"):
        register_datasets(cfg)


# --- the tool ---


def test_cpu_is_taken_where_there_is_no_cuda(tmp_path, coco):
    path = tmp_path / "c.yaml"
    cfg = tiny_cfg(coco)
    cfg.MODEL.DEVICE = "cuda"
    path.write_text(cfg.dump())
    loaded = load_config(str(path), ["SOLVER.MAX_ITER", "7"])
    assert loaded.SOLVER.MAX_ITER == 7
    assert loaded.MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")

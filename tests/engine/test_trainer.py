"""Training through Detectron2's DefaultTrainer: parity, checkpoints, resume, data, checks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, make_batch, tiny_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from fgbg_kd import TeacherError, student_config
from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer, load_config

ROOT = Path(__file__).parents[2]


def make_trainer(cls, cfg, folder, steps):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = str(folder), steps
    folder.mkdir(exist_ok=True)
    register_datasets(cfg)
    seed_all_rng(cfg.SEED)
    return cls(cfg)


def train(cls, cfg, folder, steps, resume=False):
    trainer = make_trainer(cls, cfg, folder, steps)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "loss" in k} for row in rows if "total_loss" in row]


@pytest.mark.parametrize("off", ["both weights 0", "no teacher"])
def test_off_is_bit_for_bit_the_plain_detector_of_stock_detectron2(coco, distil_cfg, tmp_path, off):
    if off == "no teacher":
        distil_cfg.MODEL.KD.TEACHER.CONFIG = ""
    else:
        distil_cfg.MODEL.KD.FG_WEIGHT = distil_cfg.MODEL.KD.BG_WEIGHT = 0.0
    # TorchScript (fvcore's focal loss) runs its first calls in a process unoptimised, and those
    # round differently: let them pass, so that both runs use the same code.
    train(DefaultTrainer, tiny_cfg(coco), tmp_path / "warm", 4)
    train(FgBgTrainer, distil_cfg, tmp_path / "off", 20)
    train(DefaultTrainer, tiny_cfg(coco), tmp_path / "stock", 20)
    ours, stock = weights(tmp_path / "off"), weights(tmp_path / "stock")
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[k], v) for k, v in stock.items())
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
    assert saved["kd"].keys() == trainer.model.kd.state_dict().keys() != set()
    DetectionCheckpointer(plain).load(str(path))
    student = trainer.model.eval().student
    for model in (plain, student):
        model.test_score_thresh = 0.0
    batch = make_batch()
    with torch.no_grad():
        for a, b in zip(plain(batch), trainer.model(batch)):
            assert len(a["instances"]) > 0
            assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_resume_goes_on_with_adapters_and_optimizer(distil_cfg, tmp_path):
    first = train(FgBgTrainer, distil_cfg, tmp_path / "kd", 3)
    distil_cfg.SOLVER.MAX_ITER = 5
    again = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 5)
    again.resume_or_load(resume=True)
    assert again.start_iter == 3
    for a, b in zip(first.model.kd.parameters(), again.model.kd.parameters()):
        assert torch.equal(a, b)
    momentum = [t.optimizer.state_dict()["state"] for t in (first, again)]
    assert momentum[0].keys() == momentum[1].keys() != set()
    for k, v in momentum[0].items():
        assert torch.equal(v["momentum_buffer"], momentum[1][k]["momentum_buffer"])
    again.train()
    assert again.iter == 5


def test_the_first_log_period_shows_losses_and_gate_shares(distil_cfg, tmp_path):
    train(FgBgTrainer, distil_cfg, tmp_path / "kd", 20)
    rows = [json.loads(x) for x in (tmp_path / "kd" / "metrics.json").read_text().splitlines()]
    row = next(r for r in rows if "total_loss" in r)
    assert {"loss_kd_fg", "loss_kd_bg", "kd/fg_gate", "kd/bg_gate", "loss_cls"} <= row.keys()


def test_adamw_if_asked_for(distil_cfg, tmp_path):
    distil_cfg.SOLVER.OPTIMIZER = "AdamW"
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 2)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    distil_cfg.SOLVER.OPTIMIZER = "Adagrad"
    with pytest.raises(ValueError, match="'Adagrad'"):
        make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 2)


def test_a_teacher_under_min_ap_stops_the_run_before_the_first_step(distil_cfg, tmp_path):
    distil_cfg.MODEL.KD.TEACHER.MIN_AP = 99.0
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 5)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(TeacherError, match="MIN_AP 99"):
        trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


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
    assert measured[0] is trainer.model.teacher
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(v, b[k]) for k, v in a.items())


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


def test_the_tool_trains_and_evaluates_a_users_own_data_without_python(coco, distil_cfg, tmp_path):
    """README's commands: data named on the command line; then the plain student is evaluated."""
    base, config = tmp_path / "student.yaml", tmp_path / "distilled.yaml"
    plain = student_config(distil_cfg)
    for path, cfg in ((base, plain), (config, distil_cfg)):
        cfg = cfg.clone()
        cfg.defrost()
        for part in ("TRAIN", "TEST"):
            cfg.DATASETS[part] = (f"my_{part.lower()}",)
            cfg.DATASETS[f"{part}_JSON"] = cfg.DATASETS[f"{part}_IMAGES"] = ""
        path.write_text(cfg.dump())
    data = []
    for part in ("TRAIN", "TEST"):
        data += [f"DATASETS.{part}_JSON", coco[0], f"DATASETS.{part}_IMAGES", coco[1]]
    run = [sys.executable, str(ROOT / "tools" / "train_net.py")]
    out = tmp_path / "run"
    opts = [*data, "OUTPUT_DIR", str(out)]
    extra = ["SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "2"]
    done = subprocess.run(
        [*run, "--config-file", str(config), *opts, *extra], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model_final.pth").is_file()
    evaluated = [*run, "--eval-only", "--config-file", str(base), *opts]
    done = subprocess.run(
        [*evaluated, "MODEL.WEIGHTS", str(out / "model_final.pth")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "copypaste: AP,AP50,AP75" in done.stdout


def test_cpu_is_taken_where_there_is_no_cuda(tmp_path, coco):
    path = tmp_path / "c.yaml"
    cfg = tiny_cfg(coco)
    cfg.MODEL.DEVICE = "cuda"
    path.write_text(cfg.dump())
    loaded = load_config(str(path), ["SOLVER.MAX_ITER", "7"])
    assert loaded.SOLVER.MAX_ITER == 7
    assert loaded.MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")

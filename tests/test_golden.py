"""Losses and gradients equal recorded values, on eight of the scenes.

Commit 390ac44 recorded the values. If a change alters the numbers on purpose, record them again:
``python tests/test_golden.py``.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from fgbg_kd.engine import FgBgTrainer, load_config

FOLDER = Path(__file__).parent / "golden"
# Detectron2 v0.6 and main order the images differently.
VERSION = "main" if hasattr(comm, "create_local_process_group") else "v0.6"
VALUES = FOLDER / f"values_{VERSION}.json"
CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
PEERS = ("FgBg", "PKD", "CWD", "MGD", "FGD", "DeFeat", "Mimic", "QFL")
DATA = ["DATASETS.TRAIN", "('golden_train',)", "DATASETS.TRAIN_JSON", str(FOLDER / "scenes.json"),
        "DATASETS.TRAIN_IMAGES", str(FOLDER), "DATASETS.TEST", "()", "DATASETS.TEST_JSON", "",
        "MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "4",
        "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip
FCOS = {"MODEL.FCOS.IN_FEATURES": ["p3", "p4", "p5"], "MODEL.FCOS.NUM_CONVS": 2,
        "MODEL.FCOS.NUM_CLASSES": 10}  # fmt: skip


def save_random_teacher(folder: Path, fcos: bool) -> list[str]:
    """Config and seeded random weights of the scenes' teacher, as overrides that name them."""
    opts = {"MODEL.META_ARCHITECTURE": "FCOS", "MODEL.FPN.OUT_CHANNELS": 64, **FCOS} if fcos else {}
    opts = [str(x) for pair in opts.items() for x in pair]
    cfg = load_config(str(CONFIGS / "scenes_teacher.yaml"), [*DATA, *opts])
    torch.manual_seed(5)
    model = build_model(cfg)
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.1)
    config, weights = folder / f"teacher{fcos}.yaml", folder / f"teacher{fcos}.pth"
    torch.save({"model": model.state_dict()}, weights)
    config.write_text(cfg.dump())
    return ["MODEL.KD.TEACHER.CONFIG", str(config), "MODEL.KD.TEACHER.WEIGHTS", str(weights)]


class Losses(HookBase):
    def __init__(self):
        self.rows = []

    def after_step(self):
        latest = self.trainer.storage.latest().items()
        self.rows.append({k: v for k, (v, _) in latest if "loss" in k})


def first_losses(folder: Path, fcos: bool) -> list[dict[str, float]]:
    """Losses in the first three iterations of the scenes' student, or of a similar FCOS pair."""
    opts = save_random_teacher(folder, fcos)
    if fcos:
        student = {"MODEL.KD.STUDENT": "FCOS", "MODEL.FPN.OUT_CHANNELS": 32, **FCOS}
        opts += [str(x) for pair in student.items() for x in pair]
    output = ["OUTPUT_DIR", str(folder / f"run{fcos}"), "SOLVER.MAX_ITER", "3"]
    cfg = load_config(str(CONFIGS / "scenes_distilled.yaml"), [*DATA, *opts, *output])
    os.makedirs(cfg.OUTPUT_DIR)
    seed_all_rng(cfg.SEED)
    trainer, losses = FgBgTrainer(cfg), Losses()
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume=False)
    trainer.train()
    return losses.rows


def one_batch(folder: Path, method: str) -> dict[str, float]:
    """Losses of a method on one batch, and the norm of the gradient of its parameters."""
    opts = [*DATA, *save_random_teacher(folder, fcos=False), "MODEL.KD.METHOD", method]
    cfg = load_config(str(CONFIGS / "scenes_distilled.yaml"), opts)
    batch = next(iter(FgBgTrainer.build_train_loader(cfg)))
    torch.manual_seed(3)
    model = build_model(cfg).train()
    torch.manual_seed(4)
    with EventStorage(150):
        losses = model(batch)
    sum(losses.values()).backward()
    norms = {
        "gradient of the student": model.student.parameters(),
        "gradient of everything": model.parameters(),
    }
    norms = {
        k: sum(float(p.grad.double().square().sum()) for p in v) ** 0.5 for k, v in norms.items()
    }
    return {k: v.item() for k, v in losses.items()} | norms


@pytest.fixture(scope="module")
def golden():
    return json.loads(VALUES.read_text())


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
@pytest.mark.slow
def test_the_first_three_iterations_have_the_recorded_losses(kind, golden, tmp_path):
    for found, expected in zip(first_losses(tmp_path, kind == "FCOS"), golden[kind], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.slow
def test_each_method_has_the_recorded_losses_and_gradients_on_one_batch(method, golden, tmp_path):
    assert one_batch(tmp_path, method) == pytest.approx(golden[method], rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        values = {k: first_losses(Path(name), k == "FCOS") for k in ("RetinaNet", "FCOS")}
        values |= {method: one_batch(Path(name), method) for method in PEERS}
    VALUES.write_text(json.dumps(values, indent=1) + "\n")

"""Pictures in TensorBoard are drawn every period and do not change training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_batch, make_trainer, tiny_cfg
from detectron2.engine import HookBase
from detectron2.modeling import build_model

from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.experiments import picture_hook
from fgbg_kd.experiments.picture_hook import DistillationPictures


class Seen(HookBase):
    """Collects the pictures in the event storage after each step, and removes them from it."""

    def __init__(self):
        self.pictures = []

    def after_step(self):
        self.pictures += self.trainer.storage._vis_data
        self.trainer.storage.clear_images()


def run(cfg, folder, hooks):
    """Weights, random state and losses after 4 steps."""
    trainer = make_trainer(FgBgTrainer, cfg, folder, 4)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks(hooks)
    trainer._hooks.sort(key=lambda hook: hook not in hooks)  # before the writers
    trainer.train()
    losses = {k: v.values() for k, v in trainer.storage.histories().items() if "loss" in k}
    return trainer.model.state_dict(), torch.get_rng_state(), np.random.get_state()[1], losses


@pytest.mark.parametrize("edit", [(), ("MODEL.KD.METHOD", "PKD")])
@pytest.mark.slow
def test_training_is_the_same_bit_for_bit_with_and_without_pictures(distil_cfg, tmp_path, edit):
    distil_cfg.merge_from_list(list(edit))
    seen = Seen()
    # The first training in a process can differ from the next training by rounding.
    run(distil_cfg, tmp_path / "warm_up", [])
    with_pictures = run(distil_cfg, tmp_path / "a", [DistillationPictures(2), seen])
    without = run(distil_cfg, tmp_path / "b", [])
    assert [(name, i) for name, _, i in seen.pictures] == [("distillation", 1), ("distillation", 3)]
    picture = seen.pictures[0][1]
    assert picture.shape[0] == 3 and picture.dtype == np.uint8 and picture.std() > 10
    for mine, other in ((with_pictures[0], without[0]), (with_pictures[3], without[3])):
        assert mine.keys() == other.keys() and mine
    assert all(torch.equal(v, without[0][k]) for k, v in with_pictures[0].items())
    assert torch.equal(with_pictures[1], without[1])
    assert np.array_equal(with_pictures[2], without[2])
    assert with_pictures[3] == without[3]


@pytest.mark.slow
def test_an_image_with_objects_is_preferred(distil_cfg, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        picture_hook,
        "draw_distillation",
        lambda model, x: drawn.append(len(x["instances"])) or np.zeros((3, 4, 4), np.uint8),
    )
    distil_cfg.SOLVER.IMS_PER_BATCH = 6  # of 12 images, one in four has no object
    run(distil_cfg, tmp_path, [DistillationPictures(1)])
    assert len(drawn) == 4 and min(drawn) > 0


def test_the_trainer_of_a_python_config_keeps_its_batch_itself(distil_cfg, monkeypatch):
    seen = []
    monkeypatch.setattr(picture_hook, "draw_distillation", lambda model, x: seen.append(x))
    hook, batch = DistillationPictures(1), make_batch()[::-1]  # the first has no object
    storage = SimpleNamespace(put_image=lambda name, picture: None)
    hook.trainer = SimpleNamespace(
        model=build_model(distil_cfg), iter=0, batch=batch, storage=storage
    )
    hook.after_step()
    assert seen == [batch[1]]


@pytest.mark.slow
def test_a_plain_detector_and_a_period_of_0_give_no_pictures(coco, distil_cfg, tmp_path):
    for cfg, period in ((tiny_cfg(coco), 1), (distil_cfg, 0)):
        seen = Seen()
        run(cfg, tmp_path / str(period), [DistillationPictures(period), seen])
        assert seen.pictures == []

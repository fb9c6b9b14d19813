"""One image is evaluated before training: what breaks evaluation stops the run at once."""

import logging

import pytest
import torch
from conftest import losses, make_trainer, tiny_cfg, train, weights
from detectron2.evaluation import DatasetEvaluator
from pycocotools.coco import COCO

from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.resume import warm_up
from fgbg_kd.utils.errors import DataError, EvaluationError


def broken(*_, **__):
    raise KeyError("info")


def test_a_dependency_that_breaks_evaluation_stops_the_run_at_once(coco, tmp_path, monkeypatch):
    """As pycocotools 2.0.9 does, for a file without "info"; the untrained student finds nothing."""
    inference = tmp_path / "run" / "inference"
    inference.mkdir(parents=True)
    (inference / "coco_instances_results.json").write_text("of the previous run")
    trainer = make_trainer(FgBgTrainer, tiny_cfg(coco), tmp_path / "run", 3)
    monkeypatch.setattr(COCO, "loadRes", broken)
    trainer.resume_or_load(resume=False)
    with pytest.raises(EvaluationError, match="KeyError: 'info'.*before training.*DATASETS.TEST"):
        trainer.train()
    assert not losses(tmp_path / "run")
    assert (inference / "coco_instances_results.json").read_text() == "of the previous run"


def test_a_test_image_that_cannot_be_read_is_named_at_once(coco, tmp_path, monkeypatch):
    trainer = make_trainer(FgBgTrainer, tiny_cfg(coco), tmp_path / "run", 3)
    monkeypatch.setattr("fgbg_kd.data.mapper.read_image", broken)
    with pytest.raises(DataError, match=r"0\.png cannot be used"):
        trainer.train()


@pytest.mark.parametrize("kind", ["plain", "distilled"])
@pytest.mark.slow
def test_the_trial_changes_nothing_in_the_training(kind, coco, distil_cfg, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    warm_up(4)  # so that runs in this process round alike
    cfg = distil_cfg if kind == "distilled" else tiny_cfg(coco)
    train(FgBgTrainer, cfg, tmp_path / "tried", 3)
    said = [x.getMessage() for x in caplog.records if "evaluat" in x.getMessage().lower()]
    assert said[0] == "The evaluation was tried on one image of the test set: it works."
    before = caplog.text.split("Starting training from iteration 0")[1].split(said[0])[0]
    assert len(before.splitlines()) <= 2 and "AP" not in before
    caplog.clear()
    cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON = (), ""
    train(FgBgTrainer, cfg, tmp_path / "without", 3)
    assert "was tried" not in caplog.text
    assert losses(tmp_path / "tried") == losses(tmp_path / "without")
    both = weights(tmp_path / "tried"), weights(tmp_path / "without")
    assert all(torch.equal(both[0][k], both[1][k]) for k in both[0])


def test_any_evaluator_is_tried_with_the_first_image(coco, tmp_path):
    seen = []

    class Own(DatasetEvaluator):
        def process(self, inputs, outputs):
            seen.append([x["image_id"] for x in inputs])

        def evaluate(self):
            raise OSError("no room")

    class Trainer(FgBgTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return Own()

    trainer = make_trainer(Trainer, tiny_cfg(coco), tmp_path / "run", 3)
    with pytest.raises(EvaluationError, match="OSError: no room"):
        trainer.train()
    assert seen == [[0]]
    assert trainer.model.training

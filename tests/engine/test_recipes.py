"""Common training options work with distillation as with plain training.

The options: image sizes, crop and flip (INPUT), mixed precision, gradient clipping, averaged
weights.
"""

import pytest
import torch
from conftest import losses, make_trainer, tiny_cfg, train, weights
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from fgbg_kd.engine import FgBgTrainer, load_config
from fgbg_kd.engine.resume import warm_up


@pytest.fixture(params=["plain", "distilled"])
def cfg(request, coco, distil_cfg):
    cfg = distil_cfg if request.param == "distilled" else tiny_cfg(coco)
    cfg.MODEL.KD.FGBG.GATE = False  # so that both terms are over 0
    cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON = (), ""
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    warm_up(4)  # so that runs in this process round alike
    return cfg


def detector_of(trainer):
    return getattr(trainer.model, "student", trainer.model)


def copied(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.slow
def test_many_sizes_crop_and_flip_give_both_trainings_the_same_images(coco, distil_cfg, tmp_path):
    seen = {}
    for name, config in (("plain", tiny_cfg(coco)), ("distilled", distil_cfg)):
        config.INPUT.MIN_SIZE_TRAIN = (48, 64, 97)
        config.INPUT.CROP.ENABLED, config.INPUT.CROP.SIZE = True, [0.5, 0.7]
        config.INPUT.RANDOM_FLIP = "horizontal"
        config.MODEL.KD.FGBG.GATE = False
        config.DATASETS.TEST, config.DATASETS.TEST_JSON = (), ""
        trainer = make_trainer(FgBgTrainer, config, tmp_path / name, 6)
        images = seen[name] = []
        trainer.model.register_forward_pre_hook(
            lambda _, batch, images=images: images.extend(x["image"] for x in batch[0])
        )
        trainer.train()
    assert len(seen["plain"]) == len(seen["distilled"]) == 12
    assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["distilled"]))
    assert len({image.shape for image in seen["plain"]}) > 5
    row = losses(tmp_path / "distilled")[-1]
    assert row["loss_kd_fg"] > 0 and row["loss_kd_bg"] > 0


@pytest.mark.slow
def test_clipping_bounds_the_step_of_every_parameter(cfg, tmp_path):
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 0.0, 0.0
    largest = {}
    for clip in (False, True):
        gradients = cfg.SOLVER.CLIP_GRADIENTS
        gradients.ENABLED, gradients.CLIP_TYPE, gradients.CLIP_VALUE = clip, "norm", 1e-3
        trainer = make_trainer(FgBgTrainer, cfg, tmp_path / str(clip), 1)
        before = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
        trainer.train()
        steps = {k: (v - before[k]).norm() for k, v in trainer.model.named_parameters()}
        largest[clip] = max(steps.values())
        assert len(steps) == len(before)
    bound = cfg.SOLVER.BASE_LR * 1e-3
    assert largest[True] <= 1.1 * bound < largest[False]  # 1.1: rounding of the weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Detectron2's AMPTrainer needs CUDA")
def test_mixed_precision_trains_on_cuda(cfg, tmp_path):
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cuda", True
    train(FgBgTrainer, cfg, tmp_path / "amp", 20)
    (row,) = losses(tmp_path / "amp")
    assert all(v == v for v in row.values())
    assert all(v.dtype != torch.float16 for v in weights(tmp_path / "amp").values())


def test_mixed_precision_is_set_off_where_there_is_no_cuda(cfg, tmp_path):
    """bf16 autocast itself is in test_distiller.py and methods/: Detectron2 does not offer it."""
    cfg.SOLVER.AMP.ENABLED = True
    path = tmp_path / "c.yaml"
    path.write_text(cfg.dump())
    loaded = load_config(str(path))
    assert loaded.MODEL.DEVICE == "cpu" and not loaded.SOLVER.AMP.ENABLED


# --- averaged weights ---


def mix(average, weights, decay):
    """Averages weights as the hook does. Batch counts are not averaged."""
    return {
        k: decay * v + (1 - decay) * weights[k] if v.is_floating_point() else weights[k]
        for k, v in average.items()
    }


@pytest.mark.slow
def test_evaluation_and_checkpoint_have_the_average_of_the_weights_that_train(cfg, tmp_path):
    """The average does not change the training."""
    own, history = make_trainer(FgBgTrainer, cfg, tmp_path / "own", 4), []
    own.run_step = lambda step=own.run_step: (step(), history.append(copied(detector_of(own))))
    own.train()
    cfg.SOLVER.EMA_DECAY, cfg.TEST.EVAL_PERIOD = 0.5, 4
    evaluated = []

    class Trainer(FgBgTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            evaluated.append(copied(getattr(model, "student", model)))
            return {}

    train(Trainer, cfg, tmp_path / "ema", 4)
    average = history[0]
    for i, step in enumerate(history[1:], start=1):
        decay = min(0.5, 1 - (1 + i) ** (-2 / 3))
        average = mix(average, step, decay)
    saved = torch.load(tmp_path / "ema" / "model_final.pth", weights_only=True)
    for k, v in saved["model"].items():
        torch.testing.assert_close(v, average[k])
    assert all(torch.equal(v, saved["model"][k]) for k, v in evaluated[0].items())
    trained = saved["trainer"]["hooks"]["WeightAverage"]["weights"]
    assert all(torch.equal(v, trained[k]) for k, v in history[-1].items())
    assert any(not torch.equal(v, trained[k]) for k, v in saved["model"].items())


@pytest.mark.slow
def test_a_plain_detector_loads_the_average(coco, distil_cfg, tmp_path):
    distil_cfg.SOLVER.EMA_DECAY = 0.9
    trainer = train(FgBgTrainer, distil_cfg, tmp_path / "ema", 2)
    plain = build_model(tiny_cfg())
    DetectionCheckpointer(plain).load(str(tmp_path / "ema" / "model_final.pth"))
    average = trainer.model.student.state_dict()
    assert plain.state_dict().keys() == average.keys()
    assert all(torch.equal(v, average[k]) for k, v in plain.state_dict().items())


@pytest.mark.slow
def test_a_run_without_an_average_can_go_on_with_one(cfg, tmp_path):
    train(FgBgTrainer, cfg, tmp_path / "run", 2)
    before = weights(tmp_path / "run")
    cfg.SOLVER.EMA_DECAY = 0.5
    train(FgBgTrainer, cfg, tmp_path / "run", 3, resume=True)
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    trained = saved["trainer"]["hooks"]["WeightAverage"]["weights"]
    for k, v in mix(before, trained, 0.5).items():
        torch.testing.assert_close(v, saved["model"][k])


def test_a_decay_that_is_none_is_named(cfg, tmp_path):
    cfg.SOLVER.EMA_DECAY = 1.0
    with pytest.raises(ValueError, match="EMA_DECAY .* is 1.0"):
        make_trainer(FgBgTrainer, cfg, tmp_path / "run", 1)


@pytest.mark.slow
def test_channels_last_changes_the_layout_and_not_the_weights(distil_cfg, tmp_path):
    """After one step: each further one multiplies the rounding, which the layout does change."""
    train(FgBgTrainer, distil_cfg, tmp_path / "usual", 1)
    distil_cfg.SOLVER.CHANNELS_LAST = True
    trainer = train(FgBgTrainer, distil_cfg, tmp_path / "last", 1)
    weight = [x.weight for x in trainer.model.student.modules() if isinstance(x, torch.nn.Conv2d)]
    wide = [x for x in weight if not x.is_contiguous()]
    assert wide and all(x.is_contiguous(memory_format=torch.channels_last) for x in wide)
    other = weights(tmp_path / "last")
    for k, v in weights(tmp_path / "usual").items():
        torch.testing.assert_close(other[k], v, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_channels_last_resumes_exactly(distil_cfg, tmp_path):
    distil_cfg.SOLVER.CHANNELS_LAST, distil_cfg.SOLVER.CHECKPOINT_PERIOD = True, 2
    train(FgBgTrainer, distil_cfg, tmp_path / "whole", 4)
    train(FgBgTrainer, distil_cfg, tmp_path / "parts", 2)
    trainer = train(FgBgTrainer, distil_cfg, tmp_path / "parts", 4, resume=True)
    assert not trainer.model.student.head.cls_score.weight.is_contiguous()
    resumed = weights(tmp_path / "parts")
    assert all(torch.equal(v, resumed[k]) for k, v in weights(tmp_path / "whole").items())

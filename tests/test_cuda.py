"""Tests that need a GPU: equal losses, mixed precision, no synchronisation, a whole training."""

import copy
import warnings

import pytest
import torch
from conftest import make_batch, train, weights
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgbg_kd import METHOD_REGISTRY
from fgbg_kd.engine import FgBgTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = sorted(name for name, _ in METHOD_REGISTRY)


@pytest.fixture(autouse=True)
def full_fp32():
    """TF32 off. pytest's monkeypatch cannot restore these switches, which C++ keeps."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [x.allow_tf32 for x in switches]
    for x in switches:
        x.allow_tf32 = False
    yield
    for x, value in zip(switches, before):
        x.allow_tf32 = value


def build(cfg, method):
    cfg.MODEL.KD.METHOD = method
    torch.manual_seed(3)
    return build_model(cfg).train()


def step(model, iteration=1):
    """Losses, and the gradients of only the distillation losses. Iteration 1 logs nothing."""
    with EventStorage(iteration):
        losses = model(make_batch())
    sum(v for k, v in losses.items() if "kd" in k).backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, gradients


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_the_cpu(distil_cfg, method):
    on_cpu = build(distil_cfg, method)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    (expected, expected_grads), (losses, gradients) = step(on_cpu), step(on_gpu)
    assert losses.keys() == expected.keys() and gradients.keys() == expected_grads.keys()
    assert any(v > 0 for k, v in losses.items() if "kd" in k)
    assert all(v.isfinite().all() for v in gradients.values())
    if method == "MGD":  # its mask is drawn on the device
        return
    for name, value in losses.items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-4, atol=1e-6)
    scales = {name: value.abs().max() for name, value in expected_grads.items()}
    for name, value in gradients.items():
        # The gradients of biases that PKD and CWD do not see are rounding errors.
        tolerance = 1e-3 * scales[name] + 1e-6 * max(scales.values())
        assert (value.cpu() - expected_grads[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_gives_finite_losses_near_those_of_fp32(distil_cfg, method, dtype):
    model = build(distil_cfg, method).cuda()
    torch.manual_seed(0)  # for the mask of MGD
    exact, _ = step(model)
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cuda", dtype):
        losses, gradients = step(model)
    for name in exact:
        torch.testing.assert_close(losses[name].float(), exact[name].float(), rtol=0.1, atol=0.05)
    assert all(v.isfinite().all() for v in gradients.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("boxes", ["some", "none"])
def test_no_line_of_this_package_waits_for_the_device(distil_cfg, method, boxes):
    """Detectron2's own losses wait, and its copies of images and ground truth."""
    model = build(distil_cfg, method).cuda()
    batch = make_batch() if boxes == "some" else make_batch(boxes=((), ()))

    def run():
        with EventStorage(1):
            losses = model(batch)
        sum(v for k, v in losses.items() if "kd" in k).backward()

    run()  # kernels are compiled
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert waits  # Detectron2's: the mode works
    waiting = [f"{w.filename}:{w.lineno}" for w in waits if "fgbg_kd" in w.filename]
    assert not waiting


@pytest.mark.parametrize("cache", [False, True])
def test_a_training_on_the_gpu_ends_in_a_checkpoint_of_the_student(distil_cfg, tmp_path, cache):
    distil_cfg.MODEL.DEVICE = "cuda"
    distil_cfg.MODEL.KD.TEACHER.CACHE = cache
    distil_cfg.INPUT.RANDOM_FLIP = "none" if cache else "horizontal"
    trainer = train(FgBgTrainer, distil_cfg, tmp_path / "out", 25)
    assert trainer.model.teacher.detector.device.type == "cuda"
    found = weights(tmp_path / "out")
    assert found and all(v.isfinite().all() for v in found.values() if v.is_floating_point())
    assert not any("teacher" in name for name in found)

"""A loss that is not finite stops the run. The error says where, and a file allows a replay."""

import math
import runpy
import sys

import pytest
import torch
from conftest import ROOT, make_batch, make_trainer, tiny_cfg, train
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.non_finite import FiniteAMPTrainer, FiniteTrainer, not_finite
from fgbg_kd.utils.errors import CheckpointError, NonFiniteLossError


class Spoil(HookBase):
    """Changes the model before iteration 2."""

    def __init__(self, do):
        self.do, self.before = do, None

    def before_step(self):
        if self.trainer.iter == 2:
            self.do(self.trainer.model)
            student = getattr(self.trainer.model, "student", self.trainer.model)
            self.before = {k: v.clone() for k, v in student.state_dict().items()}


@torch.no_grad()
def overflow_on_p4(model):
    """The student's features exceed fp32 on one level, but all parameters stay finite."""
    model.student.backbone.fpn_output4.weight.fill_(1e38)


def run(cfg, folder, do):
    trainer = make_trainer(FgBgTrainer, cfg, folder, 5)
    spoil = Spoil(do)
    trainer.register_hooks([spoil])
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.train()
    return trainer, spoil, str(stopped.value)


def test_the_first_step_stops_with_term_level_and_images_and_takes_no_step(distil_cfg, tmp_path):
    trainer, spoil, message = run(distil_cfg, tmp_path / "kd", overflow_on_p4)
    assert trainer.iter == 2
    assert message.startswith("Iteration 2: loss_cls is nan and loss_box_reg is nan")
    assert "features of the student on p4" in message and "p3" not in message.split(".png")[-1]
    assert "teacher" not in message and "parameters" not in message.split("not_finite_")[-1]
    names = [x["file_name"] for x in trainer._trainer.batch]
    assert len(names) == 2 and all(name in message for name in names)
    now = trainer.model.student.state_dict()
    weights = [k for k, _ in trainer.model.student.named_parameters()]
    assert all(torch.equal(now[k], spoil.before[k]) for k in weights)


@pytest.mark.slow
def test_the_file_replays_to_the_same_losses_and_the_same_words(
    distil_cfg, tmp_path, monkeypatch, capsys
):
    trainer, _, message = run(distil_cfg, tmp_path / "kd", overflow_on_p4)
    path = tmp_path / "kd" / "not_finite_0000002_rank0.pth"
    saved = torch.load(path, weights_only=True)
    batch = trainer._trainer.batch
    assert [torch.equal(a["image"], b["image"]) for a, b in zip(saved["batch"], batch)] == [
        True
    ] * 2
    config = tmp_path / "c.yaml"
    config.write_text(trainer.cfg.dump())
    monkeypatch.setattr(sys, "argv", ["replay.py", "--config-file", str(config), str(path)])
    runpy.run_path(str(ROOT / "tools" / "replay.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert message.split("use tools/replay.py. ")[1] in printed
    for x in batch:
        assert f"{x['file_name']}: {len(x['instances'])} boxes" in printed
    assert "loss_cls: nan" in printed and "loss_kd_fg: " in printed


@pytest.mark.parametrize(
    "name, message", [("model_final.pth", "holds no batch"), ("none.pth", "there is no file")]
)
def test_a_file_that_is_not_of_a_stopped_run_cannot_be_replayed(
    distil_cfg, tmp_path, monkeypatch, name, message
):
    train(FgBgTrainer, distil_cfg, tmp_path / "kd", 1)
    config = tmp_path / "c.yaml"
    config.write_text(distil_cfg.dump())
    file = str(tmp_path / "kd" / name)
    monkeypatch.setattr(sys, "argv", ["replay.py", "--config-file", str(config), file])
    with pytest.raises((CheckpointError, SystemExit), match=message):
        runpy.run_path(str(ROOT / "tools" / "replay.py"), run_name="__main__")


def test_a_search_that_fails_does_not_hide_the_fault(distil_cfg, tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError("no memory left")

    monkeypatch.setattr("fgbg_kd.engine.non_finite.not_finite", fails)
    message = run(distil_cfg, tmp_path / "kd", overflow_on_p4)[2]
    assert "loss_cls is nan" in message and "could not be found (no memory left)" in message


def test_of_several_processes_none_runs_the_model_again(distil_cfg, tmp_path, monkeypatch):
    """The others would be waited for, by a SyncBN."""
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "kd", 1)
    trainer.train()
    monkeypatch.setattr("fgbg_kd.engine.non_finite.comm.get_world_size", lambda: 2)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer._trainer._stop(["loss_cls is nan"])
    assert "finite:" not in str(stopped.value) and "Not finite" not in str(stopped.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.slow
def test_nan_and_both_infinities_stop_a_run(coco, tmp_path, value):
    trainer = make_trainer(FgBgTrainer, tiny_cfg(coco), tmp_path / "plain", 1)
    trainer.train()
    with trainer.storage, pytest.raises(NonFiniteLossError, match=f"a is {value}"):
        trainer._trainer._write_metrics({"a": torch.tensor(float(value))}, 0.0)


def test_parameters_and_a_teacher_that_are_not_finite_are_named(distil_cfg, tmp_path):
    @torch.no_grad()
    def spoil(model):
        model.student.head.cls_score.bias.fill_(float("nan"))
        model.teacher.detector.backbone.fpn_output5.weight.fill_(float("inf"))

    message = run(distil_cfg, tmp_path / "kd", spoil)[2]
    assert "the parameters student.head.cls_score.bias" in message
    assert "class logits of the student on p3, p4, p5" in message
    assert "features of the teacher on p5" in message


def test_a_plain_detector_is_watched_too(coco, tmp_path):
    @torch.no_grad()
    def spoil(model):
        model.head.bbox_pred.bias.fill_(float("nan"))

    message = run(tiny_cfg(coco), tmp_path / "plain", spoil)[2]
    assert "loss_box_reg is nan" in message and "box deltas of the model on p3" in message
    assert "loss_cls is" not in message


def test_a_loss_that_overflows_by_itself_is_told_apart(distil_cfg, tmp_path):
    distil_cfg.MODEL.KD.FGBG.FG_WEIGHT = 1e39
    message = run(distil_cfg, tmp_path / "kd", lambda model: None)[2]
    assert message.startswith("Iteration 0: loss_kd_fg is ")
    assert "the loss itself overflows" in message


@pytest.mark.parametrize(
    "value, said", [(1.0, "replay the files of the others"), (math.inf, "overflows")]
)
def test_losses_that_are_finite_now_are_not_said_to_overflow(value, said):
    losses = [torch.tensor(2.0), torch.tensor(value)]
    assert said in not_finite(build_model(tiny_cfg()), make_batch(), losses)


def test_a_batch_that_cannot_be_saved_does_not_hide_the_fault(distil_cfg, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = run(distil_cfg, tmp_path / "kd", overflow_on_p4)[2]
    assert "loss_cls is nan" in message and "No space left" in message
    assert "features of the student on p4" in message


def test_losses_are_read_once(coco, tmp_path):
    """Detectron2 gets losses that are on the CPU, so it does not wait for the device again."""
    trainer = make_trainer(FgBgTrainer, tiny_cfg(coco), tmp_path / "plain", 1)
    trainer.train()
    reads = []

    class Loss(torch.Tensor):
        def cpu(self, *args):
            reads.append(1)
            return torch.tensor(1.0)

        def item(self):
            raise AssertionError("a second reading")

    with trainer.storage:
        loss = torch.tensor(1.0).as_subclass(Loss)
        trainer._trainer._write_metrics({"a": loss, "b": loss}, 0.0)
    assert len(reads) == 2


# --- arithmetic ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_half_precision_trains_and_is_near_fp32(distil_cfg, dtype):
    model = build_model(distil_cfg).train()
    terms = []
    for enabled in (False, True):
        model.zero_grad()
        with EventStorage(0), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            losses = model(make_batch())
        sum(losses.values()).backward()
        terms.append({k: v.item() for k, v in losses.items()})
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients)
    for name, value in terms[0].items():
        assert terms[1][name] == pytest.approx(value, rel=0.1, abs=0.02), name


@torch.no_grad()
def large_logits(model):
    for detector, sign in ((model.student, 1), (model.teacher.detector, -1)):
        detector.head.cls_score.bias.fill_(sign * 3e4)  # fp16 ends at 65504


@torch.no_grad()
def zero_features(model):
    for detector in (model.student, model.teacher.detector):
        for name, parameter in detector.backbone.named_parameters():
            if "fpn_output" in name:
                parameter.zero_()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extreme", [large_logits, zero_features])
@pytest.mark.slow
def test_extremes_stay_finite(distil_cfg, extreme, dtype):
    model = build_model(distil_cfg).train()
    extreme(model)
    with EventStorage(0), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        losses = model(make_batch())
    assert losses["loss_kd_fg"].isfinite() and losses["loss_kd_bg"].isfinite()
    (losses["loss_kd_fg"] + losses["loss_kd_bg"]).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.slow
def test_a_huge_image_beside_a_tiny_one_stays_finite(distil_cfg):
    model = build_model(distil_cfg).train()
    sizes = (8192, 64), (8, 8)
    batch = make_batch(sizes, (((5, 5, 60, 8000), (10, 10, 11, 11)), ((1, 1, 3, 3),)))
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_mixed_precision_can_be_switched_on_by_a_resume():
    model = torch.nn.Linear(1, 1)
    trainers = [
        kind(model, [None], torch.optim.SGD(model.parameters(), lr=0.1), output_dir="", seed=0)
        for kind in (FiniteTrainer, FiniteAMPTrainer)
    ]
    state = trainers[0].state_dict()
    assert "grad_scaler" not in state
    trainers[1].load_state_dict(state)
    assert "grad_scaler" in trainers[1].state_dict()

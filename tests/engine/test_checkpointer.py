"""Checkpoints are written atomically, and damaged checkpoints are skipped."""

import os
import resource
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fgbg_kd.engine.checkpointer import PARTIAL, RunCheckpointer, last_checkpoint
from fgbg_kd.engine.ema import WeightAverage
from fgbg_kd.utils.errors import CheckpointError, ConfigError


@pytest.fixture
def saved(tmp_path):
    """A checkpointer with three checkpoints. Their only weight is the iteration."""
    model = torch.nn.Linear(1, 1)
    checkpointer = RunCheckpointer(model, str(tmp_path))
    for i in (9, 19, 29):
        torch.nn.init.constant_(model.weight, i)
        checkpointer.save(f"model_{i:07d}", iteration=i)
        os.utime(tmp_path / f"model_{i:07d}.pth", (i, i))
    return checkpointer


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    at = data.index(torch.tensor(29.0).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, remove])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, tmp_path, caplog, damage):
    damage(tmp_path / "model_0000029.pth")
    assert saved.resume_or_load("", resume=True)["iteration"] == 19
    assert saved.model.weight.item() == 19
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "model_0000019.pth")
    assert "model_0000029.pth is damaged" in caplog.text


def test_a_damaged_mark_of_the_last_checkpoint_does_no_harm(saved, tmp_path):
    (tmp_path / "last_checkpoint").write_bytes(b"")
    assert saved.resume_or_load("", resume=True)["iteration"] == 29


def test_no_whole_checkpoint_is_an_error_not_a_new_run(saved, tmp_path):
    for path in tmp_path.glob("*.pth"):
        cut(path)
    with pytest.raises(CheckpointError, match="All checkpoints .* are damaged"):
        saved.resume_or_load("", resume=True)


def test_old_checkpoints_go_and_the_newest_stay(saved, tmp_path):
    """The file age decides, since a new run in the folder of a longer run starts at 0."""
    saved.max_to_keep = 2
    saved.save("model_0000004", iteration=4)
    assert {x.name for x in tmp_path.glob("*.pth")} == {"model_0000004.pth", "model_0000029.pth"}
    saved.save("model_final", iteration=5)
    assert len(list(tmp_path.glob("*.pth"))) == 3
    with pytest.raises(ConfigError, match="CHECKPOINT_MAX_TO_KEEP is 1"):
        RunCheckpointer(saved.model, max_to_keep=1)
    with pytest.raises(ConfigError, match="CHECKPOINT_MAX_TO_KEEP is -1"):
        RunCheckpointer(saved.model, max_to_keep=-1)


def test_a_finished_run_has_its_last_checkpoint_as_the_final_one_and_is_marked_so(saved, tmp_path):
    saved.finish()
    assert saved.get_checkpoint_file() == str(tmp_path / "model_final.pth")
    final, last = (tmp_path / name for name in ("model_final.pth", "model_0000029.pth"))
    assert final.read_bytes() == last.read_bytes()
    before = os.stat(final).st_mtime_ns
    saved.finish()
    assert os.stat(final).st_mtime_ns == before


def test_without_a_limit_all_checkpoints_stay(saved, tmp_path):
    saved.save("model_0000039", iteration=39)
    assert len(list(tmp_path.glob("*.pth"))) == 4


def test_a_folder_without_checkpoints_has_no_last_one_and_starts_from_the_weights(tmp_path):
    assert last_checkpoint("") == last_checkpoint(str(tmp_path)) == ""
    model = nn.Linear(1, 1)
    assert RunCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True) == {}


def test_a_checkpoint_of_another_shape_fills_nothing_and_names_the_tensors(saved, tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.new = nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.zeros(1))

    other = RunCheckpointer(Other(), str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        other.resume_or_load("", resume=True)
    for text in ("weight (1, 1), now (1, 2)", "only the checkpoint has: bias", "this run has: new"):
        assert text in str(error.value)
    assert (other.model.weight == 0).all()


@pytest.mark.parametrize(
    "trained, message", [(("weight", "bias"), None), (("weight",), "other parameters are trained")]
)
def test_a_resume_may_not_train_other_parameters(tmp_path, trained, message):
    def checkpointer(names):
        model = nn.Linear(2, 2)
        parameters = [p for name, p in model.named_parameters() if name in names]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        trainer = SimpleNamespace(
            optimizer=optimizer,
            state_dict=lambda: {"optimizer": optimizer.state_dict()},
            load_state_dict=lambda state: optimizer.load_state_dict(state["optimizer"]),
        )
        # The schedule adds "initial_lr" when it begins, also after a resume.
        return RunCheckpointer(model, str(tmp_path), trainer=trainer), optimizer

    first, optimizer = checkpointer(("weight", "bias"))
    optimizer.param_groups[0]["initial_lr"] = 0.1
    first.save("model_0000001")
    again, _ = checkpointer(trained)
    if message is None:
        again.resume_or_load("", resume=True)
    else:
        with pytest.raises(CheckpointError, match=message):
            again.resume_or_load("", resume=True)


def training(folder, options=(), hooks=()):
    """A checkpointer of a model that SGD trains, with a learning rate that has warmed up."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, **dict(options)}
    )
    group = optimizer.param_groups[0]
    group["initial_lr"], group["lr"] = group["lr"], group["lr"] / 2
    trainer = SimpleNamespace(
        optimizer=optimizer,
        _hooks=hooks,
        state_dict=lambda: {
            "optimizer": optimizer.state_dict(),
            "hooks": {type(h).__qualname__: {} for h in hooks},
        },
        load_state_dict=lambda state: optimizer.load_state_dict(state["optimizer"]),
    )
    return RunCheckpointer(model, str(folder), trainer=trainer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"options": {"lr": 0.001}}, r"learning rate \(SOLVER.BASE_LR\) was 0.1, now it is 0.001"),
        ({"options": {"weight_decay": 0.5}}, "weight decay was 0.0001, now it is 0.5"),
    ],
)
def test_a_resume_may_not_ask_for_values_that_it_would_not_use(tmp_path, change, message):
    """PyTorch loads the optimizer's values from the checkpoint."""
    training(tmp_path).save("model_0000001")
    again = training(tmp_path, **change)
    if message is None:
        again.resume_or_load("", resume=True)
    else:
        with pytest.raises(CheckpointError, match=message):
            again.resume_or_load("", resume=True)


def test_a_run_with_mean_weights_cannot_go_on_without_them(tmp_path):
    training(tmp_path, hooks=[WeightAverage(nn.Linear(1, 1), 0.9)]).save("model_0000001")
    with pytest.raises(CheckpointError, match="EMA_DECAY was not 0, now it is 0"):
        training(tmp_path).resume_or_load("", resume=True)


def test_a_checkpoint_of_an_older_pytorch_with_fewer_options_is_resumed(tmp_path):
    first = training(tmp_path)
    first.save("model_0000001")
    file = tmp_path / "model_0000001.pth"
    saved = torch.load(file, weights_only=True)
    for option in ("differentiable", "initial_lr"):
        saved["trainer"]["optimizer"]["param_groups"][0].pop(option)
    torch.save(saved, file)
    training(tmp_path).resume_or_load("", resume=True)


def test_a_file_without_a_tensor_of_the_detector_does_not_start_a_random_run(tmp_path):
    torch.save({"model": {"features.0.weight": torch.ones(2, 2)}}, tmp_path / "timm.pth")
    torch.save({"model": {"bias": torch.ones(2)}}, tmp_path / "part.pth")
    checkpointer = RunCheckpointer(nn.Linear(2, 2))
    checkpointer.resume_or_load(str(tmp_path / "part.pth"), resume=False)
    with pytest.raises(CheckpointError, match="no tensor of the detector .*MODEL.TIMM.WEIGHTS"):
        checkpointer.resume_or_load(str(tmp_path / "timm.pth"), resume=False)


@pytest.mark.parametrize(
    "width, message", [(3, None), (4, "a teacher with other levels or channels: phi.weight")]
)
def test_a_method_of_other_shapes_is_not_resumed(tmp_path, width, message):
    def method(width):
        return nn.ModuleDict({"phi": nn.Linear(2, width, bias=False)})

    RunCheckpointer(nn.Linear(1, 1), str(tmp_path), method=method(3)).save("model_0000001")
    again = RunCheckpointer(nn.Linear(1, 1), str(tmp_path), method=method(width))
    if message is None:
        again.resume_or_load("", resume=True)
    else:
        with pytest.raises(CheckpointError, match=message):
            again.resume_or_load("", resume=True)


def test_a_save_that_fails_leaves_the_last_checkpoint(saved, tmp_path):
    class Torn:
        def state_dict(self):
            return {"x": 1}

        def __reduce__(self):
            raise OSError("No space left on device")

    before = sorted(x.name for x in tmp_path.iterdir())
    with pytest.raises(OSError, match="No space"):
        saved.save("model_0000029", torn=Torn())
    assert sorted(x.name for x in tmp_path.iterdir()) == before
    assert saved.resume_or_load("", resume=True)["iteration"] == 29


def test_what_a_killed_save_leaves_is_overwritten_by_the_next(saved, tmp_path):
    (tmp_path / PARTIAL).write_bytes(b"half a checkpoint")
    assert saved.resume_or_load("", resume=True)["iteration"] == 29
    saved.save("model_0000039", iteration=39)
    assert saved.resume_or_load("", resume=True)["iteration"] == 39
    assert not (tmp_path / PARTIAL).exists()


def test_a_disk_that_is_full_while_saving_leaves_the_checkpoint_before_it(tmp_path):
    """A file size limit simulates a full disk: the write fails in the middle."""
    model = nn.Linear(1000, 1000)  # 4 MB
    checkpointer = RunCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    nn.init.zeros_(model.weight)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(
            OSError, match="model_0000003.pth could not be written .*too large.*--resume"
        ):
            checkpointer.save("model_0000003")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    RunCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())

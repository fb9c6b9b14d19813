"""A run that is stopped and resumed ends like an uninterrupted run.

The parts are tested in test_loader.py, test_checkpointer.py and test_run_dir.py. Python
configs are tested in test_lazy.py, and several processes in test_distributed.py.
"""

import itertools
import json
import random
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_trainer, tiny_fcos_cfg
from detectron2.engine import HookBase
from detectron2.utils import comm

from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.checkpointer import RunCheckpointer
from fgbg_kd.engine.resume import IterationState, begin, run_seed, seed_iteration, warm_up
from fgbg_kd.utils.errors import ConfigError, OutputDirError


class Killed(Exception):
    pass


class Kill(HookBase):
    def __init__(self, at):
        self.at = at

    def after_step(self):
        if self.trainer.iter == self.at:
            raise Killed


class Trainer(FgBgTrainer):
    """Draws random numbers in the model, and reads other data between iterations."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        detector = getattr(model, "student", model)
        detector.head.cls_subnet.append(torch.nn.Dropout(0.3))
        return model

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        model.eval()
        for batch in itertools.islice(cls.build_test_loader(cfg, cfg.DATASETS.TEST[0]), 2):
            model(batch)
        torch.rand(1)
        model.train()
        return {}


def run(cfg, folder, kill_at=None, resume=False):
    trainer = make_trainer(Trainer, cfg, folder, 8)
    trainer.resume_or_load(resume=resume)
    if kill_at is not None:
        trainer.register_hooks([Kill(kill_at)])
        with pytest.raises(Killed):
            trainer.train()
    else:
        trainer.train()
    return trainer


def distilled(cfg, coco):
    """A RetinaNet with adapters, whose loss has a running normaliser."""
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = "AdamW", 1e-3
    return cfg


def averaged(cfg, coco):
    """A plain FCOS by SGD with momentum, whose checkpoints hold averaged weights."""
    cfg = tiny_fcos_cfg(coco)
    cfg.SOLVER.EMA_DECAY = 0.5
    return cfg


@pytest.fixture(params=[distilled, averaged])
def run_cfg(request, distil_cfg, coco):
    cfg = request.param(distil_cfg, coco)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.TEST.EVAL_PERIOD = 3
    warm_up(4)  # all runs are in this one process
    return cfg


def differences(a, b, name=""):
    """Names of the values in which two checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [x for k in a for x in differences(a[k], b[k], f"{name}.{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [x for i in range(len(a)) for x in differences(a[i], b[i], f"{name}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_checkpoint(run_cfg, tmp_path):
    """The run is killed twice. After the first kill, the number of loading processes differs."""
    run(run_cfg, tmp_path / "whole")
    run(run_cfg, tmp_path / "killed", kill_at=4)
    run_cfg.DATALOADER.NUM_WORKERS = 2
    run(run_cfg, tmp_path / "killed", kill_at=6, resume=True)
    assert run(run_cfg, tmp_path / "killed", resume=True).start_iter == 6
    whole, killed = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert differences(whole, killed) == []
    assert whole["trainer"]["hooks"]["IterationState"]["loss_normalizers"][0] > 0
    if run_cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller":  # with the adapters beside the student
        tensors = [k for k, v in whole.items() if isinstance(v, dict) and k != "trainer"]
        assert len(tensors) == 2 and all(whole[k] for k in tensors)
    else:
        average = whole["trainer"]["hooks"]["WeightAverage"]
        assert differences(average["weights"], whole["model"])
    rows = [json.loads(x) for x in (tmp_path / "killed" / "metrics.json").open()]
    iterations = [r["iteration"] for r in rows]
    assert iterations == sorted(set(iterations))


@pytest.mark.parametrize("run_cfg", [distilled], indirect=True)
@pytest.mark.slow
def test_resuming_elsewhere_in_the_data_would_show(run_cfg, tmp_path):
    """Shows that the comparison above can fail: it fails with another seed."""
    run(run_cfg, tmp_path / "a")
    run_cfg.SEED += 1
    run(run_cfg, tmp_path / "b")
    assert differences(final(tmp_path / "a")["model"], final(tmp_path / "b")["model"])


@pytest.mark.parametrize("run_cfg", [averaged], indirect=True)
@pytest.mark.slow
def test_a_run_killed_between_its_last_two_checkpoints_ends_with_the_final_one(
    run_cfg, tmp_path, monkeypatch
):
    def killed(checkpointer, name, **kwargs):
        if name == "model_final":
            raise Killed
        save(checkpointer, name, **kwargs)

    save = RunCheckpointer.save
    monkeypatch.setattr(RunCheckpointer, "save", killed)
    with pytest.raises(Killed):
        run(run_cfg, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    for _ in range(2):  # the second time there is nothing to do
        assert run(run_cfg, tmp_path, resume=True).start_iter == 8
        assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
        last, end = (tmp_path / f"model_{x}.pth" for x in ("0000007", "final"))
        assert last.read_bytes() == end.read_bytes()


@pytest.mark.parametrize("run_cfg", [averaged], indirect=True)
@pytest.mark.slow
def test_a_new_run_is_not_resumed_as_the_one_before_it_in_its_folder(run_cfg, tmp_path):
    run(run_cfg, tmp_path)
    metrics = (tmp_path / "metrics.json").read_text()
    make_trainer(Trainer, run_cfg, tmp_path, 8).resume_or_load(resume=False)  # and killed
    trainer = run(run_cfg, tmp_path, resume=True)
    assert trainer.start_iter == 0
    previous = tmp_path / "previous" / "1"
    assert (previous / "model_final.pth").is_file()
    assert (previous / "metrics.json").read_text() == metrics
    rows = (tmp_path / "metrics.json").read_text().splitlines()
    assert len(rows) == len(metrics.splitlines())


def test_the_normaliser_goes_on_in_each_process_and_in_other_numbers_of_them(monkeypatch):
    def loaded(rank, size):
        monkeypatch.setattr(comm, "get_world_size", lambda: size)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        detector = SimpleNamespace()
        IterationState(detector, 0, 1).load_state_dict({"loss_normalizers": [30.0, 50.0]})
        return detector.loss_normalizer

    assert [loaded(0, 2), loaded(1, 2)] == [30, 50]
    assert [loaded(0, 1), loaded(3, 4)] == [80, 20]


def test_a_detector_without_a_normaliser_gets_none(monkeypatch):
    detector = SimpleNamespace()
    IterationState(detector, 0, 1).load_state_dict({"loss_normalizers": [None]})
    assert not hasattr(detector, "loss_normalizer")


def test_the_normalisers_are_gathered_for_each_checkpoint_of_period_and_end():
    detector = SimpleNamespace(loss_normalizer=0)
    hook, kept = IterationState(detector, 0, checkpoint_period=3), []
    for i in range(8):
        hook.trainer = SimpleNamespace(iter=i, max_iter=8)
        detector.loss_normalizer = i + 1
        hook.after_step()
        kept.append(hook.state_dict()["loss_normalizers"])
    assert [kept[i] for i in (2, 5, 7)] == [[3], [6], [8]]


def test_each_iteration_of_each_process_draws_its_own_numbers_the_same_each_time():
    def drawn(*key):
        seed_iteration(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    keys = [(1, 2, 0), (1, 3, 0), (1, 2, 1), (2, 2, 0)]
    assert drawn(*keys[0]) == drawn(*keys[0])
    for numbers in zip(*map(lambda key: drawn(*key), keys)):
        assert len(set(numbers)) == len(keys)


def test_a_given_seed_goes_before_the_one_in_the_folder(tmp_path):
    begin(0, 20, None, str(tmp_path), 5, resume=False)
    assert run_seed(7, str(tmp_path), resume=True) == 7
    assert run_seed(0, str(tmp_path), resume=True) == 0


def test_all_processes_take_the_seed_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda seed: [11, seed])
    assert run_seed(-1, str(tmp_path), resume=False) == 11


def test_a_loader_that_cannot_start_later_is_warned_of_only_where_it_must(tmp_path, caplog):
    begin(0, 20, [], str(tmp_path), 5, resume=True)
    assert "cannot start" not in caplog.text
    begin(3, 20, [], str(tmp_path), 5, resume=True)
    assert "list cannot start at iteration 3" in caplog.text


def test_an_open_seed_is_drawn_once_a_run(tmp_path):
    assert run_seed(7, str(tmp_path), resume=True) == 7
    seed = run_seed(-1, str(tmp_path), resume=True)
    assert seed >= 0
    begin(0, 20, None, str(tmp_path), seed, resume=False)
    assert run_seed(-1, str(tmp_path), resume=True) == seed
    assert run_seed(-1, str(tmp_path), resume=False) != seed


def test_processes_that_see_different_checkpoints_do_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda start: [start, 0])
    with pytest.raises(OutputDirError, match=r"different iterations \[0, 20\].*file system"):
        begin(20, 40, None, str(tmp_path), 1, resume=True)
    assert not list(tmp_path.iterdir())


# A program in place of tools/train_net.py. With "careless" a training that resumes ends otherwise.
TRAINING = """
import sys, time
from pathlib import Path
option, _, folder = sys.argv[-3:]
here, folder = Path(sys.argv[0]).parent, Path(folder)
mark = folder / "last_checkpoint"
first = int(mark.read_text()) + 1 if mark.exists() else 0
print("Starting training from iteration", first, flush=True)
for i in range(first, 6):
    (folder / ".partial").touch()
    time.sleep(0.03)
    (folder / ".partial").rename(folder / "model.pth")
    (folder / "mark").write_text(str(i))
    (folder / "mark").rename(mark)  # whole, also if a kill comes now
end = "b.pth" if option == "careless" and first else "a.pth"
(folder / "model_final.pth").write_bytes((here / end).read_bytes())
"""


@pytest.mark.parametrize("option", ["careful", "careless"])
@pytest.mark.slow
def test_the_tool_kills_a_training_and_compares_its_end(option, tmp_path, monkeypatch, capsys):
    """With a small program for the training. test_distributed kills a real one."""
    (tmp_path / "train_net.py").write_text(TRAINING)
    for name, value in (("a.pth", 1.0), ("b.pth", 2.0)):
        torch.save({"model": {"x": torch.tensor(value)}}, tmp_path / name)
    tool = runpy.run_path(str(ROOT / "tools" / "chaos.py"))
    monkeypatch.setitem(tool["main"].__globals__, "TRAIN", tmp_path / "train_net.py")
    command = ["chaos.py", "kill", "--kills", "5", "--seed", "5", "--config-file", "none.yaml"]
    monkeypatch.setattr(sys, "argv", [*command, "--output-dir", str(tmp_path / "out"), option])
    if option == "careless":
        with pytest.raises(SystemExit, match="1 values of .* differ: .model.x"):
            tool["main"]()
        return
    tool["main"]()
    printed = capsys.readouterr().out
    assert printed.count("saving: ") + printed.count("training: ") >= 1
    assert "5 kills" in printed and "bit for bit" in printed


def test_a_run_that_has_more_iterations_than_it_shall_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has done 9 iterations, and the run ends at 5.*MAX_ITER"):
        begin(9, 5, None, str(tmp_path), 7, True)

"""A run that stops anywhere and resumes ends as one that does not."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_trainer, tiny_cfg, weights
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.utils import comm

from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.loader import ResumableLoader
from fgbg_kd.engine.resume import (
    IterationState,
    RunCheckpointer,
    begin,
    rewind_metrics,
    run_seed,
    warm_up,
)
from fgbg_kd.utils.errors import CheckpointError


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
        model.student.head.cls_subnet.append(torch.nn.Dropout(0.3))
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


@pytest.fixture
def run_cfg(distil_cfg):
    distil_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    distil_cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    distil_cfg.SOLVER.OPTIMIZER = "AdamW"
    distil_cfg.SOLVER.BASE_LR = 1e-3
    distil_cfg.TEST.EVAL_PERIOD = 3
    return distil_cfg


def test_a_killed_and_resumed_run_ends_with_the_same_weights(run_cfg, tmp_path):
    """Killed twice, with another number of loading processes after."""
    warm_up(4)  # all runs are in this one process
    run(run_cfg, tmp_path / "whole")
    run(run_cfg, tmp_path / "killed", kill_at=4)
    run_cfg.DATALOADER.NUM_WORKERS = 2
    run(run_cfg, tmp_path / "killed", kill_at=6, resume=True)
    assert run(run_cfg, tmp_path / "killed", resume=True).start_iter == 6
    ends = [torch.load(tmp_path / x / "model_final.pth") for x in ("whole", "killed")]
    assert ends[0]["trainer"]["hooks"] == ends[1]["trainer"]["hooks"]
    for part in ("model", "kd"):
        assert ends[0][part].keys() == ends[1][part].keys() != set()
        assert all(torch.equal(v, ends[1][part][k]) for k, v in ends[0][part].items())
    rows = [json.loads(x) for x in (tmp_path / "killed" / "metrics.json").open()]
    iterations = [r["iteration"] for r in rows]
    assert iterations == sorted(set(iterations))


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
        last, final = (tmp_path / f"model_{x}.pth" for x in ("0000007", "final"))
        assert last.read_bytes() == final.read_bytes()


def test_resuming_elsewhere_in_the_data_would_show(run_cfg, tmp_path):
    """The comparison above can fail: with another seed it does."""
    run(run_cfg, tmp_path / "a")
    run_cfg.SEED += 1
    run(run_cfg, tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(v, b[k]) for k, v in a.items())


# --- the data ---


def ids(loader, count):
    return [[x["image_id"] for x in batch] for batch in itertools.islice(iter(loader), count)]


@pytest.fixture
def data_cfg(coco):
    cfg = tiny_cfg(coco)
    register_datasets(cfg)
    return cfg


def our_loader(cfg):
    return FgBgTrainer.build_train_loader(cfg)


@pytest.mark.parametrize("grouping", [True, False])
def test_the_loader_gives_detectron2s_batches(data_cfg, grouping, monkeypatch):
    data_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    assert ids(our_loader(data_cfg), 20) == ids(build_detection_train_loader(data_cfg), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_anywhere_with_the_same_images_and_augmentation(
    data_cfg, workers, monkeypatch
):
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    data_cfg.INPUT.MIN_SIZE_TRAIN = (48, 56, 64, 72)
    whole = list(itertools.islice(iter(our_loader(data_cfg)), 15))
    assert len({x["image"].shape for batch in whole for x in batch}) > 2
    data_cfg.DATALOADER.NUM_WORKERS = workers
    loader = our_loader(data_cfg)
    batches = iter(loader)
    loader.start = 11
    for batch, expected in zip(batches, whole[11:]):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, expected))


def test_loading_leaves_the_trainings_random_numbers_alone(data_cfg):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    dataset = our_loader(data_cfg).dataset
    dataset[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_more_processes_share_the_batch_of_one(data_cfg, monkeypatch):
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    data_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    data_cfg.SOLVER.IMS_PER_BATCH = 4
    one = list(itertools.islice(iter(our_loader(data_cfg)), 5))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(list(itertools.islice(iter(our_loader(data_cfg)), 5)))
    for batch, a, b in zip(one, *shares):
        both = [x for pair in zip(a, b) for x in pair]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(batch, both))


def test_a_batch_that_cannot_be_shared_is_named(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="16 images .* among 3 processes"):
        ResumableLoader([], mapper=None, sampler=None, total_batch_size=16, seed=0)


# --- checkpoints ---


@pytest.fixture
def saved(tmp_path):
    """A checkpointer with three checkpoints, whose one weight is the iteration."""
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
    assert "model_0000029.pth is damaged" in caplog.text


def test_a_damaged_mark_of_the_last_checkpoint_does_no_harm(saved, tmp_path):
    (tmp_path / "last_checkpoint").write_bytes(b"")
    assert saved.resume_or_load("", resume=True)["iteration"] == 29


def test_no_whole_checkpoint_is_an_error_not_a_new_run(saved, tmp_path):
    for path in tmp_path.glob("*.pth"):
        cut(path)
    with pytest.raises(CheckpointError, match="No checkpoint .* is whole"):
        saved.resume_or_load("", resume=True)


def test_old_checkpoints_go_and_the_newest_stay(saved, tmp_path):
    """By their age: a new run in the folder of a longer one counts from 0 again."""
    saved.max_to_keep = 2
    saved.save("model_0000004", iteration=4)
    assert {x.name for x in tmp_path.glob("*.pth")} == {"model_0000004.pth", "model_0000029.pth"}
    saved.save("model_final", iteration=5)
    assert len(list(tmp_path.glob("*.pth"))) == 3
    with pytest.raises(ValueError, match="CHECKPOINT_MAX_TO_KEEP is 1"):
        RunCheckpointer(saved.model, max_to_keep=1)


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


# --- state ---


def test_the_normaliser_goes_on_in_each_process_and_in_other_numbers_of_them(monkeypatch):
    def loaded(rank, size):
        monkeypatch.setattr(comm, "get_world_size", lambda: size)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        detector = SimpleNamespace()
        IterationState(detector, 0, 1).load_state_dict({"loss_normalizers": [30.0, 50.0]})
        return detector.loss_normalizer

    assert [loaded(0, 2), loaded(1, 2)] == [30, 50]
    assert [loaded(0, 1), loaded(3, 4)] == [80, 20]


def test_an_open_seed_is_drawn_once_a_run(tmp_path):
    assert run_seed(7, str(tmp_path), resume=True) == 7
    seed = run_seed(-1, str(tmp_path), resume=True)
    assert seed >= 0
    begin(0, 20, None, str(tmp_path), seed, resume=False)
    assert run_seed(-1, str(tmp_path), resume=True) == seed
    assert run_seed(-1, str(tmp_path), resume=False) != seed


def test_a_new_run_is_not_resumed_as_the_one_before_it_in_its_folder(distil_cfg, tmp_path):
    make_trainer(FgBgTrainer, distil_cfg, tmp_path, 2).train()
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path, 2)
    trainer.resume_or_load(resume=False)  # and killed before its first checkpoint
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path, 2)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert (tmp_path / "previous" / "model_final.pth").is_file()


def test_processes_that_see_different_checkpoints_do_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda start: [start, 0])
    with pytest.raises(RuntimeError, match=r"from iterations \[0, 20\].*file system that all"):
        begin(20, 40, None, str(tmp_path), 1, resume=True)
    assert not list(tmp_path.iterdir())


def test_the_order_of_images_is_the_seeds_whatever_was_drawn_before(data_cfg):
    def order():
        np.random.seed(None)
        return list(itertools.islice(FgBgTrainer.build_train_loader(data_cfg).sampler, 24))

    assert order() == order()


def rows(*iterations):
    return "".join(json.dumps({"iteration": i, "loss": i / 7}) + "\n" for i in iterations)


@pytest.mark.parametrize(
    "text, kept",
    [
        (rows(19, 39, 59), rows(19, 39)),
        (rows(19, 39) + '{"iteration": 5', rows(19, 39)),
        (rows(19, 39, 59, 19, 39), rows(19, 39, 59, 19, 39)),  # of a run before: not ours
        (rows(19, 39, 59, 19, 39, 59), rows(19, 39, 59, 19, 39)),
        ("", ""),
    ],
)
def test_metrics_of_iterations_that_come_again_are_cut(tmp_path, text, kept):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    rewind_metrics(str(path), 40)
    assert path.read_text() == kept


# --- the whole of it ---


def test_killed_processes_end_as_one_that_is_not(distil_cfg, tmp_path):
    """tools/chaos.py, which says in which iteration and file a run was killed."""
    distil_cfg.SOLVER.MAX_ITER, distil_cfg.SOLVER.CHECKPOINT_PERIOD = 12, 2
    distil_cfg.DATASETS.TEST, distil_cfg.DATASETS.TEST_JSON = (), ""
    (tmp_path / "run.yaml").write_text(distil_cfg.dump())
    command = [sys.executable, str(ROOT / "tools" / "chaos.py"), "kill", "--kills", "2"]
    arguments = ["--config-file", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 kills")

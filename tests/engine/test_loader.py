"""The training data can start at any iteration and equals that of Detectron2's loader."""

import itertools
import random
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.loader import (
    ResumableLoader,
    _leave_interrupts_to_the_training,
    allow_many_open_files,
    derived_seed,
    random_numbers,
)
from fgbg_kd.utils.errors import ConfigError, DataError


def ids(loader, count):
    return [[x["image_id"] for x in batch] for batch in itertools.islice(iter(loader), count)]


@pytest.fixture
def data_cfg(coco):
    cfg = tiny_cfg(coco)
    register_datasets(cfg)
    return cfg


def resumable_loader(cfg):
    return FgBgTrainer.build_train_loader(cfg)


@pytest.mark.parametrize("grouping", [True, False])
def test_the_loader_gives_detectron2s_batches(data_cfg, grouping, monkeypatch):
    data_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    assert ids(resumable_loader(data_cfg), 20) == ids(build_detection_train_loader(data_cfg), 20)


class Picky:
    """A mapper that refuses two images of three."""

    def __init__(self, taken):
        self.taken = taken

    def __call__(self, record):
        return record if record["image_id"] in self.taken else None


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_the_mapper_refuses_is_replaced_in_the_same_way_in_every_run(workers):
    records = [{"image_id": i, "width": 2, "height": 1} for i in range(12)]

    def loader(mapper, workers=0):
        sampler = TrainingSampler(len(records), seed=5)
        arguments = {"sampler": sampler, "total_batch_size": 2, "seed": 3, "num_workers": workers}
        return ResumableLoader(records, mapper=mapper, **arguments)

    picky = Picky({0, 4, 8, 11})
    whole = ids(loader(picky), 20)
    assert {x for batch in whole for x in batch} == picky.taken
    all_taken = ids(loader(Picky(range(12))), 20)
    same = [(x, y) for a, b in zip(whole, all_taken) for x, y in zip(a, b) if y in picky.taken]
    assert len(same) > 5 and all(x == y for x, y in same)
    later = loader(picky, workers)
    later.start = 11
    assert ids(later, 9) == whole[11:]
    with pytest.raises(DataError, match="returned None for 1000 images in a row"):
        ids(loader(Picky(())), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_anywhere_with_the_same_images_and_augmentation(
    data_cfg, workers, monkeypatch
):
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    data_cfg.INPUT.MIN_SIZE_TRAIN = (48, 56, 64, 72)
    whole = list(itertools.islice(iter(resumable_loader(data_cfg)), 15))
    assert len({x["image"].shape for batch in whole for x in batch}) > 2
    data_cfg.DATALOADER.NUM_WORKERS = workers
    loader = resumable_loader(data_cfg)
    batches = iter(loader)
    loader.start = 11
    for batch, expected in zip(batches, whole[11:]):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, expected))


def test_loading_leaves_the_trainings_random_numbers_alone(data_cfg):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    dataset = resumable_loader(data_cfg).dataset
    dataset[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_asking_for_a_batch_leaves_the_trainings_random_numbers_alone(data_cfg):
    loader = resumable_loader(data_cfg)
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), state)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeded_numbers_are_the_seeds_and_then_each_sequence_goes_on():
    def drawn(seed):
        with random_numbers(seed):
            return draw()

    first, again, other = drawn(5), drawn(5), drawn(6)
    assert first == again and all(a != b for a, b in zip(first, other))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyError), random_numbers(5):
        draw()
        raise KeyError
    assert draw() == expected


def test_a_derived_seed_depends_on_the_seed_and_on_each_number_of_its_key():
    seeds = [derived_seed(*x) for x in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))]
    assert len(set(seeds)) == 5 and derived_seed(1, 2, 3) == seeds[0]


def test_a_loading_process_ignores_ctrl_c_and_hides_lost_connections_alone(monkeypatch):
    handlers, told = {}, []
    monkeypatch.setattr(signal, "signal", lambda number, what: handlers.update({number: what}))
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: told.append(kind))
    _leave_interrupts_to_the_training(0)
    for error in (EOFError(), ConnectionResetError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert handlers == {signal.SIGINT: signal.SIG_IGN} and told == [ValueError]


def test_more_processes_share_the_batch_of_one(data_cfg, monkeypatch):
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    data_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    data_cfg.SOLVER.IMS_PER_BATCH = 4
    one = list(itertools.islice(iter(resumable_loader(data_cfg)), 5))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(list(itertools.islice(iter(resumable_loader(data_cfg)), 5)))
    for batch, a, b in zip(one, *shares):
        both = [x for pair in zip(a, b) for x in pair]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(batch, both))


def test_a_batch_that_cannot_be_shared_is_named(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 16, .* equally among 3 processes"):
        ResumableLoader([], mapper=None, sampler=None, total_batch_size=16, seed=0)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 0"):
        ResumableLoader([], mapper=None, sampler=None, total_batch_size=0, seed=0)


def test_the_order_of_images_is_the_seeds_whatever_was_drawn_before(data_cfg):
    def order():
        np.random.seed(None)
        return list(itertools.islice(FgBgTrainer.build_train_loader(data_cfg).sampler, 24))

    assert order() == order()


def test_a_loader_may_open_more_files_than_a_low_limit_allows():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
        allow_many_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_of_open_files_that_is_too_low_is_told_before_the_training(
    data_cfg, monkeypatch, caplog
):
    monkeypatch.setattr("fgbg_kd.engine.loader.allow_many_open_files", lambda: 64)
    FgBgTrainer.build_train_loader(data_cfg)
    assert "ulimit" not in caplog.text  # no loading process
    data_cfg.DATALOADER.NUM_WORKERS = 2
    FgBgTrainer.build_train_loader(data_cfg)
    needed = 100 + 6 * 2 * data_cfg.SOLVER.IMS_PER_BATCH
    assert f"only 64 files on this system, and 2 loading processes may need {needed}" in caplog.text

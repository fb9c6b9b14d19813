"""Training data that can start at any iteration: batch i depends only on the seed and i.

So a checkpoint needs no random states and no position in the data. A saved random state would be
wrong, because the loading processes are some batches ahead of the training.
"""

import contextlib
import itertools
import logging
import random
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from ..utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Number of images that a mapper may refuse (return None for) in a row.
_TRIES = 1000


def derived_seed(seed: int, *key: int) -> int:
    """A 32-bit seed for one use.

    Args:
        seed: the run's seed.
        key: numbers that identify the use, such as iteration and rank. Different keys give
            statistically independent seeds.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


class ResumableLoader:
    """``build_detection_train_loader`` that can start at any iteration.

    Its batches contain the same images as the batches of Detectron2's loader with at most one
    loading process. The number of loading processes does not change the batches.

    The augmentation of each image has its own seed, which depends on the run's seed and the image's
    position in the stream. Detectron2 draws the random numbers from one sequence per process. The
    distribution is the same, but the numbers differ.

    Attributes:
        start: the iteration of the first batch. It can be set until the first batch is requested.

    Example::

        loader = ResumableLoader(
            dataset, mapper=mapper, sampler=sampler, total_batch_size=16, seed=7
        )
        loader.start = 5000
        batch = next(iter(loader))  # the batch of iteration 5000
    """

    def __init__(
        self,
        dataset: Sequence[dict],
        *,
        mapper,
        sampler: Sampler,
        total_batch_size: int,
        seed: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
    ):
        """
        Args:
            seed: for the augmentation, >= 0. The sampler decides the order of the images.
            dataset, mapper, sampler, total_batch_size, aspect_ratio_grouping, num_workers: as in
                ``build_detection_train_loader``.

        Raises:
            ConfigError: the batch cannot be divided equally among the processes.
        """
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % self.world_size:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH is {total_batch_size}, which cannot be divided equally "
                f"among {self.world_size} processes: choose a multiple of {self.world_size}."
            )
        self.batch_size = total_batch_size // self.world_size
        self.mapper, self.grouping = mapper, aspect_ratio_grouping
        self.dataset = _SeededDataset(_Mapped(dataset, mapper), seed)
        self.sampler = sampler
        self.streams = [_Stream(sampler, self.batch_size, self._wide(dataset))]
        self.num_workers = num_workers
        self.start = 0
        limit = allow_many_open_files()
        needed = 100 + 6 * num_workers * self.batch_size  # two batches of three tensors an image
        if num_workers and limit < needed:
            logger.warning(
                f"A process may open only {limit} files on this system, and {num_workers} loading "
                f"processes may need {needed}. At the limit, the training would wait for ever. Let "
                f"an administrator raise it (ulimit -n {needed}), or set DATALOADER.NUM_WORKERS 0."
            )

    def _wide(self, dataset: Sequence[dict]) -> list[bool] | None:
        return [x["width"] > x["height"] for x in dataset] if self.grouping else None

    def mix(self, photos: list[dict], share: float) -> None:
        """Gives a share of each batch to other images. The batch keeps its size.

        Each batch then holds images of both sets. The other images come last. Their order is random
        and depends on the seed only. Call this before the first batch is requested.

        Args:
            photos: dataset dicts of the other images.
            share: share of the other images in a batch, between 0 and 1. Their number is rounded. A
                batch has at least one image of each set.

        Raises:
            ConfigError: see :meth:`number_of`.
        """
        number = self.number_of(share)
        first = len(self.dataset)
        own = _Mapped(photos, _Marking(self.mapper))
        self.dataset.dataset = ConcatDataset([self.dataset.dataset, own])
        sampler = TrainingSampler(len(photos), seed=derived_seed(self.dataset.seed, 0, 0, 0, 1))
        self.streams = [
            self.streams[0]._replace(batch_size=self.batch_size - number),
            _Stream(sampler, number, self._wide(photos), first, key=(0, 1)),
        ]

    def number_of(self, share: float) -> int:
        """The number of other images in a batch of one process, for :meth:`mix`.

        Raises:
            ConfigError: the share is not between 0 and 1, or a process gets one image per batch.
        """
        if not 0 < share < 1:
            raise ConfigError(
                f"MODEL.KD.UNLABELED.SHARE is {share}: give a number between 0 and 1. To train "
                "without these photos, set DATASETS.UNLABELED ()."
            )
        if self.batch_size < 2:
            raise ConfigError(
                "Each process gets one image per batch, but DATASETS.UNLABELED needs one with and "
                f"one without labels: set SOLVER.IMS_PER_BATCH {2 * self.world_size} or more."
            )
        return min(max(round(share * self.batch_size), 1), self.batch_size - 1)

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator function: this code runs when the first batch is requested, not before.
        yield from DataLoader(
            self.dataset,
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_leave_interrupts_to_the_training,
            generator=torch.Generator(),  # the default draws from the training's numbers
        )

    def _batches(self) -> Iterator[list[tuple[int, ...]]]:
        """Endless batches of keys for the dataset."""
        for parts in zip(*(x.batches(self.rank, self.world_size) for x in self.streams)):
            yield [key for part in parts for key in part]


class _Marking:
    """A mapper that marks its images as photos without labels."""

    def __init__(self, mapper):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict | None:
        found = self.mapper(record)  # a user's mapper may drop what it does not know
        return None if found is None else {**found, "unlabeled": True}


class _Stream(NamedTuple):
    """An endless stream of images, and how many of them each batch takes.

    Attributes:
        sampler: gives endless indices. They differ between processes.
        batch_size: number of these images in a batch of one process.
        wide: whether each image is wider than high; None: images are not grouped.
        first: index of the stream's first image in the dataset.
        key: further numbers for the seeds of the augmentation, so that streams differ.
    """

    sampler: Sampler
    batch_size: int
    wide: list[bool] | None
    first: int = 0
    key: tuple[int, ...] = ()

    def batches(self, rank: int, world_size: int) -> Iterator[list[tuple[int, ...]]]:
        """(position in the stream of all processes, ``key``, index of the image) of each image."""
        buckets = [], []  # tall and wide images; only the first if images are not grouped
        for i, index in enumerate(self.sampler):
            bucket = buckets[self.wide[index] if self.wide else 0]
            bucket.append((i * world_size + rank, *self.key, self.first + index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


def allow_many_open_files() -> int:
    """Raises this process's limit of open files as far as a user may, to 65536 at most.

    Loading processes keep a file open for each tensor that they send. At the limit (1024 on many
    systems) they fail in a thread of their own, and the training would wait for them for ever.

    Returns:
        The limit now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may set a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _leave_interrupts_to_the_training(_worker: int) -> None:
    """Makes a loading process ignore Ctrl-C, and end silently when the training ends.

    Ctrl-C reaches all processes of a terminal, but the training ends the loading processes itself.
    If the training ends while a loading process is sending it a tensor, the loading process gets an
    error. This error is not printed. An error in the mapper is raised in the training, as usual.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report = sys.excepthook

    def excepthook(kind, error, trace):
        if not issubclass(kind, (EOFError, ConnectionError)):
            report(kind, error, trace)

    sys.excepthook = excepthook


class _Mapped(Dataset):
    """Dataset dicts, read by a mapper. If it returns None, another dict is drawn.

    Detectron2's MapDataset draws from a state of its own, so that the images of an iteration would
    depend on the earlier ones. Here, :class:`_SeededDataset` has seeded the draw.
    """

    def __init__(self, records: Sequence[dict], mapper):
        self.records, self.mapper = DatasetFromList(records, copy=False), mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        for _ in range(_TRIES):
            if (found := self.mapper(self.records[index])) is not None:
                return found
            index = random.randrange(len(self))
        raise DataError(
            f"The mapper returned None for {_TRIES} images in a row, so there may be none that it "
            "takes: correct the mapper, or leave these images out of the training set."
        )


class _SeededDataset(Dataset):
    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        *position, index = key
        with random_numbers(derived_seed(self.seed, *position)):
            return self.dataset[index]


@contextlib.contextmanager
def random_numbers(seed: int):
    """Seeds Python, NumPy and PyTorch (CPU) inside a ``with`` block, then restores their states.

    Example::

        with random_numbers(seed=7):
            sampler = build_sampler()  # draws the same numbers every time
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

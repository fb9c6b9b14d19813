"""Training data whose batch i is a function of the seed and i, so that a run can resume there.

Nothing about the data has to be saved for that, neither random states nor positions: states saved
would be wrong, since the loading processes are some batches ahead of the training.
"""

import contextlib
import itertools
import random
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler


def derived_seed(seed: int, *key: int) -> int:
    """A seed (32 bits) for one use, unrelated to those of other keys."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


class ResumableLoader:
    """``build_detection_train_loader`` that can start at any iteration.

    Its batches are those of Detectron2's loader with one loading process at most; here their number
    makes no difference. Augmentation is drawn anew for each image, from the seed and the image's
    position in the stream, where Detectron2 draws it from one sequence per process: the same
    distribution, other numbers.

    Attributes:
        start: the iteration of the first batch; it may be set until that is asked for.
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
            seed: of the augmentation, >= 0. The order of images is the sampler's.
            dataset, mapper, sampler, total_batch_size, aspect_ratio_grouping, num_workers:
                those of ``build_detection_train_loader``.

        Raises:
            ValueError: the batch cannot be divided among the processes.
        """
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % self.world_size:
            raise ValueError(
                f"The batch of {total_batch_size} images (SOLVER.IMS_PER_BATCH) cannot be divided "
                f"among {self.world_size} processes: make it a multiple."
            )
        self.batch_size = total_batch_size // self.world_size
        self.wide = [x["width"] > x["height"] for x in dataset] if aspect_ratio_grouping else None
        self.dataset = _SeededDataset(
            MapDataset(DatasetFromList(dataset, copy=False), mapper), seed
        )
        self.sampler = sampler
        self.num_workers = num_workers
        self.start = 0

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator: nothing of this runs before the first batch is asked for.
        yield from DataLoader(
            self.dataset,
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_leave_interrupts_to_the_training,
            generator=torch.Generator(),  # or it would draw from the training's numbers
        )

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Endless batches of (position in the stream of all processes, index of the image)."""
        buckets = [], []  # tall and wide images, where they are grouped
        for i, index in enumerate(self.sampler):
            bucket = buckets[self.wide[index] if self.wide else 0]
            bucket.append((i * self.world_size + self.rank, index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


def _leave_interrupts_to_the_training(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: loading ones end with the training, silent.

    The thread that hands tensors over would report a training that ended in the midst of it. (What
    fails in a mapper is raised in the training, not reported here.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report = sys.excepthook

    def excepthook(kind, error, trace):
        if not issubclass(kind, (EOFError, ConnectionError)):
            report(kind, error, trace)

    sys.excepthook = excepthook


class _SeededDataset(Dataset):
    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        with random_numbers(derived_seed(self.seed, position)):
            return self.dataset[index]


@contextlib.contextmanager
def random_numbers(seed: int):
    """Python, NumPy and PyTorch (CPU) draw as seeded; afterwards they go on as before."""
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

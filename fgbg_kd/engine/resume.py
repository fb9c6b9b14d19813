"""Exact resume: a run that is killed at any moment and resumed ends as if it had not been killed.

Three parts make this possible:

- The data (loader.py) and the random numbers of an iteration depend only on the seed and the
  iteration number. So they need not be saved.
- Detectron2's checkpoints hold the weights, the method's parameters, the optimizer, the schedule
  and the GradScaler. checkpointer.py writes them whole and skips damaged ones.
- This file restores the loss normaliser and the state of TorchScript.
"""

import logging
import os

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.nn import sigmoid_focal_loss_jit
from torch import nn

from ..utils.errors import ConfigError, OutputDirError
from ..utils.files import write_whole
from .checkpointer import RunCheckpointer
from .loader import ResumableLoader, derived_seed
from .run_dir import SEED_FILE, rewind_metrics, set_previous_run_aside

logger = logging.getLogger(__name__)


class IterationState(HookBase):
    """Seeds every iteration, and keeps the loss normaliser of each process in checkpoints.

    Each iteration gets its own seed; the state of the random generators is not saved. So an
    evaluation between two iterations may draw random numbers without changing the training.
    """

    def __init__(self, detector: nn.Module, seed: int, checkpoint_period: int):
        """
        Args:
            detector: the trained detector. Detectron2's dense detectors keep a running mean of the
                number of positive anchors per batch in the attribute ``loss_normalizer``. This
                attribute is not in the state dict.
            seed: the run's seed.
            checkpoint_period: number of iterations between two checkpoints.

        Raises:
            ConfigError: ``checkpoint_period`` is not positive.
        """
        if checkpoint_period < 1:
            raise ConfigError(
                f"SOLVER.CHECKPOINT_PERIOD (train.checkpointer.period) is {checkpoint_period}: set "
                "it to at least 1. With a value over MAX_ITER only the last iteration is saved."
            )
        self.detector, self.seed, self.period = detector, seed, checkpoint_period
        self.normalizers = []

    def before_step(self):
        seed_iteration(self.seed, self.trainer.iter, comm.get_rank())

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            # Gathered here, where all processes are: only the first process saves a checkpoint.
            # As a number: another process may not have the GPU of a tensor.
            normalizer = getattr(self.detector, "loss_normalizer", None)
            self.normalizers = comm.gather(None if normalizer is None else float(normalizer))

    def state_dict(self):
        return {"loss_normalizers": self.normalizers}

    def load_state_dict(self, state):
        normalizers = [n for n in state["loss_normalizers"] if n is not None]
        if len(normalizers) == comm.get_world_size():
            self.detector.loss_normalizer = normalizers[comm.get_rank()]
        elif normalizers:
            # The number of processes has changed, but the total number of positives has not.
            self.detector.loss_normalizer = sum(normalizers) / comm.get_world_size()


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seeds Python, NumPy and PyTorch for one iteration of a run in one process.

    Args:
        seed: the run's seed.
        iteration: number of the iteration, from 0.
        rank: the rank of the process.
    """
    seed_all_rng(derived_seed(seed, iteration, rank))


def run_seed(seed: int, output_dir: str, resume: bool) -> int:
    """The seed of a run, the same in all processes.

    Args:
        seed: the seed in the config. If it is negative, a seed is drawn.
        output_dir: the run's folder, where :func:`begin` writes the seed to seed.txt.
        resume: if true, seed.txt replaces a negative seed (if the file exists).
    """
    path = os.path.join(output_dir, SEED_FILE)
    if seed < 0 and resume and os.path.isfile(path):
        with open(path) as file:
            seed = int(file.read())
    if seed < 0:
        seed = int.from_bytes(os.urandom(3), "big")
    return comm.all_gather(seed)[0]


def begin(start: int, end: int, loader, output_dir: str, seed: int, resume: bool) -> None:
    """Prepares everything that is not in a checkpoint for a run that has done ``start`` iterations.

    It sets the loader's position and writes the seed to seed.txt. It removes the rows of
    metrics.json that the run will write again. If ``start`` is 0, it moves the results of a
    previous run to the folder "previous".

    Args:
        start: the first iteration to compute, as this process found it in the checkpoint.
        end: the number of iterations of the run. If all are done, the last checkpoint becomes
            model_final.pth.
        loader: a :class:`ResumableLoader`. The data of any other loader starts from the beginning.
        output_dir: the run's folder.
        seed: the run's seed.
        resume: whether the user asked to resume.

    Raises:
        OutputDirError: the processes found different checkpoints.
        ConfigError: the checkpoint has more iterations than the run shall have.
    """
    if start > end:
        raise ConfigError(
            f"--resume: the checkpoint in {output_dir} has done {start} iterations, and the run "
            f"ends at {end}. Set SOLVER.MAX_ITER (train.max_iter) over {start} to train on, or use "
            "--eval-only to evaluate."
        )
    if resume and 0 < start == end:
        logger.warning(
            f"The run has done all of its {end} iterations: it is only evaluated. To train on, set "
            "a larger SOLVER.MAX_ITER (train.max_iter)."
        )
    starts = sorted(set(comm.all_gather(start)))
    if len(starts) > 1:
        raise OutputDirError(
            f"The processes would continue from different iterations {starts}: put OUTPUT_DIR "
            f"({output_dir}) on a file system that all machines share."
        )
    if isinstance(loader, ResumableLoader):
        loader.start = start
    elif start:
        logger.warning(
            f"{type(loader).__name__} cannot start at iteration {start}: the training data starts "
            "from the beginning. Use fgbg_kd.engine.loader.ResumableLoader for an exact resume."
        )
    if comm.is_main_process():
        if start == 0:
            set_previous_run_aside(output_dir, resume)
        os.makedirs(output_dir, exist_ok=True)
        write_whole(os.path.join(output_dir, SEED_FILE), f"{seed}\n")
        metrics = os.path.join(output_dir, "metrics.json")
        if resume and os.path.isfile(metrics):
            rewind_metrics(metrics, start, end)
        if resume and 0 < start == end:
            RunCheckpointer(nn.Identity(), output_dir).finish()


def warm_up(iterations: int, device: torch.device | str = "cpu") -> None:
    """Brings TorchScript to the state that it has after a number of iterations on a device.

    TorchScript runs the first calls of a function without optimisation and later calls with it. The
    results differ by rounding. Detectron2's dense detectors script one function: fvcore's focal
    loss. Calls after the fourth change nothing.
    """
    for _ in range(min(iterations, 4)):
        logits = torch.zeros(2, 2, device=device, requires_grad=True)
        labels = torch.zeros_like(logits)
        sigmoid_focal_loss_jit(logits, labels, alpha=0.25, gamma=2.0, reduction="sum").backward()

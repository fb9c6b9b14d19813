"""Exact resume: a run that was killed at any moment ends as if it had not been.

The data (loader.py) and the random numbers of an iteration are functions of the seed and of the
iteration. Weights, adapters, optimizer, schedule and GradScaler are in Detectron2's checkpoints.
What those leave out is here: checkpoints that are whole, and the losses' normaliser.
"""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import zipfile

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss_jit
from torch import nn

from ..utils.errors import CheckpointError
from ..utils.safe_checkpoint import SafeCheckpointer
from .loader import ResumableLoader, derived_seed

logger = logging.getLogger(__name__)

SEED_FILE = "seed.txt"


class RunCheckpointer(SafeCheckpointer):
    """Writes a checkpoint whole or not at all, and resumes from the last one that is whole."""

    def __init__(self, model: nn.Module, save_dir: str = "", *, max_to_keep: int = 0, **kwargs):
        """
        Args:
            max_to_keep: of the periodic checkpoints the last so many, at least 2; 0 = all.
            kwargs: SafeCheckpointer's.
        """
        super().__init__(model, save_dir, **kwargs)
        if max_to_keep < 0 or max_to_keep == 1:
            raise ValueError(
                f"SOLVER.CHECKPOINT_MAX_TO_KEEP is {max_to_keep}: choose 0 (all), or at least 2, "
                "for a damaged checkpoint to have one before it."
            )
        self.max_to_keep = max_to_keep
        self.path_manager = _AtomicWrites(self.path_manager)

    def save(self, name: str, **kwargs) -> None:
        """
        Raises:
            OSError: the disk is full or fails; what was saved before is whole.
        """
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:
            # torch's writer fails over the failed writing, with an error of its own.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                f"{name}.pth could not be written to {self.save_dir} ({cause}). The checkpoint "
                "before it is whole: make room and go on with --resume."
            ) from error
        if self.max_to_keep and self.save_dir and self.save_to_disk:
            for path in self._newest_first(r"model_\d{7}\.pth")[self.max_to_keep :]:
                self.path_manager.rm(path)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """
        Raises:
            CheckpointError: there are checkpoints to resume from, and each is damaged.
        """
        if resume and self.has_checkpoint():
            return self.load(self.last_whole_checkpoint())
        return super().resume_or_load(path, resume=False)

    def last_whole_checkpoint(self) -> str:
        last = self.get_checkpoint_file()
        others = [x for x in self._newest_first(r"model_(\d{7}|final)\.pth") if x != last]
        for path in [last, *others]:
            damage = _damage(path)
            if damage is None:
                return path
            logger.warning(f"{path} is damaged ({damage}): the checkpoint before it is taken.")
        raise CheckpointError(
            f"No checkpoint in {self.save_dir} is whole. Without --resume the run starts anew."
        )

    def finish(self) -> None:
        """Gives the last checkpoint the name model_final, where a run was killed between the two
        writes of its last iteration: no iteration is left that would write it."""
        last = self.last_whole_checkpoint()
        if os.path.basename(last) != "model_final.pth":
            final = os.path.join(self.save_dir, "model_final.pth")
            with open(last, "rb") as source, self.path_manager.open(final, "wb") as target:
                shutil.copyfileobj(source, target)
            self.tag_last_checkpoint("model_final.pth")

    def _newest_first(self, name: str) -> list[str]:
        files = self.get_all_checkpoint_files()
        files = [path for path in files if re.fullmatch(name, os.path.basename(path))]
        return sorted(files, key=os.path.getmtime, reverse=True)


def last_checkpoint(run_dir: str) -> str:
    """Path of the last whole checkpoint in a run's folder, "" if there is none (or no folder).

    Raises:
        CheckpointError: there are some, and each is damaged.
    """
    if not run_dir:
        return ""
    checkpointer = RunCheckpointer(nn.Identity(), run_dir)
    return checkpointer.last_whole_checkpoint() if checkpointer.has_checkpoint() else ""


def _damage(path: str) -> str | None:
    """What is wrong with a .pth file, which is a zip archive with a checksum for each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged archive can raise anything
        return str(error)
    return bad and f"checksum of {bad}"


class _AtomicWrites:
    """A path manager that puts a file in its place when all of it is on the disk."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" not in mode or "://" in path:
            return self._path_manager.open(path, mode, **kwargs)
        return _atomic_write(path, mode)


@contextlib.contextmanager
def _atomic_write(path: str, mode: str):
    folder = os.path.dirname(path) or "."
    partial = os.path.join(folder, ".partial")  # what a kill leaves is overwritten next time
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    os.replace(partial, path)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too
    finally:
        os.close(directory)


class IterationState(HookBase):
    """Seeds every iteration, and keeps the losses' normaliser of each process in checkpoints.

    A seed per iteration, rather than saved states: what runs between two iterations (an evaluation,
    a measurement of the teacher) may draw numbers without changing the training.
    """

    def __init__(self, detector: nn.Module, seed: int, checkpoint_period: int):
        """
        Args:
            detector: a DenseDetector, which keeps the running mean of its positives per batch as
                a plain attribute.
            seed: of the run.
            checkpoint_period: in iterations.
        """
        self.detector, self.seed, self.period = detector, seed, checkpoint_period
        self.normalizers = []

    def before_step(self):
        seed_iteration(self.seed, self.trainer.iter, comm.get_rank())

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            # All processes are here; later only the first one saves.
            self.normalizers = comm.gather(getattr(self.detector, "loss_normalizer", None))

    def state_dict(self):
        return {"loss_normalizers": self.normalizers}

    def load_state_dict(self, state):
        normalizers = [n for n in state["loss_normalizers"] if n is not None]
        if len(normalizers) == comm.get_world_size():
            self.detector.loss_normalizer = normalizers[comm.get_rank()]
        elif normalizers:  # other processes, the same positives in all
            self.detector.loss_normalizer = sum(normalizers) / comm.get_world_size()


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Python, NumPy and PyTorch draw, in that iteration of a run and that process, as seeded."""
    seed = derived_seed(seed, iteration, rank)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_seed(seed: int, output_dir: str, resume: bool) -> int:
    """The seed of a run. A config that leaves it open (-1) gets one, and keeps it on resume.

    Args:
        output_dir: the run's folder; :func:`begin` records the seed there.
    """
    record = os.path.join(output_dir, SEED_FILE)
    if seed < 0 and resume and os.path.isfile(record):
        with open(record) as file:
            seed = int(file.read())
    if seed < 0:
        seed = int.from_bytes(os.urandom(3), "big")
    return comm.all_gather(seed)[0]


def evaluation_dir(output_dir: str) -> str:
    """Where --eval-only writes: a folder below that of a training, whose files stay as they are."""
    trained = os.path.isfile(os.path.join(output_dir, SEED_FILE))
    return os.path.join(output_dir, "eval") if trained else output_dir


def keep_record(output_dir: str) -> None:
    """Copies the config.yaml of a run that began to config.previous.yaml.

    Detectron2 writes it anew at every start, also at one that is then refused.
    """
    record, seed = (os.path.join(output_dir, name) for name in ("config.yaml", SEED_FILE))
    began = os.path.isfile(record) and os.path.isfile(seed)
    if began and os.path.getmtime(seed) >= os.path.getmtime(record):
        shutil.copy2(record, os.path.join(output_dir, "config.previous.yaml"))


def begin(start: int, end: int, loader, output_dir: str, seed: int, resume: bool) -> None:
    """Puts all that is not in a checkpoint where a run of ``start`` iterations would have it.

    Args:
        start: the first iteration to come, on every process.
        end: how many iterations the run has; if all are done, its last checkpoint is the final one.
        loader: a :class:`ResumableLoader`, or another, whose data then begins anew.
        output_dir: the run's folder, which gets a record of the seed. The checkpoints of a run
            before it are moved to its folder "previous" when a new one begins, which would
            otherwise resume from them.

    Raises:
        RuntimeError: the processes see different checkpoints.
    """
    starts = sorted(set(comm.all_gather(start)))
    if len(starts) > 1:
        raise RuntimeError(
            f"The processes would go on from iterations {starts}: the output folder "
            f"({output_dir}) must be on a file system that all machines share."
        )
    if isinstance(loader, ResumableLoader):
        loader.start = start
    elif start:
        logger.warning("The data loader is not this package's own: the data begins anew.")
    warm_up(start)
    if comm.is_main_process():
        if start == 0:
            _set_aside(output_dir)
        with _atomic_write(os.path.join(output_dir, SEED_FILE), "w") as file:
            file.write(f"{seed}\n")
        metrics = os.path.join(output_dir, "metrics.json")
        if resume and os.path.isfile(metrics):
            rewind_metrics(metrics, start)
        if resume and 0 < start == end:
            RunCheckpointer(nn.Identity(), output_dir).finish()


def _set_aside(output_dir: str) -> None:
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    names = [n for n in names if re.fullmatch(r"model_(\d{7}|final)\.pth|last_checkpoint", n)]
    if names:
        previous = os.path.join(output_dir, "previous")
        os.makedirs(previous, exist_ok=True)
        for name in sorted(names):  # last_checkpoint first: killed here, nothing is resumed
            os.replace(os.path.join(output_dir, name), os.path.join(previous, name))
        logger.warning(f"A new run begins: the checkpoints of the one before are in {previous}.")


def warm_up(iterations: int) -> None:
    """Brings TorchScript to the state in which so many iterations leave it.

    It runs the first calls of a function in a process as they are written, and optimises it then;
    the two round differently. fvcore's focal loss is what Detectron2's detectors script.
    """
    for _ in range(min(iterations, 4)):
        logits = torch.zeros(2, 2, requires_grad=True)
        sigmoid_focal_loss_jit(
            logits, torch.zeros(2, 2), alpha=0.25, gamma=2.0, reduction="sum"
        ).backward()


def rewind_metrics(path: str, iteration: int) -> None:
    """Cuts from metrics.json what the last run wrote from an iteration on, for it comes again.

    The file keeps its identity: Detectron2's writer holds it open, to append.
    """
    cut, offset, last = None, 0, -1
    with open(path, "rb") as file:
        for line in file:
            try:
                at = json.loads(line)["iteration"] if line.endswith(b"\n") else None
            except ValueError:
                at = None
            if at is None:  # torn by the kill
                cut = offset if cut is None else cut
                break
            if at < last:  # another run began
                cut = None
            if at >= iteration and cut is None:
                cut = offset
            offset, last = offset + len(line), at
    if cut is not None:
        os.truncate(path, cut)

"""Writes the checkpoints of a run atomically and resumes from the newest undamaged checkpoint."""

import contextlib
import logging
import math
import os
import re
import shutil
import zipfile

from torch import nn

from ..utils.errors import CheckpointError, ConfigError
from ..utils.files import whole
from ..utils.safe_checkpoint import SafeCheckpointer, read_pth
from .ema import WeightAverage

logger = logging.getLogger(__name__)

PARTIAL = ".partial"  # a checkpoint is written to this file, which is then renamed


class RunCheckpointer(SafeCheckpointer):
    """Writes checkpoints atomically and resumes from the newest undamaged checkpoint."""

    def __init__(self, model: nn.Module, save_dir: str = "", *, max_to_keep: int = 0, **kwargs):
        """
        Args:
            max_to_keep: how many of the newest periodic checkpoints to keep, at least 2. 0: all.
            kwargs: passed to SafeCheckpointer.

        Raises:
            ConfigError: ``max_to_keep`` is 1 or negative.
        """
        super().__init__(model, save_dir, **kwargs)
        if max_to_keep < 0 or max_to_keep == 1:
            raise ConfigError(
                f"SOLVER.CHECKPOINT_MAX_TO_KEEP is {max_to_keep}: set it to 0 (keep all) or to "
                "at least 2. A single checkpoint may be damaged."
            )
        self.max_to_keep = max_to_keep
        self.path_manager = _AtomicWrites(self.path_manager)

    def save(self, name: str, **kwargs) -> None:
        """
        Raises:
            OSError: the disk is full or fails. Earlier checkpoints stay intact.
        """
        method = self.checkpointables.get("method")
        if method is not None:
            kwargs["method_name"] = type(method).__name__
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:
            # When a write fails, torch's writer raises a RuntimeError. Its context is the OSError.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                f"{name}.pth could not be written to {self.save_dir} ({cause}). The previous "
                "checkpoint is intact: free some disk space and continue with --resume."
            ) from error
        if self.max_to_keep and self.save_dir and self.save_to_disk:
            for path in self._newest_first(r"model_\d{7}\.pth")[self.max_to_keep :]:
                self.path_manager.rm(path)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """
        Raises:
            CheckpointError: all checkpoints are damaged, a run with other settings wrote them, or
                ``path`` cannot be read.
        """
        if not (resume and self.has_checkpoint()):
            return self._load_start(path)
        last = self.last_whole_checkpoint()
        self._check_same_settings(last)
        return self.load(last)

    def _load_model(self, checkpoint):
        found = super()._load_model(checkpoint)
        if found is not None:
            self._absent = {*found.missing_keys, *(key for key, *_ in found.incorrect_shapes)}
        return found

    def _load_start(self, path: str) -> dict:
        """
        Raises:
            CheckpointError: the file cannot be read, or it has no tensor of the detector.
        """
        self._absent = set()
        try:
            loaded = super().resume_or_load(path, resume=False)
        except (OSError, AssertionError) as error:  # Detectron2 asserts that the file exists
            raise CheckpointError(
                f"MODEL.WEIGHTS (train.init_checkpoint) is {path!r}, which cannot be read ({error})"
                '. Give the path of a checkpoint, or "" to start from random weights. If this '
                "machine has no network, download the file elsewhere and give its path."
            ) from error
        names = {name for name, _ in self.model.named_parameters()}
        if path and names <= self._absent:
            raise CheckpointError(
                f"MODEL.WEIGHTS (train.init_checkpoint) is {path}, but this file has no tensor of "
                f"the detector ({_some(sorted(names))}). Give a checkpoint of this detector or of "
                "its backbone. The weights of a timm backbone belong into MODEL.TIMM.WEIGHTS."
            )
        return loaded

    def _check_same_settings(self, path: str) -> None:
        """Checks, before anything is loaded, that checkpoint and run have the same tensors."""
        saved = read_pth(path)
        changes = [
            *_model_changes(saved.get("model", {}), self.model),
            *_method_changes(saved, self.checkpointables.get("method")),
            *_optimizer_changes(saved.get("trainer", {}), self.checkpointables.get("trainer")),
            *_ema_changes(saved.get("trainer", {}), self.checkpointables.get("trainer")),
        ]
        if changes:
            raise CheckpointError(
                f"--resume: {path} was written with other settings than this run has:\n  "
                + "\n  ".join(changes)
                + f"\nUse the settings in {self.save_dir}/config.previous.yaml (or in config.yaml, "
                "if that file is missing). Or start a new run: omit --resume, or set another "
                "OUTPUT_DIR."
            )

    def last_whole_checkpoint(self) -> str:
        """Path of the newest checkpoint that is not damaged. Damaged ones are logged.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        last = self.get_checkpoint_file()
        others = [x for x in self._newest_first(r"model_(\d{7}|final)\.pth") if x != last]
        for path in [last, *others]:
            damage = _damage(path)
            if damage is None:
                return path
            logger.warning(f"{path} is damaged ({damage}): the previous checkpoint is used.")
        raise CheckpointError(
            f"All checkpoints in {self.save_dir} are damaged: start again without --resume."
        )

    def finish(self) -> None:
        """Copies the last checkpoint to model_final.pth, if that file is missing.

        The last iteration writes a periodic checkpoint and then model_final.pth. If the run was
        killed between the two, a resumed run has no iteration left that writes model_final.pth.
        """
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


def _model_changes(saved: dict, model: nn.Module) -> list[str]:
    state = model.state_dict()
    unlike = [
        f"{k} {tuple(saved[k].shape)}, now {tuple(v.shape)}"
        for k, v in state.items()
        if k in saved and saved[k].shape != v.shape
    ]
    groups = {
        "another number of classes, anchors or channels": unlike,
        "tensors that only the checkpoint has": [k for k in saved if k not in state],
        "tensors that only this run has": [k for k in state if k not in saved],
    }
    return [f"the student: {what}: {_some(keys)}" for what, keys in groups.items() if keys]


def _method_changes(saved: dict, method: nn.Module | None) -> list[str]:
    if ("method" in saved) != (method is not None):
        was, now = ("plain training", "distillation")[:: -1 if method is None else 1]
        return [f"it was {was}, now it is {now} (MODEL.META_ARCHITECTURE, MODEL.KD.TEACHER.CONFIG)"]
    if method is None:
        return []
    was, now = saved.get("method_name"), type(method).__name__
    if was != now:
        return [f"MODEL.KD.METHOD was {was}, now it is {now}"]
    both = saved["method"], method.state_dict()
    shapes = [{k: tuple(v.shape) for k, v in x.items()} for x in both]
    if shapes[0] == shapes[1]:
        return []
    keys = [k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)]
    return [f"a teacher with other levels or channels: {_some(keys)}"]


def _optimizer_changes(saved: dict, trainer) -> list[str]:
    saved = saved.get("_trainer", saved).get("optimizer")
    if saved is None or trainer is None:
        return []
    optimizer = getattr(trainer, "_trainer", trainer).optimizer
    groups = [x["param_groups"] for x in (saved, optimizer.state_dict())]
    # Not all options are compared: a newer PyTorch has more of them.
    kinds = [{"momentum", "betas"} & {*x[0]} for x in groups]
    if kinds[0] != kinds[1]:
        return ["another optimizer (SOLVER.OPTIMIZER)"]
    sizes = [[len(g["params"]) for g in x] for x in groups]
    if sizes[0] != sizes[1]:
        return ["other parameters are trained (BACKBONE.FREEZE_AT, SOLVER.*)"]
    # PyTorch loads the values of the checkpoint, so a new value would have no effect.
    names = {"initial_lr": "the learning rate (SOLVER.BASE_LR)", "weight_decay": "the weight decay"}
    # In a run with a Python config, the schedule adds "initial_lr" only after the resume.
    groups[1] = [{"initial_lr": g["lr"], **g} for g in groups[1]]
    changes = [
        f"{name} was {was[key]:g}, now it is {now[key]:g}"
        for key, name in names.items()
        for was, now in zip(*groups)
        if key in was and key in now and not math.isclose(was[key], now[key], rel_tol=1e-6)
    ]
    return list(dict.fromkeys(changes))


def _ema_changes(saved: dict, trainer) -> list[str]:
    """Of SOLVER.EMA_DECAY. Without it, a run would go on from the mean weights of one with it."""
    name = WeightAverage.__qualname__
    hooks = {type(h).__qualname__ for h in getattr(trainer, "_hooks", ())}
    if trainer is None or name in hooks or name not in saved.get("hooks", {}):
        return []
    return ["SOLVER.EMA_DECAY was not 0, now it is 0"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def last_checkpoint(run_dir: str) -> str:
    """Path of the last undamaged checkpoint in a run's folder; "" if there is none (or no folder).

    Raises:
        CheckpointError: all checkpoints in the folder are damaged.
    """
    if not run_dir:
        return ""
    checkpointer = RunCheckpointer(nn.Identity(), run_dir)
    return checkpointer.last_whole_checkpoint() if checkpointer.has_checkpoint() else ""


def _damage(path: str) -> str | None:
    """What is wrong with a .pth file (a zip archive with checksums). None: it is undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged archive can raise anything
        return str(error)
    return bad and f"wrong checksum of {bad}"


class _AtomicWrites:
    """A path manager that gives a written file its final name only when the file is complete."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" not in mode or "://" in path:
            return self._path_manager.open(path, mode, **kwargs)
        return self._write(path, mode)

    @contextlib.contextmanager
    def _write(self, path: str, mode: str):
        partial = os.path.join(os.path.dirname(path), PARTIAL)
        with whole(path, partial) as place, open(place, mode) as file:
            yield file

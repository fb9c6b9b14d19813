"""Writers of events for Weights & Biases and MLflow, beside Detectron2's writers."""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import log_first_n

from ..utils.errors import ConfigError
from ..utils.files import read_json, write_whole
from ..utils.packages import need
from .run_dir import WRITERS_FILE


class RunWriter(EventWriter):
    """Writes scalars and pictures to one run of a tracking service. Subclasses are the services.

    The run is opened at the first write. Its id is kept in OUTPUT_DIR/writers.json, so that a
    resumed training continues the same run.

    Attributes:
        package: name of the service's Python package. The extra in setup.py has the same name.
    """

    package = ""

    def __init__(self, output_dir: str, window: int = 20):
        """
        Args:
            output_dir: folder of the training.
            window: iterations over which noisy scalars are smoothed by their median, as in
                Detectron2's other writers.

        Raises:
            ConfigError: the package is not installed.
        """
        self.api: Any = need(self.package, self.package, ConfigError)
        self.output_dir, self.window = Path(output_dir), window
        self._opened, self._last = False, -1

    def write(self) -> None:
        storage = get_event_storage()
        scalars, pictures = defaultdict(dict), defaultdict(dict)
        for name, (value, step) in storage.latest_with_smoothing_hint(self.window).items():
            if step > self._last:
                scalars[step][name] = value
        # Detectron2 has no public access to the pictures. Its TensorBoard writer removes them, so
        # it must be the last writer.
        for name, picture, step in storage._vis_data:
            pictures[step][name] = _as_pixels(picture)
        steps = sorted({*scalars, *pictures})
        if steps and not self._opened:
            self._open()
        for step in steps:
            self._send(self.log, scalars[step], pictures[step], step)
        self._last = max([self._last, *steps])

    def _send(self, call: Callable, *values: Any) -> None:
        """Calls the service. If it fails in the middle of a training, the training goes on."""
        try:
            call(*values)
        except Exception as error:  # the services raise many types
            log_first_n(
                logging.WARNING,
                f"{self.package} does not answer, and loses values of this training. TensorBoard "
                f"and metrics.json have them. {type(error).__name__}: {error}",
                name=__name__,
            )

    def _open(self) -> None:
        file = self.output_dir / WRITERS_FILE
        known = read_json(file) if file.is_file() else {}
        try:
            known[self.package] = self.open(known.get(self.package))
        except Exception as error:  # the services raise many types
            raise ConfigError(
                f"{self.package} opens no run: {error}. Check its server and your login, or remove "
                f"{self.package!r} from WRITERS (train.writers)."
            ) from error
        write_whole(file, json.dumps(known))
        self._opened = True

    def close(self) -> None:
        if self._opened:
            self._send(self.finish)

    def open(self, run_id: str | None) -> str:
        """Opens a run and returns its id.

        Args:
            run_id: id of the run that is continued; None: a new run.
        """
        raise NotImplementedError

    def log(self, scalars: dict[str, float], pictures: dict[str, np.ndarray], step: int) -> None:
        """Writes the values of an iteration. Pictures are (H, W, 3) uint8 RGB."""
        raise NotImplementedError

    def finish(self) -> None:
        """Ends the run."""
        raise NotImplementedError


class WandbWriter(RunWriter):
    """Weights & Biases. Its environment variables apply: WANDB_PROJECT, WANDB_MODE=offline, ..."""

    package = "wandb"

    def open(self, run_id: str | None) -> str:
        project = os.environ.get("WANDB_PROJECT", "fgbg_kd")
        self.run = self.api.init(
            project=project,
            name=str(self.output_dir),
            id=run_id,
            resume="allow",
            dir=str(self.output_dir),
        )
        return self.run.id

    def log(self, scalars: dict[str, float], pictures: dict[str, np.ndarray], step: int) -> None:
        images = {name: self.api.Image(picture) for name, picture in pictures.items()}
        self.run.log({**scalars, **images}, step=step)

    def finish(self) -> None:
        self.run.finish()


class MlflowWriter(RunWriter):
    """MLflow. Its environment variables apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""

    package = "mlflow"

    def open(self, run_id: str | None) -> str:
        name = None if run_id else str(self.output_dir)
        return self.api.start_run(run_id=run_id, run_name=name).info.run_id

    def log(self, scalars: dict[str, float], pictures: dict[str, np.ndarray], step: int) -> None:
        self.api.log_metrics({_plain(k): v for k, v in scalars.items()}, step=step)
        for name, picture in pictures.items():
            self.api.log_image(picture, key=_plain(name), step=step)

    def finish(self) -> None:
        self.api.end_run()


WRITERS = {writer.package: writer for writer in (WandbWriter, MlflowWriter)}


def build_writers(names: Sequence[str], output_dir: str) -> list[RunWriter]:
    """The writers of the config key WRITERS. Put them before Detectron2's writers.

    Raises:
        ConfigError: there is no writer of a name, or its package is not installed.
    """
    if unknown := [name for name in names if name not in WRITERS]:
        raise ConfigError(
            f"WRITERS (train.writers) names {unknown[0]!r}: choose from {', '.join(WRITERS)}. "
            "TensorBoard and metrics.json are always written."
        )
    return [WRITERS[name](output_dir) for name in names]


def _plain(name: str) -> str:
    """The name with "_" in place of characters that MLflow refuses. Class names may have them."""
    return re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name)


def _as_pixels(picture: np.ndarray | torch.Tensor) -> np.ndarray:
    """(3, H, W), uint8 or float in 0..1 -> (H, W, 3) uint8."""
    picture = np.asarray(picture).transpose(1, 2, 0)
    return picture if picture.dtype == np.uint8 else (picture * 255).round().astype(np.uint8)

"""Trains with tools/train_net.py, shows a progress bar, and measures steps and the teacher's AP."""

import contextlib
import io
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from ..data import test_size_of, training_classes
from ..detectors.dense import DenseView, num_classes_of
from ..detectors.load import read_detector_config
from ..engine import FgBgTrainer, load_config, read_config, read_for
from ..experiments.runner import Runner
from ..utils.errors import RunError
from ..utils.files import read_json, read_rows, sha256_of, sha256_of_text, write_whole

_TRAIN_NET = Path(__file__).parents[2] / "tools" / "train_net.py"
_FIRST, _LEAST = 2, 6  # steps that are not timed and that are timed, without prefetched batches
_PREFETCHED = 2  # batches of each loading process, PyTorch's default


def find_train_net() -> Path:
    """The path of tools/train_net.py.

    Raises:
        RunError: the package was installed without its repository.
    """
    if not _TRAIN_NET.is_file():
        raise RunError(
            f"{_TRAIN_NET} is not there: install this package from its repository, with "
            "pip install -e ."
        )
    return _TRAIN_NET


class BarRunner(Runner):
    """A :class:`~fgbg_kd.experiments.runner.Runner` with a bar; silent if there is no terminal."""

    def __init__(self, **options):
        super().__init__(find_train_net(), **options)
        self._bar = None

    def run(self, name: str, config: str | Path, output: Path, *args, **options) -> dict:
        self._metrics = output / "metrics.json"
        total = read_config(str(config)).SOLVER.MAX_ITER
        torch.cuda.empty_cache()  # the training is another process on the same GPU
        with tqdm(total=total, desc=name, disable=None, dynamic_ncols=True) as self._bar:
            return super().run(name, config, output, *args, **options)

    def _show(self, name: str, line: str) -> None:
        step = re.search(r"iter: (\d+)\s+total_loss: ", line)
        test = re.search(r"Inference done (\d+/\d+)", line)
        if self._bar.disable or not (step or test):
            return
        if test:
            self._bar.set_postfix_str(f"evaluating, image {test[1]}")
            return
        done = int(step[1]) + 1
        if self._bar.n == 0:  # a resumed run: its first part has no speed
            self._bar.initial = done
        self._bar.n = done
        losses = {k: float(v) for k, v in re.findall(r"(\w*loss\w*): (\S+)", line)}
        self._bar.set_postfix_str(shown_values(losses, read_rows(self._metrics)))

    def say(self, text: str) -> None:
        tqdm.write(text)


def shown_values(losses: dict[str, float], rows: list[dict]) -> str:
    """Losses, mean of the gate on objects and last AP, for the bar.

    Args:
        losses: by name: "total_loss", "loss_kd_fg", ...
        rows: of metrics.json.
    """
    terms = {k: v for k, v in losses.items() if k.startswith("loss_kd")}
    shown = f"loss {losses['total_loss']:.3g}"
    if terms:
        own = sum(v for k, v in losses.items() if k not in {*terms, "total_loss"})
        terms = {"detector": own, **{k.removeprefix("loss_"): v for k, v in terms.items()}}
        shown += f" ({', '.join(f'{k} {v:.3g}' for k, v in terms.items())})"
    values = [shown]
    for key, short in (("kd/fg_gate", "gate"), ("bbox/AP", "AP")):
        found = [row[key] for row in rows if key in row]
        if found:
            values.append(f"{short} {found[-1]:.2f}")
    return ", ".join(values)


@contextlib.contextmanager
def _without_log():
    """Detectron2 does not log in this block. A trainer would otherwise set up a log by itself."""
    logger = logging.getLogger("detectron2")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]


def seconds_per_step(config: Path, num_gpus: int = 1) -> float:
    """The mean time of a training step on this machine, with the loading of its images.

    With several GPUs, it is the time of one GPU with its part of the batch.

    The batches that the loading processes have prefetched are used up before.
    """
    with tempfile.TemporaryDirectory() as folder, _without_log():
        # Photos without labels do not change the time of a step. They are left out here, because
        # otherwise the teacher would first run over all of them.
        opts = ["OUTPUT_DIR", folder, "DATASETS.UNLABELED", "()"]
        batch = read_config(str(config)).SOLVER.IMS_PER_BATCH // num_gpus
        cfg = load_config(str(config), [*opts, "SOLVER.IMS_PER_BATCH", str(batch)])
        prefetched = _PREFETCHED * cfg.DATALOADER.NUM_WORKERS
        first, timed = _FIRST + prefetched, max(_LEAST, prefetched)
        trainer = FgBgTrainer(cfg)
        with EventStorage(1) as trainer.storage:
            for trainer.iter in range(1, first + timed + 1):
                trainer.run_step()
                if trainer.iter == first:
                    start = time.perf_counter()
            return (time.perf_counter() - start) / timed


def teacher_ap(config: Path, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """AP and AP50 of the teacher on the test set, and the check that student and teacher fit.

    The images have the teacher's test size. {} if its classes are not those of the data. A
    two-stage teacher may have other classes, because it gives features only. A one-stage teacher is
    reduced to the student's classes. The result is kept in a file, until a config, the teacher's
    checkpoint or the test annotations change.

    Args:
        config: the config that distils, with student.yaml beside it.
        folder: for the detections and the result.

    Raises:
        FgBgError: of data, config, teacher or output, as at the start of a training.
    """
    kept = folder / "teacher.json"
    cfg = load_config(str(config), ["OUTPUT_DIR", str(folder)])
    theirs = cfg.MODEL.KD.TEACHER
    size, weights = test_size_of(read_detector_config(theirs.CONFIG)), Path(theirs.WEIGHTS)
    parts = [config.read_text(), config.with_name("student.yaml").read_text(), str(size)]
    parts += [sha256_of(f) for f in (weights, Path(cfg.DATASETS.TEST_JSON)) if f.is_file()]
    key = sha256_of_text("".join(parts))
    if kept.is_file() and read_json(kept)["config"] == key:
        return read_json(kept)["result"]
    teacher = FgBgTrainer.build_model(cfg).teacher
    detector, classes = teacher.detector, len(training_classes(cfg))
    number = num_classes_of(detector)
    names = None  # of a teacher that gives features only, and may have other classes
    if not isinstance(teacher.view, DenseView):
        names = list(theirs.CLASSES) or training_classes(read_detector_config(theirs.CONFIG))
        if names is None:
            say(
                "teacher: the names of its classes are not known. Its AP is right only if they are "
                "in the order of the training set's categories. Give them with --classes."
            )
    if number not in (None, classes) or (names and list(names) != list(training_classes(cfg))):
        say(f"teacher: its {number} classes are not the {classes} of the data. It gets no AP.")
        return {}
    say("teacher: evaluating")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        found = FgBgTrainer.test(read_for(teacher, cfg), detector).get("bbox", {})
    result = {k: found[k] for k in ("AP", "AP50") if math.isfinite(found.get(k, math.nan))}
    write_whole(kept, json.dumps({"config": key, "result": result}))
    return result

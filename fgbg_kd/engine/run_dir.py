"""The folder of a run, OUTPUT_DIR: one run at a time uses it, and previous files are kept."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket

from ..utils.errors import OutputDirError

logger = logging.getLogger(__name__)

SEED_FILE = "seed.txt"  # exists once a training has begun in the folder
WRITERS_FILE = "writers.json"  # ids of the run in Weights & Biases and MLflow

_locks = {}  # open files; the kernel releases a lock when its process ends for any reason


def lock_output_dir(path: str) -> None:
    """Creates the folder and locks it until this process ends.

    The lock is a POSIX record lock. Data loading processes do not inherit it. So a run
    that was killed can be resumed at once, even if its loading processes still run.

    Raises:
        OutputDirError: the folder cannot be written, or another run uses it.
    """
    file_name = os.path.realpath(os.path.join(path, ".lock"))
    if file_name in _locks:  # opening and closing the file again would free the lock
        return
    try:
        os.makedirs(path, exist_ok=True)
        file = open(file_name, "a+")
    except OSError as error:
        raise OutputDirError(
            f"OUTPUT_DIR {path} cannot be written ({error}): choose another folder."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(
                f"{file_name} cannot be locked ({error}): do not start a second run in this folder."
            )
        else:
            file.seek(0)
            raise OutputDirError(
                f"OUTPUT_DIR {path} is in use by another run ({file.read().strip()}): choose "
                "another folder, or stop that run."
            ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[file_name] = file


def evaluation_dir(output_dir: str) -> str:
    """The folder that --eval-only writes to.

    If a training has begun in ``output_dir``, the folder is ``output_dir/eval``. So the log and the
    config of the training are not overwritten.
    """
    trained = os.path.isfile(os.path.join(output_dir, SEED_FILE))
    return os.path.join(output_dir, "eval") if trained else output_dir


def keep_previous_config(output_dir: str) -> None:
    """Copies config.yaml to config.previous.yaml if its training has begun.

    Detectron2 overwrites config.yaml at every start, even if the new run is then refused.
    """
    config, seed = (os.path.join(output_dir, name) for name in ("config.yaml", SEED_FILE))
    began = os.path.isfile(config) and os.path.isfile(seed)
    if began and os.path.getmtime(seed) >= os.path.getmtime(config):
        shutil.copy2(config, os.path.join(output_dir, "config.previous.yaml"))


def set_previous_run_aside(output_dir: str, resume: bool = False) -> None:
    """Moves the results of the previous run in this folder to previous/1, previous/2, ...

    The results are its checkpoints, metrics.json, TensorBoard's event files, the ids in
    writers.json, the detections in ``inference``, and a copy of config.previous.yaml. If they
    stayed, the metrics of both runs would be mixed. And if the new run were killed before its first
    checkpoint, --resume would load the previous run's checkpoint.

    Args:
        output_dir: the run's folder.
        resume: True: the run was killed before its first checkpoint and starts at 0 again. The
            metrics are its own, so nothing is moved unless there are checkpoints.
    """
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    checkpoints = [n for n in names if re.fullmatch(r"model_(\d{7}|final)\.pth|last_checkpoint", n)]
    metrics = os.path.join(output_dir, "metrics.json")
    measured = os.path.isfile(metrics) and os.path.getsize(metrics) > 0
    if not checkpoints and (resume or not measured):
        return
    place = _next_place(os.path.join(output_dir, "previous"))
    for name in sorted(checkpoints):  # last_checkpoint first: without it, nothing is resumed
        os.replace(os.path.join(output_dir, name), os.path.join(place, name))
    for name in names:
        events = name.startswith("events.out.tfevents.") and f".{os.getpid()}." not in name
        if events or name == WRITERS_FILE:
            os.replace(os.path.join(output_dir, name), os.path.join(place, name))
    _move_detections(os.path.join(output_dir, "inference"), os.path.join(place, "inference"))
    if measured:  # the new run's writer has already opened the file to append
        shutil.copy2(metrics, os.path.join(place, "metrics.json"))
        os.truncate(metrics, 0)
    config = os.path.join(output_dir, "config.previous.yaml")
    if os.path.isfile(config):
        shutil.copy2(config, place)
    logger.warning(f"A new run begins: the previous run's results are now in {place}.")


def _move_detections(source: str, target: str) -> None:
    """Detectron2's cached annotations (*_coco_format.json) stay: a registered set names them."""
    names = os.listdir(source) if os.path.isdir(source) else []
    for name in (n for n in names if "_coco_format.json" not in n):
        os.makedirs(target, exist_ok=True)
        os.replace(os.path.join(source, name), os.path.join(target, name))


def _next_place(folder: str) -> str:
    os.makedirs(folder, exist_ok=True)
    number = max([int(n) for n in os.listdir(folder) if n.isdecimal()], default=0) + 1
    place = os.path.join(folder, str(number))
    os.mkdir(place)
    return place


def rewind_metrics(path: str, iteration: int, end: int) -> None:
    """Removes the rows of metrics.json that a resumed run writes again.

    Rows of earlier runs in the same file stay. They come before the last place where the iteration
    number decreases. The file is truncated in place, because Detectron2's writer holds it open.

    Args:
        path: path of metrics.json.
        iteration: the first iteration that the resumed run computes.
        end: number of iterations of the resumed run. A run that has ended before has a row with its
            last AP at ``iteration``, which a longer run does not write again.
    """
    cut, offset, last = None, 0, -1
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                row = {}
            at = row.get("iteration")
            if at is None:  # incomplete: the run was killed while it wrote this row
                cut = offset if cut is None else cut
                break
            if at < last:  # another run began
                cut = None
            last_ap = at == iteration < end and "total_loss" not in row
            if at >= iteration and cut is None and not last_ap:
                cut = offset
            offset, last = offset + len(line), at
    if cut is not None:
        os.truncate(path, cut)

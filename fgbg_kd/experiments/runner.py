"""Trainings as child processes: not repeated when done, gone on with when interrupted."""

import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import detectron2
import torch

from ..engine import read_config
from ..utils.errors import RunError
from ..utils.files import read_json, read_rows, write_whole
from .settings import changes, python_settings, settings_of

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COSTS = ("seconds_per_step", "memory_mb", "gpu_memory_mb")
_NOTE_EVERY = 60  # seconds between two lines on a run's progress where they do not overwrite


class Runner:
    """Runs tools/train_net.py in child processes, from any number of threads, and shows progress.

    Left by whatever way, as a context manager, it takes its children with it.

    Args:
        train_net: path of that script.
        threads: OMP_NUM_THREADS of a child; None: as the environment has it.
    """

    def __init__(self, train_net: Path, threads: int | None = None):
        self.train_net = train_net
        self.environment = dict(os.environ)
        if threads:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen] = set()
        self._stopped = False
        self._progress: dict[str, str] = {}
        self._noted: dict[str, float] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Ends all children, data loaders included; no other starts after it."""
        with self._lock:
            self._stopped = True
            for process in self._children:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def run(
        self,
        name: str,
        config: str | Path,
        output: Path,
        opts: list[str],
        reads: Path | None = None,
        eval_only: bool = False,
    ) -> dict:
        """Trains and evaluates, unless that is done already; goes on with what was interrupted.

        A folder belongs to one setting from the start: a run of other settings is refused.

        Args:
            name: for the progress.
            config, opts: YAML file and KEY VALUE overrides, or Python file and KEY=VALUE, for
                train_net.py.
            output: folder of the run. Of its checkpoints model_final.pth stays.
            reads: a checkpoint that the run depends on; its content is a part of the settings.
            eval_only: evaluates MODEL.WEIGHTS instead.

        Returns:
            COCO's metrics by name (None where undefined), "seconds_per_step" (the median),
            "memory_mb" (peak of a process), "gpu_memory_mb" (of tensors; None without a GPU) and
            "commit" (:func:`commit`; of each part, where a run went on under another).

        Raises:
            RunError: other settings, already running, or the training failed.
        """
        output.mkdir(parents=True, exist_ok=True)
        if str(config).endswith(".py"):
            settings = python_settings(Path(config), opts, reads)
            opts = [*opts, f"train.output_dir='{output}'"]
        else:
            opts = [*opts, "OUTPUT_DIR", str(output)]
            settings = settings_of(read_config(str(config), opts), reads)
        with open(output / "train.txt", "a", buffering=1) as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{output}: another process is running this.") from None
            _claim(output, settings)
            done = output / "done.json"
            if done.is_file():
                return read_json(done)
            log.write(f"commit {commit()}\n")  # now: it may be another when the run ends
            command = [sys.executable, str(self.train_net), "--config-file", str(config)]
            command += ["--eval-only" if eval_only else "--resume", *opts]
            self._follow(name, command, log)
        result = _measured(output)
        _tidy(output)
        write_whole(done, json.dumps(result))
        return result

    def _follow(self, name: str, command: list[str], log) -> None:
        """Runs a child to its end; the log gets its output and its peak memory in MB."""
        with self._lock:
            if self._stopped:
                raise RunError("stopped")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=self.environment,
                start_new_session=True,  # Ctrl-C is ours: a child would answer with a traceback
            )
            self._children.add(process)
        try:
            for line in process.stdout:
                log.write(line)
                self._show(name, line)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            self.stop()
            process.wait()
            raise
        finally:
            with self._lock:
                self._children.discard(process)
                self._progress.pop(name, None)
        # Of a run in several parts the most counts: kept here, as what else is measured of them.
        log.write(f"memory {usage.ru_maxrss // (2**20 if sys.platform == 'darwin' else 2**10)}\n")
        if process.returncode:
            *tail, _ = Path(log.name).read_text(errors="replace").splitlines()[-16:]
            raise RunError("\n".join([*tail, f"{name}: failed, see {log.name}"]))

    def _show(self, name: str, line: str) -> None:
        """One line that overwrites itself on a terminal, a line a minute and run elsewhere."""
        step = re.search(r"eta: (\S+)\s+iter: (\d+)\s+total_loss: (\S+)", line)
        test = re.search(r"Inference done (\d+/\d+)", line)
        if step:
            eta, iteration, loss = step.groups()
            text = f"{name}: iteration {int(iteration) + 1}, loss {loss}, {eta} to go"
        elif test:
            text = f"{name}: evaluating, image {test[1]}"
        else:
            return
        with self._lock:
            self._progress[name] = text
            if sys.stdout.isatty():
                self._rewrite(" | ".join(self._progress.values()))
            elif time.monotonic() - self._noted.get(name, -_NOTE_EVERY) >= _NOTE_EVERY:
                self._noted[name] = time.monotonic()
                print(text, flush=True)

    def say(self, text: str) -> None:
        """Prints a line that stays, above the progress."""
        with self._lock:
            if sys.stdout.isatty():
                self._rewrite("")
            print(text, flush=True)

    @staticmethod
    def _rewrite(text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="\r", flush=True)


def commit() -> str:
    """Commit of this package, with a + where tracked files differ from it; "" outside git."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))


def surroundings(threads: int, jobs: int) -> dict:
    """On what a comparison runs, for its rows."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        told = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        models = re.findall(r"model name\s*: (.+)", told)
        hardware = f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
        # How numbers round depends on it: rows of two instruction sets are not of one machine.
        hardware += f", {torch.backends.cpu.get_cpu_capability()}"
    versions = (
        f"PyTorch {torch.__version__.split('+')[0]}, Detectron2 {detectron2.__version__}, "
        f"Python {platform.python_version()}"
    )
    return {"hardware": hardware, "threads": threads, "jobs": jobs, "versions": versions}


def _claim(output: Path, settings: dict) -> None:
    """Writes the settings into a new folder, or checks that an old one has the same."""
    kept = output / "settings.json"
    if not kept.is_file():
        if (output / "metrics.json").exists():
            raise RunError(f"{output} holds a run of unknown settings: move it away.")
        write_whole(kept, json.dumps(settings, indent=1))
    elif changed := changes(read_json(kept), settings):
        raise RunError(
            f"{output} holds a run of other settings: {'; '.join(changed)}. Move it away, or give "
            "another --output."
        )


def _measured(output: Path) -> dict:
    """What train.txt and metrics.json say of metrics (of boxes, last), time, memory and commits."""
    text = (output / "train.txt").read_text(errors="replace")
    found = re.findall(r"Task: bbox$.*?copypaste: ([\d.,nan-]+)$", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise RunError(f"{output / 'train.txt'} tells of no evaluation: is DATASETS.TEST empty?")
    values = {k: float(v) for k, v in zip(METRICS, found[-1].split(","))}
    values = {k: None if math.isnan(v) else v for k, v in values.items()}
    if values["AP"] is None:  # Detectron2's answer where nothing at all was detected
        values |= dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    times = [r["time"] for r in read_rows(output / "metrics.json") if "time" in r]
    memory = [int(v) for v in re.findall(r"^memory (\d+)$", text, re.MULTILINE)]
    gpu = [int(v) for v in re.findall(r"max_mem: (\d+)M", text)]
    return {
        **values,
        "seconds_per_step": statistics.median(times) if times else None,
        "memory_mb": max(memory, default=None),
        "gpu_memory_mb": max(gpu, default=None),
        "commit": ", ".join(dict.fromkeys(re.findall(r"^commit (\S*)$", text, re.MULTILINE))),
    }


def _tidy(output: Path) -> None:
    """Removes what only an interrupted run needs, and detections that are there twice."""
    for path in [*output.glob("model_*.pth"), output / "inference" / "instances_predictions.pth"]:
        if path.name != "model_final.pth":
            path.unlink(missing_ok=True)

"""Trainings in child processes. A finished run is not repeated. An interrupted run is resumed."""

import fcntl
import json
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
from collections.abc import Sequence
from pathlib import Path

import detectron2
import torch

from ..engine import read_config
from ..utils.errors import RunError
from ..utils.files import read_json, read_rows, write_whole
from .run_folder import defined_metrics, last_rows
from .settings import changes, python_settings, settings_of
from .tide import detections_of

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COSTS = ("seconds_per_step", "memory_mb", "gpu_memory_mb")
_NOTE_EVERY = 60  # seconds between two lines about a run, if the output is not a terminal


class Runner:
    """Runs tools/train_net.py in child processes and shows progress. Several threads can use it.

    Use it as a context manager. At the end of the block, it ends all children, also after an error.

    Args:
        train_net: path of tools/train_net.py.
        threads: OMP_NUM_THREADS of a child; None: the value in the environment.
        imports: the user's modules that the children import (train_net.py --import).
        num_gpus: of a child (train_net.py --num-gpus).
    """

    def __init__(
        self,
        train_net: Path,
        threads: int | None = None,
        imports: Sequence[str] = (),
        num_gpus: int = 1,
    ):
        self.train_net, self.num_gpus = train_net, num_gpus
        self.imports = imports
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
        """Ends all children and their data loaders. No child can start after this."""
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
        checkpoint: Path | None = None,
        eval_only: bool = False,
    ) -> dict:
        """Trains and evaluates. A finished run is not repeated. An interrupted run is resumed.

        A folder belongs to one run. A run with other settings is refused.

        Args:
            name: name of the run in the progress.
            config, opts: a YAML file and overrides KEY VALUE, or a Python file and KEY=VALUE.
            output: folder of the run. At the end, it has only the last checkpoint,
                model_final.pth.
            checkpoint: another file that the run reads. Its content is part of the settings.
            eval_only: evaluate MODEL.WEIGHTS without training.

        Returns:
            - COCO's metrics by name, 0..100; None if a metric is not defined.
            - "classes": AP by class. A class without objects in the test set is left out.
            - "detections": 0 if nothing was detected, otherwise absent.
            - "seconds_per_step": median.
            - "memory_mb": peak of the process.
            - "gpu_memory_mb": peak of tensors; None without a GPU.
            - "commit": see :func:`commit`; several commits if the run was resumed with another
              commit.

        Raises:
            RunError: the folder has other settings or is in use, the run failed, or its AP is not
                defined.
        """
        output.mkdir(parents=True, exist_ok=True)
        settings = _settings(config, output, opts, checkpoint)
        python = str(config).endswith(".py")
        own = [f"train.output_dir='{output}'"] if python else ["OUTPUT_DIR", str(output)]
        opts = [*opts, *own]
        with open(output / "train.txt", "a", buffering=1) as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{output} is in use by another process: wait for it, or give another --output."
                ) from None
            _claim(output, settings)
            done = output / "done.json"
            if done.is_file():
                return read_json(done)
            log.write(f"commit {commit()}\n")  # of the start; the commit can change during the run
            command = [sys.executable, str(self.train_net), "--config-file", str(config)]
            command += [x for module in self.imports for x in ("--import", module)]
            if self.num_gpus > 1:
                command += ["--num-gpus", str(self.num_gpus)]
            command += ["--eval-only" if eval_only else "--resume", *opts]
            self._follow(name, command, log)
        result = {**_metrics(output, eval_only), **_costs(output)}
        if result.get("detections") == 0:
            self.say(f"{name}: nothing was detected on the test set, so AP is 0.")
        _tidy(output)
        write_whole(done, json.dumps(result))
        return result

    def _follow(self, name: str, command: list[str], log) -> None:
        """Runs a child to its end. Writes its output and its peak memory in MB to the log."""
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
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the child
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
        # A run that was interrupted has several such lines. The largest value counts.
        log.write(f"memory {usage.ru_maxrss // (2**20 if sys.platform == 'darwin' else 2**10)}\n")
        if process.returncode:
            *tail, _ = Path(log.name).read_text(errors="replace").splitlines()[-16:]
            raise RunError("\n".join([*tail, f"{name}: failed, see {log.name}"]))

    def _show(self, name: str, line: str) -> None:
        """Shows progress: a line that is overwritten on a terminal, otherwise a line per minute."""
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
        """Prints a line that is not overwritten by the progress."""
        with self._lock:
            if sys.stdout.isatty():
                self._rewrite("")
            print(text, flush=True)

    @staticmethod
    def _rewrite(text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="\r", flush=True)


def commit() -> str:
    """The commit of this package, with a + if tracked files differ from it; "" without git."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))


def surroundings(threads: int, jobs: int) -> dict:
    """Hardware and versions on this machine, for the rows of a comparison.

    Args:
        threads: threads per run.
        jobs: runs at a time.
    """
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        models = re.findall(r"model name\s*: (.+)", about)
        hardware = f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
        # Rounding depends on the instruction set.
        hardware += f", {torch.backends.cpu.get_cpu_capability()}"
    versions = (
        f"PyTorch {torch.__version__.split('+')[0]}, Detectron2 {detectron2.__version__}, "
        f"Python {platform.python_version()}"
    )
    return {"hardware": hardware, "threads": threads, "jobs": jobs, "versions": versions}


def check_folder(
    output: Path, config: str | Path, opts: list[str], checkpoint: Path | None = None
) -> None:
    """Refuses a folder that holds another run. Arguments: see :meth:`Runner.run`.

    Raises:
        RunError: the folder has other settings, or unknown ones.
    """
    if (output / "settings.json").is_file() or (output / "metrics.json").exists():
        _check_settings(output, _settings(config, output, opts, checkpoint))


def _settings(config: str | Path, output: Path, opts: list[str], checkpoint: Path | None) -> dict:
    if str(config).endswith(".py"):
        return python_settings(Path(config), opts, checkpoint)
    cfg = read_config(str(config), [*opts, "OUTPUT_DIR", str(output)])
    return settings_of(cfg, checkpoint)


def _claim(output: Path, settings: dict) -> None:
    """Writes the settings into a new folder. Refuses a folder with other settings."""
    _check_settings(output, settings)
    if not (output / "settings.json").is_file():
        write_whole(output / "settings.json", json.dumps(settings, indent=1))


def _check_settings(output: Path, settings: dict) -> None:
    kept = output / "settings.json"
    if not kept.is_file():
        if (output / "metrics.json").exists():
            raise RunError(
                f"{output} holds a run that another tool started: finish it there (--resume), or "
                "move it away."
            )
    elif changed := changes(read_json(kept), settings):
        raise RunError(
            f"{output} holds a run of other settings: {'; '.join(changed)}. Move it away, or give "
            "another --output."
        )


def _metrics(output: Path, eval_only: bool) -> dict:
    """COCO's metrics for boxes after the last iteration; None if a metric is not defined."""
    if eval_only:
        found = read_json(output / "results.json").get("bbox", {})
    else:
        tested = [row for row in last_rows(output) if "bbox/AP" in row]
        found = {k.removeprefix("bbox/"): v for k, v in tested[-1].items()} if tested else {}
    if "AP" not in found:
        raise RunError(
            f"{output} has no AP of boxes. Name one test set in DATASETS.TEST, with boxes."
        )
    file = detections_of(output)
    values = defined_metrics(found, file)
    if "AP" not in values:
        if not file.is_file():
            raise RunError(
                f"{output}: AP is not a number, and there is no {file}. Let the COCOEvaluator "
                "write its detections there."
            )
        raise RunError(
            f"{output}: AP is not a number, although there are {len(read_json(file))} detections: "
            "no box of the test set counts. Its annotations need boxes that are not iscrowd, in "
            "images and classes that the same file lists."
        )
    empty = values["AP"] == 0 and file.is_file() and not read_json(file)
    classes = {k.removeprefix("AP-"): v for k, v in values.items() if k.startswith("AP-")}
    nothing = {"detections": 0} if empty else {}
    return {**{k: values.get(k) for k in METRICS}, "classes": classes, **nothing}


def _costs(output: Path) -> dict:
    """Time per step, peak memory, and the commits of the package during the run."""
    text = (output / "train.txt").read_text(errors="replace")
    times = [r["time"] for r in read_rows(output / "metrics.json") if "time" in r]
    memory = [int(v) for v in re.findall(r"^memory (\d+)$", text, re.MULTILINE)]
    gpu = [int(v) for v in re.findall(r"max_mem: (\d+)M", text)]
    return {
        "seconds_per_step": statistics.median(times) if times else None,
        "memory_mb": max(memory, default=None),
        "gpu_memory_mb": max(gpu, default=None),
        "commit": ", ".join(dict.fromkeys(re.findall(r"^commit (\S*)$", text, re.MULTILINE))),
    }


def _tidy(output: Path) -> None:
    """Removes the checkpoints that only an interrupted run needs, and a copy of the detections."""
    for path in [*output.glob("model_*.pth"), output / "inference" / "instances_predictions.pth"]:
        if path.name != "model_final.pth":
            path.unlink(missing_ok=True)

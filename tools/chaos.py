#!/usr/bin/env python
"""Tests a training run: whether it resumes after kills, and whether its memory stays constant.

Examples:
    tools/chaos.py kill --config-file my_distilled.yaml --kills 20 SOLVER.MAX_ITER 100
    tools/chaos.py soak --config-file my_distilled.yaml SOLVER.MAX_ITER 2000
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _quiet  # noqa: F401
import torch

TRAIN = Path(__file__).with_name("train_net.py")


def start(args, folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), "--config-file", args.config_file, "--resume"]
    with open(folder / "stdout.txt", "a") as log:
        return subprocess.Popen(
            [*command, *args.opts, "OUTPUT_DIR", str(folder)], stdout=log, stderr=log
        )


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"The training failed: see {folder / 'stdout.txt'}.")


# --- kill ---


def kill(args) -> None:
    """Checks that killing and resuming a run many times does not change its final checkpoint."""
    whole, killed = args.output_dir / "whole", args.output_dir / "killed"
    shutil.rmtree(whole, ignore_errors=True)
    process = start(args, whole)
    starting = wait_for(process, lambda: begun(whole))
    training = wait_for(process, lambda: False)
    finish(process, whole)
    print(f"Without a kill: {starting:.1f} s to start, {training:.1f} s to train.")

    rng = random.Random(args.seed)
    kills = writing = runs = 0
    while kills < args.kills:
        shutil.rmtree(killed, ignore_errors=True)
        while kills < args.kills:
            partial = killed / ".partial"
            partial.unlink(missing_ok=True)  # left by the previous kill
            process, starts = start(args, killed), begun(killed)
            moment = rng.choices(("starting", "training", "saving"), (1, 4, 5))[0]
            if moment == "starting":
                wait_for(process, lambda: False, rng.uniform(0, starting))
            elif moment == "training":
                wait_for(process, lambda before=starts: begun(killed) > before)
                wait_for(process, lambda: False, rng.uniform(0, 2 * training / args.kills))
            else:
                wait_for_save(process, partial, rng.randint(0, 2))
            process.kill()
            if process.wait() != -signal.SIGKILL:  # the run ended before the kill
                break
            kills += 1
            writing += partial.exists()
            print(
                f"kill {kills:2}, {moment}: {last(killed)}{', a partial file' * partial.exists()}"
            )
        finish(start(args, killed), killed)
        check_same_end(whole, killed)
        runs += 1
        print(
            f"Run {runs} ends with the same checkpoint as the run that was not killed, bit for bit."
        )
    print(f"{kills} kills, {writing} of them while a checkpoint was being written. Runs: {runs}.")


def begun(folder: Path) -> int:
    """Number of times that the training has begun."""
    return (folder / "stdout.txt").read_text().count("Starting training from iteration")


def wait_for(process: subprocess.Popen, happened, timeout: float = float("inf")) -> float:
    """Waits until an event happens, the process ends, or the timeout is reached.

    Returns:
        How long it waited, in seconds.
    """
    began = time.perf_counter()
    while process.poll() is None and not happened() and time.perf_counter() - began < timeout:
        time.sleep(0.0005)
    return time.perf_counter() - began


def wait_for_save(process: subprocess.Popen, partial: Path, saves: int) -> None:
    """Waits until a number of checkpoints have been written and the next one is being written."""
    for _ in range(saves):
        wait_for(process, partial.exists)
        wait_for(process, lambda: not partial.exists())
    wait_for(process, partial.exists)


def last(folder: Path) -> str:
    mark = folder / "last_checkpoint"
    return mark.read_text() if mark.exists() else "no checkpoint yet"


def check_same_end(a: Path, b: Path) -> None:
    """Ends the tool with an error if the final checkpoints of two runs differ."""
    ends = [torch.load(x / "model_final.pth", weights_only=True) for x in (a, b)]
    differing = list(differences(*ends))
    if differing:
        sys.exit(f"{len(differing)} values of {a} and {b} differ: {', '.join(differing[:5])}")


def differences(a, b, name: str = ""):
    """Yields the names of the values in which two checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for k in a:
            yield from differences(a[k], b[k], f"{name}.{k}")
    elif isinstance(a, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{name}.{i}")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
        yield name


# --- soak ---


def soak(args) -> None:
    """Measures the memory of a run and its loading processes over time."""
    folder = args.output_dir / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    process, samples = start(args, folder), []
    while process.poll() is None:
        time.sleep(args.interval)
        step = iteration(folder / "metrics.json")
        if step and process.poll() is None and (not samples or step > samples[-1][0]):
            samples.append((step, memory(process.pid)))
    finish(process, folder)
    samples = [x for x in samples if x[0] < samples[-1][0]]  # at the last iteration, processes end
    if len(samples) < 8:
        sys.exit(
            f"The run was too short: {len(samples)} samples, at least 8 are needed. Increase "
            "SOLVER.MAX_ITER or decrease --interval."
        )
    print("| iteration | MiB |\n|---|---|")
    for step, size in samples[:: max(len(samples) // 10, 1)]:
        print(f"| {step} | {size:.1f} |")
    # The first quarter is left out, because caches fill during it.
    quarter = len(samples) // 4
    early, late = (
        statistics.median(size for _, size in part)
        for part in (samples[quarter : 2 * quarter], samples[-quarter:])
    )
    print(f"Second quarter {early:.1f} MiB, last quarter {late:.1f} MiB: {late / early - 1:+.2%}")
    if late > 1.02 * early:
        sys.exit("The memory grows by more than 2 %.")


def iteration(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    try:
        return json.loads(lines[-1])["iteration"]
    except (IndexError, ValueError):  # no line yet, or an incomplete one
        return 0


def memory(pid: int) -> float:
    """Memory of a process and its children in MiB. Shared pages are counted once. Linux only."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    own = next((int(x.split()[1]) for x in lines if x.startswith("Pss:")), 0) / 1024
    return own + sum(memory(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (kill, soak):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--config-file", required=True)
        command.add_argument(
            "--output-dir",
            type=Path,
            default=Path("output/chaos"),
            help="folder of the runs, emptied first; default: %(default)s",
        )
        if function is kill:
            command.add_argument("--kills", type=int, default=20)
            command.add_argument(
                "--seed", type=int, default=0, help="seed for the random times of the kills"
            )
        else:
            command.add_argument(
                "--interval", type=float, default=1.0, help="seconds between two measurements"
            )
        command.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()

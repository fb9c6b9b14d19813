#!/usr/bin/env python
"""Trains a student in several ways, over seeds, and shows what each of them gains.

Example:
    tools/compare.py --config-file configs/quickstart/scenes_distilled.yaml --seeds 5 \\
        --methods plain FgBg PKD "PKD WEIGHT=2" "FgBg GATE=off" --set SOLVER.MAX_ITER 1000

A method is `plain` (no distillation) or a name of MODEL.KD.METHOD, and options of its own after it.
A run that was interrupted goes on where it stopped; one that is done is not run again. Every run
adds a line to results.jsonl, from which the tables (results.md) and plots are made. Evaluated are
the weights after the last iteration, once: to choose options, name a validation set by
--set DATASETS.TEST_JSON. The teacher has a row where it has the classes of that set. With --errors
the table says what kinds of errors each method leaves.
"""

import argparse
import datetime
import hashlib
import logging
import os
import platform
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import _quiet  # noqa: F401
import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from fgbg_kd.comparison import (
    PLAIN,
    TEACHER,
    as_recorded,
    fill,
    group,
    heading,
    is_kept,
    markdown,
    method_overrides,
    plot,
)
from fgbg_kd.config import method_options
from fgbg_kd.data import training_classes
from fgbg_kd.detector import build_detector, find_config, read_detector_config, weights_of
from fgbg_kd.engine import load_config, read_config
from fgbg_kd.errors import run_errors, tide, truth_of
from fgbg_kd.methods import METHOD_REGISTRY
from fgbg_kd.records import add_row, read_json, read_rows, write_whole
from fgbg_kd.runs import COUNTED, RunError, Runner, flat, task_of

TRAIN_NET = Path(__file__).with_name("train_net.py")


def folder_name(text: str) -> str:
    """`text` as the name of a folder, unlike that of any other text."""
    name = re.sub(r"[^\w.=+-]+", "_", text)
    return name if name == text else f"{name[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def surroundings(threads: int, jobs: int) -> dict:
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        models = re.findall(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
        hardware = f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
    versions = (
        f"PyTorch {torch.__version__.split('+')[0]}, Detectron2 {detectron2.__version__}, "
        f"Python {platform.python_version()}"
    )
    return {"hardware": hardware, "threads": threads, "jobs": jobs, "versions": versions}


def _read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def train_or_find_teacher(runner: Runner, cfg) -> Path | None:
    """The teacher's checkpoint; trains it if it is what its config would make and is not there."""
    kd = cfg.MODEL.KD.TEACHER
    if not kd.CONFIG:
        raise RunError("MODEL.KD.TEACHER.CONFIG is empty: give a config that distils.")
    named = kd.WEIGHTS or weights_of(kd.CONFIG, read_detector_config(kd.CONFIG))
    weights = Path(named)
    if not weights.is_file() and Path(kd.CONFIG).is_file() and kd.CONFIG.endswith(".yaml"):
        output = Path(read_config(kd.CONFIG).OUTPUT_DIR)
        if output / "model_final.pth" == weights:
            runner.run("teacher", kd.CONFIG, output, [])
    if kd.WEIGHTS and not weights.is_file() and "://" not in kd.WEIGHTS:
        raise RunError(f"MODEL.KD.TEACHER.WEIGHTS is {kd.WEIGHTS}: there is no such file.")
    return weights if weights.is_file() else None


def teacher_evaluation(cfg, teacher: Path | None) -> tuple[str, list[str]]:
    """Config file and overrides by which train_net.py evaluates the teacher on DATASETS.TEST.

    Args:
        teacher: its checkpoint; None: a download, or what its config names.

    Raises:
        RunError: it cannot be evaluated there.
    """
    kd, (test,) = cfg.MODEL.KD.TEACHER, cfg.DATASETS.TEST
    theirs = read_detector_config(kd.CONFIG)
    detector = build_detector(theirs)
    number = getattr(getattr(detector, "roi_heads", detector), "num_classes", None)
    names = list(kd.CLASSES) or training_classes(theirs)
    if names and len(names) != number:  # a config of other data than the detector's says nothing
        names = None
    classes = MetadataCatalog.get(test).get("thing_classes")
    if classes and (number != len(classes) or names and names != list(classes)):
        raise RunError(f"its {number} classes are not the {len(classes)} of {test}.")
    file = find_config(kd.CONFIG)
    weights = str(teacher or kd.WEIGHTS) or weights_of(kd.CONFIG, theirs)
    if isinstance(theirs, CfgNode):
        opts = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", str((test,))]
        for key in ("TEST_JSON", "TEST_IMAGES"):
            opts += [f"DATASETS.{key}", cfg.DATASETS[key]]
        return file, opts
    if cfg.DATASETS.TEST_JSON:
        raise RunError("its Python config cannot read DATASETS.TEST_JSON.")
    opts = {
        "train.init_checkpoint": weights,
        "dataloader.test.dataset.names": test,
        "dataloader.evaluator.dataset_name": test,
        "dataloader.evaluator.output_dir": "${train.output_dir}/inference",
    }
    quoted = [f"{key}='{value}'" for key, value in opts.items()]
    return file, [*quoted, "dataloader.evaluator.tasks=[bbox]"]  # not masks


def has_boxes(truth: Path) -> bool:
    return any(not a.get("iscrowd") for a in read_json(truth).get("annotations", ()))


def compare(args, output: Path) -> None:
    cfg = load_config(args.config_file, args.set)
    if len(cfg.DATASETS.TEST) != 1:
        raise RunError(
            f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} sets: give one to compare on."
        )
    overrides = {spec: [*args.set, *method_overrides(cfg, spec)] for spec in args.methods}
    options = {spec: {} for spec in overrides}
    for spec, opts in overrides.items():
        if spec.split()[0] != PLAIN:
            changed = read_config(args.config_file, opts)
            options[spec] = method_options(changed)
            # What is wrong with a value shows now, not after hours.
            METHOD_REGISTRY.get(changed.MODEL.KD.METHOD)([1], [1], **options[spec])
    if counted := sorted({*args.set[::2]} & {*COUNTED}):
        raise RunError(
            f"--set {' '.join(counted)}: compare.py sets it for each run (--seeds, --output)."
        )
    truth = truth_of(flat(cfg))
    if truth and truth.is_file() and not has_boxes(truth):
        raise RunError(f"{truth} has no box to be found, so there is no AP: give another test set.")
    if args.errors:
        tide()
        if truth is None:
            raise RunError(f"--errors: no COCO file is known of {cfg.DATASETS.TEST[0]}.")
    results = output / "results.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.jobs))
    about = surroundings(threads, args.jobs)
    base = output / (folder_name(" ".join(args.set)) if args.set else "as_configured")

    def record(method: str, seed: int | None, folder: Path, result: dict) -> dict:
        """Adds the run's row, if it is not there yet, or its errors."""
        row = {
            "method": method,
            "seed": seed,
            "config": args.config_file,
            "overrides": args.set,
            "task": task,
            "options": options.get(method, {}),
            **result,
            "folder": str(folder),
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
            **about,
        }
        rows = read_rows(results)
        row = as_recorded(row, rows)
        if not is_kept(row, rows):
            add_row(results, row)
        write_whole(output / "results.md", tables([results], output))
        return row

    def run(name: str, config: str, folder: Path, *rest, **options) -> dict:
        result = runner.run(name, config, folder, *rest, **options)
        return {**result, "errors": run_errors(folder)} if args.errors else result

    failures = []
    with Runner(TRAIN_NET, threads) as runner, ThreadPoolExecutor(args.jobs) as pool:
        try:
            teacher = train_or_find_teacher(runner, cfg)
            task = task_of(cfg, teacher)
            folder = base / TEACHER
            try:
                config, opts = teacher_evaluation(cfg, teacher)
                result = run(TEACHER, config, folder, opts, teacher, eval_only=True)
                record(TEACHER, None, folder, {**result, "seconds_per_step": None})
            except RunError as error:  # the comparison of students stands without it
                runner.say(f"The teacher is not evaluated: {str(error).splitlines()[-1]}")
            jobs = {}
            for seed in range(args.seeds):  # seed by seed: pairs are there early
                for spec, opts in overrides.items():
                    folder = base / folder_name(spec) / f"seed{seed}"
                    opts = [*opts, "SEED", str(seed), "TEST.EVAL_PERIOD", "0"]
                    reads = None if spec.split()[0] == PLAIN else teacher
                    title = f"{spec}, seed {seed}"
                    job = pool.submit(run, title, args.config_file, folder, opts, reads)
                    jobs[job] = (spec, seed, folder)
            for number, job in enumerate(as_completed(jobs), 1):
                spec, seed, folder = jobs[job]
                try:
                    row = record(spec, seed, folder, job.result())
                    done = f"{row['AP']:.2f} AP"
                except RunError as error:
                    failures.append(f"{spec}, seed {seed}: {error}")
                    done = "FAILED"
                runner.say(f"{number}/{len(jobs)} {spec}, seed {seed}: {done} ({folder})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    if failures:
        raise RunError("\n\n".join([*failures, f"{len(failures)} of {len(jobs)} runs failed"]))


def tables(files: list[Path], pictures: Path | None = None) -> str:
    """Markdown of all comparisons in the files, with a plot each in the folder ``pictures``."""
    parts = []
    rows = [row for file in files for row in read_rows(file)]
    for title, methods in group(rows).items():
        parts.append(f"`{heading(title)}`\n\n{markdown(methods)}\n")
        if pictures:
            picture = pictures / f"{folder_name(title)}.png"
            plot(methods, picture)
            parts.append(f"![every seed]({picture.name})\n")
    return "\n".join(parts)


def filling(name: str) -> str:
    """The tables of a document's file of rows."""
    made = tables([Path(name)])
    print(f"{name}: {'made anew' if made else 'no rows here, the table stays as it is'}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="a config that distils")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help='such as plain FgBg "PKD WEIGHT=2"'
    )
    parser.add_argument("--seeds", type=int, default=5, help="0 to one less; default: %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="for all methods")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, threads shared")
    parser.add_argument("--errors", action="store_true", help="kinds of errors too, by tidecv")
    parser.add_argument("--output", type=Path, help="default: output/compare/<name of the config>")
    parser.add_argument(
        "--table-only", type=Path, nargs="+", metavar="FILE", help="results.jsonl: only print them"
    )
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="FILE",
        help="a document: only make its tables anew, from files named as seen from here",
    )
    args = parser.parse_args()
    for file in args.table_only or ():
        if not file.is_file():
            parser.error(f"--table-only: there is no {file}")
    if args.table_only:
        print(tables(args.table_only))
        return
    if args.fill:
        write_whole(args.fill, fill(args.fill.read_text(), filling))
        return
    if not args.config_file or not args.methods:
        parser.error("give --config-file and --methods, or --table-only, or --fill")
    if args.seeds < 1 or args.jobs < 1 or len(args.set) % 2:
        parser.error("--seeds and --jobs: at least 1; --set: pairs of KEY VALUE")
    args.methods = list(dict.fromkeys(" ".join(spec.split()) for spec in args.methods))
    output = args.output or Path("output", "compare", Path(args.config_file).stem)
    compare(args, output)
    print((output / "results.md").read_text())
    print(f"{output / 'results.jsonl'}\n{output / 'results.md'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("fgbg_kd").setLevel(logging.ERROR)  # each run's own log has its notices
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; run it again to go on")
    except (RunError, OSError, ValueError) as error:
        sys.exit(f"compare: {error}")

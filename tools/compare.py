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
import logging
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import _quiet  # noqa: F401

from fgbg_kd.config import method_options
from fgbg_kd.engine import load_config, read_config
from fgbg_kd.experiments.runner import Runner, surroundings
from fgbg_kd.experiments.settings import COUNTED, flat, task_of
from fgbg_kd.experiments.tables import (
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
from fgbg_kd.experiments.teacher_runs import teacher_evaluation, train_or_find_teacher
from fgbg_kd.experiments.tide import has_objects, run_errors, tide, truth_of
from fgbg_kd.methods import METHOD_REGISTRY
from fgbg_kd.utils.errors import RunError
from fgbg_kd.utils.files import add_row, read_rows, sha256_of_text, write_whole

TRAIN_NET = Path(__file__).with_name("train_net.py")


def folder_name(text: str) -> str:
    """`text` as the name of a folder, unlike that of any other text."""
    name = re.sub(r"[^\w.=+-]+", "_", text)
    return name if name == text else f"{name[:60]}-{sha256_of_text(text)[:6]}"


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
    if truth and truth.is_file() and not has_objects(truth):
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
        row = as_recorded(row, rows)  # what ran stays as it was told
        if not is_kept(row, rows):
            add_row(results, row)
        write_whole(output / "results.md", tables([results], output))
        return row

    def run(name: str, config: str, folder: Path, *rest, **how) -> dict:
        result = runner.run(name, config, folder, *rest, **how)
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

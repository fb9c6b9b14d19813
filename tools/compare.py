#!/usr/bin/env python
"""Trains a student with several methods and seeds, and shows the gain of each method.

Example:
    tools/compare.py --config-file configs/quickstart/scenes_distilled.yaml --seeds 5 \\
        --methods plain FgBg PKD "PKD WEIGHT=2" "FgBg GATE=False" --set SOLVER.MAX_ITER 1000

A method is `plain` (no distillation) or a value of MODEL.KD.METHOD. Options follow as KEY=VALUE.
A finished run is not repeated. An interrupted run is resumed. Each run is evaluated once, after its
last iteration, and adds a line to results.jsonl. Tables (results.md) and plots are made from these
lines. The teacher has a row if its classes are the classes of the test set. --errors adds a table
with the kinds of errors of each method (it needs `make analysis`).

Do not choose options on the test set: name a validation set with --set DATASETS.TEST_JSON.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path

import _quiet
from _arguments import add_import_flag

from fgbg_kd.experiments.compare_methods import (
    Comparison,
    compare_methods,
    fill_document,
    tables_of,
)
from fgbg_kd.experiments.method_specs import one_spelling
from fgbg_kd.utils.errors import FgBgError

TRAIN_NET = Path(__file__).with_name("train_net.py")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="a config that distils")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help='such as plain FgBg "PKD WEIGHT=2"'
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of seeds (default: %(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY VALUE", help="overrides for all methods"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on shared cores")
    parser.add_argument("--errors", action="store_true", help="also measure kinds of errors (TIDE)")
    parser.add_argument("--output", type=Path, help="default: output/compare/NAME_OF_THE_CONFIG")
    add_import_flag(parser)
    parser.add_argument(
        "--table-only",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only print the tables of results.jsonl files",
    )
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="FILE",
        help="only update the tables in a document; paths in it are relative to the current folder",
    )
    args = parser.parse_args()
    for file in args.table_only or ():
        if not file.is_file():
            parser.error(f"--table-only: {file} does not exist")
    if not (args.table_only or args.fill or (args.config_file and args.methods)):
        parser.error("give --config-file and --methods, or --table-only, or --fill")
    if args.seeds < 1 or args.jobs < 1 or len(args.set) % 2:
        parser.error("--seeds and --jobs must be at least 1, and --set needs pairs of KEY VALUE")
    return args


def main() -> None:
    args = parse_arguments()
    if args.table_only:
        print(tables_of(args.table_only))
        return
    if args.fill:
        fill_document(args.fill, print)
        return
    comparison = Comparison(
        config_file=args.config_file,
        methods=list(dict.fromkeys(map(one_spelling, args.methods))),
        output=args.output or Path("output", "compare", Path(args.config_file).stem),
        seeds=args.seeds,
        overrides=args.set,
        jobs=args.jobs,
        errors=args.errors,
        imports=args.imports,
    )
    compare_methods(comparison, TRAIN_NET)
    tables = comparison.output / "results.md"
    print(f"{tables.read_text()}\n{comparison.results}\n{tables}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("fgbg_kd").setLevel(logging.ERROR)  # the log of each run has these messages
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: run the same command again to continue")
    except (FgBgError, OSError, ValueError) as error:
        _quiet.stop("compare", error)

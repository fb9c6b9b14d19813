#!/usr/bin/env python
"""Writes an HTML page about runs: tables, curves, pictures and configuration in one file.

Example:
    tools/report.py output/quickstart      writes output/quickstart/report.html
    tools/report.py output/teacher output/plain output/distilled -o my_report.html

A folder is the OUTPUT_DIR of a run, or it contains such folders. Runs whose names differ only in
seed0, seed1, ... are a group. The page needs no network and no other file.

Kinds of errors need tidecv (`make analysis`). Pictures and cost need the checkpoints and the data.
Paths in the configs of the runs are relative to the current folder. The page lists its missing
parts.
"""

import argparse
import logging
import sys
from pathlib import Path

import _quiet
from _arguments import add_import_flag

from fgbg_kd.experiments.report import write_report
from fgbg_kd.utils.errors import FgBgError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the first folder",
    )
    add_import_flag(parser)
    args = parser.parse_args()
    output = args.output or args.folders[0] / "report.html"
    write_report(args.folders, output, lambda text: print(text, file=sys.stderr))
    print(output)


if __name__ == "__main__":
    logging.getLogger("fgbg_kd.engine").setLevel(logging.ERROR)
    try:
        main()
    except (FgBgError, OSError, ValueError) as error:
        _quiet.stop("report", error)

#!/usr/bin/env python
"""Writes a page about finished runs: tables, curves, pictures, configuration, in one HTML file.

Example:
    tools/report.py output/quickstart
    tools/report.py output/teacher output/plain output/distilled -o my_report.html

A folder is that of one run (OUTPUT_DIR) or has runs below it; runs whose names differ in seed0,
seed1, ... alone are one group. The page needs no network and no other file. To show kinds of errors
it needs tidecv; to show pictures and cost, the checkpoints, and the data where the runs' configs
name it, seen from here. What it cannot show it names.
"""

import argparse
import logging
import sys
from pathlib import Path

import _quiet  # noqa: F401

from fgbg_kd.experiments.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    args = parser.parse_args()
    write_report(args.folders, args.output, lambda text: print(text, file=sys.stderr))
    print(args.output)


if __name__ == "__main__":
    logging.getLogger("fgbg_kd.engine").setLevel(logging.ERROR)
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")

#!/usr/bin/env python
"""Prints the published results of Detectron2's model zoo, and the results of your own runs.

Example:
    tools/zoo.py                     reads output/COCO-Detection/NAME, the default of the configs
    tools/zoo.py --runs elsewhere    reads elsewhere/NAME

NAME is a config in configs/COCO-Detection. The table has the columns of Detectron2's MODEL_ZOO.md.
The numbers of a run are from its metrics.json, config.yaml and log.txt.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

import _quiet  # noqa: F401

from fgbg_kd.experiments.run_folder import last_rows, read_config_file
from fgbg_kd.utils.errors import FgBgError
from fgbg_kd.utils.markdown import markdown_table

CONFIGS = Path(__file__).parents[1] / "configs" / "COCO-Detection"
COLUMNS = (
    "name",
    "lr sched",
    "train time (s/iter)",
    "inference time (s/im)",
    "train mem (GB)",
    "box AP",
    "model id",
)
# From MODEL_ZOO.md and projects/ViTDet/README.md of Detectron2, commit 02b5c4e2. They were measured
# on eight V100 GPUs, ViTDet on 64 A100 GPUs.
PUBLISHED = (
    ("RetinaNet R50", "1x", "0.205", "0.041", "4.1", "37.4", "190397773"),
    ("RetinaNet R50", "3x", "0.205", "0.041", "4.1", "38.7", "190397829"),
    ("RetinaNet R101", "3x", "0.291", "0.054", "5.2", "40.4", "190397697"),
    ("Faster R-CNN X101-FPN", "3x", "0.638", "0.098", "6.7", "43.0", "139173657"),
    ("Mask R-CNN ViTDet-B", "100 epochs", "0.314", "0.079", "10.9", "51.6", "325346929"),
)
ONE_SCHEDULE = 90_000  # iterations of "1x"


def run_row(name: str, folder: Path) -> dict[str, str]:
    """The row of a config's run. The run can be missing, unfinished or damaged."""
    row = dict.fromkeys(COLUMNS, "")
    row["name"] = name
    if not (folder / "metrics.json").is_file():
        return row | {"box AP": "not run"}
    try:
        metrics, cfg = last_rows(folder), read_config_file(folder)
        log = (folder / "log.txt").read_text() if (folder / "log.txt").is_file() else ""
    except (FgBgError, OSError, ValueError) as error:  # the other rows are still printed
        print(f"{name}: {error}", file=sys.stderr)
        return row | {"box AP": "damaged"}
    if "SOLVER" in cfg:
        iterations, data = cfg["SOLVER"]["MAX_ITER"], list(cfg["DATASETS"]["TEST"])
    else:  # a .py config
        iterations, data = cfg["train"]["max_iter"], [cfg["dataloader"]["test"]["dataset"]["names"]]
    times_one, rest = divmod(iterations, ONE_SCHEDULE)
    row["lr sched"] = f"{iterations} iterations" if rest else f"{times_one}x"
    if times := [m["time"] for m in metrics if "time" in m]:
        row["train time (s/iter)"] = f"{statistics.median(times):.3f}"
    if inference := re.findall(r"pure compute time: .*\((\S+) s / iter", log):
        row["inference time (s/im)"] = f"{float(inference[-1]):.3f}"
    if memory := re.findall(r"max_mem: (\d+)M", log):
        row["train mem (GB)"] = f"{max(map(int, memory)) / 1024:.1f}"
    final = [m["bbox/AP"] for m in metrics if "bbox/AP" in m and m["iteration"] >= iterations - 1]
    at = metrics[-1]["iteration"] if metrics else 0
    row["box AP"] = f"{final[-1]:.1f}" if final else f"at iteration {at} of {iterations}"
    if data != ["coco_2017_val"]:
        row["box AP"] += f" on {', '.join(data)}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("output") / "COCO-Detection", help="default: %(default)s"
    )
    args = parser.parse_args()
    names = [p.stem for p in sorted(CONFIGS.iterdir()) if not p.name.startswith(("Base-", "_"))]
    rows = [dict(zip(COLUMNS, (f"zoo: {name}", *rest))) for name, *rest in PUBLISHED]
    rows += [run_row(name, args.runs / name) for name in names]
    print(markdown_table(COLUMNS, [row.values() for row in rows]))


if __name__ == "__main__":
    main()

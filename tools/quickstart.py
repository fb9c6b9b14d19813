#!/usr/bin/env python
"""Trains a teacher, a plain student and a distilled student, and shows the gain by distillation.

Example:
    tools/quickstart.py digits                   the same as `make quickstart`
    tools/quickstart.py trees --seeds 3          students with the seeds 0, 1 and 2

A finished run is not repeated. An interrupted run is resumed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import _quiet
import cv2
import numpy as np
from detectron2.data import DatasetCatalog

from fgbg_kd.data.images import pick
from fgbg_kd.detectors.load import load_detector
from fgbg_kd.engine import load_config
from fgbg_kd.experiments.cost import cost, table
from fgbg_kd.experiments.runner import Runner
from fgbg_kd.experiments.side_by_side import draw_side_by_side, read_input
from fgbg_kd.utils.errors import RunError

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parent / "configs" / "quickstart"
METRICS = ("AP", "AP50", "AP75")


def row(name: str, result: dict, model, cfg, example: str) -> dict:
    metrics = {k: round(result[k], 2) for k in METRICS}
    return {"name": name, **metrics, **cost(model, read_input(cfg, example))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=("digits", "scenes", "trees"))
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument(
        "--output", type=Path, help="default: output/quickstart for digits, otherwise output/SET"
    )
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    output = args.output or Path("output") / {"digits": "quickstart"}.get(args.set, args.set)

    for kind in ("pretrained", args.set):
        command = [sys.executable, str(TOOLS / "prepare_data.py"), kind, "--brief"]
        subprocess.run(command, check=True)
    configs = {n: CONFIGS / f"{args.set}_{n}.yaml" for n in ("teacher", "student", "distilled")}
    weights = output / "teacher" / "model_final.pth"

    def run(title: str, config: str, folder: Path, *opts: str) -> tuple[str, dict, Path]:
        teacher = weights if config == "distilled" else None
        result = runner.run(title, configs[config], folder, list(opts), teacher)
        runner.say(f"{title}: {result['AP']:.1f} AP, log in {folder / 'train.txt'}")
        return title, result, folder / "model_final.pth"

    with Runner(TOOLS / "train_net.py") as runner:
        runs = [("teacher", *run("teacher", "teacher", output / "teacher"))]
        for seed in range(args.seeds):
            suffix = f", seed {seed}" if args.seeds > 1 else ""
            opts = ("SEED", str(seed))
            folder = output / f"student_seed{seed}"
            runs.append(("student", *run(f"plain student{suffix}", "student", folder, *opts)))
            folder, opts = output / f"distilled_seed{seed}", (*opts, "MODEL.KD.TEACHER.WEIGHTS")
            title = f"distilled student{suffix}"
            runs.append(("distilled", *run(title, "distilled", folder, *opts, str(weights))))

    cfg = load_config(str(configs["student"]))
    records = pick(DatasetCatalog.get(cfg.DATASETS.TEST[0]), 4)
    rows, models = [], {}
    for config, title, result, checkpoint in runs:
        own_cfg = load_config(str(configs[config]))
        model = load_detector(own_cfg, str(checkpoint))
        rows.append(row(title, result, model, own_cfg, records[0]["file_name"]))
        models.setdefault(title.split(",")[0], (own_cfg, model))  # of the first seed
    (output / "results.json").write_text(json.dumps(rows, indent=1))
    picture = np.vstack([draw_side_by_side(cfg, r, models, score=0.3) for r in records])
    cv2.imwrite(str(output / "comparison.png"), picture)

    print("\n" + table(rows))
    for name in ("plain", "distilled"):
        values = [r["AP"] for r in rows if r["name"].startswith(name)]
        if len(values) > 1:
            print(f"{name}: mean {np.mean(values):.2f}, sd {np.std(values, ddof=1):.2f} AP")
    print(f"\ntable: {output / 'results.json'}")
    print(f"test images, ground truth and detections: {output / 'comparison.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: run the same command again to continue")
    except (RunError, OSError, ValueError, subprocess.CalledProcessError) as error:
        _quiet.stop("\nquickstart", error)

#!/usr/bin/env python
"""Computes the losses of an iteration in which a run stopped at a loss that was not finite.

Example:
    tools/replay.py --config-file my_distilled.yaml output/distilled/not_finite_0000123_rank0.pth
"""

import argparse
import os

import _quiet
import torch
from _arguments import add_import_flag
from detectron2.utils.events import EventStorage

from fgbg_kd.detectors.load import without_pretrained
from fgbg_kd.engine import FgBgTrainer, build_lazy, load_config, load_lazy_config
from fgbg_kd.engine.hooks import beside_detector, detector_of
from fgbg_kd.engine.non_finite import load_batch, not_finite
from fgbg_kd.engine.resume import seed_iteration
from fgbg_kd.utils.errors import CheckpointError, FgBgError
from fgbg_kd.utils.safe_checkpoint import SafeCheckpointer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, help="the .yaml or .py config of the stopped run"
    )
    parser.add_argument("file", help="not_finite_*.pth in the folder of the stopped run")
    parser.add_argument(
        "opts", nargs="*", metavar="OVERRIDE", help="the overrides that the run was started with"
    )
    add_import_flag(parser)
    args = parser.parse_args()

    if args.config_file.endswith(".py"):
        cfg = load_lazy_config(args.config_file, args.opts)
        model, amp = build_lazy(cfg).to(cfg.train.device), cfg.train.amp.enabled
    else:
        cfg = load_config(args.config_file, args.opts)
        model, amp = FgBgTrainer.build_model(without_pretrained(cfg)), cfg.SOLVER.AMP.ENABLED
    detector = detector_of(model)
    if not os.path.isfile(args.file):
        raise FileNotFoundError(f"there is no file {args.file}")
    saved = SafeCheckpointer(detector, **beside_detector(model)).load(args.file)
    if "batch" not in saved:
        raise CheckpointError(
            f"{args.file} holds no batch: give the not_finite_*.pth in the folder of the stopped "
            "run."
        )
    if saved["loss_normalizer"] is not None:
        detector.loss_normalizer = saved["loss_normalizer"]
    batch = load_batch(saved)
    seed_iteration(saved["seed"], saved["iteration"], saved["rank"])
    model.train()
    with (
        EventStorage(saved["iteration"]),
        torch.autocast(next(model.parameters()).device.type, enabled=amp),
    ):
        losses = model(batch)
        where = not_finite(model, batch, losses.values())
    for x in batch:
        boxes = x["instances"].gt_boxes.tensor.tolist() if "instances" in x else []
        print(f"{x.get('file_name', '?')}: {len(boxes)} boxes {boxes}")
    for name, loss in losses.items():
        print(f"{name}: {loss.item()}")
    print(where)


if __name__ == "__main__":
    try:
        main()
    except (FgBgError, OSError) as error:
        _quiet.stop("replay", error)

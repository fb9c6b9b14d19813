#!/usr/bin/env python
"""Computes once more the losses that were not finite, from the file that the stopped run left.

Example:
    tools/replay.py --config-file my_distilled.yaml output/distilled/not_finite_0000123_rank0.pth
"""

import argparse

import _quiet  # noqa: F401
import torch
from detectron2.utils.events import EventStorage

from fgbg_kd.checkpoint import SafeCheckpointer
from fgbg_kd.distiller import FgBgDistiller
from fgbg_kd.engine import FgBgTrainer, load_config
from fgbg_kd.engine.finite import load_batch, not_finite


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args()

    cfg = load_config(args.config_file, args.opts)
    model = FgBgTrainer.build_model(cfg)
    student, parts = model, {}
    if isinstance(model, FgBgDistiller):
        student, parts = model.student, {} if model.kd is None else {"kd": model.kd}
    saved = SafeCheckpointer(student, **parts).load(args.file)
    batch = load_batch(saved)
    model.train()
    with (
        EventStorage(saved["iteration"]),
        torch.autocast(model.device.type, enabled=cfg.SOLVER.AMP.ENABLED),
    ):
        losses = model(batch)
        where = not_finite(model, batch)
    for x in batch:
        boxes = x["instances"].gt_boxes.tensor.tolist() if "instances" in x else []
        print(f"{x.get('file_name', '?')}: {len(boxes)} boxes {boxes}")
    for name, loss in losses.items():
        print(f"{name}: {loss.item()}")
    print(where)


if __name__ == "__main__":
    main()

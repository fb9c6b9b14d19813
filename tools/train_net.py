#!/usr/bin/env python
"""Trains and evaluates a detector, plain or distilled.

Example:
    tools/train_net.py --config-file configs/quickstart/scenes_distilled.yaml OUTPUT_DIR output/run
"""

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from fgbg_kd import student_config
from fgbg_kd.checkpoint import SafeCheckpointer
from fgbg_kd.engine import FgBgTrainer, launch, load_config


def main(args):
    cfg = load_config(args.config_file, args.opts, args.resume)
    default_setup(cfg, args)
    if args.eval_only:  # the student alone: no teacher is built
        model = FgBgTrainer.build_model(student_config(cfg))
        SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = FgBgTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = FgBgTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__.split("\n\n")[1]).parse_args()
    launch(main, args)

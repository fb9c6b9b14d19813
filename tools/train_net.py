#!/usr/bin/env python
"""Trains and evaluates a detector, plain or distilled.

Examples:
    tools/train_net.py --config-file configs/quickstart/digits_distilled.yaml OUTPUT_DIR output/run
    tools/train_net.py --config-file my_distilled.py train.max_iter=9000 model.method.fg_weight=12
    tools/train_net.py --import l1.py --config-file my_distilled.yaml MODEL.KD.METHOD L1
"""

import argparse
import json
from pathlib import Path

import _quiet  # noqa: F401
from _arguments import add_import_flag
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from fgbg_kd import student_config
from fgbg_kd.data import register_datasets
from fgbg_kd.detectors.load import load_exactly, without_pretrained
from fgbg_kd.engine import (
    FgBgTrainer,
    evaluate_lazy,
    evaluation_dir,
    keep_previous_config,
    last_checkpoint,
    launch,
    load_lazy_config,
    load_lazy_student,
    lock_output_dir,
    read_run_config,
    train_lazy,
)
from fgbg_kd.experiments.picture_hook import DistillationPictures
from fgbg_kd.utils.files import write_whole
from fgbg_kd.utils.user_code import import_user_module


def main(args):
    for module in args.imports:  # --num-gpus starts new processes
        import_user_module(module)
    return main_lazy(args) if args.config_file.endswith(".py") else main_yaml(args)


def prepare(cfg, output_dir, args):
    if comm.is_main_process():
        lock_output_dir(output_dir)
        keep_previous_config(output_dir)
    default_setup(cfg, args)
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="fgbg_kd")


def write_results(output_dir, results):
    """Writes the results of an evaluation to results.json, in Detectron2's format."""
    if comm.is_main_process():
        write_whole(Path(output_dir, "results.json"), json.dumps(results, indent=1))
    return results


def main_lazy(args):
    cfg = load_lazy_config(args.config_file, args.opts, args.resume)
    run_dir = cfg.train.output_dir
    if args.eval_only:
        cfg.train.output_dir = evaluation_dir(run_dir)
    prepare(cfg, cfg.train.output_dir, args)
    if args.eval_only:
        results = evaluate_lazy(cfg, load_lazy_student(cfg, run_dir if args.resume else ""))
        return write_results(cfg.train.output_dir, results)
    return train_lazy(cfg, args.resume, pictures(cfg.train.get("vis_period", 0)))


def main_yaml(args):
    cfg = read_run_config(args.config_file, args.opts, args.resume)
    run_dir = cfg.OUTPUT_DIR
    if args.eval_only:
        cfg.defrost()
        cfg.OUTPUT_DIR = evaluation_dir(run_dir)
        cfg.freeze()
    prepare(cfg, cfg.OUTPUT_DIR, args)
    register_datasets(cfg, training=not args.eval_only)
    if args.eval_only:  # only the student is built, no teacher
        model = FgBgTrainer.build_model(without_pretrained(student_config(cfg)))
        load_exactly(model, last_checkpoint(run_dir if args.resume else "") or cfg.MODEL.WEIGHTS)
        results = FgBgTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return write_results(cfg.OUTPUT_DIR, results)
    trainer = FgBgTrainer(cfg, pictures(cfg.VIS_PERIOD))
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def pictures(period: int) -> list[DistillationPictures]:
    return [DistillationPictures(period)] if period > 0 else []


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser(epilog=__doc__.split("\n\n")[1])
    add_import_flag(parser)
    return parser


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())

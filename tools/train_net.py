#!/usr/bin/env python
"""Trains and evaluates a detector, plain or distilled.

Examples:
    tools/train_net.py --config-file configs/quickstart/scenes_distilled.yaml OUTPUT_DIR output/run
    tools/train_net.py --config-file my_distilled.py train.max_iter=9000 model.kd.fg_weight=4
"""

import json
from pathlib import Path

import _quiet  # noqa: F401
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
from fgbg_kd.utils.files import write_whole
from fgbg_kd.utils.user_code import import_user_module


def main(args):
    for module in args.imports:
        import_user_module(module)
    return main_lazy(args) if args.config_file.endswith(".py") else main_yaml(args)


def prepare(cfg, output_dir, args):
    if comm.is_main_process():
        lock_output_dir(output_dir)
        keep_previous_config(output_dir)
    default_setup(cfg, args)
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="fgbg_kd")


def write_results(output_dir, results):
    """Keeps what an evaluation measured, as Detectron2 returns it, in results.json."""
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
    return train_lazy(cfg, args.resume)


def main_yaml(args):
    if args.eval_only:  # the training data need not be there
        args.opts += ["DATASETS.TRAIN_JSON", ""]
    cfg = read_run_config(args.config_file, args.opts, args.resume)
    run_dir = cfg.OUTPUT_DIR
    if args.eval_only:
        cfg.defrost()
        cfg.OUTPUT_DIR = evaluation_dir(run_dir)
        cfg.freeze()
    prepare(cfg, cfg.OUTPUT_DIR, args)
    register_datasets(cfg)
    if args.eval_only:  # the student alone: no teacher is built
        model = FgBgTrainer.build_model(without_pretrained(student_config(cfg)))
        load_exactly(model, last_checkpoint(run_dir if args.resume else "") or cfg.MODEL.WEIGHTS)
        results = FgBgTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return write_results(cfg.OUTPUT_DIR, results)
    trainer = FgBgTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, or a .py file, that registers methods or detectors; may be repeated",
    )
    args = parser.parse_args()
    launch(main, args)

"""Batch, iterations and learning rate from the size of the data and the time that is given."""

import math
import os

import torch
from detectron2.config import CfgNode

from ..utils.errors import ConfigError
from .students import Setting

_EPOCHS = 72  # at most, unless the user asks for more; as long as Detectron2's 6x schedule on COCO
_LONGER = 2  # times as long with random weights
_LEAST = 300  # iterations: a shorter training hardly leaves its warm-up
_LARGEST_BATCH = 16
EVALUATIONS = 5  # of a training
_BETWEEN = 200  # iterations at least


def batch_of(images: int, teacher_batch: int, num_gpus: int = 1, each: int = 1) -> int:
    """The teacher's batch, but from 2 to 16 images and at most a quarter of the training images.

    Then it is rounded for the GPUs. Each gets at least ``each`` images, so many GPUs can exceed
    these bounds.

    Args:
        images: number of training images.
        num_gpus: the batch is a multiple of it.
        each: least number of images for each GPU.
    """
    batch = max(2, min(teacher_batch, _LARGEST_BATCH, images // 4))
    return num_gpus * max(each, batch // num_gpus)


def iterations_of(
    images: int, batch: int, teacher_images: int, pretrained: bool
) -> tuple[int, str]:
    """The number of iterations without a wish of the user, and the reason.

    Args:
        images: number of training images.
        teacher_images: number of images in the teacher's own training, with repetitions.
        pretrained: whether the backbone has trained weights.
    """
    factor = 1 if pretrained else _LONGER
    longer = "" if pretrained else f", times {_LONGER} because the backbone has random weights"
    if teacher_images <= _EPOCHS * images:
        seen, why = factor * teacher_images, f"as many images as the teacher saw{longer}"
    else:
        seen, why = factor * _EPOCHS * images, f"{_EPOCHS} epochs of {images} images{longer}"
    number = math.ceil(seen / batch)
    if number < _LEAST:
        return _LEAST, "the shortest training that this command makes by itself"
    return number, why


def iterations_in(hours: float, step: float, test: float) -> tuple[int, int, str]:
    """The number of iterations and of evaluations in a time.

    Args:
        hours: for all trainings together.
        step: seconds for one step of all trainings together, as measured.
        test: seconds for one evaluation of all trainings together.

    Returns:
        Iterations, evaluations, and the reason for the iterations.

    Raises:
        ConfigError: there is no time for ten iterations.
    """
    seconds = 0.95 * hours * 3600  # the rest is for starts and checkpoints
    evaluations = EVALUATIONS if EVALUATIONS * test <= 0.2 * seconds else 1
    number = int((seconds - evaluations * test) / step)
    if number < 10:
        least = math.ceil(1e4 * (10 * step + test) / 0.95 / 3600) / 1e4
        raise ConfigError(
            f"--hours {hours:g} is time for {max(number, 0)} iterations: a step takes {step:.2f} s "
            f"and an evaluation {test:.0f} s. Give at least --hours {least:g}."
        )
    return number, evaluations, f"--hours {hours:g}, at {step:.2f} s per step on this machine"


def schedule_settings(
    batch: int, iterations: int, why: str, evaluations: int = EVALUATIONS
) -> list[Setting]:
    """The keys of the schedule: AdamW, and a cosine after a warm-up.

    Args:
        why: reason for the number of iterations.
        evaluations: number of evaluations at most.
    """
    # Adam's step grows with the square root of the batch. 0.001 for 4 images is what the configs
    # of configs/ for small data have.
    rate = float(f"{0.0005 * math.sqrt(batch):.1g}")
    return [
        Setting("SOLVER.OPTIMIZER", "AdamW"),
        Setting("SOLVER.BASE_LR", rate, f"0.0005 times the square root of {batch}, rounded"),
        Setting("SOLVER.WEIGHT_DECAY", 0.05),
        Setting("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        Setting("SOLVER.WARMUP_ITERS", min(1000, iterations // 10)),
        Setting("SOLVER.IMS_PER_BATCH", batch, "the teacher's, at most 16 or 1/4 of the images"),
        Setting("SOLVER.MAX_ITER", iterations, why),
        Setting("SOLVER.CHANNELS_LAST", not torch.cuda.is_available(), "shortens a step on a CPU"),
        Setting("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        Setting("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        Setting("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0),
        *_periods(iterations, evaluations),
        Setting("DATALOADER.NUM_WORKERS", min(4, max(1, (os.cpu_count() or 1) // 2))),
        Setting("SEED", 0),
    ]


def rescaled(
    cfg: CfgNode, iterations: int, why: str, evaluations: int = EVALUATIONS
) -> list[Setting]:
    """The keys of another length of a user's schedule. The other keys stay as they are.

    Args:
        cfg: the user's config.
        why: reason for the number of iterations.
        evaluations: number of evaluations at most.
    """
    ratio = iterations / cfg.SOLVER.MAX_ITER
    scaled = "scaled with SOLVER.MAX_ITER"
    return [
        Setting("SOLVER.MAX_ITER", iterations, why),
        Setting("SOLVER.STEPS", [int(step * ratio) for step in cfg.SOLVER.STEPS], scaled),
        Setting("SOLVER.WARMUP_ITERS", int(cfg.SOLVER.WARMUP_ITERS * ratio), scaled),
        *_periods(iterations, evaluations),
    ]


def _periods(iterations: int, evaluations: int) -> list[Setting]:
    """The keys of checkpoints and evaluations during a training."""
    between = max(math.ceil(iterations / evaluations), min(iterations, _BETWEEN))
    return [
        # After Ctrl-C, the same command continues from the last checkpoint.
        Setting("SOLVER.CHECKPOINT_PERIOD", min(1000, max(iterations // 20, 10))),
        Setting("SOLVER.CHECKPOINT_MAX_TO_KEEP", 2),
        Setting("TEST.EVAL_PERIOD", between, "iterations between two evaluations"),
    ]

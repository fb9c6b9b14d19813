"""The teacher of a comparison: its checkpoint is found or trained, and it is evaluated."""

from pathlib import Path

from detectron2.config import CfgNode

from ..data import training_classes
from ..data.classes import set_classes
from ..detectors.load import build_detector, find_config, read_detector_config, weights_of
from ..engine import read_config
from ..utils.errors import RunError
from .runner import Runner


def train_or_find_teacher(runner: Runner, cfg) -> Path | None:
    """Finds the teacher's checkpoint.

    If the file does not exist, but training with the teacher's own YAML config would write it, the
    teacher is trained first.

    Args:
        cfg: a config that distils.

    Returns:
        Path of the checkpoint; None if it is a download.

    Raises:
        RunError: the config names no teacher, or the checkpoint does not exist.
    """
    teacher = cfg.MODEL.KD.TEACHER
    if not teacher.CONFIG:
        raise RunError("MODEL.KD.TEACHER.CONFIG is empty: give a config that distils.")
    named = teacher.WEIGHTS or weights_of(teacher.CONFIG, read_detector_config(teacher.CONFIG))
    weights, config = Path(named), Path(teacher.CONFIG)
    if not weights.is_file() and config.is_file() and config.suffix == ".yaml":
        output = Path(read_config(teacher.CONFIG).OUTPUT_DIR)
        if output / "model_final.pth" == weights:
            runner.run("teacher", teacher.CONFIG, output, [])
    if teacher.WEIGHTS and not weights.is_file() and "://" not in teacher.WEIGHTS:
        raise RunError(
            f"MODEL.KD.TEACHER.WEIGHTS is {teacher.WEIGHTS}: there is no such file. Train the "
            "teacher, or name its checkpoint."
        )
    return weights if weights.is_file() else None


def teacher_evaluation(cfg, checkpoint: Path | None) -> tuple[str, list[str]]:
    """The config file and overrides for train_net.py to evaluate the teacher on DATASETS.TEST.

    Args:
        cfg: a config that distils.
        checkpoint: path of the teacher's checkpoint. None: MODEL.KD.TEACHER.WEIGHTS, or the weights
            that the teacher's config names.

    Raises:
        RunError: the teacher has other classes than the test set, or its config cannot name the
            test set.
    """
    teacher, (test,) = cfg.MODEL.KD.TEACHER, cfg.DATASETS.TEST
    teacher_cfg = read_detector_config(teacher.CONFIG)
    _check_classes(teacher, teacher_cfg, test)
    file = find_config(teacher.CONFIG)
    weights = str(checkpoint or teacher.WEIGHTS) or weights_of(teacher.CONFIG, teacher_cfg)
    if isinstance(teacher_cfg, CfgNode):
        opts = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", str((test,))]
        for key in ("TEST_JSON", "TEST_IMAGES"):
            opts += [f"DATASETS.{key}", cfg.DATASETS[key]]
        return file, opts
    if cfg.DATASETS.TEST_JSON:
        raise RunError(
            "its config is Python and cannot read DATASETS.TEST_JSON. Register the test set in a "
            "module (--import) and name it in DATASETS.TEST."
        )
    opts = {
        "train.init_checkpoint": weights,
        "dataloader.test.dataset.names": test,
        "dataloader.evaluator.dataset_name": test,
        "dataloader.evaluator.output_dir": "${train.output_dir}/inference",
    }
    quoted = [f"{key}='{value}'" for key, value in opts.items()]
    return file, [*quoted, "dataloader.evaluator.tasks=[bbox]"]  # not masks


def _check_classes(teacher: CfgNode, teacher_cfg, test: str) -> None:
    """Refuses a teacher with other classes than the test set."""
    detector = build_detector(teacher_cfg)
    number = getattr(getattr(detector, "roi_heads", detector), "num_classes", None)
    names = list(teacher.CLASSES) or training_classes(teacher_cfg)
    if names and len(names) != number:  # its config names other data than its training data
        names = None
    classes = set_classes(test)
    if classes and (number != len(classes) or names and names != classes):
        raise RunError(f"its {number} classes are not the {len(classes)} of {test}.")

"""The teacher of a comparison as runs of its own: trained where it is missing, and evaluated."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..data import training_classes
from ..detectors.load import build_detector, find_config, read_detector_config, weights_of
from ..engine import read_config
from ..utils.errors import RunError
from .runner import Runner


def train_or_find_teacher(runner: Runner, cfg) -> Path | None:
    """The teacher's checkpoint; trains it if it is what its config would make and is not there."""
    kd = cfg.MODEL.KD.TEACHER
    if not kd.CONFIG:
        raise RunError("MODEL.KD.TEACHER.CONFIG is empty: give a config that distils.")
    named = kd.WEIGHTS or weights_of(kd.CONFIG, read_detector_config(kd.CONFIG))
    weights = Path(named)
    if not weights.is_file() and Path(kd.CONFIG).is_file() and kd.CONFIG.endswith(".yaml"):
        output = Path(read_config(kd.CONFIG).OUTPUT_DIR)
        if output / "model_final.pth" == weights:
            runner.run("teacher", kd.CONFIG, output, [])
    if kd.WEIGHTS and not weights.is_file() and "://" not in kd.WEIGHTS:
        raise RunError(f"MODEL.KD.TEACHER.WEIGHTS is {kd.WEIGHTS}: there is no such file.")
    return weights if weights.is_file() else None


def teacher_evaluation(cfg, teacher: Path | None) -> tuple[str, list[str]]:
    """Config file and overrides by which train_net.py evaluates the teacher on DATASETS.TEST.

    Args:
        teacher: its checkpoint; None: a download, or what its config names.

    Raises:
        RunError: it cannot be evaluated there.
    """
    kd, (test,) = cfg.MODEL.KD.TEACHER, cfg.DATASETS.TEST
    theirs = read_detector_config(kd.CONFIG)
    detector = build_detector(theirs)
    number = getattr(getattr(detector, "roi_heads", detector), "num_classes", None)
    names = list(kd.CLASSES) or training_classes(theirs)
    if names and len(names) != number:  # a config of other data than the detector's says nothing
        names = None
    classes = MetadataCatalog.get(test).get("thing_classes")
    if classes and (number != len(classes) or names and names != list(classes)):
        raise RunError(f"its {number} classes are not the {len(classes)} of {test}.")
    file = find_config(kd.CONFIG)
    weights = str(teacher or kd.WEIGHTS) or weights_of(kd.CONFIG, theirs)
    if isinstance(theirs, CfgNode):
        opts = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", str((test,))]
        for key in ("TEST_JSON", "TEST_IMAGES"):
            opts += [f"DATASETS.{key}", cfg.DATASETS[key]]
        return file, opts
    if cfg.DATASETS.TEST_JSON:
        raise RunError("its Python config cannot read DATASETS.TEST_JSON.")
    opts = {
        "train.init_checkpoint": weights,
        "dataloader.test.dataset.names": test,
        "dataloader.evaluator.dataset_name": test,
        "dataloader.evaluator.output_dir": "${train.output_dir}/inference",
    }
    quoted = [f"{key}='{value}'" for key, value in opts.items()]
    return file, [*quoted, "dataloader.evaluator.tasks=[bbox]"]  # not masks

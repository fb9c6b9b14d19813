"""What the student takes from its teacher: family, levels, anchors, input and schedule."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..config import get_fgbg_kd_cfg
from ..data import resize_of, test_size_of
from ..detectors.dense import DenseView, DetectorView
from ..detectors.load import read_detector_config
from ..teacher import Teacher
from ..utils.errors import ConfigError
from .data import is_voc

# Strides of the levels that a timm model with an FPN can give: p2 to p7.
STRIDES = (4, 8, 16, 32, 64, 128)
_COMMON = (8, 16, 32)
# Keys that a family needs, so that its student can be written: MODEL.<FAMILY>.<KEY>.
_FAMILY_KEYS = {"IN_FEATURES", "NUM_CLASSES", "NUM_CONVS"}
# Keys with which the student is trained and tested as its teacher was.
_FURTHER = (
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "DATALOADER.SAMPLER_TRAIN",
    "DATALOADER.REPEAT_THRESHOLD",
    "TEST.DETECTIONS_PER_IMAGE",
)
# RetinaNet's anchors (Lin et al., 2017, section 4): three sizes per octave, three shapes.
_OCTAVES, _RATIOS = [2 ** (i / 3) for i in range(3)], [0.5, 1.0, 2.0]


@dataclass(frozen=True)
class TeacherFacts:
    """What the student takes from its teacher.

    Attributes:
        name: class of the teacher.
        family: meta-architecture of the student. It is the teacher's own if its config keys let a
            student be written, and otherwise the default of MODEL.KD.STUDENT.
        strides: of the student's levels, in pixels.
        anchors: SIZES and ASPECT_RATIOS of MODEL.ANCHOR_GENERATOR; {} if the family has none.
        own_anchors: whether these are the teacher's anchors.
        head: keys of MODEL.<FAMILY> that the student takes from the teacher.
        pixel_format, mean, std: of the teacher's input.
        train_sizes, train_limit: INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN.
        test_size, test_limit: INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.
        input: further keys of INPUT, by name.
        further: keys of DATALOADER and TEST, by full name.
        iterations, batch: of the teacher's own training.
    """

    name: str
    family: str
    strides: list[int]
    anchors: dict[str, list]
    own_anchors: bool
    head: dict[str, Any]
    pixel_format: str
    mean: list[float]
    std: list[float]
    train_sizes: list[int]
    train_limit: int
    test_size: int
    test_limit: int
    iterations: int
    batch: int
    input: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        """Names of the student's levels: p3 has stride 8."""
        return [f"p{STRIDES.index(stride) + 2}" for stride in self.strides]


def check_class_order(teacher: Teacher, train: Sequence[str], classes: Sequence[str]) -> None:
    """Refuses PASCAL VOC data if the names of the teacher's classes are not known.

    Such data have names, but no order of classes. So class i of the student would be another class
    than class i of the teacher.

    Args:
        train: the paths of the training data, as the user gave them.
        classes: names of the training set's classes.

    Raises:
        ConfigError: the teacher's class names are not known.
    """
    dense = isinstance(teacher.view, DenseView)
    if dense and teacher.class_names is None and len(classes) > 1 and is_voc(Path(train[0])):
        raise ConfigError(
            "PASCAL VOC data have no order of classes, and the names of the teacher's classes are "
            "not known: give them with --classes, in the order of the teacher. The names in the "
            f"data are {', '.join(classes)}."
        )


def facts_of(config: str, teacher: Teacher) -> TeacherFacts:
    """Reads what a student needs from a teacher and its config.

    Args:
        config: of the teacher, as for :func:`~fgbg_kd.teacher.build_teacher`.
    """
    cfg, of = read_detector_config(config), teacher.view
    family = _family(of)
    strides = _strides(of)
    mean, std = ([round(v, 4) for v in x.flatten().tolist()] for x in of.normalization)
    anchors = _anchors(of, strides, cfg)
    has_none = family == of.name and any(len(c) < 2 for c in of.cell_anchors)
    recipe = _recipe(cfg, of)
    if of.input_size:  # it warps each image to one size; the student keeps the shape of images
        side = min(of.input_size)
        recipe |= {"train_sizes": [side], "test_size": side}
        recipe |= {"train_limit": side * 5 // 3, "test_limit": side * 5 // 3}
        recipe.get("input", {}).pop("MIN_SIZE_TRAIN_SAMPLING", None)  # "range" needs two sizes
    return TeacherFacts(
        name=of.name,
        family=family,
        strides=strides,
        anchors=anchors or ({} if has_none else _similar_anchors(of, strides)),
        own_anchors=anchors is not None,
        head=_head(cfg, family) if family == of.name else {},
        pixel_format=of.channel_order,
        mean=mean,
        std=std,
        **recipe,
    )


def _family(of: DetectorView) -> str:
    keys = get_fgbg_kd_cfg().MODEL
    has_keys = keys.get(of.name.upper(), {}).keys() >= _FAMILY_KEYS
    return of.name if isinstance(of, DenseView) and has_keys else keys.KD.STUDENT


def _head(cfg: CfgNode | DictConfig, family: str) -> dict[str, Any]:
    """The keys of the family that the teacher's config changes, such as thresholds."""
    if not isinstance(cfg, CfgNode):
        return {}
    own, default = (c.MODEL[family.upper()] for c in (cfg, get_fgbg_kd_cfg()))
    return {k: v for k, v in own.items() if v != default[k] and k not in _FAMILY_KEYS}


def _strides(of: DetectorView) -> list[int]:
    """The teacher's strides if a timm FPN has all of them; otherwise as many as possible.

    An FPN with P6 or P7 makes them from P5, so stride 32 is always there.
    """
    theirs = [level.stride for level in of.levels]
    if isinstance(of, DenseView) and 32 in theirs and set(theirs) <= set(STRIDES):
        return sorted(theirs)
    coarse = [s for s in (64, 128) if s in theirs]
    return [*_COMMON, *coarse]


def _anchors(
    of: DetectorView, strides: Sequence[int], cfg: CfgNode | DictConfig
) -> dict[str, list] | None:
    """The teacher's anchors as sizes and ratios; None if they are no such product.

    The values of the config are taken if they give these anchors: they are exact, so that student
    and teacher are compared anchor by anchor. If no key sets the anchors, a single one per cell
    stands for a detector without anchors.
    """
    if not isinstance(of, DenseView) or [x.stride for x in of.levels] != list(strides):
        return None
    cells = [c.detach().float().cpu() for c in of.cell_anchors]
    if not of.anchors_in_config and any(len(c) < 2 for c in cells):
        return None
    found, exact = _named_anchors(cfg), 0.0
    if found is None or not _gives(found, cells):
        sizes, ratios = zip(*(_factors(c) for c in cells))
        same = all(r == ratios[0] for r in ratios)
        found = {"SIZES": list(sizes), "ASPECT_RATIOS": [ratios[0]] if same else list(ratios)}
        exact = 1e-2
    if not _gives(found, cells, exact):
        return None
    return {**found, "OFFSET": of.anchor_offset} if of.anchor_offset else found


def _named_anchors(cfg: CfgNode | DictConfig) -> dict[str, list] | None:
    """The anchors that a config names."""
    if isinstance(cfg, CfgNode):
        return {k: list(cfg.MODEL.ANCHOR_GENERATOR[k]) for k in ("SIZES", "ASPECT_RATIOS")}
    node = OmegaConf.select(cfg, "model.anchor_generator") or {}
    if "sizes" not in node or "aspect_ratios" not in node:
        return None
    node = OmegaConf.to_container(node)
    ratios = node["aspect_ratios"]
    nested = ratios if isinstance(ratios[0], (list, tuple)) else [ratios]
    return {"SIZES": node["sizes"], "ASPECT_RATIOS": nested}


def _gives(anchors: dict[str, list], cells: Sequence[Tensor], atol: float = 0.0) -> bool:
    """Whether sizes and ratios give the anchors of each level, (A_l, 4)."""
    strides = [1] * len(cells)
    try:
        made = DefaultAnchorGenerator(
            sizes=anchors["SIZES"], aspect_ratios=anchors["ASPECT_RATIOS"], strides=strides
        )
    except AssertionError:  # of another number of levels
        return False
    pairs = zip(made.cell_anchors, cells)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


def _factors(cell: Tensor) -> tuple[list[float], list[float]]:
    """(A, 4) XYXY -> the sizes and the ratios height / width, in their order."""
    width, height = (cell[:, 2:] - cell[:, :2]).unbind(1)
    found = (width * height).sqrt(), height / width
    sizes, ratios = (list(dict.fromkeys(round(v, 4) for v in x.tolist())) for x in found)
    return sizes, ratios


def _similar_anchors(of: DetectorView, strides: Sequence[int]) -> dict[str, list]:
    """RetinaNet's shapes, in sizes that suit the teacher's objects.

    On the same levels, the sizes are those of the teacher's anchors. Otherwise there are three per
    octave, as in RetinaNet. The smallest is that of a two-stage teacher's first stage. Without such
    a stage, it is 4 strides, as in RetinaNet.
    """
    if isinstance(of, DenseView) and [x.stride for x in of.levels] == list(strides):
        areas = [(c[:, 2:] - c[:, :2]).prod(1).sqrt().tolist() for c in of.cell_anchors]
        if all(len(a) > 1 for a in areas):
            sizes = [sorted({round(size, 1) for size in level}) for level in areas]
            return {"SIZES": sizes, "ASPECT_RATIOS": [_RATIOS]}
    smallest = 4.0 * strides[0]
    proposals = getattr(of.detector, "proposal_generator", None)
    if hasattr(proposals, "anchor_generator"):
        cells = torch.cat(list(proposals.anchor_generator.cell_anchors))
        smallest = float((cells[:, 2:] - cells[:, :2]).prod(1).sqrt().min())
    sizes = [[round(smallest * s / strides[0] * x, 2) for x in _OCTAVES] for s in strides]
    return {"SIZES": sizes, "ASPECT_RATIOS": [_RATIOS]}


def _recipe(cfg: CfgNode | DictConfig, view: DetectorView) -> dict[str, Any]:
    """Sizes of images, augmentation, sampling and schedule."""
    if not isinstance(cfg, CfgNode):
        return _python_recipe(cfg, view)
    of, default = cfg.INPUT, get_fgbg_kd_cfg().INPUT
    kept = {k: of[k] for k in ("RANDOM_FLIP", "MIN_SIZE_TRAIN_SAMPLING") if of[k] != default[k]}
    if of.CROP.ENABLED:
        kept |= {f"CROP.{k}": v for k, v in of.CROP.items()}
    return {
        "train_sizes": list(of.MIN_SIZE_TRAIN),
        "train_limit": of.MAX_SIZE_TRAIN,
        "test_size": of.MIN_SIZE_TEST,
        "test_limit": of.MAX_SIZE_TEST,
        "iterations": cfg.SOLVER.MAX_ITER,
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()},
        "further": _changed(cfg, _FURTHER),
    }


def _changed(cfg: CfgNode, keys: Sequence[str]) -> dict[str, Any]:
    """The values of those keys that differ from the defaults."""
    default = get_fgbg_kd_cfg()
    own = {key: attrgetter(key)(cfg) for key in keys}
    return {key: value for key, value in own.items() if value != attrgetter(key)(default)}


def _python_recipe(cfg: DictConfig, view: DetectorView) -> dict[str, Any]:
    """The same from a Python config. Parts that it lacks have Detectron2's defaults."""
    default = get_fgbg_kd_cfg()
    resize = resize_of(OmegaConf.select(cfg, "dataloader.train")) or {}
    train = resize.get("short_edge_length", default.INPUT.MIN_SIZE_TRAIN)
    train = [train] if isinstance(train, int) else list(train)
    limit = resize.get("max_size", sys.maxsize if resize else default.INPUT.MAX_SIZE_TRAIN)
    test_size, test_limit = test_size_of(cfg) or (
        default.INPUT.MIN_SIZE_TEST,
        default.INPUT.MAX_SIZE_TEST,
    )
    # "range" is the default of ResizeShortestEdge, but in a YAML config it needs two sizes.
    ranged = resize and resize.get("sample_style", "range") == "range" and len(train) == 2
    further = {"MIN_SIZE_TRAIN_SAMPLING": "range"} if ranged else {}
    steps = OmegaConf.select(cfg, "dataloader.train.mapper.augmentations")
    if steps is not None and "RandomFlip" not in str(steps):
        further["RANDOM_FLIP"] = "none"
    kept = {}
    if OmegaConf.select(cfg, "dataloader.train.dataset.filter_empty") is False:
        kept["DATALOADER.FILTER_EMPTY_ANNOTATIONS"] = False
    limit_of_test = view.suppression["limit"] if isinstance(view, DenseView) else None
    if limit_of_test not in (None, default.TEST.DETECTIONS_PER_IMAGE):
        kept["TEST.DETECTIONS_PER_IMAGE"] = limit_of_test
    return {
        "train_sizes": train,
        "train_limit": limit,
        "test_size": test_size,
        "test_limit": test_limit,
        "input": further,
        "further": kept,
        "iterations": OmegaConf.select(cfg, "train.max_iter") or default.SOLVER.MAX_ITER,
        "batch": OmegaConf.select(cfg, "dataloader.train.total_batch_size")
        or default.SOLVER.IMS_PER_BATCH,
    }

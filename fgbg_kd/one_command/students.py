"""The candidates for a student, and the config of a student in the form of settings.

A setting is a config key with its value and the reason for it. The settings become student.yaml,
with the reasons as comments, and the lines that the command prints.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import timm
import yaml
from detectron2.config import CfgNode

from ..config import get_fgbg_kd_cfg
from ..utils.config_files import merge_overrides
from ..utils.errors import ConfigError
from .teacher_facts import STRIDES, TeacherFacts


class Candidate(NamedTuple):
    """A light detector: a timm model, the channels of the FPN, the convolutions of the head."""

    backbone: str
    width: int
    depth: int

    def __str__(self) -> str:
        return f"{self.backbone}, FPN {self.width}, head {self.depth}"


# From small to large. All backbones have ImageNet weights in timm and a permissive licence. Widths
# are multiples of 32, as the GroupNorm in FCOS's head needs.
CANDIDATES = (
    Candidate("test_resnet", 32, 1),
    Candidate("lcnet_050", 32, 1),
    Candidate("lcnet_075", 64, 1),
    Candidate("mobilenetv3_small_100", 64, 2),
    Candidate("lcnet_100", 96, 2),
    Candidate("mobilenetv3_large_100", 96, 2),
    Candidate("efficientnet_lite0", 96, 4),
    Candidate("mobilenetv3_large_100", 128, 4),
    Candidate("resnet18", 128, 4),
    Candidate("resnet18", 192, 4),
    Candidate("resnet34", 256, 4),
)
# Widths and depths of the candidates that `finer` makes.
_WIDTHS, _DEPTHS = range(32, 257, 32), range(1, 5)
# Widths and depths of the candidates with a timm model that the user names.
_SHAPES = ((32, 1), (64, 2), (96, 2), (128, 4))


def candidate_of(name: str) -> Candidate:
    """The candidate of a row of the table."""
    backbone, width, depth = re.fullmatch(r"(\S+), FPN (\d+), head (\d+)", name).groups()
    return Candidate(backbone, int(width), int(depth))


def finer(candidate: Candidate, outputs: int) -> list[Candidate]:
    """Candidates with the same backbone that cost more, from small to large.

    Args:
        outputs: channels of the head's outputs: anchors per cell times (classes + 4).
    """

    def cost(c: Candidate) -> int:
        """Multiplications per cell and kernel position, in the FPN, the head and its outputs."""
        return c.width * (c.width * (1 + 2 * c.depth) + outputs)

    every = (Candidate(candidate.backbone, *shape) for shape in product(_WIDTHS, _DEPTHS))
    return sorted((c for c in every if cost(c) > cost(candidate)), key=cost)


class Setting(NamedTuple):
    """A config key, its value, and the reason for the value; "": not worth a line."""

    key: str
    value: Any
    why: str = ""


def candidates_for(name: str) -> tuple[Candidate, ...]:
    """The candidates: the list above, or those with the timm model ``name``.

    Raises:
        ConfigError: timm has no such model.
    """
    if not name:
        return CANDIDATES
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models()))
        raise ConfigError(
            f"--student {name}: neither a YAML config here nor a model of timm"
            f"{f' (similar names: {near})' if near else ''}. Correct the name."
        )
    return tuple(Candidate(name, *shape) for shape in _SHAPES)


def model_settings(
    facts: TeacherFacts, candidate: Candidate, num_classes: int, why: str = ""
) -> list[Setting]:
    """The detector of a candidate, with the teacher's levels, anchors and image sizes.

    Args:
        why: reason for the choice.
    """
    family = f"MODEL.{facts.family.upper()}"
    # A top block adds P6 and P7. Without it, the FPN adds one level by max-pooling. All parameters
    # need a gradient, because DistributedDataParallel fails on unused ones.
    top = "retinanet_" if max(facts.strides) > 64 else ""
    own = facts.family == facts.name
    kind = "the teacher's own"
    if not own:
        kind = f"no gain is proven for a student of a {facts.name}: add --compare to measure it"
    maps = [f"res{i + 2}" for i, stride in enumerate(STRIDES[:4]) if stride in facts.strides]
    settings = [
        Setting("MODEL.META_ARCHITECTURE", facts.family, kind),
        Setting("MODEL.MASK_ON", False),
        Setting("MODEL.BACKBONE.NAME", f"build_{top}timm_fpn_backbone"),
        Setting("MODEL.TIMM.NAME", candidate.backbone, why),
        Setting("MODEL.TIMM.OUT_FEATURES", maps),
        Setting("MODEL.FPN.IN_FEATURES", maps),
        Setting("MODEL.FPN.OUT_CHANNELS", candidate.width, why and "of the same candidate"),
        Setting("MODEL.FPN.NORM", "BN"),
        Setting(f"{family}.NUM_CONVS", candidate.depth, why and "of the same candidate"),
        Setting(f"{family}.NUM_CLASSES", num_classes, "the classes of the training set"),
        Setting(f"{family}.IN_FEATURES", facts.features, "levels with the teacher's strides"),
        *(Setting(f"{family}.{key}", value) for key, value in facts.head.items()),
    ]
    if "INITIAL_DISTANCE" in get_fgbg_kd_cfg().MODEL[facts.family.upper()]:
        settings.append(Setting(f"{family}.INITIAL_DISTANCE", 1.0))  # AdamW needs it
    whose = "the teacher's" if facts.own_anchors else "RetinaNet's shapes, sizes as in the teacher"
    for key, value in facts.anchors.items():
        settings.append(Setting(f"MODEL.ANCHOR_GENERATOR.{key}", value, whose))
    settings += [
        Setting("INPUT.MIN_SIZE_TEST", facts.test_size, "the teacher's; smaller is faster"),
        Setting("INPUT.MAX_SIZE_TEST", facts.test_limit),
        Setting("INPUT.MIN_SIZE_TRAIN", facts.train_sizes, "the teacher's"),
        Setting("INPUT.MAX_SIZE_TRAIN", facts.train_limit),
        *(Setting(f"INPUT.{key}", value) for key, value in facts.input.items()),
        *(Setting(key, value, "the teacher's") for key, value in facts.further.items()),
    ]
    return settings


def config_of(settings: Iterable[Setting], base: CfgNode | None = None) -> CfgNode:
    """A config with these settings, on the CPU.

    Args:
        base: the config that they change; None: the defaults.
    """
    cfg = get_fgbg_kd_cfg() if base is None else base.clone()
    cfg.MODEL.DEVICE = "cpu"
    merge_overrides(cfg, [x for s in settings for x in (s.key, s.value)])
    return cfg


def yaml_of(title: Sequence[str], settings: Iterable[Setting]) -> str:
    """A YAML config with a comment for each reason.

    Args:
        title: lines of the comment at the top.
    """
    tree: dict[str, Any] = {}
    for setting in settings:
        *groups, name = setting.key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = setting
    return "\n".join([*(f"# {line}" for line in title), *_lines(tree, "")]) + "\n"


def _lines(node: dict, indent: str) -> Iterable[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            text = yaml.safe_dump(
                json.loads(json.dumps(value.value)), default_flow_style=True, width=10**6
            )
            text = text.removesuffix("...\n").strip()
            yield f"{indent}{name}: {text}" + (f"  # {value.why}" if value.why else "")


def spoken(settings: Iterable[Setting]) -> list[str]:
    """A line for each setting that has a reason."""
    return [f"{s.key} {s.value or repr(s.value)}: {s.why}" for s in settings if s.why]

"""Trained weights for the student's backbone: a file, timm's own, or none."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch

from ..detectors.timm_backbone import TimmBackbone
from ..utils.errors import ConfigError
from .students import Setting
from .teacher_facts import TeacherFacts

RANDOM = "random"


def check_backbone_file(given: str) -> None:
    """
    Args:
        given: --backbone-weights.

    Raises:
        ConfigError: there is no such file.
    """
    if given and given != RANDOM and not Path(given).is_file():
        raise ConfigError(
            f"--backbone-weights {given}: there is no such file. Give a state dict of the "
            f"student's timm model, or {RANDOM}."
        )


def backbone_settings(
    name: str, given: str, facts: TeacherFacts, file: Path, say: Callable[[str], None]
) -> tuple[list[Setting], bool]:
    """The keys of the backbone's weights and of the input that they need.

    Args:
        name: timm model.
        given: a state dict with timm's names; "random"; "": timm's own weights, if they are in its
            cache or can be downloaded.
        file: path for timm's own weights.

    Returns:
        The settings, and whether the backbone has trained weights.

    Raises:
        CheckpointError: the file does not fill the backbone.
    """
    weights, why = given, "--backbone-weights"
    if not given:
        weights = str(file) if _downloaded(name, file, say) else RANDOM
        why = "timm's own ImageNet weights"
    if weights == RANDOM:
        say(
            f"The backbone {name} starts from random weights, so it trains longer unless "
            "--iterations or --hours is given. With "
            "ImageNet weights the student is usually better: --backbone-weights FILE."
        )
        return [
            Setting("MODEL.TIMM.WEIGHTS", "", "random weights"),
            *_input(facts.pixel_format, facts.mean, facts.std, "the teacher's"),
        ], False
    path = str(Path(weights).resolve())
    body = TimmBackbone(name, weights=path)  # also checks the file
    return [
        Setting("MODEL.TIMM.WEIGHTS", path, why),
        Setting("MODEL.TIMM.FREEZE_BN", True, "batches are small"),
        *_input("RGB", body.pixel_mean, body.pixel_std, "the input of the backbone's weights"),
    ], True


def _input(order: str, mean: list[float], std: list[float], why: str) -> list[Setting]:
    return [
        Setting("INPUT.FORMAT", order, why),
        Setting("MODEL.PIXEL_MEAN", mean, why),
        Setting("MODEL.PIXEL_STD", std, why),
    ]


def _downloaded(name: str, file: Path, say: Callable[[str], None]) -> bool:
    """Whether timm's weights could be downloaded. They are then in the file."""
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no network, no weights of this name, a full disk: any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        say(f"timm's weights of {name} cannot be downloaded ({reason}).")
        return False
    torch.save(state, file)
    return True

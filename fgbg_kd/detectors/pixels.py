"""How the configs of SSD, YOLOX and YOLO normalise pixels."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from ..utils.errors import ConfigError

logger = logging.getLogger(__name__)


def check_colour(name: str, pixel_mean: Sequence[float]) -> None:
    """
    Args:
        name: of the detector.
        pixel_mean: one value for each channel of an image.

    Raises:
        ConfigError: the images are not colour images.
    """
    if len(pixel_mean) != 3:
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {len(pixel_mean)} values, but {name} reads images with 3 "
            "channels: set INPUT.FORMAT to RGB or BGR, and three values for the mean and the std."
        )


def warn_of_pixels(
    cfg: CfgNode, name: str, mean: Sequence[float], std: Sequence[float], order: str
) -> None:
    """Warns if a config prepares pixels in another way than the published weights expect.

    With such a config, the weights load without an error, but AP is near 0.

    Args:
        name: whose weights.
        mean, std, order: what these weights need.
    """
    has = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT
    needs = list(mean), list(std), order
    if has != needs:
        logger.warning(f"{name} weights need {_listed(needs)}, but this config has {_listed(has)}.")


def warn_of_defaults(cfg: CfgNode, name: str) -> None:
    """Warns if a config has Detectron2's default normalisation, which fits its own ResNets only."""
    default = get_cfg().MODEL
    if (list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)) == (
        list(default.PIXEL_MEAN),
        list(default.PIXEL_STD),
    ):
        logger.warning(
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are Detectron2's defaults. No published weights "
            f"of {name} were trained with them: set the values and INPUT.FORMAT that belong to "
            "your weights."
        )


def _listed(values: tuple) -> str:
    keys = "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values))

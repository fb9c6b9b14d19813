"""fgbg_kd: distils one-stage detectors in Detectron2, foreground and background apart.

Importing it registers the meta-architecture ``FgBgDistiller`` and the timm backbones.
"""

from .config import add_fgbg_kd_config, get_fgbg_kd_cfg, student_config
from .detectors import build_timm_backbone
from .distiller import FgBgDistiller
from .methods import METHOD_REGISTRY, Batch, DenseOutput, FgBg, Method
from .teacher import build_teacher
from .utils.errors import TeacherError

__version__ = "0.1.0"

__all__ = [
    "METHOD_REGISTRY",
    "Batch",
    "DenseOutput",
    "FgBg",
    "FgBgDistiller",
    "Method",
    "TeacherError",
    "add_fgbg_kd_config",
    "build_teacher",
    "build_timm_backbone",
    "get_fgbg_kd_cfg",
    "student_config",
]

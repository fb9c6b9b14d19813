"""fgbg_kd distils one-stage Detectron2 detectors, with separate foreground and background losses.

Importing this package registers the meta-architectures ``FgBgDistiller``, ``FCOS``, ``SSD``,
``YOLOX`` and ``YOLO``, and the timm backbones.
"""

from .config import add_fgbg_kd_config, add_keys, get_fgbg_kd_cfg, student_config
from .detectors import DenseView, register_view
from .distiller import FgBgDistiller
from .methods import METHOD_REGISTRY, Batch, DenseOutput, FgBg, Method
from .teacher import Teacher, build_teacher
from .utils.errors import FgBgError, TeacherError

__version__ = "0.2.0"

__all__ = [
    "METHOD_REGISTRY",
    "Batch",
    "DenseOutput",
    "DenseView",
    "FgBg",
    "FgBgDistiller",
    "FgBgError",
    "Method",
    "Teacher",
    "TeacherError",
    "add_fgbg_kd_config",
    "add_keys",
    "build_teacher",
    "get_fgbg_kd_cfg",
    "register_view",
    "student_config",
]

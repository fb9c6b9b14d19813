"""Every configuration key that this package adds to Detectron2's, with its default."""

from collections.abc import Callable

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from omegaconf import DictConfig

_extensions: list[Callable[[CN], None]] = []


def add_fgbg_kd_config(cfg: CN) -> None:
    """Adds this package's keys, and those of :func:`add_keys`, to a Detectron2 config."""
    _add_distillation(cfg)
    _add_methods(cfg)
    _add_detectors(cfg)
    _add_training(cfg)
    for extend in _extensions:
        extend(cfg)


def add_keys(extend: Callable[[CN], None]) -> Callable[[CN], None]:
    """Decorator of a function that adds a user's own keys to each config that is made afterwards.

    Example::

        @add_keys
        def _(cfg):
            cfg.MODEL.KD.MYMETHOD = CN({"WEIGHT": 1.0})  # scales loss_kd; 0 = off
    """
    _extensions.append(extend)
    return extend


def _add_distillation(cfg: CN) -> None:
    # MODEL.META_ARCHITECTURE "FgBgDistiller" switches distillation on.
    kd = cfg.MODEL.KD = CN()
    # Meta-architecture of the student, "RetinaNet" or "FCOS". The rest of MODEL.* describes the
    # student as it would be alone.
    kd.STUDENT = "RetinaNet"

    kd.TEACHER = CN()
    # Name in the model zoo ("COCO-Detection/retinanet_R_101_FPN_3x.yaml"), or a local .yaml or .py
    # config. "" = no teacher: plain training. A .py config is a program: use only files you trust.
    kd.TEACHER.CONFIG = ""
    # Path or URL of its checkpoint. "" = the zoo's weights, or those that a local config names.
    kd.TEACHER.WEIGHTS = ""
    # sha256 of that file, or the first digits of it. "" = not checked. A download with the sum in
    # its name (name-<8 or more hex digits>.pth) is checked in any case.
    kd.TEACHER.SHA256 = ""
    # Names of its classes in the order of their numbers. [] = the names of its config's
    # DATASETS.TRAIN. The student's names are those of its own DATASETS.TRAIN.
    kd.TEACHER.CLASSES = []
    # Precision of the teacher's pass by autocast: "fp32", "bf16" or "fp16". "auto" = the student's
    # (SOLVER.AMP). bf16 halves the time of the pass on hardware that has it, CPUs included.
    kd.TEACHER.PRECISION = "auto"
    # True = keep the teacher's outputs of every image in host memory, so that the teacher runs in
    # the first epoch only. Images must be the same in every epoch: no crops, no flips, one size in
    # INPUT. An image of 288x288 pixels takes about 1 MB (96 channels, 40 logits a cell).
    kd.TEACHER.CACHE = False
    # COCO AP (0 to 100) that the teacher must reach on DATASETS.TEST before training. 0 = no check.
    kd.TEACHER.MIN_AP = 0.0

    # Parts that the student copies from the teacher before the first iteration, after
    # MODEL.WEIGHTS: "fpn", "head". Only tensors of equal name and shape are copied. [] = nothing.
    # A resumed run copies nothing.
    kd.INHERIT = []
    # Name of the method. Its options stand in the node of its name: MODEL.KD.FGBG.*, ...
    kd.METHOD = "FgBg"
    # The losses of distillation grow linearly from 0 over this number of iterations. -1 = as long
    # as the learning rate's warm-up (SOLVER.WARMUP_ITERS), 0 = full from the start.
    kd.WARMUP_ITERS = -1
    # From this iteration on the student learns without the teacher. 0 = never.
    kd.STOP_ITER = 0


def _add_methods(cfg: CN) -> None:
    """Options of each method; the file of its name in fgbg_kd/methods has its formula."""
    kd = cfg.MODEL.KD
    fgbg = kd.FGBG = CN()
    fgbg.FG_WEIGHT = 8.0  # scales loss_kd_fg; 0 = off
    fgbg.BG_WEIGHT = 1.0  # scales loss_kd_bg; 0 = off
    # "scale": each box is foreground on the one level that fits its size. "all": on every level.
    fgbg.ASSIGN = "scale"
    # "sigmoid": KL of a Bernoulli distribution for each class. "softmax": one KL over all classes
    # and a background of logit 0.
    fgbg.KL = "sigmoid"
    fgbg.TEMPERATURE = 1.0  # divides the logits in the KL; 1 = logits as predicted
    # Unit in which the teacher's quality is compared with the student's: "cell", "object" or
    # "image". "off" = the gate is open everywhere.
    fgbg.GATE = "cell"
    # By how much the teacher's quality (0 to 1) must exceed the student's. A negative value allows
    # a worse teacher.
    fgbg.GATE_MARGIN = -0.2
    # Quality on foreground. "score": score of the owner's class. "box": that score times the IoU.
    fgbg.GATE_QUALITY = "score"

    kd.MIMIC = CN({"WEIGHT": 2.0})  # scales loss_kd; 0 = off
    kd.DEFEAT = CN({"WEIGHT": 4.0})  # scales loss_kd; 0 = off. 4 on COCO, 3 on VOC (authors)
    kd.DEFEAT.BG_RATIO = 4.0  # background's share beside the foreground's 1; 0 = off
    kd.FGD = CN({"WEIGHT": 1e-3})  # scales loss_kd; 0 = off. FCOS: 1.6e-3 (authors)
    kd.FGD.BG_RATIO = 0.5  # of each term beside the foreground's 1; 0 = off
    kd.FGD.ATTENTION_RATIO = 0.5
    kd.FGD.GLOBAL_RATIO = 0.005
    kd.FGD.TEMPERATURE = 0.5  # of the attention. FCOS: 0.8 (authors)
    kd.MGD = CN({"WEIGHT": 2e-5})  # scales loss_kd; 0 = off
    kd.MGD.MASK_RATIO = 0.65  # probability that a cell is masked; 0 = none
    kd.PKD = CN({"WEIGHT": 10.0})  # scales loss_kd; 0 = off. Two-stage teachers: 6 (authors)
    kd.PKD.NUM_LEVELS = 4  # number of levels that are compared, from the finest on
    kd.CWD = CN({"WEIGHT": 10.0})  # scales loss_kd; 0 = off
    kd.CWD.TEMPERATURE = 1.0  # divides the features; 1 = features as they are
    kd.QFL = CN({"WEIGHT": 1.0})  # scales loss_kd; 0 = off


def _add_detectors(cfg: CN) -> None:
    # FCOS, for MODEL.META_ARCHITECTURE "FCOS" and MODEL.BACKBONE.NAME
    # "build_fcos_resnet_fpn_backbone". The defaults are those of Detectron2's lazy config.
    fcos = cfg.MODEL.FCOS = CN()
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.NUM_CLASSES = 80
    # Convolutions in each branch of the head, and their norm ("" = none).
    fcos.NUM_CONVS = 4
    fcos.NORM = "GN"
    # Score of every class before training; it sets the bias of the classifier.
    fcos.PRIOR_PROB = 0.01
    # Cells within this number of strides of a box's centre are positive.
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    # Threshold of sqrt(class score * centerness).
    fcos.SCORE_THRESH_TEST = 0.2
    fcos.TOPK_CANDIDATES_TEST = 1000
    fcos.NMS_THRESH_TEST = 0.6

    # A timm feature extractor, for MODEL.BACKBONE.NAME "build_timm_backbone",
    # "build_timm_fpn_backbone" or "build_retinanet_timm_fpn_backbone".
    timm = cfg.MODEL.TIMM = CN()
    timm.NAME = "mobilenetv2_100"
    # Maps by stride, named as Detectron2 names those of a ResNet: res2 = 4, res3 = 8, res4 = 16.
    timm.OUT_FEATURES = ["res3", "res4", "res5"]
    # Local state dict with timm's names. "" = random weights, or MODEL.WEIGHTS for everything.
    timm.WEIGHTS = ""
    # True = batch norms with frozen statistics and affine parameters.
    timm.FREEZE_BN = False
    # What is frozen, counted as by MODEL.BACKBONE.FREEZE_AT, which these backbones do not read:
    # 0 = nothing, 1 = all that the map res1 (stride 2) is computed from, 2 = all of res2, ...
    timm.FREEZE_AT = 0


def _add_training(cfg: CN) -> None:
    # "SGD" is Detectron2's own. "AdamW" takes SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Decay of an exponential moving average of the weights, such as 0.9998. The average is
    # evaluated and saved instead of the weights. 0 = off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Number of periodic checkpoints that are kept: at least 2, so that a damaged one has a
    # predecessor. 0 = all.
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0

    # Your own COCO-format data under the one name in DATASETS.TRAIN (TEST), without Python.
    # "" = the name is registered already.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""


def get_fgbg_kd_cfg() -> CN:
    """Detectron2's default config with this package's keys."""
    cfg = get_cfg()
    add_fgbg_kd_config(cfg)
    return cfg


def method_options(cfg: CN, name: str = "") -> dict:
    """Options of a method as keyword arguments: {"fg_weight": 8.0, ...}.

    Args:
        name: of the method; "": the one that MODEL.KD.METHOD names. A method without a node in
            MODEL.KD has no options.
    """
    node = cfg.MODEL.KD.get((name or cfg.MODEL.KD.METHOD).upper(), {})
    return {key.lower(): value for key, value in node.items()}


def method_defaults(name: str) -> dict:
    """The defaults of :func:`method_options`."""
    return method_options(get_fgbg_kd_cfg(), name)


def student_config(cfg: CN) -> CN:
    """The config of the plain student, which is trained without distillation and deployed after it.

    Detectron2 builds from it the detector whose tensor names the checkpoints hold. A config that
    does not distil is returned unchanged.
    """
    if cfg.MODEL.META_ARCHITECTURE != "FgBgDistiller":
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    cfg.freeze()
    return cfg


def student_model(model: DictConfig) -> DictConfig:
    """:func:`student_config` for the ``model`` of a Python config."""
    target = model._target_
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return model.student if name.endswith("FgBgDistiller") else model

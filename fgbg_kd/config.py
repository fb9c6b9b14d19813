"""Every configuration key that this package adds to Detectron2's."""

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from omegaconf import DictConfig

from .methods import METHOD_REGISTRY


def add_fgbg_kd_config(cfg: CN) -> None:
    """Adds MODEL.{KD,FCOS,TIMM}.*, SOLVER.{OPTIMIZER,EMA_DECAY}, DATASETS.*_{JSON,IMAGES}."""
    # Distillation is on where MODEL.META_ARCHITECTURE is "FgBgDistiller".
    kd = cfg.MODEL.KD = CN()
    # Meta-architecture of the student, "RetinaNet" or "FCOS"; the rest of MODEL.* describes it as
    # it would alone.
    kd.STUDENT = "RetinaNet"

    kd.TEACHER = CN()
    # A zoo name ("COCO-Detection/retinanet_R_101_FPN_3x.yaml") or a local .yaml or .py config.
    # "" = no teacher: plain training. A .py config is code that runs: use only what you trust.
    kd.TEACHER.CONFIG = ""
    # Checkpoint: path or URL. "" = the zoo's weights, or those that a local config names.
    kd.TEACHER.WEIGHTS = ""
    # sha256 of that file (or its first digits); "" = not checked. A download whose name carries it
    # (name-<8 or more hex digits>.pth) is checked by its name.
    kd.TEACHER.SHA256 = ""
    # Names of its classes in the order of their numbers, for a student with some of them; [] =
    # those of its config's DATASETS.TRAIN. The student's are those of its own DATASETS.TRAIN.
    kd.TEACHER.CLASSES = []
    # Arithmetic of the teacher's pass: "fp32", "bf16" or "fp16" by autocast; "auto" = as the
    # student trains (SOLVER.AMP). bf16 halves the teacher's time on hardware that has it, CPUs
    # included.
    kd.TEACHER.PRECISION = "auto"
    # Keeps the teacher's outputs of every image in host memory, so that the teacher runs in the
    # first epoch only. Where images come the same every time: without crops, flips and several
    # sizes in INPUT. A megabyte per image of 288x288 pixels (96 channels, 40 logits a cell).
    kd.TEACHER.CACHE = False
    # COCO AP (0..100) that the teacher must reach on DATASETS.TEST before training; 0 = no check.
    kd.TEACHER.MIN_AP = 0.0

    # What the student takes over from the teacher before the first iteration, after MODEL.WEIGHTS,
    # where names and shapes agree: "fpn", "head"; [] = nothing. A resumed run takes over nothing.
    kd.INHERIT = []

    # How to distil: "FgBg", ours, or a peer to compare it with. The file of its name in
    # fgbg_kd/methods says what its options mean. Ours stand here, as KD.FG_WEIGHT; a peer's in a
    # node of its name, as KD.PKD.WEIGHT.
    kd.METHOD = "FgBg"
    for name, method in METHOD_REGISTRY:
        options = CN({k.upper(): v for k, v in method.options().items()})
        if name == "FgBg":
            kd.update(options)
        else:
            kd[name.upper()] = options

    # The losses grow linearly from 0 over so many iterations; -1 = as many as the learning rate
    # does (SOLVER.WARMUP_ITERS), 0 = full from the start.
    kd.WARMUP_ITERS = -1
    # From this iteration on the student learns alone; 0 = never.
    kd.STOP_ITER = 0

    # FCOS, for MODEL.META_ARCHITECTURE "FCOS" and MODEL.BACKBONE.NAME
    # "build_fcos_resnet_fpn_backbone"; the defaults are those of Detectron2's lazy config.
    fcos = cfg.MODEL.FCOS = CN()
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.NUM_CLASSES = 80
    # Convolutions in each subnet of the head, and their norm ("" = none).
    fcos.NUM_CONVS = 4
    fcos.NORM = "GN"
    # Score of every class before training: sets the bias of the classifier.
    fcos.PRIOR_PROB = 0.01
    # Cells within so many strides of a box's centre are positive.
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    # Of sqrt(class score * centerness).
    fcos.SCORE_THRESH_TEST = 0.2
    fcos.TOPK_CANDIDATES_TEST = 1000
    fcos.NMS_THRESH_TEST = 0.6

    # Any timm feature extractor, for MODEL.BACKBONE.NAME "build_timm_backbone",
    # "build_timm_fpn_backbone" or "build_retinanet_timm_fpn_backbone".
    timm = cfg.MODEL.TIMM = CN()
    timm.NAME = "mobilenetv2_100"
    # Outputs, named by stride as Detectron2 names ResNet's: res2 = 4, res3 = 8, res4 = 16, ...
    timm.OUT_FEATURES = ["res3", "res4", "res5"]
    # Local state dict in timm's names; "" = random weights (or MODEL.WEIGHTS, for all of it).
    timm.WEIGHTS = ""
    # Batch norm with frozen statistics and affine; False = trained.
    timm.FREEZE_BN = False

    # "SGD": Detectron2's own; "AdamW": with SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Exponential moving average of the weights, such as 0.9998, which is evaluated and saved in
    # their place; 0 = off.
    cfg.SOLVER.EMA_DECAY = 0.0

    # Of the periodic checkpoints the last so many stay (at least 2, for a damaged one to have one
    # before it); 0 = all.
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0

    # Your own COCO-format data under the one name in DATASETS.TRAIN (TEST), no Python needed;
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


def method_options(cfg: CN) -> dict:
    """Keyword arguments of the method that MODEL.KD.METHOD names."""
    kd = cfg.MODEL.KD
    if kd.METHOD not in METHOD_REGISTRY:
        names = sorted(name for name, _ in METHOD_REGISTRY)
        raise ValueError(f"MODEL.KD.METHOD is {kd.METHOD!r}: choose from {names}.")
    node = kd if kd.METHOD == "FgBg" else kd[kd.METHOD.upper()]
    return {k: node[k.upper()] for k in METHOD_REGISTRY.get(kd.METHOD).options()}


def student_config(cfg: CN) -> CN:
    """The config of the plain student: what is trained without, and deployed after, distillation.

    Stock Detectron2 builds from it (once the keys above are added) the detector whose names the
    checkpoints hold. A config that distils nothing is returned as it is.
    """
    if cfg.MODEL.META_ARCHITECTURE != "FgBgDistiller":
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    cfg.freeze()
    return cfg


def student_model(model: DictConfig) -> DictConfig:
    """The same of a Python config's ``model``."""
    target = model._target_
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return model.student if name.endswith("FgBgDistiller") else model

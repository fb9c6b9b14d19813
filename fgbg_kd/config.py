"""All config keys that this package adds to Detectron2, with their defaults."""

from collections.abc import Callable

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from omegaconf import DictConfig

_extensions: list[Callable[[CN], None]] = []


def add_fgbg_kd_config(cfg: CN) -> None:
    """Adds this package's keys, and the keys of :func:`add_keys`, to a Detectron2 config."""
    _add_distillation(cfg)
    _add_methods(cfg)
    _add_detectors(cfg)
    _add_ssd(cfg)
    _add_yolox(cfg)
    _add_yolo(cfg)
    _add_training(cfg)
    for extend in _extensions:
        extend(cfg)


def add_keys(extend: Callable[[CN], None]) -> Callable[[CN], None]:
    """Decorator for a function that adds a user's own keys to every config created afterwards.

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
    # Meta-architecture of the student: "RetinaNet", "FCOS", "SSD", "YOLOX" or "YOLO". All other
    # MODEL.* keys describe the student as in training without a teacher.
    kd.STUDENT = "RetinaNet"

    kd.TEACHER = CN()
    # Name in the model zoo ("COCO-Detection/retinanet_R_101_FPN_3x.yaml"), or a local .yaml or .py
    # config. "" = no teacher: plain training. A .py config is a program: use only files you trust.
    kd.TEACHER.CONFIG = ""
    # Path or URL of the teacher's checkpoint. "" = the zoo's weights, or the weights that a local
    # config names.
    kd.TEACHER.WEIGHTS = ""
    # sha256 of the checkpoint file, or its first digits. "" = not checked. A download whose name
    # contains its hash (name-<8 or more hex digits>.pth) is always checked.
    kd.TEACHER.SHA256 = ""
    # Names of the teacher's classes in the order of their indices. [] = the names in DATASETS.TRAIN
    # of the teacher's config. The student's names come from the student's DATASETS.TRAIN.
    kd.TEACHER.CLASSES = []
    # Autocast precision of the teacher's forward pass: "fp32", "bf16" or "fp16". "auto" = the
    # student's precision (SOLVER.AMP). bf16 makes the pass shorter on hardware that supports it,
    # including CPUs.
    kd.TEACHER.PRECISION = "auto"
    # True = keep the teacher's outputs for every image in host memory. The teacher then runs again
    # only if the padded size of the image's batch differs from the last time. Images must be the
    # same in every epoch: no crops, no flips, and one size in INPUT. An image of 288x288 pixels
    # takes about 1 MB (96 channels, 40 logits per cell).
    kd.TEACHER.CACHE = False
    # COCO AP (0 to 100) that the teacher must reach on DATASETS.TEST before training. 0 = no check.
    kd.TEACHER.MIN_AP = 0.0

    # Parts that are copied from the teacher to the student: "fpn", "head". [] = nothing. They are
    # copied before the first iteration and after MODEL.WEIGHTS is loaded. Only tensors with equal
    # names and shapes are copied. A resumed run copies nothing.
    kd.INHERIT = []
    # Name of the distillation method. Its options are in the node with its name: MODEL.KD.FGBG.*
    kd.METHOD = "FgBg"
    # The distillation losses grow linearly from 0 over this number of iterations. -1 = the same
    # number as the learning rate's warm-up (SOLVER.WARMUP_ITERS). 0 = no warm-up.
    kd.WARMUP_ITERS = -1
    # From this iteration on, the student trains without the teacher. 0 = never.
    kd.STOP_ITER = 0

    # These keys are read if DATASETS.UNLABELED names folders.
    kd.UNLABELED = CN()
    # Share of each batch that photos without labels take, between 0 and 1.
    kd.UNLABELED.SHARE = 0.5
    # The teacher's detections are used as the boxes of such photos. Their lowest score is chosen so
    # that this share of the teacher's detections on labelled training images is right.
    kd.UNLABELED.PRECISION = 0.8
    # Scales the student's own losses on these photos. 0 = on labelled images only.
    kd.UNLABELED.LOSS_WEIGHT = 1.0
    # Path of the COCO file of these detections. Several runs can share it. It is read if it was
    # made from the same teacher, test size, photos, labels and PRECISION. Otherwise it is made.
    # "" = unlabeled.json in OUTPUT_DIR.
    kd.UNLABELED.FILE = ""


def _add_methods(cfg: CN) -> None:
    """Options of each method. The method's file in fgbg_kd/methods has the formula."""
    kd = cfg.MODEL.KD
    fgbg = kd.FGBG = CN()
    fgbg.FG_WEIGHT = 8.0  # scales loss_kd_fg; 0 = off
    fgbg.BG_WEIGHT = 1.0  # scales loss_kd_bg; 0 = off
    # Scales loss_kd_bg_features; 0 = off. -1: 32 if student and teacher are the same kind of
    # detector, otherwise 0. If both other weights are 0, -1 is 0 for every pair.
    fgbg.BG_FEATURE_WEIGHT = -1.0
    # How scaled features are compared on the foreground. "cosine": by 1 - cosine, so only their
    # direction counts. "mse": by half their mean squared difference, so their length counts too.
    # "auto": "mse" if student and teacher are the same kind of detector and MODEL.WEIGHTS or
    # MODEL.TIMM.WEIGHTS names the weights that the student starts from, otherwise "cosine".
    fgbg.FG_LOSS = "auto"
    # Which cells of a box are foreground, and their weights. "teacher": its cells on all levels,
    # weighted by the teacher's score of the object's class (a two-stage teacher: "scale").
    # "scale": its cells on the one level that fits its size, with equal weights. "all": its cells
    # on all levels, with equal weights on each level.
    fgbg.ASSIGN = "teacher"
    # "sigmoid": KL of a Bernoulli distribution for each class. "softmax": one KL over all classes
    # and a background class with logit 0.
    fgbg.KL = "sigmoid"
    fgbg.TEMPERATURE = 1.0  # divides the logits in the KL; 1 = unchanged logits
    # True: the losses are scaled by the gate, fgbg_kd/ops/gate.py. On an object, it is min(1, 2 t)
    # if the teacher's best score t is higher than the student's, otherwise 0. The terms of the
    # background are also scaled by the mean gate of the objects. False: all gates are 1.
    fgbg.GATE = True

    kd.MIMIC = CN({"WEIGHT": 2.0})  # scales loss_kd; 0 = off
    kd.DEFEAT = CN({"WEIGHT": 4.0})  # scales loss_kd; 0 = off. 4 on COCO, 3 on VOC (authors)
    kd.DEFEAT.BG_RATIO = 4.0  # weight of the background term (foreground: 1); 0 = off
    kd.FGD = CN({"WEIGHT": 1e-3})  # scales loss_kd; 0 = off. FCOS: 1.6e-3 (authors)
    kd.FGD.BG_RATIO = 0.5  # weight of the background term (foreground: 1); 0 = off
    kd.FGD.ATTENTION_RATIO = 0.5  # weight of the attention term; 0 = off
    kd.FGD.GLOBAL_RATIO = 0.005  # weight of the global-context term; 0 = off
    kd.FGD.TEMPERATURE = 0.5  # temperature of the attention. FCOS: 0.8 (authors)
    kd.MGD = CN({"WEIGHT": 2e-5})  # scales loss_kd; 0 = off
    kd.MGD.MASK_RATIO = 0.65  # probability that a cell is masked; 0 = none
    kd.PKD = CN({"WEIGHT": 10.0})  # scales loss_kd; 0 = off. Two-stage teachers: 6 (authors)
    kd.PKD.NUM_LEVELS = 4  # number of compared levels, starting with the finest
    kd.CWD = CN({"WEIGHT": 10.0})  # scales loss_kd; 0 = off
    kd.CWD.TEMPERATURE = 1.0  # divides the features; 1 = unchanged features
    kd.QFL = CN({"WEIGHT": 1.0})  # scales loss_kd; 0 = off


def _add_detectors(cfg: CN) -> None:
    # FCOS, for MODEL.META_ARCHITECTURE "FCOS" and MODEL.BACKBONE.NAME
    # "build_fcos_resnet_fpn_backbone". The defaults equal Detectron2's lazy config.
    fcos = cfg.MODEL.FCOS = CN()
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.NUM_CLASSES = 80
    # Number of convolutions in each branch of the head.
    fcos.NUM_CONVS = 4
    # Norm of these convolutions. "" = none.
    fcos.NORM = "GN"
    # Initial score of every class. It sets the bias of the classifier.
    fcos.PRIOR_PROB = 0.01
    # Initial distance from a cell's centre to the sides of its box, in strides. A side at distance
    # 0 gets no gradient (the distance is relu(x)), so with 0 and AdamW all boxes can stay empty:
    # 1 prevents this.
    fcos.INITIAL_DISTANCE = 0.0
    # Cells within this number of strides around a box's centre are positive.
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
    # Feature maps, with Detectron2's names for a ResNet: res2 has stride 4, res3 8, res4 16.
    timm.OUT_FEATURES = ["res3", "res4", "res5"]
    # Path of a state dict with timm's names. "" = random weights; MODEL.WEIGHTS may then fill the
    # whole detector.
    timm.WEIGHTS = ""
    # True = freeze the statistics and affine parameters of the batch norms.
    timm.FREEZE_BN = False
    # What is frozen, counted as by MODEL.BACKBONE.FREEZE_AT, which these backbones do not read:
    # 0 = nothing, 1 = all that the map res1 (stride 2) is computed from, 2 = all of res2, ...
    timm.FREEZE_AT = 0


def _add_ssd(cfg: CN) -> None:
    # SSD and SSDlite, for MODEL.META_ARCHITECTURE "SSD" and MODEL.BACKBONE.NAME
    # "build_ssd_vgg16_backbone", "build_ssd_mobilenetv3_backbone", "build_ssd_mobilenetv1_backbone"
    # or "build_ssd_timm_backbone". The defaults are those of torchvision's SSD300.
    ssd = cfg.MODEL.SSD = CN()
    ssd.NUM_CLASSES = 80
    # Images are warped to this height and width.
    ssd.SIZE = 300
    # Convolutions of the head: "conv" = 3x3, "lite" = depthwise separable, "linear" = 1x1.
    ssd.HEAD = "conv"
    # Default boxes of the six maps. A ratio r gives two boxes, r and 1 / r.
    ssd.ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    # Side of each map's square as a share of SIZE, and one more value.
    ssd.SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    # Distance of neighbouring cells in pixels. [] = SIZE / number of cells.
    ssd.STEPS = []
    # Number of squares per cell: 2, or 1 without the square of scale sqrt(s_l * s_(l+1)).
    ssd.SQUARES = [2, 2, 2, 2, 2, 2]
    # True = a box is at most as wide and high as the image.
    ssd.CLIP_SHAPES = True
    # Factor for the channels of the MobileNetV1 and MobileNetV3 backbones.
    ssd.WIDTH = 1.0
    # Channels of the blocks after a timm model ("build_ssd_timm_backbone").
    ssd.EXTRA_CHANNELS = [512, 256, 256, 128]
    # A default box with this IoU or more with an object is positive.
    ssd.IOU_THRESHOLD = 0.5
    # Share of positives among the default boxes that enter the classification loss.
    ssd.POSITIVE_FRACTION = 0.25
    ssd.SCORE_THRESH_TEST = 0.01
    # Number of predictions per class, by highest score, that enter NMS.
    ssd.TOPK_CANDIDATES_TEST = 400
    ssd.NMS_THRESH_TEST = 0.45


def _add_yolox(cfg: CN) -> None:
    # YOLOX, for MODEL.META_ARCHITECTURE "YOLOX". It has its own backbone: MODEL.BACKBONE and
    # MODEL.FPN are not read. It needs the package pixeltable-yolox (make yolox). The defaults are
    # YOLOX-s.
    yolox = cfg.MODEL.YOLOX = CN()
    # Factor for the number of blocks: nano, tiny and s 0.33, m 0.67, l 1.0, x 1.33.
    yolox.DEPTH = 0.33
    # Factor for the number of channels: nano 0.25, tiny 0.375, s 0.5, m 0.75, l 1.0, x 1.25.
    yolox.WIDTH = 0.5
    # "silu", "relu" or "lrelu".
    yolox.ACT = "silu"
    # True = depthwise 3x3 convolutions, as in nano.
    yolox.DEPTHWISE = False
    yolox.NUM_CLASSES = 80
    # Levels of the head, of strides 8, 16 and 32.
    yolox.IN_FEATURES = ["p3", "p4", "p5"]
    # Initial objectness, and initial score of every class. It sets their biases.
    yolox.PRIOR_PROB = 0.01
    # True = add the L1 loss of the boxes. Megvii adds it in the last 15 epochs.
    yolox.USE_L1 = False
    # Padding of images at the right and at the bottom, after normalisation. Official weights were
    # trained with 114, PIXEL_MEAN 0 and PIXEL_STD 1.
    yolox.PAD_VALUE = 114.0
    # Threshold of objectness times class score.
    yolox.SCORE_THRESH_TEST = 0.01
    yolox.NMS_THRESH_TEST = 0.65
    # Number of predictions per level that enter NMS. Megvii's code takes all.
    yolox.TOPK_CANDIDATES_TEST = 1000
    # True = a box has its best class only, as in Megvii's code. False = a box may have several
    # classes, as in Detectron2.
    yolox.ONE_CLASS_PER_BOX = True


def _add_yolo(cfg: CN) -> None:
    # YOLOv3 and YOLOv4, for MODEL.META_ARCHITECTURE "YOLO". They do not read MODEL.BACKBONE.
    yolo = cfg.MODEL.YOLO = CN()
    # "yolov3", "yolov3-tiny", "yolov4", "yolov4-tiny", or the path of a Darknet .cfg file. Only the
    # network, the anchors and the thresholds are read from the file, not the schedule.
    yolo.CFG = "yolov3"
    # [width, height] in pixels of each anchor, in the order of the .cfg file. [] = those of the
    # file, which fit COCO at 416 or 608 pixels.
    yolo.ANCHORS = []
    # Replaces the number in the .cfg file.
    yolo.NUM_CLASSES = 80
    # Factor for the number of channels of all layers, such as 0.5 for a narrower network. 1 = as in
    # the file. Darknet's weights fit 1 only.
    yolo.WIDTH = 1.0
    # Norm of the convolutions: "BN", "SyncBN" or "FrozenBN".
    yolo.NORM = "BN"
    # Initial objectness. It sets the bias of the last convolutions. Darknet starts with 0.5.
    yolo.PRIOR_PROB = 0.01
    # Scales 1 - CIoU, the loss of boxes in networks with iou_loss=ciou (YOLOv4). It replaces
    # iou_normalizer of the .cfg file: Darknet's gradient leaves out a factor.
    yolo.IOU_WEIGHT = 2.5
    # Threshold of objectness * class score.
    yolo.SCORE_THRESH_TEST = 0.005
    yolo.TOPK_CANDIDATES_TEST = 1000
    yolo.NMS_THRESH_TEST = 0.45


def _add_training(cfg: CN) -> None:
    # "SGD" is Detectron2's optimizer. "AdamW" uses SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Decay of an exponential moving average of the weights, such as 0.9998. The average is
    # evaluated and saved instead of the weights. 0 = off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # True = train with the memory format channels_last. A step on a CPU is then shorter. Results
    # differ only by rounding.
    cfg.SOLVER.CHANNELS_LAST = False
    # Number of periodic checkpoints to keep. 0 = all. Other values must be at least 2, so that an
    # older checkpoint remains if the last one is damaged.
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0

    # Services that get losses, statistics, AP and pictures beside TensorBoard: "wandb" (Weights &
    # Biases), "mlflow". Each needs the extra of its name. [] = none.
    cfg.WRITERS = []

    # Annotation files and image folders of data in COCO format. They are registered under the only
    # name in DATASETS.TRAIN or DATASETS.TEST. "" = this name is already registered.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""
    # Folders of photos without annotations. Their subfolders are used too. The student learns from
    # the teacher's detections on these photos. () = none.
    cfg.DATASETS.UNLABELED = ()


def get_fgbg_kd_cfg() -> CN:
    """Detectron2's default config with this package's keys."""
    cfg = get_cfg()
    add_fgbg_kd_config(cfg)
    return cfg


def method_options(cfg: CN, name: str = "") -> dict:
    """Options of a method as keyword arguments: {"fg_weight": 8.0, ...}.

    Args:
        name: name of the method; "": the name in MODEL.KD.METHOD. A method without a node in
            MODEL.KD has no options.
    """
    node = cfg.MODEL.KD.get((name or cfg.MODEL.KD.METHOD).upper(), {})
    return {key.lower(): value for key, value in node.items()}


def method_defaults(name: str) -> dict:
    """The default options of a method, in the form of :func:`method_options`."""
    return method_options(get_fgbg_kd_cfg(), name)


def student_config(cfg: CN) -> CN:
    """The config of the student alone, for plain training and for deployment.

    The checkpoints have the tensor names of this detector. A config without distillation is
    returned unchanged.
    """
    if cfg.MODEL.META_ARCHITECTURE != "FgBgDistiller":
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    cfg.freeze()
    return cfg


def student_model(model: DictConfig) -> DictConfig:
    """The same as :func:`student_config`, for the ``model`` node of a Python config."""
    target = model._target_
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return model.student if name.endswith("FgBgDistiller") else model

"""Small detectors and a small COCO-format set, made on the spot."""

import json
import logging
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported: runs them on the CPU

from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.multiprocessing import start_processes

from fgbg_kd import METHOD_REGISTRY, FgBgDistiller, Teacher, config, get_fgbg_kd_cfg
from fgbg_kd.data import register_datasets
from fgbg_kd.detectors import dense

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
CLASSES = ("square", "stripe")
# The losses of FgBg, and the options that switch all of them off.
KD_LOSSES = {"loss_kd_fg", "loss_kd_bg", "loss_kd_bg_features"}
FGBG_OFF = {"fg_weight": 0.0, "bg_weight": 0.0, "bg_feature_weight": 0.0}


def write_coco(folder, count: int, seed: int) -> tuple[str, str]:
    """`count` noise images of two sizes with up to 3 filled boxes; image 0 has none."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    os.makedirs(folder / "images", exist_ok=True)
    for i in range(count):
        h, w = ((64, 80), (72, 56))[i % 2]
        pixels = rng.integers(0, 80, (h, w, 3), dtype=np.uint8)
        for _ in range(i % 4):
            bw, bh = (int(v) for v in rng.integers(8, 40, 2))
            x, y = int(rng.integers(0, w - bw)), int(rng.integers(0, h - bh))
            c = int(rng.integers(2))
            pixels[y : y + bh, x : x + bw, c] = 220
            box = {"bbox": [x, y, bw, bh], "area": bw * bh, "category_id": c + 1, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": i, **box})
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": h, "width": w})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return str(path), str(folder / "images")


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same random numbers on every machine, alone and among others."""
    seed_all_rng(0)


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """A tool that runs in this process quiets loggers, which caplog would miss in later tests."""

    def states():
        known = logging.root.manager.loggerDict.values()
        loggers = [logger for logger in known if isinstance(logger, logging.Logger)]
        return {x: (x.level, x.propagate) for x in loggers}

    before = states()
    yield
    for logger in states():
        level, logger.propagate = before.get(logger, (logging.NOTSET, True))
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch):
    """A test may register methods, detectors and keys of its own."""
    for registry in (METHOD_REGISTRY, META_ARCH_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    monkeypatch.setattr(config, "_extensions", list(config._extensions))
    monkeypatch.setattr(dense, "_views", dict(dense._views))


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """(json, image folder) of 12 images."""
    return write_coco(tmp_path_factory.mktemp("coco"), 12, seed=0)


def tiny_cfg(coco=None, name="tiny"):
    """Config of the smallest RetinaNet: three levels, 16 channels, 2 classes, CPU."""
    cfg = get_fgbg_kd_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME = "test_resnet"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.7, 1.4]]
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SEED = 7
    if coco:
        for part in ("TRAIN", "TEST"):
            cfg.DATASETS[part] = (f"{name}_{part.lower()}",)
            cfg.DATASETS[f"{part}_JSON"], cfg.DATASETS[f"{part}_IMAGES"] = coco
    return cfg


def tiny_fcos_cfg(coco=None, name="tiny"):
    """tiny_cfg's detector as an FCOS; GroupNorm's 32 groups need 32 channels."""
    cfg = tiny_cfg(coco, name)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.FCOS.NUM_CONVS = 1
    cfg.MODEL.FCOS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES
    return cfg


def tiny_ssd_cfg(coco=None, name="tiny", size=96):
    """The smallest SSD: four levels whose cells have 3, 4, 4 and 4 default boxes."""
    cfg = tiny_cfg(coco, name)
    cfg.MODEL.META_ARCHITECTURE = "SSD"
    cfg.MODEL.BACKBONE.NAME = "build_ssd_timm_backbone"
    cfg.MODEL.TIMM.OUT_FEATURES = ["res4", "res5"]
    ssd = cfg.MODEL.SSD
    ssd.NUM_CLASSES, ssd.SIZE, ssd.HEAD = len(CLASSES), size, "lite"
    ssd.EXTRA_CHANNELS = [16, 16]
    ssd.ASPECT_RATIOS, ssd.SQUARES = [[2]] * 4, [1, 2, 2, 2]
    ssd.SCALES = [0.2, 0.4, 0.6, 0.8, 1.0]
    return cfg


def tiny_ssd(seed=1, **options):
    """An SSD with clear predictions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(tiny_ssd_cfg(**options))
        for convolutions in model.head.classification_head.module_list:
            torch.nn.init.normal_(convolutions[1].weight, std=0.5)
    return model


def tiny_yolox_cfg(coco=None, name="tiny"):
    """The smallest YOLOX: the levels of tiny_cfg, 16 to 64 channels."""
    cfg = tiny_cfg(coco, name)
    cfg.MODEL.META_ARCHITECTURE = "YOLOX"
    cfg.MODEL.YOLOX.WIDTH = 0.0625
    cfg.MODEL.YOLOX.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return cfg


def tiny_yolo_cfg(coco=None, name="tiny", network="yolov4-tiny"):
    """A YOLO with a sixteenth of its channels, for tiny_cfg's data."""
    cfg = tiny_cfg(coco, name)
    cfg.MODEL.META_ARCHITECTURE = "YOLO"
    cfg.MODEL.YOLO.CFG, cfg.MODEL.YOLO.WIDTH = network, 1 / 16
    cfg.MODEL.YOLO.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [255.0] * 3
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def save_teacher(folder, channels=24, seed=1, edit=None):
    """Writes a teacher's config and random weights; returns their paths."""
    from detectron2.modeling import build_model

    cfg = tiny_cfg()
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    if edit:
        edit(cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(cfg)
        # Clearly not the prior, so that some predictions beat an untrained student's.
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.2)
    config, weights = folder / "teacher.yaml", folder / "teacher.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return str(config), str(weights)


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def distil_cfg(coco, teacher_files):
    cfg = tiny_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    return cfg


def make_batch(sizes=((64, 80), (72, 56)), boxes=(((5, 5, 30, 40), (10, 10, 20, 18)), ()), seed=0):
    """Detectron2 inputs of random images; `boxes` per image, classes alternate."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for (h, w), image_boxes in zip(sizes, boxes):
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor(image_boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(image_boxes)) % len(CLASSES)
        image = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": h, "width": w})
    return batch


def make_trainer(cls, cfg, folder, steps):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = str(folder), steps
    folder.mkdir(exist_ok=True)
    register_datasets(cfg)
    seed_all_rng(cfg.SEED)
    return cls(cfg)


def train(cls, cfg, folder, steps, resume=False):
    trainer = make_trainer(cls, cfg, folder, steps)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "loss" in k} for row in rows if "total_loss" in row]


def detector(kind="RetinaNet", edit=None, seed=1):
    """A small detector with clear predictions; FCOS has 32 channels, RetinaNet 16."""
    cfg = tiny_fcos_cfg() if kind == "FCOS" else tiny_cfg()
    if edit:
        edit(cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(cfg)
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.2)
    return model


_SIZES = ((64, 80), (72, 56), (130, 70), (40, 140))


def yolox_detector(edit=None, seed=1):
    """A small YOLOX with clear predictions. Its batch norms have statistics of random images."""
    cfg = tiny_yolox_cfg()
    if edit:
        edit(cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(cfg)
        for conv in (*model.head.cls_preds, *model.head.obj_preds):
            torch.nn.init.normal_(conv.weight, std=0.5)
            torch.nn.init.zeros_(conv.bias)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            batch = make_batch(_SIZES, ((),) * len(_SIZES))
            model.head(list(model.backbone(model.preprocess_image(batch).tensor).values()))
        for norm in norms:
            norm.momentum = 0.03
    return model


def faster_rcnn_cfg(coco=None, name="tiny"):
    cfg = tiny_cfg(coco, name)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    return cfg


def faster_rcnn():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_model(faster_rcnn_cfg())


def distiller(student, teacher, **options):
    """Of a student and a detector that becomes its teacher.

    Args:
        options: those of FgBgDistiller; "teacher_classes"; those of the method.
    """
    names = options.pop("teacher_classes", None)
    teacher = Teacher(teacher, class_names=names)
    own = ("classes", "inherit", "warmup_iters", "stop_iter", "unlabeled_weight")
    rest = {k: options.pop(k) for k in own if k in options}
    return FgBgDistiller(student=student, teacher=teacher, method=options, **rest).train()


def losses_of(model, batch=None):
    with EventStorage():
        return model(batch or make_batch())


def seen_by(model, batch=None):
    """The losses, and the Batch that the method got."""
    seen = []
    hook = model.method.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    losses = losses_of(model, batch)
    hook.remove()
    return losses, seen[0]


def in_two_processes(function, *arguments):
    """Runs function(rank, *arguments) in two processes with the environment of torchrun's workers.

    The processes are forks of a server that has imported the packages, which takes seconds. They
    see no GPU, because there may be fewer GPUs than processes.
    """
    multiprocessing.set_forkserver_preload(["fgbg_kd.engine"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_process, (port, function, arguments), nprocs=2, start_method="forkserver")


def _process(rank, port, function, arguments):
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {k: str(v) for k, v in {**address, **numbers}.items()}
    function(rank, *arguments)


def answers(coco, images):
    """All objects of these images, found; of others nothing."""
    truth = json.loads(Path(coco[0]).read_text())
    objects = [a for a in truth["annotations"] if a["image_id"] in images]
    return [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in objects
    ]


def row(method, seed, ap, finished="2026-01-01", options=None, **changes):
    return {
        "method": method,
        "seed": seed,
        "config": "c.yaml",
        "overrides": [],
        "options": ({"kl": "sigmoid"} if method[:4] == "FgBg" else {}) | (options or {}),
        **dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm"), ap),
        "APl": None,
        "seconds_per_step": 0.5,
        "memory_mb": 100,
        "gpu_memory_mb": None,
        "finished": finished,
        **dict.fromkeys(("hardware", "threads", "jobs", "versions", "commit"), "x"),
        **changes,
    }

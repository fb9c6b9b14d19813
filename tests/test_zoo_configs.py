"""Every config in configs/COCO-Detection trains, and the zoo's checkpoint formats load fully.

COCO and the zoo's files are not needed: images are like COCO's, weights random, networks small.
"""

import json
import pickle
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from PIL import Image

from fgbg_kd import build_teacher, get_fgbg_kd_cfg, student_config
from fgbg_kd.data import register_datasets
from fgbg_kd.engine import FgBgTrainer, load_config, load_lazy_config, train_lazy

FOLDER = ROOT / "configs" / "COCO-Detection"
LEAVES = sorted(p for p in FOLDER.glob("*.yaml") if not p.name.startswith("Base-"))


def name_of(path):
    return path.stem


@pytest.fixture(scope="module")
def coco_like(tmp_path_factory):
    """(json, image folder): four images, COCO's 80 categories under its own ids (1 to 90)."""
    folder = tmp_path_factory.mktemp("coco_like")
    rng = np.random.default_rng(0)
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    images, annotations = [], []
    for i in range(4):
        pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 128})
        for size in (20, 60):
            x, y = (int(v) for v in rng.integers(0, 30, 2))
            box = {"bbox": [x, y, size, size], "area": size**2, "iscrowd": 0}
            category = things[int(rng.integers(80))]["id"]
            annotations.append({"id": len(annotations) + 1, "image_id": i, **box})
            annotations[-1]["category_id"] = category
    categories = [{"id": c["id"], "name": c["name"]} for c in things]
    path = folder / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return str(path), str(folder)


def shrink(cfg):
    """Fewer channels, same modules: depth, levels, anchors and classes stay."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH > 34:
        resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS = 8, 32
        resnets.WIDTH_PER_GROUP = max(1, 8 // resnets.NUM_GROUPS)
    cfg.MODEL.FPN.OUT_CHANNELS //= 8
    cfg.MODEL.SSD.WIDTH /= 8
    cfg.MODEL.YOLOX.WIDTH /= 8
    cfg.MODEL.YOLO.WIDTH /= 16
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    return cfg


def write_teacher(name, folder):
    """Saves a small detector of a config with random weights. Returns the paths of both files."""
    if name.endswith(".py"):
        return write_vitdet(FOLDER.parents[1] / name, folder)
    ours = FOLDER.parents[1] / name
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_file(str(ours) if ours.is_file() else model_zoo.get_config_file(name))
    shrink(cfg)
    config, weights = folder / "teacher.yaml", folder / "teacher.pth"
    config.write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    return str(config), str(weights)


VITDET = """
from detectron2.config import LazyConfig
model = LazyConfig.load({path!r}).model
_net = model.backbone.net
_net.embed_dim, _net.depth, _net.num_heads, _net.window_size = 32, 4, 2, 4
_net.img_size = model.backbone.square_pad = 128
"""


def write_vitdet(path, folder):
    config, weights = folder / "vitdet.py", folder / "vitdet.pth"
    config.write_text(VITDET.format(path=str(path)))
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, weights)
    return str(config), str(weights)


def classifier(detector):
    """The last convolution of the classes, on the finest level if there are several."""
    head = detector.head
    if hasattr(head, "classification_head"):  # SSD
        modules = head.classification_head.module_list[0].modules()
        return [x for x in modules if isinstance(x, torch.nn.Conv2d)][-1]
    if hasattr(head, "classifiers"):  # YOLO
        return head.classifiers()[0]
    return head.cls_score if hasattr(head, "cls_score") else head.cls_preds[0]


def load_small(path, coco_like, folder):
    cfg = load_config(str(path)).clone()
    cfg.defrost()
    shrink(cfg)
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_like",), ()
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = coco_like
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 1, ()
    if path.stem == "ssd300_vgg16":  # of 300 x 300 pixels, with all its channels
        cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.MODEL.KD.FGBG.GATE = False  # a random teacher need not be better anywhere
    cfg.OUTPUT_DIR = str(folder)
    register_datasets(cfg)
    return cfg


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
@pytest.mark.slow
def test_a_config_trains_a_step(path, coco_like, tmp_path):
    if "yolox" in path.stem:
        pytest.importorskip("yolox")
    cfg = load_small(path, coco_like, tmp_path)
    distils = cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller"
    if distils:
        teacher = cfg.MODEL.KD.TEACHER
        if teacher.CONFIG.endswith(".py") and not find_spec("detectron2.modeling.backbone.vit"):
            pytest.skip("v0.6 has no ViT")
        if not (FOLDER.parents[1] / teacher.CONFIG).is_file():
            assert model_zoo.get_checkpoint_url(teacher.CONFIG)  # the zoo has weights by this name
        teacher.CONFIG, teacher.WEIGHTS = write_teacher(teacher.CONFIG, tmp_path)
    trainer = FgBgTrainer(cfg)
    detector = trainer.model.student if distils else trainer.model
    before = classifier(detector).weight.clone()
    trainer.train()
    losses = {k: v[0] for k, v in trainer.storage.latest().items() if "loss" in k}
    assert all(np.isfinite(v) for v in losses.values())
    if distils:
        assert losses["loss_kd_fg"] > 0
        if cfg.MODEL.KD.FGBG.BG_WEIGHT > 0:
            assert losses["loss_kd_bg"] > 0
    trained = {k: v for k, v in trainer.model.named_parameters() if v.requires_grad}
    assert [k for k, v in trained.items() if v.grad is None] == []
    assert not torch.equal(classifier(detector).weight, before)


@pytest.mark.slow
def test_the_python_config_trains_a_step(coco_like, tmp_path):
    cfg = load_lazy_config(str(FOLDER / "lazy_retinanet_R101_3x_to_R50_1x.py"))
    assert cfg.train.output_dir.endswith("/lazy_retinanet_R101_3x_to_R50_1x")
    assert model_zoo.get_checkpoint_url(cfg.model.teacher.config)
    teacher, student = cfg.model.teacher, cfg.model.student
    teacher.config, teacher.weights = write_teacher(teacher.config, tmp_path)
    stages = student.backbone.bottom_up.stages
    stages.depth, stages.norm = 18, "BN"
    del stages.stride_in_1x1
    student.backbone.top_block.in_channels = 512
    student.backbone.out_channels = 32
    student.head.input_shape = [ShapeSpec(channels=32)] * 5
    student.head.conv_dims = [32]
    small = load_small(FOLDER / "retinanet_R101_3x_to_R50_1x.yaml", coco_like, tmp_path)
    cfg.dataloader.train.dataset.names = small.DATASETS.TRAIN[0]
    cfg.dataloader.train.mapper.augmentations[0].short_edge_length = (64, 96)
    cfg.dataloader.train.num_workers, cfg.dataloader.train.total_batch_size = 0, 2
    cfg.dataloader.evaluator, cfg.model.method.gate = None, False
    cfg.train.init_checkpoint, cfg.train.max_iter = "", 1
    cfg.train.output_dir, cfg.train.log_period = str(tmp_path), 1
    train_lazy(cfg)
    losses = json.loads((tmp_path / "metrics.json").read_text())
    assert losses["loss_kd_fg"] > 0 and losses["loss_kd_bg"] > 0


@pytest.mark.parametrize("path", [*LEAVES, *FOLDER.glob("*.py")], ids=name_of)
def test_a_config_is_short_and_has_an_output_folder_of_its_name(path):
    assert len(path.read_text().splitlines()) <= 15
    if path.suffix == ".yaml":
        assert load_config(str(path)).OUTPUT_DIR == f"output/COCO-Detection/{path.stem}"


@pytest.mark.parametrize("schedule", ["1x", "3x"])
def test_the_distilled_r50_is_the_zoos_r50(schedule):
    """They differ only in distillation, so their APs can be compared."""
    ours = load_config(str(FOLDER / f"retinanet_R101_3x_to_R50_{schedule}.yaml"))
    zoos = get_fgbg_kd_cfg()
    zoos.merge_from_file(
        model_zoo.get_config_file(f"COCO-Detection/retinanet_R_50_FPN_{schedule}.yaml")
    )
    ours = student_config(ours).clone()
    ours.defrost()
    ours.OUTPUT_DIR, ours.MODEL.DEVICE = zoos.OUTPUT_DIR, zoos.MODEL.DEVICE
    ours.MODEL.KD, ours.SEED = zoos.MODEL.KD, zoos.SEED
    assert ours == zoos


# --- checkpoints in the zoo's formats ---

ZOO = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}


@pytest.fixture(scope="module", params=ZOO)
def detector(request, tmp_path_factory):
    """Name, config file and weights of a small RetinaNet and of a small Faster R-CNN."""
    config, weights = write_teacher(ZOO[request.param], tmp_path_factory.mktemp(request.param))
    return request.param, config, torch.load(weights, weights_only=True)["model"]


def same(teacher, saved):
    loaded = teacher.detector.state_dict()
    return loaded.keys() == saved.keys() and all(torch.equal(loaded[k], saved[k]) for k in saved)


@pytest.mark.parametrize("kind", ["pkl", "pkl matched by name", "pth", "pth of tensors alone"])
@pytest.mark.slow
def test_detectron2s_own_names_load_whole(detector, kind, tmp_path):
    _, config, saved = detector
    arrays = {k: v.numpy() for k, v in saved.items()}
    path = tmp_path / f"model_final.{kind[:3]}"
    if kind == "pkl":
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    elif kind == "pkl matched by name":
        data = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(saved if kind == "pth of tensors alone" else {"model": saved}, path)
    assert same(build_teacher(config, str(path)), saved)


# Name in Detectron2, name in Caffe2's Detectron ("." for "_"); the first that fits is taken.
CAFFE2 = [
    (r"backbone\.bottom_up\.stem\.conv1\.norm", "res.conv1.bn"),
    (r"backbone\.bottom_up\.stem\.conv1", "conv1"),
    (r"backbone\.bottom_up\.(res.)\.(\d+)\.shortcut", r"\1.\2.branch1"),
    (r"backbone\.bottom_up\.(res.)\.(\d+)\.conv1", r"\1.\2.branch2a"),
    (r"backbone\.bottom_up\.(res.)\.(\d+)\.conv2", r"\1.\2.branch2b"),
    (r"backbone\.bottom_up\.(res.)\.(\d+)\.conv3", r"\1.\2.branch2c"),
    (r"backbone\.fpn_lateral5", "fpn.inner.res5.2.sum"),
    (r"backbone\.fpn_lateral(.)", r"fpn.inner.res\1.2.sum.lateral"),
    (r"backbone\.fpn_output(.)", r"fpn.res\1.2.sum"),
    (r"proposal_generator\.rpn_head\.conv", "conv.rpn.fpn2"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn.bbox.pred.fpn2"),
    (r"proposal_generator\.rpn_head\.objectness_logits", "rpn.cls.logits.fpn2"),
    (r"roi_heads\.box_head\.fc1", "fc6"),
    (r"roi_heads\.box_head\.fc2", "fc7"),
    (r"roi_heads\.box_predictor\.", ""),
]


def to_caffe2(saved):
    """Converts a Faster R-CNN's tensors to the blobs of Caffe2's Detectron."""
    blobs = {}
    for key, value in saved.items():
        if "running" in key:  # it merges them into scale and bias
            continue
        name = next(re.sub(p, r, key, count=1) for p, r in CAFFE2 if re.match(p, key))
        name = name.replace(".norm", ".bn")
        name = re.sub(r"\.weight$", ".s" if ".bn" in name else ".w", name)
        name = re.sub(r"\.bias$", ".b", name).replace(".", "_")
        if name.startswith("cls_score"):  # background comes first, not last
            value = torch.cat([value[-1:], value[:-1]])
        elif name.startswith("bbox_pred"):  # and has a box of its own
            value = torch.cat([torch.zeros_like(value[:4]), value])
        blobs[name] = value.numpy()
        blobs[f"{name}_momentum"] = blobs[name]
    return blobs


@pytest.mark.parametrize("detector", ["faster_rcnn"], indirect=True)
def test_caffe2s_names_load_whole(detector, tmp_path):
    """Names in the format of Detectron's zoo. Detectron2 converts its two-stage detectors."""
    _, config, saved = detector
    blobs = to_caffe2(saved)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", "fpn_res2_2_sum_b"} <= blobs.keys()
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}))
    expected = {k: torch.ones_like(v) if "running_var" in k else v for k, v in saved.items()}
    assert same(build_teacher(config, str(path)), expected)


def test_imagenet_weights_in_caffe2s_names_fill_the_students_backbone(coco_like, tmp_path):
    """Tests R-50.pkl, from which the zoo's detectors and the distilled detectors start."""
    cfg = load_small(FOLDER / "retinanet_R101_3x_to_R50_1x.yaml", coco_like, tmp_path)
    bottom_up = build_model(student_config(cfg)).backbone.bottom_up.state_dict()
    saved = {f"backbone.bottom_up.{k}": v for k, v in bottom_up.items()}
    cfg.MODEL.WEIGHTS = str(tmp_path / "R-50.pkl")
    blobs = to_caffe2(saved) | {"fc1000_w": np.zeros((1000, 256), np.float32)}
    Path(cfg.MODEL.WEIGHTS).write_bytes(pickle.dumps(blobs))
    teacher = cfg.MODEL.KD.TEACHER
    teacher.CONFIG, teacher.WEIGHTS = write_teacher(teacher.CONFIG, tmp_path)
    trainer = FgBgTrainer(cfg)
    trainer.resume_or_load(resume=False)
    loaded = trainer.model.student.state_dict()
    compared = [k for k in saved if "running" not in k]
    assert all(torch.equal(loaded[k], saved[k]) for k in compared) and compared

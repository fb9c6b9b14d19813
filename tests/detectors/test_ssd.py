"""SSD equals torchvision's, whatever the size of the images, and teaches and learns."""

import pickle

import pytest
import torch
from conftest import (
    detector,
    distiller,
    losses_of,
    make_batch,
    seen_by,
    tiny_ssd,
    tiny_ssd_cfg,
    train,
    weights,
)
from detectron2.config import LazyCall, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as TorchvisionSSD

from fgbg_kd import FgBgDistiller, Teacher, deploy, get_fgbg_kd_cfg
from fgbg_kd.data import register_datasets
from fgbg_kd.detectors import SSD, view
from fgbg_kd.detectors.load import build_detector, load_detector
from fgbg_kd.detectors.ssd_backbones import SSDTimm
from fgbg_kd.detectors.timm_backbone import TimmBackbone
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.matching import select_unwarped
from fgbg_kd.methods import DenseOutput
from fgbg_kd.utils.errors import CheckpointError, ConfigError

BOXES = (((5, 5, 40, 60), (30, 20, 90, 90)), ((10, 10, 50, 40),))
SQUARES = dict(sizes=((96, 96), (96, 96)), boxes=BOXES)


def pair():
    """Our SSD, and torchvision's with the same modules, for pixels from 0 to 1."""
    cfg = tiny_ssd_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [255.0] * 3
    cfg.MODEL.SSD.SQUARES = [2] * 4
    ssd = cfg.MODEL.SSD
    ours = build_model(cfg)
    anchors = DefaultBoxGenerator(ssd.ASPECT_RATIOS, scales=ssd.SCALES)
    theirs = TorchvisionSSD(
        ours.backbone, anchors, (96, 96), 3, [0.0] * 3, [1.0] * 3, ours.head,
        detections_per_img=100,
    )  # fmt: skip
    return ours, theirs


def targets(batch):
    return [
        {"boxes": x["instances"].gt_boxes.tensor, "labels": x["instances"].gt_classes + 1}
        for x in batch
    ]


@pytest.mark.parametrize("boxes", [BOXES, (BOXES[0], ()), ((), ())])
def test_losses_and_gradients_are_torchvisions(boxes):
    ours, theirs = pair()
    batch = make_batch(((96, 96), (96, 96)), boxes)
    found, gradients = [], []
    pixels = [x["image"] / 255 for x in batch]
    for model, inputs in ((ours, (batch,)), (theirs, (pixels, targets(batch)))):
        model.train().zero_grad()
        losses = model(*inputs)
        sum(losses.values()).backward()
        found.append(losses)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(found[0]["loss_cls"], found[1]["classification"])
    assert torch.equal(found[0]["loss_box_reg"], found[1]["bbox_regression"])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert (found[0]["loss_cls"] > 0) == (boxes != ((), ()))


def test_detections_are_torchvisions():
    ours, theirs = (model.eval() for model in pair())
    for convolutions in ours.head.classification_head.module_list:
        torch.nn.init.normal_(convolutions[1].weight, std=0.5)
    batch = make_batch(**SQUARES)
    with torch.no_grad():
        found = [x["instances"] for x in ours(batch)]
        expected = theirs([x["image"] / 255 for x in batch])
    for a, b in zip(found, expected):
        assert len(a) == len(b["scores"]) == 100
        assert torch.equal(a.scores, b["scores"])
        assert torch.equal(a.pred_boxes.tensor, b["boxes"])
        assert torch.equal(a.pred_classes, b["labels"] - 1)


def official(kind):
    """A torchvision model with random weights, and the config that takes its file."""
    cfg = tiny_ssd_cfg()
    ssd = cfg.MODEL.SSD
    if kind == "ssd300":
        names = ("ASPECT_RATIOS", "SCALES", "STEPS", "SQUARES", "EXTRA_CHANNELS", "HEAD", "SIZE")
        fresh = get_fgbg_kd_cfg().MODEL.SSD
        for name in names:
            ssd[name] = fresh[name]
        cfg.MODEL.BACKBONE.NAME = "build_ssd_vgg16_backbone"
        model = ssd300_vgg16(weights=None, weights_backbone=None)
    else:
        cfg.MODEL.BACKBONE.NAME, ssd.SIZE = "build_ssd_mobilenetv3_backbone", 320
        ssd.ASPECT_RATIOS, ssd.SQUARES = [[2, 3]] * 6, [2] * 6
        ssd.SCALES = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]
        model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    ssd.NUM_CLASSES = 80
    return model.eval(), cfg


@pytest.mark.parametrize("kind", [pytest.param("ssd300", marks=pytest.mark.slow), "ssdlite320"])
@pytest.mark.slow
def test_torchvisions_file_loads_whole_and_the_80_classes_of_its_91_are_kept(kind, tmp_path):
    model, cfg = official(kind)
    path = str(tmp_path / "official.pth")
    torch.save(model.state_dict(), path)  # the file of torchvision: names and tensors
    ours = load_detector(cfg, path)
    assert isinstance(ours, SSD) and ours.state_dict().keys() == model.state_dict().keys()
    coco_ids = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]
    for name, value in model.state_dict().items():
        if ours.state_dict()[name].shape != value.shape:
            assert name.startswith("head.classification_head.")
            value = value.unflatten(0, (-1, 91))[:, [0, *coco_ids]].flatten(0, 1)
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_file_of_arrays_is_read_for_80_classes_too(tmp_path):
    cfg = tiny_ssd_cfg()
    cfg.MODEL.SSD.NUM_CLASSES = 80
    state = build_detector(cfg).state_dict()
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({"model": {name: value.numpy() for name, value in state.items()}}, file)
    found = load_detector(cfg, str(tmp_path / "a.pkl")).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_file_with_another_number_of_classes_is_refused(tmp_path):
    torch.save({"model": tiny_ssd().state_dict()}, tmp_path / "a.pth")
    cfg = tiny_ssd_cfg()
    cfg.MODEL.SSD.NUM_CLASSES = 5
    with pytest.raises(CheckpointError, match="of another shape in the model"):
        load_detector(cfg, str(tmp_path / "a.pth"))


def test_images_of_any_size_are_warped_and_boxes_come_back_in_their_pixels():
    model = tiny_ssd().eval()
    batch = make_batch(((48, 192), (96, 96)), (((10, 5, 60, 30),), ()))
    seen = model.warped(batch)
    assert [x["image"].shape for x in seen] == [(3, 96, 96)] * 2 and seen[1] is batch[1]
    assert seen[0]["instances"].gt_boxes.tensor.tolist() == [[5, 10, 30, 60]]
    assert batch[0]["instances"].gt_boxes.tensor.tolist() == [[10, 5, 60, 30]]  # as it was
    with torch.no_grad():
        wide = model(batch[:1])[0]["instances"]
        square = model([{"image": seen[0]["image"]}])[0]["instances"]
    assert wide.image_size == (48, 192) and torch.equal(wide.scores, square.scores)
    scaled = square.pred_boxes.tensor * torch.tensor([2, 0.5, 2, 0.5])
    torch.testing.assert_close(wide.pred_boxes.tensor, scaled)


def test_losses_do_not_depend_on_how_a_batch_is_split_over_processes(monkeypatch):
    batch = make_batch(((96, 96),) * 2, (BOXES[0], ()))
    model = tiny_ssd().double().eval()  # eval: a batch norm's statistics are local
    model.training = True
    whole = model(batch)
    counts = []
    monkeypatch.setattr("fgbg_kd.detectors.ssd.world_mean", lambda n: counts.append(n) or n)
    for x in batch:
        model([x])
    mean = sum(counts) / 2
    monkeypatch.setattr("fgbg_kd.detectors.ssd.world_mean", lambda n: mean)
    parts = [model([x]) for x in batch]
    for name, value in whole.items():
        torch.testing.assert_close(sum(p[name] for p in parts) / 2, value)


def test_the_logits_are_those_of_the_softmax_score():
    model = tiny_ssd().double().eval()
    of = view(model)
    images = of.preprocess(make_batch(**SQUARES))
    output = of.run(images.tensor.double())
    for logits, scores, raw in zip(output.logits, of.scores(output.raw), output.raw[0]):
        expected = raw.unflatten(1, (-1, 3)).softmax(2)[:, :, 1:].flatten(1, 2)
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(logits.sigmoid(), expected)
    sure = of.logits(([torch.tensor([[0.0, 90.0, -90.0]]).reshape(1, 3, 1, 1)], None))[0]
    assert sure.isfinite().all()


def test_fewer_classes_keep_their_scores():
    of, images = view(tiny_ssd().eval()), torch.randn(1, 3, 96, 96)
    before = of.run(images, raw=False).logits
    of.keep_classes([1])
    assert of.num_classes == 1
    for all_of_them, one in zip(before, of.run(images, raw=False).logits):
        torch.testing.assert_close(one, all_of_them[:, 1::2])


def test_a_head_has_the_order_of_the_classes_that_are_kept():
    """INHERIT copies this head to a student whose classes have another order."""
    of, images = view(tiny_ssd().eval()), torch.randn(1, 3, 96, 96)
    before = of.run(images, raw=False).logits
    of.keep_classes([1, 0])
    student = tiny_ssd(seed=2).eval()
    student.load_state_dict(of.detector.state_dict())
    for old, new in zip(before, view(student).run(images, raw=False).logits):
        torch.testing.assert_close(new.unflatten(1, (-1, 2)), old.unflatten(1, (-1, 2)).flip(2))


def test_qfl_divides_by_the_number_of_matched_boxes():
    model = distiller(tiny_ssd(), tiny_ssd(seed=2), name="QFL")
    losses, batch = seen_by(model)
    targets = [x["instances"].gt_boxes.tensor for x in model.student.warped(make_batch())]
    matched = sum(int((model.student._match(x) >= 0).sum()) for x in targets)
    assert losses["loss_kd"] > 0 and batch.loss_normalizer == matched > 1


def test_other_classes_take_no_place_among_the_detections():
    model = tiny_ssd().eval()
    model.detections_per_img = 10_000
    second = model(make_batch())[0]["instances"]
    expected = (second.pred_classes == 1).sum()
    model.detections_per_img = int(expected)  # fewer than all detections
    view(model).keep_classes([1])
    assert len(model(make_batch())[0]["instances"]) == expected < len(second)


def test_detections_of_a_class_that_is_not_kept_are_left_out():
    model = tiny_ssd().eval()
    found = model(make_batch())[0]["instances"]
    both = found[found.pred_classes == 1]
    view(model).keep_classes([1])
    one = model(make_batch())[0]["instances"]
    assert 0 < len(one) < len(found) and (one.pred_classes == 0).all()
    n = len(both)  # those of the other class took places
    torch.testing.assert_close(one[:n].pred_boxes.tensor, both.pred_boxes.tensor)
    torch.testing.assert_close(one[:n].scores, both.scores)


PAIRS = {
    "SSD from SSD": (tiny_ssd, lambda: tiny_ssd(seed=2)),
    "SSD from a larger SSD": (tiny_ssd, lambda: tiny_ssd(seed=2, size=128)),
    "RetinaNet from SSD": (detector, tiny_ssd),
    "FCOS from SSD": (lambda: detector("FCOS"), tiny_ssd),
    "SSD from RetinaNet": (tiny_ssd, detector),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_train(name):
    student, teacher = (build() for build in PAIRS[name])
    model = distiller(student, teacher, gate=False)
    losses, batch = seen_by(model, make_batch(boxes=(((5, 5, 30, 40), (0, 0, 64, 60)), ())))
    assert batch.same_anchors == (name == "SSD from SSD")
    shapes = [[x.shape[-2:] for x in of.features] for of in (batch.student, batch.teacher)]
    assert shapes[0] == shapes[1] and 16 in batch.strides
    assert losses["loss_kd_fg"] > 0 and losses["loss_kd_bg"] > 0
    sum(losses.values()).backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)


@pytest.mark.parametrize("strides", [(16, 32), (8, 16)])
def test_maps_of_warped_images_are_put_back_cell_by_cell(strides):
    """The reference looks up, for each cell, the cell of the warped image at the same place."""
    maps = [torch.randn(2, 4, 19, 19), torch.randn(2, 4, 10, 10)]  # of SSD300: 15.8 and 30 pixels
    output, sizes = DenseOutput(maps, maps), [(64, 80), (72, 56)]
    found = select_unwarped(output, [0, 1], [(9, 10), (5, 5)], strides, sizes)
    for level, (stride, cells) in enumerate(zip(strides, (19, 10))):
        maps = output.features[level], found.features[level]
        logits = output.logits[level], found.logits[level]
        for n, (h, w) in enumerate(sizes):
            for y in range(maps[1].shape[2]):
                for x in range(maps[1].shape[3]):
                    v = min(int((y + 0.5) * stride / h * cells), cells - 1)
                    u = min(int((x + 0.5) * stride / w * cells), cells - 1)
                    assert torch.equal(maps[1][n, :, y, x], maps[0][n, :, v, u])
                    assert torch.equal(logits[1][n, :, y, x], logits[0][n, :, v, u])


def test_levels_of_a_warping_teacher_meet_by_their_stride_in_the_students_pixels():
    """A teacher of 96 pixels: for images of 48x48, its stride 16 covers 8 pixels."""
    student, teacher = detector(), tiny_ssd()

    def places(size):
        frozen = Teacher(teacher.eval().requires_grad_(False))
        model = FgBgDistiller(student=student, teacher=frozen, image_size=size)
        return [x.place for x in model.levels]

    assert places(None) == places((96, 96)) == [(1, 0), (2, 1)]  # strides 16 and 32
    assert places((48, 48)) == [(0, 0), (1, 1), (2, 2)]  # 8, 16, and 24 beside 32
    same = FgBgDistiller(student=tiny_ssd(), teacher=tiny_ssd(size=128), image_size=(7, 7))
    assert [x.place for x in same.levels] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_fixed_teacher_sees_each_image_warped_without_the_padding():
    student, teacher = detector(), tiny_ssd()
    model, seen = distiller(student, teacher), []
    teacher.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = make_batch()
    losses_of(model, batch)
    teacher_alone = view(teacher).preprocess(batch).tensor
    torch.testing.assert_close(seen[0], teacher_alone, rtol=1e-5, atol=1e-3)


def test_a_lazy_config_gives_the_same_losses():
    cfg = tiny_ssd_cfg()
    ssd = cfg.MODEL.SSD
    torch.manual_seed(0)
    from_yaml = build_model(cfg)
    lazy = LazyCall(SSD)(
        backbone=LazyCall(SSDTimm)(
            bottom_up=LazyCall(TimmBackbone)(name="test_resnet", out_features=("res4", "res5")),
            size=96,
            extra_channels=(16, 16),
        ),
        num_classes=2,
        size=96,
        head="lite",
        aspect_ratios=ssd.ASPECT_RATIOS,
        scales=ssd.SCALES,
        squares=ssd.SQUARES,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format="BGR",
    )
    torch.manual_seed(0)
    from_python = instantiate(lazy)
    a, b = (losses_of(m.train(), make_batch(**SQUARES)) for m in (from_yaml, from_python))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_wrong_lists_of_default_boxes_are_refused():
    for key, value in (("SCALES", [0.2]), ("ASPECT_RATIOS", [[2]]), ("STEPS", [8]), ("HEAD", "x")):
        cfg = tiny_ssd_cfg()
        cfg.MODEL.SSD[key] = value
        with pytest.raises(ConfigError, match=f"MODEL.SSD.{key}"):
            build_model(cfg)


@pytest.mark.parametrize("suffix", ["onnx", "pt", "xml"])
@pytest.mark.slow
def test_an_exported_file_detects_the_same_in_photos_of_two_sizes(suffix, tmp_path):
    from deploy.small import photo

    pytest.importorskip("openvino" if suffix == "xml" else "onnxruntime")
    cfg = tiny_ssd_cfg()
    cfg.INPUT.FORMAT = "RGB"
    model = tiny_ssd().eval()
    model.input_format = "RGB"
    about = deploy.describe(cfg, model)
    path = str(tmp_path / f"ssd.{suffix}")
    deploy.export(model, about, path, photo(96, 96))
    exported = deploy.ExportedDetector(path)
    images = [photo(h, w, h) for h, w in ((96, 96), (60, 130))]
    found = deploy.agreement(model, exported, about, images)
    assert found.detections > 10 and found.partners == 1 and found.score < 1e-5


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_like_one_that_was_not_stopped(coco, tmp_path):
    cfg = tiny_ssd_cfg(coco)
    cfg.SOLVER.EMA_DECAY = 0.9
    register_datasets(cfg)
    train(FgBgTrainer, cfg, tmp_path / "whole", 4)
    train(FgBgTrainer, cfg, tmp_path / "parts", 2)
    train(FgBgTrainer, cfg, tmp_path / "parts", 4, resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


@pytest.mark.parametrize("step, fits", [(16, True), (20, True), (22, False), (10, False)])
def test_steps_that_are_made_for_another_backbone_are_refused(step, fits):
    assert build_model(tiny_ssd_cfg()).backbone.grids[0] == (6, 6)  # 16 pixels apart
    cfg = tiny_ssd_cfg()
    cfg.MODEL.SSD.STEPS = [step, 32, 48, 96]
    if fits:
        build_model(cfg)
        return
    message = rf"STEPS\[0\] is {step}, .* map of 6 cells for 96 pixels, .* set MODEL.SSD.STEPS: "
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)


def test_the_default_boxes_of_every_backbone_cover_the_image_by_default():
    for name in ("mobilenetv1", "mobilenetv3", "vgg16"):
        cfg = get_fgbg_kd_cfg()
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "SSD", "cpu"
        cfg.MODEL.BACKBONE.NAME = f"build_ssd_{name}_backbone"
        boxes = build_model(cfg).default_boxes
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert (centres.amax(0) > 290).all() and (centres.amin(0) < 10).all()


def test_a_timm_body_of_other_strides_is_refused():
    cfg = tiny_ssd_cfg()
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res4", "res5"]
    with pytest.raises(ConfigError, match=r"strides \[8, 16, 32\], .* set it to \[res4, res5\]"):
        build_model(cfg)


def test_detectron2s_default_normalisation_is_warned_of(caplog):
    cfg = tiny_ssd_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    build_model(cfg)
    assert "PIXEL_MEAN" not in caplog.text
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]
    build_model(cfg)
    assert "are Detectron2's defaults" in caplog.text


def test_grey_images_are_refused():
    cfg = tiny_ssd_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_ssd_mobilenetv1_backbone"
    cfg.MODEL.SSD.ASPECT_RATIOS, cfg.MODEL.SSD.SQUARES = [[2]] * 6, [2] * 6
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [127.5], [127.5], "L"
    with pytest.raises(ConfigError, match="PIXEL_MEAN has 1 values, but SSD reads images with 3"):
        build_model(cfg)

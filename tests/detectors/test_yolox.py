"""YOLOX equals the library's model: weights, losses, gradients, boxes and detections."""

import inspect
import math
import warnings

import pytest
import torch
from conftest import ROOT, losses_of, make_batch, tiny_yolox_cfg, yolox_detector
from detectron2.config import instantiate
from detectron2.modeling import build_model

from fgbg_kd import build_teacher, get_fgbg_kd_cfg
from fgbg_kd.detectors import YOLOX, view
from fgbg_kd.engine import load_lazy_config
from fgbg_kd.experiments.cost import detectors_of
from fgbg_kd.utils.errors import ConfigError, TeacherError

pytest.importorskip("yolox")
from yolox.config import YoloxConfig  # noqa: E402
from yolox.utils import postprocess  # noqa: E402

CONFIGS = ROOT / "configs" / "COCO-Detection"
BOXES = {
    "boxes in both images": (((5, 5, 30, 40), (10, 10, 20, 18)), ((4, 4, 40, 60),)),
    "one image without boxes": (((5, 5, 30, 40), (10, 10, 20, 18)), ()),
    "no boxes": ((), ()),
    "a box whose centre is outside": (((-90, -90, 4, 4),), ()),
}


def library(model=None, num_classes=2, width=0.0625):
    """The library's model, with the weights of ours."""
    config = YoloxConfig("test", num_classes=num_classes, depth=0.33, width=width)
    found = config.get_model()
    if model is not None:
        found.load_state_dict(model.state_dict())
        found.train(model.training)
    return found


def targets(batch):
    """The library's ground truth: (N, 9, 5) of class, centre and size."""
    labels = torch.zeros(len(batch), 9, 5)
    for label, x in zip(labels, batch):
        x0, y0, x1, y1 = x["instances"].gt_boxes.tensor.unbind(1)
        rows = [x["instances"].gt_classes, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
        label[: len(x0)] = torch.stack(rows, dim=1)
    return labels


def librarys_losses(model, batch):
    images = model.preprocess_image(batch).tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = library(model)
        found.head.use_l1 = model.head.use_l1
        return found, found(images, targets(batch))


def test_the_initial_weights_are_the_librarys():
    torch.manual_seed(0)
    ours = build_model(tiny_yolox_cfg())
    torch.manual_seed(0)
    expected = library()
    assert str(ours.backbone.backbone) == str(expected.backbone.backbone)  # with eps and momentum
    saved = expected.state_dict()
    assert ours.state_dict().keys() == saved.keys()
    assert all(torch.equal(v, saved[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.parametrize("use_l1", [False, True])
def test_losses_and_gradients_are_the_librarys_bit_for_bit(case, use_l1):
    ours = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(USE_L1=use_l1)).train()
    batch = make_batch(boxes=BOXES[case])
    theirs, expected = librarys_losses(ours, batch)
    losses = losses_of(ours, batch)
    names = {"loss_iou": "iou_loss", "loss_obj": "conf_loss", "loss_cls": "cls_loss"}
    names |= {"loss_l1": "l1_loss"} if use_l1 else {}
    assert losses.keys() == names.keys()
    assert all(torch.equal(losses[k], expected[name]) for k, name in names.items())
    assert (losses["loss_cls"] > 0) == (case in list(BOXES)[:2])
    assert ours.loss_normalizer >= 1
    sum(losses.values()).backward()
    expected["total_loss"].backward()
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # The library adds its terms in another order.
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_losses_leave_the_heads_output_as_it_was():
    """The library decodes in place, which would reach maps of one cell or in channels_last."""
    model = yolox_detector().train()
    batch = make_batch(sizes=((32, 32), (20, 30)), boxes=BOXES["no boxes"])
    of = view(model)
    output = of.run(of.preprocess(batch).tensor)
    raw = [x.to(memory_format=torch.channels_last) for x in output.raw]
    before = [x.clone() for x in raw]
    assert raw[-1].shape[-2:] == (1, 1)
    model.forward_training(of.preprocess(batch), None, raw, [x["instances"] for x in batch])
    assert all(torch.equal(a, b) for a, b in zip(before, raw))


@torch.no_grad()
def test_boxes_and_scores_are_the_librarys():
    model = yolox_detector().eval()
    images = model.preprocess_image(make_batch()).tensor
    expected = library(model)(images)  # (N, R, 4 + 1 + K)
    of = view(model)
    output = of.run(images)
    boxes, logits = (
        torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)
        for maps in (of.decode(output.features, output.raw), output.logits)
    )
    centre, size = expected[..., :2], expected[..., 2:4]
    corners = torch.cat([centre - size / 2, centre + size / 2], dim=2)
    torch.testing.assert_close(boxes, corners, rtol=1e-5, atol=1e-4)
    scores = expected[..., 4:5] * expected[..., 5:]
    torch.testing.assert_close(logits.sigmoid(), scores, rtol=1e-5, atol=1e-6)
    (only,) = of.class_logits(of.features(images))[:1]
    assert torch.equal(only, output.logits[0])


def test_joint_logits_are_finite_and_have_finite_gradients():
    of = view(yolox_detector())
    raw = torch.zeros(1, 7, 1, 5)
    raw[:, 4] = torch.tensor([-80.0, 80, -80, 80, 0])
    raw[:, 5:] = torch.tensor([-80.0, 80, 80, -80, 0])
    raw.requires_grad_()
    (logits,) = of.logits([raw])
    expected = torch.tensor([-160, 80 - math.log(2), -80, -80, -math.log(3)])
    torch.testing.assert_close(logits, expected.expand(1, 2, 1, 5))
    logits.sum().backward()
    assert raw.grad.isfinite().all() and (raw.grad[:, 4:] >= 0).all() and raw.grad[:, 4:].any()


@torch.no_grad()
def test_a_box_whose_side_would_overflow_is_as_large_as_the_image():
    model = yolox_detector().eval()
    for conv in model.head.reg_preds:
        torch.nn.init.constant_(conv.bias, 200.0)
    boxes = model(make_batch()[:1])[0]["instances"].pred_boxes.tensor
    assert len(boxes) > 0 and (boxes == torch.tensor([0.0, 0, 80, 64])).all()


@torch.no_grad()
def test_detections_are_the_librarys_with_one_class_per_box():
    model = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(TOPK_CANDIDATES_TEST=10**6)).eval()
    model.max_detections_per_image = 10**6
    batch = make_batch()
    images = model.preprocess_image(batch)
    found = model.forward_inference(images, None, model.head(view(model).features(images.tensor)))
    expected = postprocess(library(model)(images.tensor), 2, conf_thre=0.01, nms_thre=0.65)
    for ours, theirs in zip(found, expected):
        assert len(ours) == len(theirs) > 50
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs[:, :4], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.scores, theirs[:, 4] * theirs[:, 5], rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.pred_classes, theirs[:, 6].long())


@torch.no_grad()
def test_a_box_may_have_several_classes_as_in_detectron2():
    """The definition in a loop: every class of every cell over the threshold, NMS by class."""
    keys = {"ONE_CLASS_PER_BOX": False, "SCORE_THRESH_TEST": 0.3, "NMS_THRESH_TEST": 1.0}
    model = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(keys)).eval()
    model.max_detections_per_image = 10**6
    batch = make_batch()[:1]
    output = view(model).run(model.preprocess_image(batch).tensor)
    scores = torch.cat([x.flatten() for x in output.logits]).sigmoid()
    (found,) = model.forward_inference(model.preprocess_image(batch), None, output.raw)
    expected = scores[scores > 0.3].sort(descending=True).values
    torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-6)
    boxes = found.pred_boxes.tensor.tolist()
    assert len({tuple(box) for box in boxes}) < len(boxes)


@torch.no_grad()
def test_limits_of_candidates_and_detections_hold():
    model = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(TOPK_CANDIDATES_TEST=5)).eval()
    batch = make_batch()[:1]
    whole = yolox_detector().eval()(batch)[0]["instances"]
    few = model(batch)[0]["instances"]
    assert 0 < len(few) <= 15 < len(whole) and few.scores[0] == whole.scores[0]
    model.max_detections_per_image = 3
    assert torch.equal(model(batch)[0]["instances"].scores, few.scores[:3])
    model.test_score_thresh = 1.0
    assert len(model(batch)[0]["instances"]) == 0


def test_batches_are_padded_with_grey_at_the_right_and_at_the_bottom():
    batch = make_batch()
    images = build_model(tiny_yolox_cfg()).preprocess_image(batch)
    assert images.tensor.shape == (2, 3, 96, 96)
    for x, padded in zip(batch, images.tensor):
        h, w = x["image"].shape[1:]
        assert torch.equal(padded[:, :h, :w], x["image"].float())
        assert (padded[:, h:] == 114).all() and (padded[:, :, w:] == 114).all()


def test_the_defaults_of_yaml_and_python_are_the_same():
    arguments = inspect.signature(YOLOX.__init__.__wrapped__).parameters
    for key, value in get_fgbg_kd_cfg().MODEL.YOLOX.items():
        default = arguments[key.lower()].default
        assert (list(default) if isinstance(default, tuple) else default) == value


def test_the_keys_reach_the_detector():
    cfg = tiny_yolox_cfg()
    cfg.INPUT.FORMAT, cfg.TEST.DETECTIONS_PER_IMAGE = "RGB", 7
    keys = {"ACT": "relu", "DEPTH": 0.67, "DEPTHWISE": True, "IN_FEATURES": ["p4", "p5"]}
    keys |= {"SCORE_THRESH_TEST": 0.3, "NMS_THRESH_TEST": 0.4, "TOPK_CANDIDATES_TEST": 9}
    cfg.MODEL.YOLOX.update(keys | {"PAD_VALUE": 3.0, "PRIOR_PROB": 0.5, "USE_L1": True})
    model = build_model(cfg)
    of = view(model)
    assert [x.stride for x in of.levels] == [16, 32] and [x.channels for x in of.levels] == [32, 64]
    assert of.suppression == {"score": 0.3, "iou": 0.4, "limit": 7}
    assert of.candidates_per_level == 9 and of.pad_value == 3 and of.channel_order == "RGB"
    assert model.head.use_l1 and model.head.cls_preds[0].bias.abs().max() < 1e-6
    assert len(model.backbone.backbone.dark3[1].m) == 6
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert any(c.groups > 1 for c in convs)
    assert any(isinstance(m, torch.nn.ReLU) for m in model.modules())
    cfg.MODEL.YOLOX.ACT = "gelu"
    with pytest.raises(ConfigError, match="MODEL.YOLOX.ACT is 'gelu': choose from"):
        build_model(cfg)


def test_the_python_config_has_the_student_of_the_yaml_config():
    cfg = load_lazy_config(str(CONFIGS / "lazy_yolox_s_to_nano.py"))
    assert cfg.train.init_checkpoint == ""  # not the ResNet of the zoo's config
    yaml = detectors_of(str(CONFIGS / "yolox_s_to_nano.yaml"))["student"]
    python = instantiate(cfg.model.student)
    assert str(python) == str(yaml) and python.input_format == yaml.input_format
    assert python.state_dict().keys() == yaml.state_dict().keys()


def test_a_normalisation_that_official_weights_do_not_expect_is_warned_of(caplog):
    build_model(tiny_yolox_cfg())
    assert "PIXEL_MEAN" not in caplog.text
    cfg = tiny_yolox_cfg()
    cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]  # Detectron2's default
    build_model(cfg)
    assert "need MODEL.PIXEL_MEAN [0.0, 0.0, 0.0]" in caplog.text
    caplog.clear()
    cfg = tiny_yolox_cfg()
    cfg.INPUT.FORMAT = "RGB"
    build_model(cfg)
    assert "INPUT.FORMAT BGR, but this config has" in caplog.text


def test_grey_images_are_refused():
    cfg = tiny_yolox_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [0.0], [1.0], "L"
    with pytest.raises(ConfigError, match="PIXEL_MEAN has 1 values, but YOLOX reads images with 3"):
        build_model(cfg)


# --- official weights ---


def official(name, folder):
    """A file of the names, shapes and other entries of Megvii's yolox_<name>.pth."""
    config = YoloxConfig.get_named_config(f"yolox_{name}")
    with torch.device("meta"):
        state = config.get_model().state_dict()
    generator = torch.Generator().manual_seed(0)
    model = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in state.items()}
    for v in model.values():
        if v.is_floating_point():
            v.copy_(torch.rand(1, generator=generator).expand_as(v))
        else:
            v.fill_(1)
    path = folder / f"yolox_{name}.pth"
    optimizer = {"state": {}, "param_groups": [{"lr": 0.01, "params": [0]}]}
    torch.save({"start_epoch": 300, "model": model, "optimizer": optimizer}, path)
    return str(path), model


@pytest.mark.parametrize("name", ["nano", "tiny", "s"])
def test_official_weights_load_whole(name, tmp_path):
    path, saved = official(name, tmp_path)
    config = CONFIGS / f"yolox_{name}.yaml"
    loaded = build_teacher(str(config), path).detector.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(v, saved[k]) for k, v in loaded.items())


def test_weights_of_another_size_are_refused(tmp_path):
    path, _ = official("nano", tmp_path)
    config = CONFIGS / "yolox_tiny.yaml"
    with pytest.raises(TeacherError, match="not a checkpoint of this YOLOX"):
        build_teacher(str(config), path)


@pytest.mark.parametrize("name, millions", [("nano", 0.91), ("tiny", 5.06), ("s", 8.97)])
def test_the_configs_have_the_parameters_of_megviis_table(name, millions):
    (model,) = detectors_of(str(CONFIGS / f"yolox_{name}.yaml")).values()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions

"""YOLO as a detector, as a student and as a teacher."""

import inspect

import numpy as np
import pytest
import torch
from conftest import (
    CLASSES,
    FGBG_OFF,
    KD_LOSSES,
    detector,
    distiller,
    losses_of,
    make_batch,
    make_trainer,
    seen_by,
    tiny_yolo_cfg,
)
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import build_model
from make_darknet_golden import write_weights

from fgbg_kd import FgBgDistiller, build_teacher, deploy, get_fgbg_kd_cfg
from fgbg_kd.detectors import YOLO, view
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.non_finite import not_finite
from fgbg_kd.experiments.cost import cost
from fgbg_kd.teacher import accelerate
from fgbg_kd.utils.errors import ConfigError, TeacherError

NETWORKS = ("yolov3", "yolov3-tiny", "yolov4", "yolov4-tiny")


def yolo(network="yolov4-tiny", edit=None, seed=1):
    """A small YOLO with scores that differ."""
    cfg = tiny_yolo_cfg(network=network)
    if edit:
        edit(cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(cfg)
        for conv in model.head.classifiers():
            torch.nn.init.normal_(conv.weight, std=0.1)
            torch.nn.init.zeros_(conv.bias)
            conv.weight.detach().view(3, -1, conv.in_channels)[:, :4] *= 0.2  # moderate boxes
    return model


def settle(model):
    """Gives the batch norms the statistics of some images, as after training."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for seed in range(3):
            model.train().backbone(model.preprocess_image(make_batch(seed=seed)).tensor)
    return model.eval()


def test_the_joint_logit_is_that_of_the_product_and_finite():
    of = view(yolo())
    values = torch.linspace(-80, 80, 41, dtype=torch.float64)
    pairs = torch.cartesian_prod(values, values)  # objectness, class
    raw = torch.zeros(len(pairs), 3 * 7, 1, 1, dtype=torch.float64)
    raw[:, 4], raw[:, 5], raw[:, 6] = pairs[:, :1, None], pairs[:, 1:, None], pairs[:, 1:, None]
    raw.requires_grad_()
    logits = of.logits([raw])[0]
    product = pairs.sigmoid().prod(1)
    assert logits.shape == (len(pairs), 6, 1, 1) and logits.isfinite().all()
    torch.testing.assert_close(logits[:, 0, 0, 0].sigmoid(), product, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits[:, 1], logits[:, 0])
    logits.sum().backward()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_config_in_python_has_the_losses_of_the_yaml_bit_for_bit(network):
    cfg = tiny_yolo_cfg(network=network)
    lazy = L(YOLO)(network=network, num_classes=2, width=1 / 16)
    torch.manual_seed(0)
    first = build_model(cfg)
    torch.manual_seed(0)
    second = instantiate(lazy)
    a, b = losses_of(first.train()), losses_of(second.train())
    assert set(a) == {"loss_box_reg", "loss_obj", "loss_cls"}
    assert all(torch.equal(a[k], b[k]) and a[k] > 0 for k in a)


def test_a_distillation_in_python_has_the_losses_of_the_yaml_bit_for_bit(tmp_path):
    teacher_cfg = tiny_yolo_cfg(network="yolov4")
    config, file = str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(teacher_cfg.dump())
    torch.save({"model": yolo("yolov4").state_dict()}, file)
    cfg = tiny_yolo_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.KD.STUDENT = "FgBgDistiller", "YOLO"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = config, file
    lazy = L(FgBgDistiller)(
        student=L(YOLO)(network="yolov4-tiny", num_classes=2, width=1 / 16),
        teacher=L(build_teacher)(config=config, weights=file),
    )
    torch.manual_seed(0)
    first = losses_of(build_model(cfg).train())
    torch.manual_seed(0)
    second = losses_of(instantiate(lazy).train())
    assert first.keys() == second.keys() and "loss_kd_bg" in first
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_both_kinds_of_configs_have_the_same_defaults():
    cfg = get_fgbg_kd_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [255.0] * 3
    cfg.INPUT.FORMAT = "RGB"
    parameters = inspect.signature(YOLO.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name != "self"}
    found = YOLO.from_config(cfg)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()} == found


def test_a_normalisation_that_official_weights_do_not_expect_is_warned_of(caplog):
    cfg = tiny_yolo_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [0.0] * 3, [255.0] * 3, "RGB"
    build_model(cfg)
    assert "PIXEL_MEAN" not in caplog.text
    cfg.INPUT.FORMAT = "BGR"
    build_model(cfg)
    assert "INPUT.FORMAT RGB, but this config has" in caplog.text


def test_grey_images_are_refused():
    cfg = tiny_yolo_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [0.0], [255.0], "L"
    with pytest.raises(ConfigError, match="PIXEL_MEAN has 1 values, but YOLO reads images with 3"):
        build_model(cfg)


def test_the_anchors_are_those_of_the_key():
    cfg = tiny_yolo_cfg(network="yolov3-tiny")
    cfg.MODEL.YOLO.ANCHORS = [[4, 6], [8, 4], [9, 9], [20, 12], [12.5, 20], [40, 30]]
    first, second = view(build_model(cfg)).cell_anchors  # strides 16 and 32
    assert first.tolist()[0] == [-2, -3, 2, 3] and second.tolist()[1] == [-6.25, -10.0, 6.25, 10.0]
    for wrong, fact in (([[4, 6]], "needs 6"), ([[4]] * 6, "width"), ([[4, 0]] * 6, "width")):
        cfg.MODEL.YOLO.ANCHORS = wrong
        with pytest.raises(ConfigError, match=f"MODEL.YOLO.ANCHORS .*{fact}"):
            build_model(cfg)


def test_the_objectness_before_training_is_the_key():
    cfg = tiny_yolo_cfg()
    cfg.MODEL.YOLO.PRIOR_PROB = 0.02
    for conv in build_model(cfg).head.classifiers():
        bias = conv.bias.detach().reshape(3, 7)
        torch.testing.assert_close(bias[:, 4].sigmoid(), torch.full((3,), 0.02))
        assert (bias[:, [0, 1, 2, 3, 5, 6]] == 0).all()


def test_padding_is_darknets_grey():
    model = yolo()
    images = model.preprocess_image(make_batch())
    assert images.tensor.shape == (2, 3, 96, 96)
    assert (images.tensor[0, :, 64:] == 0.5).all() and (images.tensor[0, :, :, 80:] == 0.5).all()
    assert view(model).pad_value == 0.5
    torch.testing.assert_close(
        images.tensor[1, :, :72, :56] * 255, make_batch()[1]["image"].float()
    )


def test_a_student_with_the_weights_0_is_trained_like_without_a_teacher():
    batch = make_batch()
    plain = losses_of(yolo().train(), batch)
    model = distiller(yolo(), yolo(seed=2), **FGBG_OFF)
    assert all(torch.equal(v, losses_of(model, batch)[k]) for k, v in plain.items())
    taught = losses_of(distiller(yolo(), yolo(seed=2)), batch)
    assert all(torch.equal(v, taught[k]) for k, v in plain.items())
    assert taught.keys() - plain.keys() == KD_LOSSES


PAIRS = {
    "YOLO from YOLO": (lambda: yolo(), lambda: yolo(seed=2), [16, 32], True),
    "tiny from YOLOv4": (lambda: yolo(), lambda: yolo("yolov4"), [16, 32], False),
    "YOLOv3 from YOLOv4": (lambda: yolo("yolov3"), lambda: yolo("yolov4"), [8, 16, 32], False),
    "YOLO from RetinaNet": (lambda: yolo(), lambda: detector(), [16, 32], False),
    "RetinaNet from YOLO": (lambda: detector(), lambda: yolo(), [16, 32], False),
    "FCOS from YOLO": (lambda: detector("FCOS"), lambda: yolo("yolov3"), [8, 16, 32], False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_takes_a_step(name):
    student, teacher, strides, same = PAIRS[name]
    model = distiller(student(), teacher(), gate=False)
    assert [level.stride for level in model.levels] == strides and model.same_anchors == same
    found = losses_of(model)
    assert found["loss_kd_fg"] > 0 and found["loss_kd_bg"] > 0
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_teacher_gets_its_own_input():
    """The same image in BGR 0..255 with RetinaNet's mean, and in RGB 0..1 with grey padding."""

    def edit(cfg):
        cfg.INPUT.FORMAT = "BGR"

    model = distiller(detector(edit=edit), yolo())
    inputs = []
    model.teacher.detector.backbone.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    batch = make_batch()
    losses_of(model, batch)
    rgb = [{**x, "image": x["image"].flip(0)} for x in batch]
    expected = model.teacher.detector.preprocess_image(rgb).tensor
    torch.testing.assert_close(inputs[0], expected)


def test_qfl_divides_by_the_number_of_images():
    _, batch = seen_by(distiller(yolo(), yolo(seed=2), name="QFL"))
    assert batch.loss_normalizer == 2


def test_the_head_can_be_inherited_and_no_fpn():
    teacher = yolo(seed=2)
    model = distiller(yolo(), teacher, inherit=("head",))
    model.inherit()
    state = teacher.head.state_dict()
    # The teacher's batch norms are folded, so its convolutions differ now; the last ones do not.
    for name, value in model.student.head.state_dict().items():
        if name.endswith(("29.weight", "36.bias")):
            assert torch.equal(value, state[name])
    with pytest.raises(TeacherError, match="'fpn': no weight"):
        distiller(yolo(), yolo(seed=2), inherit=("fpn",))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_frozen_network_gives_the_same_without_batch_norms(network):
    model = settle(yolo(network)).double()
    of, images = view(model), model.preprocess_image(make_batch()).tensor
    with torch.no_grad():
        before = of.run(images).logits
        accelerate(model)
        after = of.run(images).logits
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_only_the_kept_classes_remain():
    model = yolo(edit=lambda cfg: setattr(cfg.MODEL.YOLO, "NUM_CLASSES", 5)).eval()
    of, images = view(model), model.preprocess_image(make_batch()).tensor
    with torch.no_grad():
        before = of.run(images)
        boxes = of.decode(before.features, before.raw)
        of.keep_classes([3, 0])
        after = of.run(images)
    assert of.num_classes == model.num_classes == 2
    for i in range(2):
        n, _, h, w = before.logits[i].shape
        kept = before.logits[i].reshape(n, 3, 5, h, w)[:, :, [3, 0]].flatten(1, 2)
        torch.testing.assert_close(after.logits[i], kept)
        torch.testing.assert_close(of.decode(after.features, after.raw)[i], boxes[i])
        assert after.raw[i].shape[1] == 3 * 7


def test_a_file_of_darknet_teaches_and_its_other_classes_are_removed(tmp_path):
    cfg = tiny_yolo_cfg()
    cfg.MODEL.YOLO.NUM_CLASSES = 3
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    source = build_model(cfg)
    path = str(tmp_path / "yolov4-tiny.weights")
    write_weights(path, source)
    names = ["dog", CLASSES[1], CLASSES[0]]
    teacher = build_teacher(str(tmp_path / "teacher.yaml"), path, classes=names)
    assert teacher.view.num_classes == 3 and teacher.weights == path
    gate = {"gate": False}  # with it, a random teacher that is better on no object teaches nothing
    model = FgBgDistiller(
        student=yolo(), teacher=teacher, classes=list(CLASSES), method=gate
    ).train()
    assert teacher.view.num_classes == 2
    assert losses_of(model)["loss_kd_bg"] > 0


def test_a_file_of_darknet_initialises_a_student(coco, tmp_path):
    cfg = tiny_yolo_cfg(coco)
    source = build_model(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "yolov4-tiny.weights")
    write_weights(cfg.MODEL.WEIGHTS, source)
    trainer = make_trainer(FgBgTrainer, cfg, tmp_path / "run", 1)
    trainer.resume_or_load(resume=False)
    expected = trainer.model.read_darknet(cfg.MODEL.WEIGHTS)
    assert all(torch.equal(v, expected[k]) for k, v in trainer.model.state_dict().items())


def test_autocast_gives_finite_losses_near_those_in_single_precision():
    batch, single = make_batch(), losses_of(distiller(yolo("yolov3"), yolo("yolov4")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses_of(distiller(yolo("yolov3"), yolo("yolov4")), batch)
    for name, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, single[name], rtol=0.1, atol=0.05)


def test_values_that_are_not_finite_are_named():
    model = yolo()
    with torch.no_grad():
        model.head.s16[-1].bias[4] = torch.nan
    found = not_finite(model, make_batch())
    assert "the parameters head.s16.36.bias" in found
    assert "objectness of the model on s16" in found and "class logits of" not in found


def test_gflops_are_those_that_darknet_prints():
    """Darknet counts a multiplication and an addition as two: 5.56 BFLOPs at 416x416."""
    with torch.random.fork_rng():
        model = YOLO(network="yolov3-tiny").eval()
    found = cost(model, {"image": torch.zeros(3, 416, 416)}, runs=1)
    assert 2 * found["gflops"] == pytest.approx(5.56, rel=0.01)


# --- inference and files ---


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(found, expected):
    """Boxes to 0.01 pixels, scores to 1e-5 (or 1e-4 of the value); equal classes, in one order."""
    for a, b, atol in zip(found, expected, (1e-2, 1e-5, 0)):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4 * bool(atol), atol=atol)


def assert_same(network, path, nms_inside=True):
    """A file returns what PyTorch returns for three sizes, and PyTorch returns the detections."""
    model = settle(yolo(network))
    about = deploy.describe(tiny_yolo_cfg(network=network), model)
    deploy.export(model, about, path, photo(56, 64), nms_inside)
    exported, deployable = deploy.ExportedDetector(path), deploy.Deployable(model, nms_inside)
    for seed, (height, width) in enumerate(((72, 90), (64, 131), (33, 40))):
        image = photo(height, width, seed)
        expected = deployable(torch.from_numpy(image))
        assert len(expected[0]) > 10
        same(exported.run(image), expected)
        if nms_inside:
            pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
            found = model([{"image": pixels}])[0]["instances"]
            same((found.pred_boxes.tensor, found.scores, found.pred_classes), expected)


@pytest.mark.parametrize("nms_inside", [True, False])
@pytest.mark.parametrize("file", ["a.onnx", "a.pt", "a.xml"])
@pytest.mark.slow
def test_an_exported_tiny_detects_what_pytorch_does_in_other_sizes(file, nms_inside, tmp_path):
    if file.endswith("onnx"):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    if file.endswith("xml"):
        pytest.importorskip("openvino")
    assert_same("yolov4-tiny", str(tmp_path / file), nms_inside)


@pytest.mark.parametrize("network", ["yolov3", "yolov3-tiny", "yolov4"])
@pytest.mark.slow
def test_so_does_an_exported_file_of_the_others(network, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert_same(network, str(tmp_path / "a.onnx"))

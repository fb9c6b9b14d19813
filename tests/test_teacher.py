"""A missing or incomplete teacher stops the run with a message that names the fix."""

import logging
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES, detector, losses_of, make_batch, tiny_cfg
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from fgbg_kd import FgBgDistiller, Teacher, build_teacher
from fgbg_kd.teacher import accelerate, check_teacher_file, padded, renormalized, same_input
from fgbg_kd.utils.errors import TeacherError


def edit_weights(source, target, edit):
    saved = torch.load(source, weights_only=True)
    edit(saved["model"])
    torch.save(saved, target)
    return str(target)


def test_a_local_yaml_teacher_is_loaded_whole_and_frozen(teacher_files):
    teacher = build_teacher(*teacher_files)
    saved = torch.load(teacher_files[1], weights_only=True)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in teacher.detector.state_dict().items())
    assert not any(m.training for m in teacher.detector.modules())
    assert not any(p.requires_grad for p in teacher.detector.parameters())


def test_building_a_teacher_leaves_the_random_state_alone(teacher_files):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_teacher(*teacher_files)
    assert torch.equal(torch.rand(3), expected)


def test_weights_named_in_the_config_are_taken(tmp_path, teacher_files):
    cfg = tiny_cfg()
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    cfg.MODEL.WEIGHTS = teacher_files[1]
    path = tmp_path / "with_weights.yaml"
    path.write_text(cfg.dump())
    assert not build_teacher(str(path)).detector.training


def test_a_distilled_students_config_can_be_a_teacher(tmp_path, teacher_files):
    cfg = tiny_cfg()
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    path = tmp_path / "distilled.yaml"
    path.write_text(cfg.dump())
    assert type(build_teacher(str(path), teacher_files[1]).detector).__name__ == "RetinaNet"


def test_a_pkl_in_the_zoos_format_is_loaded_whole(tmp_path, teacher_files):
    saved = torch.load(teacher_files[1], weights_only=True)["model"]
    path = tmp_path / "model_final_abc123.pkl"
    arrays = {k: v.numpy() for k, v in saved.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    teacher = build_teacher(teacher_files[0], str(path))
    assert all(torch.equal(v, saved[k]) for k, v in teacher.detector.state_dict().items())


@pytest.mark.slow
def test_a_lazy_py_config_names_an_fcos_teacher_that_gates_a_retinanet(tmp_path, distil_cfg):
    """A small version of Detectron2's own FCOS. It has a lazy config, but is not registered."""
    text = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, FPN, ResNet
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

model = L(FCOS)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=16,
    ),
    head=L(FCOSHead)(
        input_shape=[L(ShapeSpec)(channels=16)] * 3, num_classes=2, conv_dims=[16], norm="GN"
    ),
    num_classes=2,
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
train = dict(init_checkpoint="")
"""
    from detectron2.config import LazyConfig, instantiate

    path = tmp_path / "fcos.py"
    # GroupNorm(32) needs 32 channels.
    path.write_text(text.replace("16", "32").replace("out_channels=8", "out_channels=64"))
    model = instantiate(LazyConfig.load(str(path)).model)
    torch.nn.init.constant_(model.head.cls_score.bias, 2.0)  # better than an untrained student
    torch.nn.init.constant_(model.head.bbox_pred.bias, 1.5)
    torch.save({"model": model.state_dict()}, tmp_path / "fcos.pth")
    teacher = build_teacher(str(path), str(tmp_path / "fcos.pth"))
    assert type(teacher.detector).__name__ == "FCOS"
    with pytest.raises(TeacherError, match="no weights are given"):
        build_teacher(str(path))
    kd = distil_cfg.MODEL.KD
    kd.TEACHER.CONFIG, kd.TEACHER.WEIGHTS, kd.FGBG.BG_WEIGHT = (
        str(path),
        str(tmp_path / "fcos.pth"),
        0.0,
    )
    with EventStorage(19) as storage:
        losses = build_model(distil_cfg).train()(make_batch())
        assert 0 < storage.latest()["kd/fg_gate"][0] <= 1
    assert losses["loss_kd_fg"] > 0 and losses["loss_kd_fg"].isfinite()


def input_view(mean=0.0, std=1.0, order="BGR", pad=0.0, divisor=1, square=0, size=None):
    """What a DetectorView tells of its input."""
    return SimpleNamespace(
        normalization=(torch.full((3, 1, 1), mean), torch.full((3, 1, 1), std)),
        channel_order=order,
        pad_value=pad,
        size_divisibility=divisor,
        square_size=square,
        input_size=size,
    )


def test_the_teacher_sees_the_raw_pixels_in_its_normalisation_and_its_own_padding():
    sizes = [(8, 5), (6, 12)]
    student = input_view(mean=10.0, std=2.0, order="RGB", pad=1.0)
    teacher = input_view(mean=-3.0, std=5.0, order="BGR", pad=7.0)
    raw = torch.randint(0, 256, (2, 3, 8, 12)).float()
    seen, expected = torch.full_like(raw, 1.0), torch.full_like(raw, 7.0)
    for i, (h, w) in enumerate(sizes):
        seen[i, :, :h, :w] = (raw[i, :, :h, :w] - 10) / 2
        expected[i, :, :h, :w] = (raw[i, :, :h, :w].flip(0) + 3) / 5
    got = renormalized(teacher, student, ImageList(seen, sizes))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "wanted, shape",
    [
        ({"divisor": 16}, (16, 48)),
        ({"divisor": 5}, (10, 35)),
        ({"square": 64}, (64, 64)),
        ({}, (10, 33)),
    ],
)
def test_a_batch_is_padded_below_and_at_the_right_to_the_height_and_width_wanted(wanted, shape):
    images = torch.randn(2, 3, 10, 33)
    got = padded(input_view(pad=7.0, **wanted), images, [(10, 33), (9, 30)])
    assert got.shape[-2:] == shape and torch.equal(got[..., :10, :33], images)
    assert (got[..., 10:, :] == 7).all() and (got[..., 33:] == 7).all()


@pytest.mark.parametrize("size", [(33, 32), (32, 33)])
def test_the_square_bounds_height_and_width_each(size):
    view = input_view(square=32)
    assert padded(view, torch.zeros(1, 3, 16, 32), [(16, 32)]).shape[-2:] == (32, 32)
    with pytest.raises(TeacherError, match=f"32x32 pixels, but an image has {size[0]}x{size[1]}"):
        padded(view, torch.zeros(1, 3, *size), [size])


@pytest.mark.parametrize("change", [{"mean": 1.0}, {"std": 2.0}, {"order": "RGB"}, {"pad": 3.0}])
def test_each_difference_of_the_inputs_is_seen(change):
    assert same_input(input_view(), input_view())
    assert not same_input(input_view(), input_view(**change))


def test_a_convolution_with_a_bias_before_its_norm_gives_the_same_after_acceleration():
    conv = Conv2d(3, 4, kernel_size=3, bias=True, norm=torch.nn.BatchNorm2d(4, eps=0.5)).eval()
    with torch.no_grad():
        for x in (conv.norm.weight, conv.norm.running_var):
            x.uniform_(0.5, 2)
        for x in (conv.bias, conv.norm.bias, conv.norm.running_mean):
            x.normal_()
        images = torch.randn(1, 3, 8, 8)
        before = conv(images)
        after = accelerate(torch.nn.Sequential(conv))(images)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["model_final.pth", "model_0000123.pth"])
def test_only_a_checkpoint_of_the_runs_own_folder_is_overwritten_by_it(tmp_path, name):
    with pytest.raises(TeacherError, match="would overwrite the teacher's weights"):
        check_teacher_file(str(tmp_path / name), "", str(tmp_path / "." / "x" / ".."))
    check_teacher_file(str(tmp_path / name), "", str(tmp_path / "other"))
    check_teacher_file(str(tmp_path / "teacher.pth"), "", str(tmp_path))


def test_a_teacher_without_a_file_is_not_taken_for_a_student_without_one(tmp_path):
    check_teacher_file("", "", str(tmp_path))


def test_a_link_to_the_students_weights_is_the_same_file(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    (tmp_path / "b.pth").symlink_to("a.pth")
    with pytest.raises(TeacherError, match="both start from"):
        check_teacher_file(str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), str(tmp_path / "out"))


def test_a_checksum_that_is_not_the_files_refuses_the_teacher(teacher_files):
    with pytest.raises(TeacherError, match="(?i)sha256"):
        build_teacher(*teacher_files, sha256="0" * 64)


def test_given_weights_and_given_names_go_before_those_of_the_config(tmp_path, coco, teacher_files):
    cfg = tiny_cfg(coco)
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.WEIGHTS = 24, str(tmp_path / "nowhere.pth")
    path = tmp_path / "teacher.yaml"
    path.write_text(cfg.dump())
    assert build_teacher(str(path), teacher_files[1]).class_names == ["square", "stripe"]
    names = build_teacher(str(path), teacher_files[1], classes=["a", "b"]).class_names
    assert names == ["a", "b"]


def test_the_names_of_another_number_of_classes_are_not_the_teachers(tmp_path, coco, teacher_files):
    cfg = tiny_cfg(coco)
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CLASSES = 24, 3
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "teacher.pth")
    teacher = build_teacher(str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pth"))
    assert teacher.class_names is None


@pytest.mark.parametrize("names, warns", [(["stripe", "square"], True), (["a", "b"], False)])
def test_given_names_in_another_order_than_the_known_ones_give_a_warning(
    tmp_path, coco, teacher_files, caplog, names, warns
):
    cfg = tiny_cfg(coco)
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    with caplog.at_level(logging.WARNING, logger="fgbg_kd"):
        build_teacher(str(tmp_path / "teacher.yaml"), teacher_files[1], classes=names)
    assert ("has another order: square, stripe" in caplog.text) == warns


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.slow
def test_acceleration_changes_the_output_by_rounding_only(tmp_path, norm):
    """Detectron2's ResNet with random statistics. GroupNorm stays unchanged."""
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.DEPTH = "build_resnet_fpn_backbone", 50
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = norm
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    model = build_model(cfg).eval().requires_grad_(False)
    norms = [m for m in model.modules() if hasattr(m, "running_var")]
    for m in norms:
        m.running_var.uniform_(0.5, 2)
        m.running_mean.normal_(std=0.1)
        m.weight.uniform_(0.5, 1.5)
        m.bias.normal_(std=0.1)
    images = torch.randn(1, 3, 64, 64)

    def features(detector):
        return [detector.backbone(images)[f] for f in detector.head_in_features]

    before = features(model)
    after = features(accelerate(model))
    for a, b in zip(after, before):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    left = [m for m in model.modules() if hasattr(m, "running_var")]
    assert not left and bool(norms) == (norm != "GN")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.pop("head.cls_score.weight"), "1 missing in the file: head.cls_score.weight"),
        (lambda m: m.update(extra=torch.zeros(1)), "1 not in the model: extra"),
        (
            lambda m: m.update({"head.cls_score.weight": torch.zeros(3, 24, 3, 3)}),
            r"another shape in the model: head.cls_score.weight \(3, 24, 3, 3\)",
        ),
        (
            lambda m: m["head.cls_score.bias"].fill_(float("nan")),
            "not finite: head.cls_score.bias",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fill_the_teacher_is_refused(
    tmp_path, teacher_files, edit, message
):
    weights = edit_weights(teacher_files[1], tmp_path / "bad.pth", edit)
    with pytest.raises(TeacherError, match=message):
        build_teacher(teacher_files[0], weights)


def test_pixel_statistics_in_an_old_checkpoint_are_no_fault(tmp_path, teacher_files):
    def add(model):
        model.update(pixel_mean=torch.zeros(3, 1, 1), pixel_std=torch.ones(3, 1, 1))

    weights = edit_weights(teacher_files[1], tmp_path / "old.pth", add)
    teacher = build_teacher(teacher_files[0], weights)
    assert teacher.detector.pixel_mean.flatten().tolist() == pytest.approx(
        [103.53, 116.28, 123.675]
    )


def test_a_config_that_is_nowhere_is_named():
    with pytest.raises(TeacherError, match="neither a file here nor a name in"):
        build_teacher("COCO-Detection/retinanet_R_999.yaml")


def test_weights_that_are_nowhere_are_named(teacher_files):
    with pytest.raises(TeacherError, match="The teacher .*: nowhere.pth cannot be read"):
        build_teacher(teacher_files[0], "nowhere.pth")


def test_weights_on_an_unreachable_network_are_named(teacher_files):
    with pytest.raises(TeacherError, match="cannot be read"):
        build_teacher(teacher_files[0], "http://127.0.0.1:9/teacher.pth")


def test_a_zoo_config_without_zoo_weights_is_named():
    with pytest.raises(TeacherError, match="no weights for COCO-Detection/fcos_R_50_FPN_1x.py"):
        build_teacher("COCO-Detection/fcos_R_50_FPN_1x.py")


@pytest.mark.slow
def test_a_zoo_name_takes_the_zoos_config_and_any_weights(tmp_path):
    """RetinaNet R50 by name, with random weights in a file."""
    from detectron2 import model_zoo

    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "r50.pth")
    teacher = build_teacher(name, str(tmp_path / "r50.pth"))
    assert torch.equal(teacher.detector.head.cls_score.weight, model.head.cls_score.weight)


def test_a_truncated_checkpoint_is_an_error(tmp_path, teacher_files):
    path = tmp_path / "torn.pth"
    shutil.copy(teacher_files[1], path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="is damaged"):
        build_teacher(teacher_files[0], str(path))


def test_a_teacher_that_is_given_as_a_module_is_frozen():
    model = detector().train()
    Teacher(model)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_teacher_of_two_students_serves_both():
    """The first student must leave no trace: neither its class order nor its normalisation."""
    names = ("stripe", "square")
    teacher = Teacher(detector(seed=1), class_names=list(CLASSES))
    first = FgBgDistiller(student=detector(), teacher=teacher, classes=names)
    before = teacher.detector.head.cls_score.weight.clone()
    losses_of(first)

    def another_input(cfg):
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [90.0] * 3, [60.0] * 3, "RGB"

    torch.manual_seed(0)
    second = FgBgDistiller(student=detector(edit=another_input), teacher=teacher, classes=names)
    assert torch.equal(teacher.detector.head.cls_score.weight, before)
    torch.manual_seed(0)
    fresh = Teacher(detector(seed=1), class_names=list(CLASSES))
    alone = FgBgDistiller(student=detector(edit=another_input), teacher=fresh, classes=names)
    a, b = losses_of(second), losses_of(alone)
    assert a["loss_kd_fg"] > 0 and all(torch.equal(a[k], b[k]) for k in a)

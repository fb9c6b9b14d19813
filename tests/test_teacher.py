"""A missing or incomplete teacher stops the run with a message that names the fix."""

import pickle
import shutil

import pytest
import torch
from conftest import make_batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgbg_kd import build_teacher
from fgbg_kd.teacher import accelerate
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


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
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

"""timm's feature extractors as backbones: shapes, weights from a file, frozen norms, input."""

import logging
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT, make_batch, tiny_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.detectors.timm_backbone import TimmBackbone
from fgbg_kd.utils.errors import FgBgError

PAGE = ROOT / "docs" / "zoo.md"
LIGHT = ["mobilenetv3_large_100", "efficientnet_lite0", "resnet18", "regnety_002"]


def light_cfg(name, weights="", freeze=False):
    cfg = get_fgbg_kd_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res3", "res4", "res5"], 8
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS = name, weights
    cfg.MODEL.TIMM.FREEZE_BN = freeze
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return cfg


@pytest.mark.parametrize("name", LIGHT)
def test_light_backbones_give_p3_to_p7_and_learn(name):
    backbone = build_backbone(light_cfg(name))
    strides = [8, 16, 32, 64, 128]
    shapes = backbone.output_shape()
    assert [shapes[f"p{i}"].stride for i in range(3, 8)] == strides
    assert {shape.channels for shape in shapes.values()} == {8}
    out = backbone(torch.randn(2, 3, 128, 64))
    for i, stride in enumerate(strides):
        assert out[f"p{i + 3}"].shape == (2, 8, -(-128 // stride), -(-64 // stride))
    sum(v.square().mean() for v in out.values()).backward()
    absent = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert not absent


@pytest.mark.parametrize("name", LIGHT)
def test_the_maps_are_the_timm_models_own_with_the_weights_of_the_file(name, tmp_path):
    """Compares with the classifier's forward_intermediates, which does not use features_only."""
    whole = timm.create_model(name, pretrained=False).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    cfg = light_cfg(name, str(tmp_path / "w.safetensors"))
    bottom_up = build_backbone(cfg).bottom_up.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = bottom_up(images)
        own = whole.forward_intermediates(images, intermediates_only=True)
    assert list(ours) == ["res3", "res4", "res5"]
    for a, b in zip(ours.values(), own[2:]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LIGHT)
def test_frozen_norms_keep_statistics_and_affine_in_training(name):
    backbone = build_backbone(light_cfg(name, freeze=True)).bottom_up.train()
    norms = {k for k in backbone.state_dict() if k.endswith("running_mean")}
    assert norms
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    parameters = list(backbone.parameters())
    sum(v.square().mean() for v in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    after = backbone.state_dict()
    for mean in norms:
        for part in ("running_mean", "running_var", "weight", "bias"):
            key = mean.replace("running_mean", part)
            assert torch.equal(before[key], after[key])
    assert any(not torch.equal(before[k], v) for k, v in after.items())


@pytest.mark.parametrize("name, mean", [("resnet18", 0.485), ("tf_efficientnet_lite0", 0.5)])
def test_a_warning_gives_the_input_that_the_weights_want(name, mean, tmp_path, caplog):
    """With the keys that the warning names, there is no warning, and the input equals timm's."""
    path = str(tmp_path / "w.pth")
    torch.save(timm.create_model(name).state_dict(), path)
    cfg = get_fgbg_kd_cfg()  # Detectron2's default input: BGR, 0..255, std 1
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RetinaNet", "cpu"
    stock = cfg.clone()
    right = light_cfg(name, path)
    for key in ("BACKBONE", "FPN", "TIMM"):
        cfg.MODEL[key] = right.MODEL[key]
    build_model(cfg)
    message = caplog.records[-1].getMessage()
    assert "BGR" in message and path in message
    cfg.merge_from_other_cfg(type(cfg)(yaml.safe_load(message.split("set\n")[1])))
    assert cfg.INPUT.FORMAT != stock.INPUT.FORMAT
    caplog.clear()
    model = build_model(cfg)
    assert not caplog.records
    image = make_batch()[0]["image"]
    std = timm.create_model(name).pretrained_cfg["std"][0]
    height, width = image.shape[1:]
    got = model.preprocess_image([{"image": image}]).tensor[0, 0, :height, :width]
    torch.testing.assert_close(got, (image[0] / 255 - mean) / std, rtol=1e-4, atol=1e-4)


def test_random_weights_take_any_input(caplog):
    caplog.set_level(logging.WARNING)
    cfg = light_cfg("resnet18")
    cfg.INPUT.FORMAT = "BGR"
    build_backbone(cfg)
    assert not caplog.records


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("mobilenetv3_larg_100", "", "Similar names: .*mobilenetv3_large_100"),
        (
            "resnet18",
            "nowhere.pth",
            "(?s)there is no file nowhere.pth.*create_model\\('resnet18'",
        ),
        (
            "resnet18",
            "mobilenet",
            "WEIGHTS: .* lacks .* of the 120 tensors of timm's resnet18",
        ),
        ("resnet18", "junk", "TIMM.WEIGHTS: .*junk.pth is damaged"),
        ("resnet18", "code", "TIMM.WEIGHTS: .*code.pth .*more than numbers"),
        (
            "resnet18",
            "nan",
            "WEIGHTS: 1 tensors of .* contain NaN or infinity, such as conv1",
        ),
        ("dla46_c", "", "claims a map of stride 8 with 64 channels, but an image of"),
        ("mobilevitv2_050", "", "claims a map of stride 32 .* leave this map out"),
        (
            "swin_tiny_patch4_window7_224",
            "",
            "does not take images of .* choose a model without",
        ),
    ],
)
def test_unusable_models_and_weights_are_named_with_the_key(name, weights, message, tmp_path):
    if weights == "mobilenet":
        weights = str(tmp_path / "mobilenet.pth")
        torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), weights)
    if weights == "junk":
        weights = str(tmp_path / "junk.pth")
        (tmp_path / "junk.pth").write_bytes(b"no checkpoint")
    if weights == "code":
        weights = str(tmp_path / "code.pth")
        torch.save({"conv1.weight": Path("a program")}, weights)
    if weights == "nan":
        weights = str(tmp_path / "nan.pth")
        state = timm.create_model(name).state_dict()
        state["conv1.weight"][0] = float("nan")
        torch.save(state, weights)
    with pytest.raises(FgBgError, match=message):
        build_backbone(light_cfg(name, weights))


def test_maps_with_channels_last_are_taken():
    """MambaOut returns (N, H, W, C)."""
    backbone = TimmBackbone("mambaout_femto", ["res3", "res4"])
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert {k: v.shape[1:] for k, v in maps.items()} == {"res3": (96, 8, 12), "res4": (192, 4, 6)}


def test_a_light_student_learns_from_a_teacher_of_other_input_and_width(teacher_files):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "FgBgDistiller"
    cfg.MODEL.TIMM.NAME, cfg.INPUT.FORMAT = "mobilenetv3_small_050", "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    cfg.MODEL.KD.FGBG.GATE = "off"
    with EventStorage(0):
        losses = build_model(cfg).train()(make_batch())
    assert losses["loss_kd_fg"] > 0 and losses["loss_kd_bg"] > 0


def test_the_lines_of_the_page_make_a_light_student(tmp_path, monkeypatch, caplog):
    """Uses the YAML in docs/zoo.md."""
    section = PAGE.read_text().split("## Light backbones")[1].split("\n## ")[0]
    (lines,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_other_cfg(type(cfg)(yaml.safe_load(lines)))
    torch.save(timm.create_model(cfg.MODEL.TIMM.NAME).state_dict(), cfg.MODEL.TIMM.WEIGHTS)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RetinaNet", "cpu"
    model = build_model(cfg)
    assert model.backbone.output_shape()["p7"].stride == 128
    assert not caplog.records

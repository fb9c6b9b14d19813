"""timm's feature extractors as backbones: shapes, weights from a file, frozen norms, input."""

import functools
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
from fgbg_kd.detectors import timm_backbone
from fgbg_kd.detectors.timm_backbone import TimmBackbone
from fgbg_kd.utils.errors import ConfigError, FgBgError

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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
    cfg.MODEL.KD.FGBG.GATE = False
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


def trained(backbone):
    return {k for k, p in backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "name, at, first_trained",
    [
        ("resnet18", 1, "body.layer1.0.conv1"),  # as Detectron2: the stem alone
        ("resnet18", 2, "body.layer2.0.conv1"),  # and the stage whose map is res2
        ("mobilenetv3_small_050", 2, "body.blocks.1.0.conv_pw"),
        ("convnext_atto", 3, "body.stages_2.downsample.0"),
    ],
)
@pytest.mark.slow
def test_freeze_at_freezes_all_that_its_map_is_computed_from(name, at, first_trained):
    plain, frozen = (TimmBackbone(name, ["res3", "res4", "res5"], freeze_at=x) for x in (0, at))
    assert trained(plain) == {k for k, _ in plain.named_parameters()}
    left = trained(frozen)
    assert next(k for k, p in frozen.named_parameters() if k in left).startswith(first_trained)
    images = torch.randn(4, 3, 64, 64)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    parameters = [p for p in frozen.parameters() if p.requires_grad]
    sum(v.square().mean() for v in frozen.train()(images).values()).backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    after = frozen.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed  # those of trained layers, batch norms' statistics among them
    stages = {k.rsplit(".", 1)[0] for k in left}
    assert {k.rsplit(".", 1)[0] for k in changed} <= stages


@pytest.mark.slow
def test_freezing_draws_no_random_numbers():
    states = []
    for at in (0, 2):
        torch.manual_seed(3)
        states.append(TimmBackbone("resnet18", ["res3"], freeze_at=at).state_dict())
    assert all(torch.equal(v, states[0][k]) for k, v in states[1].items())


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("BACKBONE", 0, "MODEL.BACKBONE.FREEZE_AT is 0, .* set MODEL.TIMM.FREEZE_AT 0 and leave"),
        ("BACKBONE", 3, "set MODEL.TIMM.FREEZE_AT 3 and leave MODEL.BACKBONE.FREEZE_AT .* .2."),
        ("TIMM", 6, r"MODEL.TIMM.FREEZE_AT: timm's resnet18 has the maps \['res1', .* \['res6'\]"),
        ("TIMM", -1, r"MODEL.TIMM.FREEZE_AT: timm's resnet18 has the maps .* \['res-1'\]"),
    ],
)
@pytest.mark.slow
def test_a_wrong_freeze_at_is_refused_with_the_right_key(key, value, message):
    cfg = light_cfg("resnet18")
    cfg.MODEL[key].FREEZE_AT = value
    with pytest.raises(ConfigError, match=message):
        build_backbone(cfg)


def test_the_key_freezes():
    cfg = light_cfg("resnet18")
    cfg.MODEL.TIMM.FREEZE_AT = 2
    assert "bottom_up.body.layer1.0.conv1.weight" not in trained(build_backbone(cfg))


# The smallest model of each family (a module of timm.models), by its number of parameters.
SMALLEST = """
    beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny
    convmixer_768_32 test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
    cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
    efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0
    hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
    test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
    nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m
    rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet
    resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256
    swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11
    visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224
    vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p
    xcit_nano_12_p8_224
""".split()
# Over 50 M parameters.
LARGE = {"beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m", "inception_resnet_v2",
         "mobilenetv5_base", "naflexvit_base_patch16_parfac_gap", "nasnetalarge", "pnasnet5large",
         "qwen3_vit_88m", "samvit_base_patch16_224", "vgg11"}  # fmt: skip
# Families that must work.
WORKING = {"convnext", "efficientnet", "hrnet", "mambaout", "mobilenetv3", "pvt_v2", "regnet",
           "resnet", "vgg"}  # fmt: skip
FACTS = "does not take images of|claims a map of stride|has the maps|gives no feature maps"


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_family_of_timm_gives_the_maps_it_claims_or_is_refused(family, monkeypatch):
    """One model of each family, with random weights.

    Models over 50 M parameters are built on the meta device: shapes are computed, numbers are not.
    So is the first model of a family that this list does not know yet (another version of timm).
    """
    models = timm.list_models(module=family)
    known = [name for name in SMALLEST if name in models]
    name = known[0] if known else models[0]
    device = "meta" if name in LARGE or not known else "cpu"
    create = timm_backbone._create
    whole = functools.cache(create)  # claimed_maps and TimmBackbone both read its strides
    monkeypatch.setattr(
        timm_backbone, "_create", lambda name, **some: create(name, **some) if some else whole(name)
    )
    with torch.device(device), torch.no_grad():
        try:
            backbone = TimmBackbone(name, claimed_maps(name)).eval()
        except ConfigError as error:
            assert re.search(
                rf"MODEL.TIMM.(NAME|OUT_FEATURES): timm's {name} ({FACTS})", str(error)
            )
            assert family not in WORKING
            return
        if device == "meta":
            return  # TimmBackbone has tried two sizes; a third is slow there
        maps = backbone(torch.zeros(1, 3, 224, 96))  # TimmBackbone has tried other sizes
        for key, shape in backbone.output_shape().items():
            cells = [-(-n // shape.stride) for n in (224, 96)]
            assert list(maps[key].shape) == [1, shape.channels, *cells]


def claimed_maps(name):
    """Those of stride 4 to 64; where a model claims none of them, the default of the key."""
    try:
        strides = timm_backbone._create(name).feature_info.reduction()
    except ConfigError:  # TimmBackbone says why
        strides = []
    claimed = [f"res{i}" for i in range(2, 7) if 2**i in strides]
    return claimed or ["res3", "res4", "res5"]

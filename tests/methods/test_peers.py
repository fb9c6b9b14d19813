"""Methods for comparison: independently computed values, zero loss for equal maps, one step."""

import numpy as np
import pytest
import torch
from conftest import make_batch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from fgbg_kd import METHOD_REGISTRY, Batch, DenseOutput
from fgbg_kd.config import method_defaults
from fgbg_kd.methods import build_method
from fgbg_kd.methods.adapters import build_adapters
from fgbg_kd.utils.errors import ConfigError

PEERS = sorted(name for name, _ in METHOD_REGISTRY if name != "FgBg")


def batch_of(student, teacher, boxes=((),), stride=8, logits=(None, None)):
    """One level per array (N, C, H, W); images fill the map."""
    first = student[0]
    n, (h, w) = len(first), first.shape[-2:]
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    return Batch(
        DenseOutput(student, logits[0]),
        DenseOutput(teacher, logits[1]),
        boxes,
        [torch.zeros(len(b), dtype=torch.long) for b in boxes],
        [(h * stride, w * stride)] * n,
        [stride * 2**i for i in range(len(student))],
        num_classes=2,
        loss_normalizer=4.0,
    )


def maps(seed, n=2, c=3, sizes=((4, 4), (2, 2))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, *size, generator=generator) for size in sizes]


def loss_of(name, batch, edit=None, **options):
    student, teacher = ([f.shape[1] for f in x.features] for x in (batch.student, batch.teacher))
    torch.manual_seed(0)
    method = build_method(name, student, teacher, **options)
    if edit:
        edit(method)
    losses, _ = method(batch)
    assert list(losses) == list(method.losses)
    return method, losses["loss_kd"]


def identity(method):
    """Sets every convolution of a method to the identity."""
    for module in method.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == module.out_channels:
            torch.nn.init.dirac_(module.weight)
            torch.nn.init.zeros_(module.bias)


def value(x):
    return x.detach().numpy().astype(np.float64)


BOX = (0, 0, 16, 8)  # two cells of the first level, upper left; one of the second
TWO_LEVELS = dict(boxes=((BOX,), ()))


PUBLISHED = {
    "CWD": {"weight": 10.0, "temperature": 1.0},
    "DeFeat": {"bg_ratio": 4.0},
    "FGD": {
        "weight": 1e-3,
        "bg_ratio": 0.5,
        "attention_ratio": 0.5,
        "global_ratio": 0.005,
        "temperature": 0.5,
    },
    "MGD": {"weight": 2e-5, "mask_ratio": 0.65},
    "PKD": {"weight": 10.0, "num_levels": 4},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_options_for_one_stage_detectors(name):
    options = method_defaults(name)
    assert {k: options[k] for k in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("channels", [(3, 5), (5, 3)])
def test_a_student_narrower_or_wider_than_the_teacher_gets_a_1x1_convolution(channels):
    (phi,), (same,) = (build_adapters([channels[0]], [c]) for c in (channels[1], channels[0]))
    assert phi(torch.zeros(1, channels[0], 2, 2)).shape == (1, channels[1], 2, 2)
    assert phi.kernel_size == (1, 1) and isinstance(same, torch.nn.Identity)


def test_mimic_is_the_mean_squared_error_of_each_level():
    s, t = maps(0), maps(1)
    _, loss = loss_of("Mimic", batch_of(s, t, **TWO_LEVELS), weight=0.5)
    expected = sum(np.mean((value(a) - value(b)) ** 2) for a, b in zip(s, t))
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_pkd_is_one_minus_pearsons_correlation_over_images_and_cells():
    s, t = maps(0), maps(1)
    _, loss = loss_of("PKD", batch_of(s, t, **TWO_LEVELS), weight=2.0)
    expected = 0
    for a, b in zip(s, t):
        rows = [value(x).transpose(1, 0, 2, 3).reshape(3, -1) for x in (a, b)]
        expected += np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(*rows)])
    assert loss.item() == pytest.approx(2 * expected, rel=1e-4)
    scaled = [3 * x + 1 for x in t]
    assert loss_of("PKD", batch_of(scaled, t))[1].item() == pytest.approx(0, abs=1e-5)


def test_pkd_leaves_out_levels_after_num_levels_and_a_dead_channel_is_finite():
    s, t = maps(0), maps(1)
    s[0][:, 1] = 0.0
    s = [x.requires_grad_() for x in s]
    method, loss = loss_of("PKD", batch_of(s, t), num_levels=1)
    loss.backward()
    assert s[0].grad.isfinite().all() and s[1].grad is None
    other = loss_of("PKD", batch_of(s, [t[0], 5 + 7 * t[1].flip(0)]), num_levels=1)[1]
    assert torch.equal(loss, other)


def test_cwd_by_hand():
    # One channel of two cells: the student has (1/4, 3/4), the teacher (1/2, 1/2).
    s = torch.tensor([0.0, np.log(3)], dtype=torch.float32).reshape(1, 1, 1, 2)
    t = torch.zeros(1, 1, 1, 2)
    _, loss = loss_of("CWD", batch_of([s], [t]), weight=1.0)
    assert loss.item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)
    s2, t2 = s.expand(2, 4, 1, 2), t.expand(2, 4, 1, 2)  # the mean over N*C
    _, same = loss_of("CWD", batch_of([s2], [t2], ((), ())), weight=1.0)
    torch.testing.assert_close(same, loss)
    _, hot = loss_of("CWD", batch_of([2 * s], [2 * t]), weight=1.0, temperature=2.0)
    torch.testing.assert_close(hot, 4 * loss)


def test_mgd_generates_from_what_the_mask_leaves():
    s, t = [x.abs() for x in maps(0)], maps(1)  # positive: ReLU between identities lets it pass
    options = {"edit": identity, "weight": 0.5}
    _, whole = loss_of("MGD", batch_of(s, t, **TWO_LEVELS), mask_ratio=0.0, **options)
    _, nothing = loss_of("MGD", batch_of(s, t, **TWO_LEVELS), mask_ratio=1.0, **options)
    _, part = loss_of("MGD", batch_of(s, [0 * x for x in t], **TWO_LEVELS), **options)
    expected = sum(np.sum((value(a) - value(b)) ** 2) for a, b in zip(s, t)) / 2
    assert whole.item() == pytest.approx(0.5 * expected, rel=1e-5)
    energy = sum(np.sum(value(b) ** 2) for b in t) / 2
    assert nothing.item() == pytest.approx(0.5 * energy, rel=1e-5)
    assert 0 < part.item() < 0.5 * sum(np.sum(value(a) ** 2) for a in s) / 2


def test_mgd_generates_by_two_3x3_convolutions_with_a_relu_between():
    """From one cell of 2: (2, -2), then ReLU, then 3 a + 5 b summed over nine neighbours."""

    def fixed(method):
        first, _, second = method.generators[0]
        for convolution in (first, second):
            torch.nn.init.zeros_(convolution.weight)
            torch.nn.init.zeros_(convolution.bias)
        with torch.no_grad():
            first.weight[0, 0, 1, 1], first.weight[1, 0, 1, 1] = 1.0, -1.0
            second.weight[0, 0], second.weight[0, 1] = 3.0, 5.0  # all nine neighbours

    s, t = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    s[0, 0, 1, 1] = 2.0
    _, loss = loss_of("MGD", batch_of([s], [t]), edit=fixed, weight=1.0, mask_ratio=0.0)
    assert loss.item() == pytest.approx(9 * 6.0**2)  # ReLU: (2, 0); every cell sees it: 3 * 2
    _, other = loss_of("MGD", batch_of([-s], [t]), edit=fixed, weight=1.0, mask_ratio=0.0)
    assert other.item() == pytest.approx(9 * 10.0**2)  # (0, 2): 5 * 2
    _, masked = loss_of("MGD", batch_of([s], [t]), edit=fixed, weight=1.0, mask_ratio=1.0)
    assert masked.item() == 0


def test_mgd_masks_before_it_generates():
    """Masked cells are generated from the unmasked cells; their own bias still has an effect."""

    def biased(method):
        identity(method)
        torch.nn.init.ones_(method.generators[0][2].bias)

    s, t = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    _, loss = loss_of("MGD", batch_of([s], [t]), edit=biased, weight=1.0, mask_ratio=1.0)
    assert loss.item() == pytest.approx(4 * 1.0)


def test_mgd_masks_whole_cells_anew_each_time_with_its_probability():
    s = [torch.ones(2, 3, 50, 50)]
    t = [torch.zeros(2, 3, 50, 50)]
    method, first = loss_of("MGD", batch_of(s, t, ((), ())), edit=identity, weight=1.0)
    again = method(batch_of(s, t, ((), ())))[0]["loss_kd"]
    assert first.item() % 1.5 == again.item() % 1.5 == 0  # 3 channels per cell, over 2 images
    assert first != again
    assert first.item() / (3 * 2500) == pytest.approx(0.35, abs=0.03)


def test_defeat_by_hand():
    """The box has 2 cells on the first level, which fits its size, and none on the second."""
    s, t = maps(0), maps(1)
    method, loss = loss_of(
        "DeFeat", batch_of(s, t, **TWO_LEVELS), edit=identity, weight=3.0, bg_ratio=2.0
    )
    error = [((value(a) - value(b)) ** 2).sum(1) for a, b in zip(s, t)]  # (N, H, W), 3 channels
    fg = error[0][0, 0, :2].sum() / (2 * 2 * 3)
    bg0 = (error[0].sum() - error[0][0, 0, :2].sum()) / (2 * 30 * 3)
    bg1 = error[1].sum() / (2 * 8 * 3)
    expected = 3 * ((fg + 0) / 2 + 2 * (bg0 + bg1) / 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_defeat_divides_by_the_cells_of_all_processes(monkeypatch):
    """With a second process that has no cells the mean over processes is half."""
    batch = batch_of(maps(0), maps(1), **TWO_LEVELS)
    _, alone = loss_of("DeFeat", batch)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: None)
    torch.testing.assert_close(loss_of("DeFeat", batch)[1], 2 * alone)


def test_defeat_starts_near_zero_with_a_convolution_on_every_level():
    method, _ = loss_of("DeFeat", batch_of(maps(0), maps(1), **TWO_LEVELS))
    for phi in method.adapters:
        assert phi.kernel_size == (3, 3) and 0 < phi.weight.abs().max() < 1e-3


def test_fgd_by_hand():
    s, t = maps(0), maps(1)
    ratios = {"bg_ratio": 0.5, "attention_ratio": 0.25, "global_ratio": 0.125}
    _, loss = loss_of("FGD", batch_of(s, t, **TWO_LEVELS), weight=2.0, temperature=0.5, **ratios)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    expected = 0
    for level, (a, b) in enumerate(zip(s, t)):
        for image in range(2):
            x, y = value(a)[image], value(b)[image]  # (C, H, W)
            _, h, w = x.shape
            space = [h * w * softmax(np.abs(f).mean(0) / 0.5) for f in (x, y)]
            channel = [3 * softmax(np.abs(f).mean((1, 2)) / 0.5) for f in (x, y)]
            error = ((x - y) ** 2 * channel[1][:, None, None]).sum(0) * space[1]
            inside = np.zeros((h, w), bool)
            if image == 0:  # 2 cells of stride 8; of stride 16 it holds no centre: one cell
                inside[0, : (2, 1)[level]] = True
            fg = error[inside].mean() if inside.any() else 0
            bg = error[~inside].mean()
            attention = sum(np.abs(f[0] - f[1]).sum() for f in (space, channel))
            context = ((x - y) ** 2).sum()  # the blocks start as identity
            expected += (fg + 0.5 * bg + 0.25 * attention + 0.125 * context) / 2
    assert loss.item() == pytest.approx(2 * expected, rel=1e-4)


def test_fgd_global_context_by_hand():
    from fgbg_kd.methods.fgd import GlobalContext

    block = GlobalContext(4)
    first, *_, last = block.transform
    with torch.no_grad():
        block.score.weight.copy_(torch.tensor([np.log(3), 0, 0, 0]).reshape(1, 4, 1, 1))
        first.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[0.0, 0], [0, 0], [0, 3.0], [5.0, 0]]))
    x = torch.tensor([[0.0, 1.0], [4.0, 8.0], [0.0, 0.0], [0.0, 0.0]]).reshape(1, 4, 1, 2)
    # softmax 1/4, 3/4; context (0.75, 7), by LayerNorm (-1, 1), by ReLU (0, 1), out (0, 0, 3, 0)
    expected = x + torch.tensor([0.0, 0.0, 3.0, 0.0]).reshape(1, 4, 1, 1)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_qfl_by_hand():
    logits = torch.tensor([0.0, np.log(3)], dtype=torch.float32).reshape(1, 2, 1, 1)
    soft = torch.tensor([np.log(3), np.log(3)], dtype=torch.float32).reshape(1, 2, 1, 1)
    features = [torch.zeros(1, 1, 1, 1)]
    batch = batch_of(features, features, logits=([logits], [soft]))
    _, loss = loss_of("QFL", batch, weight=2.0)
    # scores 1/2 and 3/4, labels 3/4: |1/2 - 3/4| * log 2, and a factor of 0; over 4 positives
    assert loss.item() == pytest.approx(2 * 0.25 * np.log(2) / 4, rel=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_no_difference_no_loss(name):
    t = [x.abs() for x in maps(1)]
    options = {"mask_ratio": 0.0} if name == "MGD" else {}
    batch = batch_of(t, t, **TWO_LEVELS, logits=(t, t))
    _, loss = loss_of(name, batch, edit=None if name == "FGD" else identity, **options)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    apart = batch_of(maps(0), t, **TWO_LEVELS, logits=(maps(0), t))
    assert loss_of(name, apart, edit=None if name == "FGD" else identity, **options)[1] > 1e-3


@pytest.mark.parametrize("boxes", [None, ((), ())], ids=["some boxes", "no boxes"])
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.slow
def test_a_step_through_the_config(distil_cfg, name, boxes):
    """Losses are finite. Every parameter has a gradient, as DDP needs; the teacher has none."""
    distil_cfg.MODEL.KD.METHOD = name
    node = distil_cfg.MODEL.KD[name.upper()]
    model = build_model(distil_cfg).train()
    batch = make_batch(boxes=boxes) if boxes else make_batch()
    values = []
    for weight in (node.WEIGHT, 2 * node.WEIGHT):
        model.method.weight = weight
        with EventStorage(0):
            torch.manual_seed(0)  # the same mask
            losses = model(batch)
        values.append(losses["loss_kd"])
    assert values[0] > 0 and losses.keys() == {"loss_cls", "loss_box_reg", "loss_kd"}
    if name != "QFL":  # it has a running normaliser
        torch.testing.assert_close(values[1], 2 * values[0], rtol=1e-4, atol=1e-6)
    values[1].backward(retain_graph=True)
    through = model.student.head.cls_score if name == "QFL" else model.student.backbone.fpn_output3
    assert through.weight.grad.abs().sum() > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in model.teacher.detector.parameters())


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.slow
def test_autocast_keeps_the_loss_in_fp32(distil_cfg, name):
    distil_cfg.MODEL.KD.METHOD = name
    model = build_model(distil_cfg).train()
    with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(make_batch())["loss_kd"]
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.method.parameters())


def test_only_qfl_runs_the_teachers_head(distil_cfg):
    assert {n for n in PEERS if METHOD_REGISTRY.get(n).needs_logits} == {"QFL"}
    distil_cfg.MODEL.KD.METHOD = "PKD"
    model = build_model(distil_cfg).train()
    calls = []
    model.teacher.detector.head.register_forward_hook(lambda *_: calls.append(1))
    with EventStorage(0):
        model(make_batch())
    assert not calls


def test_options_of_a_peer_stand_in_its_node(distil_cfg):
    distil_cfg.merge_from_list(["MODEL.KD.METHOD", "PKD", "MODEL.KD.PKD.WEIGHT", "0.5"])
    assert build_model(distil_cfg).method.weight == 0.5


@pytest.mark.parametrize("name", PEERS)
def test_a_negative_weight_is_named(name):
    with pytest.raises(ValueError, match=f"MODEL.KD.{name.upper()}.WEIGHT is -1.0: .* >= 0"):
        build_method(name, [3], [3], weight=-1.0)


def test_a_share_over_1_is_named():
    with pytest.raises(ValueError, match="MGD.MASK_RATIO is 65: it must be at most 1"):
        build_method("MGD", [3], [3], mask_ratio=65)


@pytest.mark.parametrize("name, option", [("CWD", "temperature"), ("PKD", "num_levels")])
def test_an_option_that_cannot_be_0_is_named(name, option):
    with pytest.raises(ValueError, match=f"{name}.{option.upper()} is 0: it must be over 0"):
        build_method(name, [3], [3], **{option: 0})


def test_qfl_names_what_a_student_without_a_normalizer_lacks():
    student, teacher = (DenseOutput(maps(seed), maps(seed)) for seed in (0, 1))
    method = build_method("QFL", [3, 3], [3, 3])
    boxes, classes = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    batch = Batch(student, teacher, boxes, classes, [(16, 16)] * 2, [4, 8], num_classes=3)
    with pytest.raises(ConfigError, match="QFL divides by .* loss_normalizer"):
        method(batch)

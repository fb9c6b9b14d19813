"""FgBg: values by hand. Batch size, map size and number of processes do not change the scale."""

import math

import pytest
import torch
from conftest import FGBG_OFF, in_two_processes
from detectron2.utils import comm
from torch import distributed
from torch.nn import functional as F

from fgbg_kd import Batch, DenseOutput, FgBg
from fgbg_kd.config import method_defaults
from fgbg_kd.methods import build_method
from fgbg_kd.methods.base import or_one
from fgbg_kd.methods.fgbg import statistics
from fgbg_kd.ops import (
    Comparison,
    compare_predictions,
    cosine_similarity,
    kl_divergence,
    split,
    standardise,
    teacher_gate,
)


def outputs(size, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.randn(1, 3, 2, 2, generator=generator) for _ in range(2))
    maps = [F.interpolate(x, size).repeat(2, 1, 1, 1) for x in maps]
    return DenseOutput(*([x] for x in maps))


def terms(student, teacher, boxes, size, **options):
    loss = build_method("FgBg", [3], [3], gate=False, **options)
    n = len(boxes)
    first = [DenseOutput(*([x[:n] for x in f] for f in o[:2])) for o in (student, teacher)]
    batch = Batch(
        *first,
        [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes],
        [torch.zeros(len(b), dtype=torch.long) for b in boxes],
        [(size * 8, size * 8)] * n,
        [8],
        num_classes=1,
    )
    return loss(batch)[0]


# Features of one channel. Its mean over the four cells is 0, and a direction is a sign.
SIGNS = torch.tensor([[[[1.0, -1], [1, -1]]]])


@pytest.mark.parametrize("fg_loss", ["cosine", "mse"])
def test_by_hand(fg_loss):
    student = DenseOutput([SIGNS], [torch.zeros(1, 1, 2, 2)])
    logits = torch.full((1, 1, 2, 2), math.log(3.0))
    teacher = DenseOutput([torch.tensor([[[[-1.0, 1], [1, -1]]]])], [logits])
    weights = {"fg_weight": 6.0, "bg_weight": 0.5, "bg_feature_weight": 4.0}
    loss = build_method("FgBg", [1], [1], gate=False, fg_loss=fg_loss, **weights)
    box = torch.tensor([[0.0, 0, 8, 8]])
    one = torch.zeros(1, dtype=torch.long)
    batch = Batch(student, teacher, [box], [one], [(16, 16)], [8], num_classes=1)
    losses, shares = loss(batch)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert losses["loss_kd_fg"].item() == pytest.approx(6 * 2, rel=1e-4)  # 1 - cos, (1 + 1)^2 / 2
    assert losses["loss_kd_bg_features"].item() == pytest.approx(4 * 2 / 3)  # 2, 0, 0
    assert losses["loss_kd_bg"].item() == pytest.approx(0.5 * 3 * kl / 1, rel=1e-5)
    assert {name: value.item() for name, value in shares.items()} == {
        "kd/fg_gate": 1,
        "kd/bg_gate": 1,
    }


@pytest.mark.parametrize("fg_loss", ["cosine", "mse"])
def test_the_gate_scales_the_cells_of_all_terms_and_leaves_the_divisors(monkeypatch, fg_loss):
    student = DenseOutput([SIGNS], [torch.zeros(1, 1, 2, 2)])
    logits = torch.full((1, 1, 2, 2), math.log(3.0))
    teacher = DenseOutput([-SIGNS], [logits])
    # Above two boxes of one cell: the teacher is better on the first one, 0.4 against 0.3. Below
    # the background: in the second cell the teacher is worse, 0.1 against 0.5.
    qualities = torch.tensor([[0.3, 0.3, 0.5, 0.5]]), torch.tensor([[0.4, 0.1, 0.9, 0.1]])
    weights = {"fg_weight": 1.0, "bg_feature_weight": 1.0}

    def found(self, cells, **options):
        apart = kl_divergence(student.logits[0], logits, 1, "sigmoid").flatten(1) * cells.background
        return Comparison(apart, *qualities)

    monkeypatch.setattr(Batch, "compare", found)
    classes = torch.zeros(2, dtype=torch.long)
    boxes = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    batch = Batch(student, teacher, [boxes], [classes], [(16, 16)], [8], num_classes=1)
    options = {**weights, "assign": "scale", "fg_loss": fg_loss}
    losses, shares = build_method("FgBg", [1], [1], **options)(batch)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert losses["loss_kd_fg"].item() == pytest.approx(0.4 * 2, rel=1e-4)
    assert losses["loss_kd_bg_features"].item() == pytest.approx(0.4 * 1.2 * 2 / 2)
    assert losses["loss_kd_bg"].item() == pytest.approx(0.4 * 1.2 * kl / 2, rel=1e-5)
    assert {name: value.item() for name, value in shares.items()} == {
        "kd/fg_gate": pytest.approx(0.4),  # 0.8 and 0
        "kd/bg_gate": pytest.approx(0.6),  # 1 and 0.2
    }


@pytest.mark.parametrize("gate", [True, False])
def test_without_objects_and_behind_a_closed_gate_nothing_is_followed(gate):
    batch = random_batch()
    method = build_method("FgBg", [4, 4], [4, 4], gate=gate, bg_feature_weight=1.0)
    perfect = batch.student._replace(logits=[torch.full_like(x, 9.0) for x in batch.student.logits])
    losses, shares = method(batch._replace(student=perfect))
    assert (shares["kd/fg_gate"] == 0) == gate
    assert all((loss == 0) == gate for loss in losses.values())
    none = {"gt_boxes": [torch.zeros(0, 4)], "gt_classes": [torch.zeros(0, dtype=torch.long)]}
    losses, _ = method(batch._replace(**none))
    assert losses.pop("loss_kd_fg") == 0
    assert all((loss == 0) == gate for loss in losses.values())


def test_the_other_terms_do_not_depend_on_the_weight_of_the_foreground():
    def without_foreground(weight):
        options = {"fg_weight": weight, "bg_feature_weight": 1.0}
        losses, shares = build_method("FgBg", [4, 4], [4, 4], **options)(random_batch())
        losses.pop("loss_kd_fg", None)
        return {name: value.item() for name, value in (losses | shares).items()}

    assert without_foreground(0.0) == without_foreground(8.0)


def test_a_large_object_counts_once_in_the_logged_means():
    boxes = [torch.tensor([[0.0, 0, 32, 24], [0, 24, 8, 32]])]  # 12 cells and 1 of 16
    cells = split(boxes, [(32, 32)], [(4, 4)], [8], assign="all")
    value = torch.where(cells.owner(torch.tensor([[True, False]])), 0.2, 0.6)
    value = torch.where(cells.background, 0.9, value)
    means = statistics(cells, value)
    expected = {"kd/fg_gate": 0.4, "kd/bg_gate": 0.9}
    assert {name: mean.item() for name, mean in means.items()} == pytest.approx(expected)


@pytest.mark.parametrize("fg_loss", ["cosine", "mse"])
def test_more_images_or_larger_maps_do_not_change_the_scale(fg_loss):
    half = (0, 0, 32, 16)  # half of a 4 x 4 map; of a larger map the same share
    small = outputs(4, 0), outputs(4, 1)
    large = outputs(8, 0), outputs(8, 1)
    one = terms(*small, [[half]], 4, fg_loss=fg_loss)
    two = terms(*small, [[half], [half]], 4, fg_loss=fg_loss)
    big = terms(*large, [[tuple(2 * v for v in half)]], 8, fg_loss=fg_loss)
    for name, value in one.items():
        assert value > 0
        torch.testing.assert_close(two[name], value)
        torch.testing.assert_close(big[name], value)


def _worker(rank, folder, boxes, fg_loss):
    distributed.init_process_group("gloo")
    student, teacher = outputs(4, 0), outputs(4, 1)
    got = terms(student, teacher, [boxes[rank]], 4, fg_loss=fg_loss)
    torch.save(got, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("fg_loss", ["cosine", "mse"])
def test_two_processes_average_to_the_loss_of_one_also_if_one_has_no_boxes(tmp_path, fg_loss):
    boxes = [[(0, 0, 32, 16), (0, 16, 8, 24)], []]
    in_two_processes(_worker, str(tmp_path), boxes, fg_loss)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = terms(outputs(4, 0), outputs(4, 1), boxes, 4, fg_loss=fg_loss)
    for name, value in whole.items():
        mean = (parts[0][name] + parts[1][name]) / 2  # what DistributedDataParallel does
        torch.testing.assert_close(mean, value)


def random_batch():
    """One image of 32 x 32 pixels, two levels; a large box and a small one in it."""
    generator = torch.Generator().manual_seed(11)

    def output():
        maps = [[torch.randn(1, 4, n, n, generator=generator) for n in (4, 2)] for _ in range(2)]
        return DenseOutput(*maps)  # two anchors a cell

    boxes, classes = torch.tensor([[0.0, 0, 24, 16], [0, 0, 8, 8]]), torch.tensor([0, 1])
    return Batch(output(), output(), [boxes], [classes], [(32, 32)], [8, 16], num_classes=2)


ALL_OPTIONS = {
    "fg_weight": 2.0,
    "bg_weight": 3.0,
    "bg_feature_weight": 5.0,
    "fg_loss": "cosine",
    "assign": "scale",
    "kl": "softmax",
    "temperature": 2.0,
    "gate": True,
}


@pytest.mark.parametrize(
    "option, value",
    [
        ("fg_loss", "mse"),
        ("assign", "all"),
        ("assign", "teacher"),
        ("kl", "sigmoid"),
        ("temperature", 1.0),
        ("gate", False),
        ("fg_weight", 4.0),
        ("bg_weight", 1.0),
        ("bg_feature_weight", 1.0),
    ],
)
def test_each_option_reaches_its_operator_and_changes_a_loss(option, value):
    batch = random_batch()

    def composed(o):
        assign = "scale" if o["assign"] == "scale" else "all"
        cells = split(batch.gt_boxes, [(32, 32)], [(4, 4), (2, 2)], [8, 16], assign=assign)
        s, t = batch.student, batch.teacher
        found = compare_predictions(
            s.logits,
            t.logits,
            cells,
            batch.gt_classes[0][None],
            2,
            kl=o["kl"],
            temperature=o["temperature"],
        )
        gate = (cells.foreground | cells.background).float()
        if o["gate"]:
            gate = teacher_gate(found.student_quality, found.teacher_quality, cells)
        if o["assign"] == "teacher":
            cells = cells.weighted(found.teacher_quality)
        real = torch.ones(1, 20, dtype=torch.bool)
        maps = [*zip(standardise(s.features, real), standardise(t.features, real))]
        cosine = torch.cat([cosine_similarity(*x).flatten(1) for x in maps], 1)
        mse = torch.cat([(a - b).square().mean(1).flatten(1) for a, b in maps], 1)
        error = mse / 2 if o["fg_loss"] == "mse" else 1 - cosine
        fg = (cells.weight * gate * error).sum() / cells.weight.sum()
        bg = (gate * found.kl).sum() / cells.foreground.sum()
        bg_features = (gate * (1 - cosine))[cells.background].sum() / cells.background.sum()
        mean_gate = (cells.weight * gate).sum() / cells.weight.sum()
        return {
            "loss_kd_fg": o["fg_weight"] * fg,
            "loss_kd_bg": o["bg_weight"] * mean_gate * bg,
            "loss_kd_bg_features": o["bg_feature_weight"] * mean_gate * bg_features,
        }

    changed = {**ALL_OPTIONS, option: value}
    before, expected = composed(ALL_OPTIONS), composed(changed)
    assert any(before[name] != expected[name] for name in expected)
    got, _ = build_method("FgBg", [4, 4], [4, 4], **changed)(batch)
    for name, loss in expected.items():
        torch.testing.assert_close(got[name], loss)


@pytest.mark.parametrize("weight", ["fg_weight", "bg_feature_weight"])
def test_a_gate_without_a_kl_needs_the_logits(weight):
    method = build_method("FgBg", [4, 4], [4, 4], **FGBG_OFF | {weight: 1.0})
    assert method.needs_logits
    name = {"fg_weight": "loss_kd_fg", "bg_feature_weight": "loss_kd_bg_features"}[weight]
    assert list(method(random_batch())[0]) == method.losses == [name]


def test_without_a_term_of_features_there_is_no_parameter_that_gets_no_gradient():
    method = build_method("FgBg", [3], [5], fg_weight=0.0, bg_feature_weight=0.0)
    assert not list(method.parameters())
    for weight in ("fg_weight", "bg_feature_weight"):
        assert list(build_method("FgBg", [3], [5], **FGBG_OFF | {weight: 1.0}).parameters())


def test_one_weight_over_0_keeps_the_method_on():
    assert FgBg.is_off(FGBG_OFF) and FgBg.is_off(FGBG_OFF | {"bg_feature_weight": -1.0})
    assert not any(FgBg.is_off(FGBG_OFF | {weight: 1.0}) for weight in FGBG_OFF)


def test_for_features_alone_the_background_term_and_the_gate_are_off():
    changed = {"bg_weight": 0.0, "gate": False}
    assert FgBg.for_features_only(ALL_OPTIONS) == ALL_OPTIONS | changed


@pytest.mark.parametrize("assign, expected", [("teacher", "scale"), ("all", "all")])
def test_for_features_alone_no_weight_asks_for_the_teachers_scores(assign, expected):
    options = FgBg.for_features_only(method_defaults("FgBg") | {"assign": assign})
    assert options["assign"] == expected
    assert not build_method("FgBg", [4], [4], **options).needs_logits


def test_weights_by_the_teachers_scores_need_no_gate():
    method = build_method("FgBg", [4, 4], [4, 4], assign="teacher", gate=False, bg_weight=0.0)
    assert method.needs_logits
    assert list(method(random_batch())[0]) == ["loss_kd_fg"]


def test_the_terms_of_features_depend_on_the_pair_unless_they_are_set():
    defaults = method_defaults("FgBg")
    for alike, pretrained, expected in (
        (True, True, (32, "mse")),
        (True, False, (32, "cosine")),
        (False, True, (0, "cosine")),
        (False, False, (0, "cosine")),
    ):
        options = FgBg.for_pair(defaults, alike, pretrained)
        assert (options["bg_feature_weight"], options["fg_loss"]) == expected
    set_by_user = defaults | {"bg_feature_weight": 3.0, "fg_loss": "cosine"}
    assert FgBg.for_pair(set_by_user, alike=True, pretrained=True) == set_by_user


def test_without_a_pair_the_terms_of_features_are_those_of_different_detectors():
    method, batch = build_method("FgBg", [4, 4], [4, 4]), random_batch()
    assert method.losses == ["loss_kd_fg", "loss_kd_bg"]
    different = FgBg.for_pair(method_defaults("FgBg"), alike=False, pretrained=False)
    expected = build_method("FgBg", [4, 4], [4, 4], **different)(batch)[0]
    assert method(batch)[0] == expected


def test_both_terms_divide_by_the_cells_of_all_processes(monkeypatch):
    """With a second process that has no cells the mean over processes is half."""
    alone = build_method("FgBg", [4, 4], [4, 4], gate=False)(random_batch())[0]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: None)
    shared = build_method("FgBg", [4, 4], [4, 4], gate=False)(random_batch())[0]
    for name, loss in alone.items():
        torch.testing.assert_close(shared[name], 2 * loss)


def test_a_normaliser_under_1_divides_too():
    """It is the mean over processes, of which some may have no objects."""
    assert or_one(torch.tensor([0.0, 0.25, 3.0])).tolist() == [1, 0.25, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl": "gauss"}, "MODEL.KD.FGBG.KL is 'gauss'"),
        ({"fg_weight": -1}, "FG_WEIGHT is -1"),
        ({"bg_weight": math.nan}, "BG_WEIGHT is nan"),
        ({"temperature": 0}, "TEMPERATURE is 0"),
        ({"bg_feature_weight": -2}, "BG_FEATURE_WEIGHT is -2"),
        ({"fg_loss": "l1"}, "MODEL.KD.FGBG.FG_LOSS is 'l1'"),
        ({"assign": "auto"}, "MODEL.KD.FGBG.ASSIGN is 'auto'"),
        ({"gate": "maybe"}, "MODEL.KD.FGBG.GATE is 'maybe'"),
        ({"fg_wieght": 1}, "FgBg has no option .'fg_wieght'."),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_method("FgBg", [3], [3], **options)


@pytest.mark.parametrize("fg_loss", ["cosine", "mse"])
def test_the_student_comes_nearer_to_the_teacher_in_a_few_steps(fg_loss):
    """Both terms fall when the student's maps follow their gradients."""
    torch.manual_seed(0)
    maps = [torch.randn(1, c, 4, 4) for c in (5, 3, 6, 6)]  # features, logits of two anchors
    s_features, t_features, s_logits, t_logits = maps
    leaves = [s_features.requires_grad_(), s_logits.requires_grad_()]
    method = build_method("FgBg", [5], [3], gate=False, fg_loss=fg_loss)
    optimizer = torch.optim.Adam([*leaves, *method.parameters()], lr=0.1)
    batch = Batch(
        DenseOutput([s_features], [s_logits]),
        DenseOutput([t_features], [t_logits]),
        [torch.tensor([[0.0, 0, 16, 16]])],
        [torch.zeros(1, dtype=torch.long)],
        [(32, 32)],
        [8],
        num_classes=3,
    )
    steps = []
    for _ in range(30):
        losses, _ = method(batch)
        steps.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for name, first in steps[0].items():
        assert steps[-1][name] < 0.2 * first, name


def test_a_subclass_may_have_options_of_its_own():
    class Mine(FgBg):
        def __init__(self, *channels, extra="yes", **options):
            super().__init__(*channels, **options)
            self.extra = extra

    options = method_defaults("FgBg")
    mine = Mine([3], [3], extra="no", **{**options, "assign": "all"})
    assert mine.extra == "no" and mine.assign == "all"
    with pytest.raises(ValueError, match="MODEL.KD.FGBG.FG_WEIGHT is -1"):
        Mine([3], [3], **{**options, "fg_weight": -1})

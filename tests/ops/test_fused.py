"""The fused operators against a float64 reference, on a GPU or in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from conftest import in_two_processes
from torch import distributed
from torch.autograd import gradcheck

from fgbg_kd.ops import (
    BACKGROUND,
    PADDING,
    Split,
    compare_features,
    compare_predictions,
    kl_divergence,
    split,
)
from fgbg_kd.ops.common import use_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (N, C, level shapes): ones and primes, none of them a multiple of a tile.
SHAPES = [
    (1, 1, [(1, 1)]),
    (2, 37, [(7, 11), (3, 5)]),
    (1, 96, [(13, 10)]),
]


def randn(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def make_weight(kind, n, cells):
    weight = randn(n, cells, seed=9).abs().float()
    if kind == "mixed":
        weight[:, ::3] = 0
    return weight * 0 if kind == "none" else weight


def layout(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def features_sum(student, teacher, weight, impl="auto"):
    """Sum of weight * (1 - cos + 3 * distance).

    The first cell is padding; cells of weight 0 are not used.
    """
    real = torch.ones_like(weight, dtype=torch.bool)
    if real.shape[1] > 1:
        real[0, 0] = False
    cosine, distance = compare_features(student, teacher, real, weight != 0, impl)
    return (weight * real * (1 - cosine + 3 * distance)).sum()


def kl_sum(student, teacher, weight, num_classes, kind="sigmoid", temperature=1.0, impl="auto"):
    """Sum of weight * KL. Cells of weight 0 are padding, and all other cells are background."""
    shapes = tuple(tuple(s.shape[2:]) for s in student)
    index = torch.where(weight != 0, BACKGROUND, PADDING).int()
    boxes = torch.zeros(len(weight), 1, 4, device=weight.device)
    found = compare_predictions(
        student,
        teacher,
        Split(index, weight, boxes, shapes),
        torch.zeros(len(weight), 1, dtype=torch.long, device=weight.device),
        num_classes,
        kl=kind,
        temperature=temperature,
        quality=False,
        impl=impl,
    )
    return (weight * found.kl).sum()


def run(function, student, upstream=0.7):
    """Loss and the gradients of each level, for an upstream gradient other than 1."""
    leaves = [s.detach().clone(memory_format=torch.preserve_format) for s in student]
    leaves = [s.requires_grad_() for s in leaves]
    loss = function(leaves)
    (upstream * loss).backward()
    return loss.detach(), [s.grad for s in leaves]


def check(function, student, reference_inputs):
    """The error is at most twice plain PyTorch's error in the same dtype, plus a rounding unit."""
    exact, exact_grads = run(lambda s: function(s, "torch", wide=True), reference_inputs)
    plain, plain_grads = run(lambda s: function(s, "torch"), student)
    fused, fused_grads = run(lambda s: function(s, "triton"), student)
    unit = torch.finfo(student[0].dtype).eps
    unit_loss = torch.finfo(fused.dtype).eps
    assert (fused - exact).abs() <= 2 * (plain - exact).abs() + 8 * unit_loss * (exact.abs() + 1)
    for e, p, f, s in zip(exact_grads, plain_grads, fused_grads, student):
        assert f.dtype == s.dtype and f.shape == s.shape
        bound = 2 * (p.double() - e).abs().max() + unit * e.abs().max() + 16 * unit_loss
        assert (f.double() - e).abs().max() <= bound


# Every pair of values of two parameters occurs (features and KL: shape, dtype, weights, layout).
FEATURES_CASES = [
    (0, torch.float64, "mixed", False),
    (0, torch.float32, "all", True),
    (0, torch.float16, "none", False),
    (0, torch.bfloat16, "mixed", True),
    (1, torch.float64, "all", True),
    (1, torch.float32, "mixed", False),
    (1, torch.float16, "mixed", True),
    (1, torch.bfloat16, "none", False),
    (2, torch.float64, "none", True),
    (2, torch.float32, "none", False),
    (2, torch.float16, "all", False),
    (2, torch.bfloat16, "all", True),
]


@pytest.mark.parametrize("shape, dtype, weights, channels_last", FEATURES_CASES)
@pytest.mark.slow
def test_features_equal_a_float64_reference(shape, dtype, weights, channels_last):
    n, c, shapes = SHAPES[shape]
    student, teacher = (
        [layout(randn(n, c, h, w, seed=10 * i + j).to(dtype), channels_last)
         for j, (h, w) in enumerate(shapes)]
        for i in (1, 2)
    )  # fmt: skip
    weight = make_weight(weights, n, sum(h * w for h, w in shapes))

    def function(features, impl, wide=False):
        target = [t.double() for t in teacher] if wide else teacher
        return features_sum(features, target, weight.double() if wide else weight, impl)

    check(function, student, [s.double() for s in student])


@pytest.mark.slow
def test_features_gradcheck_through_the_kernels():
    student = [
        randn(1, 3, 2, 2, seed=1).requires_grad_(),
        randn(1, 3, 1, 1, seed=2).requires_grad_(),
    ]
    teacher = [randn(1, 3, 2, 2, seed=3), randn(1, 3, 1, 1, seed=4)]
    weight = make_weight("mixed", 1, 5).double()
    assert gradcheck(lambda *s: features_sum(s, teacher, weight, "triton"), student)


def test_fused_features_do_not_read_padding_and_take_zero_vectors():
    student, teacher = randn(1, 5, 2, 2, seed=1).float(), randn(1, 5, 2, 2, seed=2).float()
    student[0, :, 0, 0] = teacher[0, :, 0, 0] = float("nan")
    one = torch.ones(1, 5, 1, 1, device=DEVICE)  # the only cell of its level: 0 after scaling
    weight = torch.ones(1, 5, device=DEVICE)
    loss, (grad, of_one) = run(
        lambda s: features_sum(s, [teacher, one], weight, "triton"), [student, one]
    )
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 0, 0] == 0).all() and (of_one == 0).all()
    assert (grad[0, :, 0, 1] != 0).all()


def test_weights_of_cells_may_lie_in_any_order_in_memory():
    student, teacher = randn(2, 5, 2, 3, seed=1).float(), randn(2, 5, 2, 3, seed=2).float()
    weight = make_weight("mixed", 6, 2).T
    assert not weight.is_contiguous()
    results = [
        run(lambda s, i=impl: features_sum(s, [teacher], weight, i), [student])
        for impl in ("torch", "triton")
    ]
    torch.testing.assert_close(results[1], results[0])


def test_the_same_input_gives_the_same_bits():
    student, teacher = randn(2, 9, 7, 5, seed=1).float(), randn(2, 9, 7, 5, seed=2).float()
    weight = make_weight("mixed", 2, 35)
    results = [run(lambda s: features_sum(s, [teacher], weight, "triton"), [student]) for _ in "ab"]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.slow
def test_operator_of_features_is_registered_soundly():
    """torch.library's own checks: schema, fake tensors and autograd, for torch.compile."""
    from fgbg_kd.ops.features_triton import channel_sums, products, products_grad
    from fgbg_kd.ops.standardise_triton import channel_statistics, moments

    student = [randn(2, 3, 2, 2, seed=1).float().requires_grad_()]
    teacher = [randn(2, 3, 2, 2, seed=2).float()]
    marks = torch.full((2, 4), 2, dtype=torch.int8, device=DEVICE)
    s_stats, t_stats = ([x] for x in channel_statistics([*student, *teacher], marks))
    stats = s_stats, t_stats
    torch.library.opcheck(moments, (teacher, marks))
    torch.library.opcheck(products, (student, teacher, marks, *stats))
    factors, detached = randn(2, 2, 4, seed=3).float(), [x.detach() for x in student]
    torch.library.opcheck(channel_sums, (detached, teacher, factors, *stats))
    means = [randn(2, 3, seed=4).float()]
    torch.library.opcheck(products_grad, (detached, teacher, factors, marks, *stats, means))


def _worker(rank, folder):
    distributed.init_process_group("gloo")
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    torch.save(measures_and_gradient(part), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def measures_and_gradient(part):
    """Fused measures and gradient for the images of a process; the third image is half padding."""
    maps = (randn(3, 4, 3, 4, seed=1), randn(3, 4, 3, 4, seed=2), randn(3, 12, seed=3))
    student, teacher, weight = (x[part] for x in maps)
    real = torch.ones(3, 12, dtype=torch.bool, device=DEVICE)
    real[2, 6:] = False
    student = student.clone().requires_grad_()
    found = compare_features([student], [teacher], real[part], weight > -1, "triton")
    (weight * found.cosine + found.distance).sum().backward()
    return torch.stack(found, dim=1).detach(), student.grad


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes see no GPU, this one does")
def test_two_processes_have_the_measures_and_gradients_of_one(tmp_path):
    """Mean and variance are over all processes, and so is their gradient."""
    in_two_processes(_worker, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, *both in zip(measures_and_gradient(slice(0, 3)), *parts):
        torch.testing.assert_close(torch.cat(both), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_channel_statistics_keep_a_small_spread_beside_a_large_mean():
    """The tiles are combined around the common mean, so nothing cancels."""
    from fgbg_kd.ops.standardise_triton import CELLS, channel_statistics

    x = 1000 + 0.01 * randn(2, 3, 7, CELLS // 5, seed=1).float()
    marks = (randn(2, 7 * (CELLS // 5), seed=2) > -1).to(torch.int8)
    mean, scale, inverse = channel_statistics([x], marks)[0]
    inside = x.double().flatten(2).transpose(1, 2)[marks != 0]
    expected = (inside.var(0, correction=0) + 1e-5).rsqrt()
    assert 1 / inverse[0].item() == pytest.approx(len(inside))
    torch.testing.assert_close(mean.double(), inside.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-3, atol=0)


KL_SHAPES = [(1, 1, SHAPES[0][2]), (2, 5, SHAPES[1][2]), (1, 33, [(4, 3)])]
KL_CASES = [
    (0, torch.float64, "mixed", "sigmoid", 1.0, False),
    (0, torch.float32, "all", "softmax", 2.5, True),
    (0, torch.float16, "none", "sigmoid", 2.5, True),
    (0, torch.bfloat16, "mixed", "softmax", 1.0, False),
    (1, torch.float64, "all", "softmax", 2.5, True),
    (1, torch.float32, "mixed", "sigmoid", 1.0, False),
    (1, torch.float16, "mixed", "softmax", 2.5, True),
    (1, torch.bfloat16, "none", "sigmoid", 2.5, True),
    (2, torch.float64, "none", "softmax", 1.0, False),
    (2, torch.float32, "none", "sigmoid", 2.5, True),
    (2, torch.float16, "all", "softmax", 1.0, False),
    (2, torch.bfloat16, "all", "sigmoid", 2.5, True),
]


@pytest.mark.parametrize("shape, dtype, weights, kind, temperature, channels_last", KL_CASES)
@pytest.mark.slow
def test_kl_equals_a_float64_reference(shape, dtype, weights, kind, temperature, channels_last):
    """c classes, three anchors, logits around the background's usual -5."""
    n, c, shapes = KL_SHAPES[shape]
    student, teacher = (
        [layout((randn(n, 3 * c, h, w, seed=10 * i + j, scale=3) - 5).to(dtype), channels_last)
         for j, (h, w) in enumerate(shapes)]
        for i in (1, 2)
    )  # fmt: skip
    weight = make_weight(weights, n, sum(h * w for h, w in shapes))

    def function(logits, impl, wide=False):
        target = [t.double() for t in teacher] if wide else teacher
        w = weight.double() if wide else weight
        return kl_sum(logits, target, w, c, kind, temperature, impl)

    check(function, student, [s.double() for s in student])


@pytest.mark.parametrize("loss", ["features", "kl"])
@pytest.mark.parametrize(
    "cut",
    [lambda x: x[..., 1:5, 2:8], lambda x: x[:, 1:4], lambda x: x.transpose(2, 3)],
    ids=["cells", "channels", "transposed"],
)
@pytest.mark.slow
def test_maps_may_be_cut_out_or_transposed(loss, cut):
    wide, other = randn(2, 6, 7, 9, seed=1).float(), cut(randn(2, 6, 7, 9, seed=2).float())
    weight = make_weight("mixed", 2, other[0, 0].numel())

    def function(x):
        if loss == "features":
            return features_sum([x], [other], weight, "triton")
        return kl_sum([x], [other], weight, other.shape[1], impl="triton")

    expected, (grad,) = run(lambda x: function(cut(x[0]).contiguous()), [wide])
    got, (cut_grad,) = run(lambda x: function(cut(x[0])), [wide])
    assert torch.equal(got, expected) and torch.equal(cut_grad, grad)
    # A map with the same strides, but not a slice.
    _, (own,) = run(lambda x: function(x[0]), [cut(wide)])
    assert torch.equal(own, cut(grad))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_kl_gradcheck_through_the_kernels(kind):
    """Two anchors of two classes; two levels, one cell of weight 0."""
    student = [
        randn(1, 4, 2, 1, seed=1).requires_grad_(),
        randn(1, 4, 1, 1, seed=2).requires_grad_(),
    ]
    teacher = [randn(1, 4, 2, 1, seed=3), randn(1, 4, 1, 1, seed=4)]
    weight = make_weight("mixed", 1, 3).double()
    assert gradcheck(lambda *s: kl_sum(s, teacher, weight, 2, kind, 2.0, "triton"), student)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_fused_kl_of_huge_logits_and_unread_nan_stays_finite(kind):
    student = torch.tensor([1e4, -1e4, 1e4, float("nan")], device=DEVICE).reshape(1, 1, 1, 4)
    teacher = torch.tensor([-1e4, 1e4, 1e4, 0.0], device=DEVICE).reshape(1, 1, 1, 4)
    weight = torch.tensor([[1.0, 1, 1, 0]], device=DEVICE)
    loss, (grad,) = run(lambda s: kl_sum(s, [teacher], weight, 1, kind, impl="triton"), [student])
    assert loss.isfinite() and grad.isfinite().all() and grad[..., 3] == 0


SHAPES_2 = [(7, 9), (4, 5)]  # of strides 8 and 16


def predictions(
    anchors, classes, shapes=SHAPES_2, channels_last=False, dtype=torch.float32, seed=0
):
    """Random logits per level; N = 2.

    Args:
        anchors: number of anchors per cell, per level.
    """
    logits = [
        randn(2, a * classes, h, w, seed=seed + i, scale=2)
        for i, ((h, w), a) in enumerate(zip(shapes, anchors))
    ]
    return [layout(x.to(dtype), channels_last) for x in logits]


SCENE = {
    "boxes": [[[3, 3, 30, 40], [20, 10, 70, 55], [41, 41, 44, 43]], []],
    "all foreground": [[[-9, -9, 99, 99]], [[-9, -9, 99, 99]]],
    "nothing": [[], []],
}


# Pairwise: scene, dtype, layout, KL, anchors per cell on each level.
PASS_CASES = [
    ("boxes", torch.float32, False, "sigmoid", (3, 3)),
    ("boxes", torch.bfloat16, True, "softmax", (3, 2)),
    ("boxes", torch.float32, True, None, (1, 1)),
    ("boxes", torch.float32, False, None, (3, 2)),
    ("all foreground", torch.bfloat16, False, "sigmoid", (1, 1)),
    ("all foreground", torch.float32, True, "softmax", (3, 3)),
    ("all foreground", torch.bfloat16, True, None, (3, 2)),
    ("nothing", torch.float32, True, "sigmoid", (3, 2)),
    ("nothing", torch.bfloat16, False, "softmax", (1, 1)),
    ("nothing", torch.bfloat16, False, None, (3, 3)),
]


@pytest.mark.parametrize("scene, dtype, channels_last, kl, anchors", PASS_CASES)
@pytest.mark.slow
def test_one_pass_gives_the_qualities_and_the_kl(scene, dtype, channels_last, kl, anchors):
    """The second image is smaller than the batch, so it has padding."""
    boxes = [torch.tensor(b, dtype=torch.float32, device=DEVICE).reshape(-1, 4)
             for b in SCENE[scene]]  # fmt: skip
    cells = split(boxes, [(56, 72), (37, 50)], SHAPES_2, [8, 16], assign="all", impl="torch")
    classes = torch.tensor([[0, 4, 2], [1, 0, 0]], device=DEVICE)[:, : cells.boxes.shape[1]]
    both = [
        predictions(anchors, 5, channels_last=channels_last, dtype=dtype, seed=100 * i)
        for i in range(2)
    ]
    plain, fused = (
        compare_predictions(*both, cells, classes, 5, kl=kl, impl=impl)
        for impl in ("torch", "triton")
    )
    for name, expected in plain._asdict().items():
        got = getattr(fused, name)
        if name == "kl" and kl is None:
            assert got is None and expected is None
            continue
        assert got.dtype == torch.float32 and got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (fused.student_quality[cells.box_index == PADDING] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_nan_in_the_logit_of_an_object_stays_in_its_quality(impl):
    cells = split([torch.tensor([[0.0, 0, 16, 8]], device=DEVICE)], [(16, 16)], [(2, 2)], [8],
                  assign="all", impl="torch")  # fmt: skip
    student, teacher = torch.zeros(2, 1, 4, 2, 2, device=DEVICE)  # two anchors of two classes
    student[0, 1, 0, 0] = teacher[0, 3, 0, 1] = float("nan")
    classes = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    found = compare_predictions([student], [teacher], cells, classes, 2, kl=None, impl=impl)
    assert found.student_quality.isnan().tolist() == [[True, False, False, False]]
    assert found.teacher_quality.isnan().tolist() == [[False, True, False, False]]


def test_other_anchors_are_compared_by_the_best_of_each_class():
    """Three anchors and one: quality uses each one's anchors, the KL uses the largest logit."""
    boxes = [torch.tensor([[3.0, 3, 30, 40], [20, 20, 29, 29]], device=DEVICE)] * 2
    shapes = [(5, 6), (3, 3)]
    cells = split(boxes, [(40, 48), (33, 48)], shapes, [8, 16], assign="all", impl="torch")
    classes = torch.tensor([[4, 0], [1, 2]], device=DEVICE)
    both = [predictions((a, a), 5, shapes, seed=50 * a) for a in (3, 1)]
    plain, fused = (
        compare_predictions(*both, cells, classes, 5, same_anchors=False, impl=impl)
        for impl in ("torch", "triton")
    )
    for expected, got in zip(plain, fused):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    best = [[x.unflatten(1, (-1, 5)).amax(1) for x in logits] for logits in both]
    apart = [kl_divergence(s, t, 5, "sigmoid").flatten(1) for s, t in zip(*best)]
    apart = torch.where(cells.background, torch.cat(apart, dim=1), 0)
    torch.testing.assert_close(plain.kl, apart)
    for maps, quality in zip(best, plain[1:]):
        score = torch.cat([x.sigmoid().flatten(2) for x in maps], dim=2)  # (N, K, R)
        own = score.gather(1, cells.owner(classes)[:, None])[:, 0]
        expected = torch.where(cells.foreground, own, (1 - score.amax(1)) * cells.background)
        torch.testing.assert_close(quality, expected)
    assert cells.foreground.any() and (cells.box_index == PADDING).any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_with_other_anchors_temperature_and_kind_reach_the_kl_and_quality_can_be_left_out(impl):
    cells, classes, (student, _) = one_box_scene()
    teacher = predictions((1, 1), 3, [(2, 3), (1, 2)], seed=80)
    options = {"kl": "softmax", "temperature": 2.0, "quality": False, "impl": impl}
    got = compare_predictions(student, teacher, cells, classes, 3, same_anchors=False, **options)
    best = [[x.unflatten(1, (-1, 3)).amax(1) for x in maps] for maps in (student, teacher)]
    apart = [kl_divergence(s, t, 3, "softmax", 2.0).flatten(1) for s, t in zip(*best)]
    expected = torch.where(cells.background, torch.cat(apart, dim=1), 0)
    torch.testing.assert_close(got.kl, expected, rtol=1e-5, atol=1e-6)
    assert got.student_quality is None and got.teacher_quality is None


def test_what_is_not_said_is_the_sigmoid_kl_of_temperature_1_with_the_same_anchors():
    cells, classes, both = one_box_scene()
    said = {"kl": "sigmoid", "temperature": 1.0, "same_anchors": True, "quality": True}
    plain, full = (compare_predictions(*both, cells, classes, 3, **o) for o in ({}, said))
    assert all(torch.equal(a, b) for a, b in zip(plain, full))


def test_half_precision_is_compared_in_fp32():
    cells, classes, both = one_box_scene()
    half = [[x.half() for x in maps] for maps in both]
    full = [[x.float() for x in maps] for maps in half]
    got, expected = (compare_predictions(*x, cells, classes, 3, impl="torch") for x in (half, full))
    assert all(x.dtype == torch.float32 for x in got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def one_box_scene():
    shapes = [(2, 3), (1, 2)]
    box = torch.tensor([[0.0, 0, 12, 16]], device=DEVICE)
    sizes = [(16, 24)] * 2
    cells = split([box, box], sizes, shapes, [8, 16], assign="all", impl="torch")
    both = [predictions((3, 3), 3, shapes, seed=seed) for seed in (0, 50)]
    return cells, torch.zeros(2, 1, dtype=torch.long, device=DEVICE), both


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_only_the_kl_on_background_has_a_gradient(impl):
    cells, classes, (student, teacher) = one_box_scene()
    leaf = student[0].clone().requires_grad_()
    found = compare_predictions([leaf, student[1]], teacher, cells, classes, 3, impl=impl)
    assert not found.student_quality.requires_grad and not found.teacher_quality.requires_grad
    found.kl.sum().backward()  # weight 1 also where the KL is masked
    touched = (leaf.grad != 0).any(1).flatten(1)
    assert torch.equal(touched, cells.background[:, :6])


@pytest.mark.slow
def test_the_losses_compile_without_a_graph_break():
    cells, classes, (student, teacher) = one_box_scene()

    def loss(maps):
        features = compare_features(maps, teacher, cells.real, cells.foreground, "triton")
        found = compare_predictions(maps, teacher, cells, classes, 3, impl="triton")
        gate = (found.teacher_quality > found.student_quality).float()
        error = 1 - features.cosine + features.distance
        return (cells.weight * error + gate * found.kl).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, grads = run(loss, student)
    got, compiled_grads = run(compiled, student)
    torch.testing.assert_close(got, expected)
    for a, b in zip(compiled_grads, grads):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_comparison_is_registered_soundly():
    """torch.library's own checks: schema, fake tensors and autograd, for torch.compile."""
    from fgbg_kd.ops import predictions_triton

    shapes = [(2, 2), (1, 1)]
    student, teacher = (predictions((3, 3), 3, shapes, seed=s) for s in (0, 50))
    arguments = (
        [s.requires_grad_() for s in student],
        teacher,
        torch.full((2, 5), BACKGROUND, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, 1, dtype=torch.long, device=DEVICE),
        3, True, True, True, 1.5,
    )  # fmt: skip
    torch.library.opcheck(predictions_triton._compare, arguments)


@pytest.mark.parametrize("value, fused", [(None, True), ("1", True), ("0", False)])
def test_a_variable_switches_the_kernels_off(monkeypatch, value, fused):
    pytest.importorskip("triton")
    monkeypatch.delenv("FGBG_KD_TRITON", raising=False)
    if value is not None:
        monkeypatch.setenv("FGBG_KD_TRITON", value)
    assert use_triton("auto", SimpleNamespace(is_cuda=True)) is fused
    assert use_triton("auto", SimpleNamespace(is_cuda=False)) is False
    assert use_triton("triton", SimpleNamespace(is_cuda=False)) is True  # tests choose it

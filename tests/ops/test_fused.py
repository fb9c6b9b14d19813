"""The fused operators against a float64 reference, on a GPU or in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from torch.autograd import gradcheck

from fgbg_kd.ops import (
    BACKGROUND,
    PADDING,
    DenseOutput,
    Split,
    compare_predictions,
    cosine_loss,
    kl_divergence,
    split,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (N, C, level shapes): ones, primes, neither a multiple of a tile.
SHAPES = [
    (1, 1, [(1, 1)]),
    (2, 37, [(7, 11), (3, 5)]),
    (1, 96, [(13, 10)]),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = ["mixed", "all", "none"]


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


def kl_sum(student, teacher, weight, num_classes, kind="sigmoid", temperature=1.0, impl="auto"):
    """Sum of weight * KL; cells of weight 0 are padding, all others background."""
    shapes = tuple(tuple(s.shape[2:]) for s in student)
    index = torch.where(weight != 0, BACKGROUND, PADDING).int()
    boxes = torch.zeros(len(weight), 1, 4, device=weight.device)
    found = compare_predictions(
        DenseOutput([], student),
        DenseOutput([], teacher),
        (SimpleNamespace(num_classes=num_classes),) * 2,
        Split(index, weight, boxes, shapes),
        torch.zeros(len(weight), 1, dtype=torch.long, device=weight.device),
        [8] * len(student),
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
    """Error at most twice that of plain PyTorch in the same dtype, plus a rounding unit."""
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


@pytest.mark.parametrize("n, c, shapes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_cosine(n, c, shapes, dtype, weights, channels_last):
    student, teacher = (
        [layout(randn(n, c, h, w, seed=10 * i + j).to(dtype), channels_last)
         for j, (h, w) in enumerate(shapes)]
        for i in (1, 2)
    )  # fmt: skip
    weight = make_weight(weights, n, sum(h * w for h, w in shapes))

    def function(features, impl, wide=False):
        target = [t.double() for t in teacher] if wide else teacher
        return cosine_loss(features, target, weight.double() if wide else weight, impl)

    check(function, student, [s.double() for s in student])


def test_cosine_gradcheck_through_the_kernels():
    student = [
        randn(2, 3, 2, 3, seed=1).requires_grad_(),
        randn(2, 3, 1, 1, seed=2).requires_grad_(),
    ]
    teacher = [randn(2, 3, 2, 3, seed=3), randn(2, 3, 1, 1, seed=4)]
    weight = make_weight("mixed", 2, 7).double()
    assert gradcheck(lambda *s: cosine_loss(s, teacher, weight, "triton"), student)


def test_fused_cosine_does_not_read_cells_of_weight_zero_and_takes_zero_vectors():
    student, teacher = randn(1, 5, 2, 2, seed=1).float(), randn(1, 5, 2, 2, seed=2).float()
    student[0, :, 0, 0] = float("nan")
    student[0, :, 1, 1] = 0
    weight = torch.tensor([[0.0, 1, 1, 1]], device=DEVICE)
    loss, (grad,) = run(lambda s: cosine_loss(s, [teacher], weight, "triton"), [student])
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 0, 0] == 0).all() and (grad[0, :, 1, 1] == 0).all()
    assert (grad[0, :, 0, 1] != 0).all()


def test_the_same_input_gives_the_same_bits():
    student, teacher = randn(2, 9, 7, 5, seed=1).float(), randn(2, 9, 7, 5, seed=2).float()
    weight = make_weight("mixed", 2, 35)
    results = [run(lambda s: cosine_loss(s, [teacher], weight, "triton"), [student]) for _ in "ab"]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


def test_cosine_operator_is_registered_soundly():
    """torch.library's own checks: schema, fake tensors, autograd, as torch.compile needs them."""
    from fgbg_kd.ops.cosine_triton import weighted_cosine

    arguments = (
        [randn(2, 3, 2, 2, seed=1).float().requires_grad_()],
        [randn(2, 3, 2, 2, seed=2).float()],
        make_weight("all", 2, 4),
    )
    torch.library.opcheck(weighted_cosine, arguments)


@pytest.mark.parametrize(
    "n, c, shapes", [(1, 1, SHAPES[0][2]), (2, 5, SHAPES[1][2]), (1, 33, [(4, 3)])]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("temperature, channels_last", [(1.0, False), (2.5, True)])
def test_kl(n, c, shapes, dtype, weights, kind, temperature, channels_last):
    """c classes, three anchors, logits around the background's usual -5."""
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


@pytest.mark.parametrize("loss", ["cosine", "kl"])
@pytest.mark.parametrize(
    "cut",
    [lambda x: x[..., 1:5, 2:8], lambda x: x[:, 1:4], lambda x: x.transpose(2, 3)],
    ids=["cells", "channels", "transposed"],
)
def test_maps_may_be_cut_out_or_transposed(loss, cut):
    wide, other = randn(2, 6, 7, 9, seed=1).float(), cut(randn(2, 6, 7, 9, seed=2).float())
    weight = make_weight("mixed", 2, other[0, 0].numel())

    def function(x):
        if loss == "cosine":
            return cosine_loss([x], [other], weight, "triton")
        return kl_sum([x], [other], weight, other.shape[1], impl="triton")

    expected, (grad,) = run(lambda x: function(cut(x[0]).contiguous()), [wide])
    got, (cut_grad,) = run(lambda x: function(cut(x[0])), [wide])
    assert torch.equal(got, expected) and torch.equal(cut_grad, grad)
    # A map that is one without being cut here.
    _, (own,) = run(lambda x: function(x[0]), [cut(wide)])
    assert torch.equal(own, cut(grad))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_kl_gradcheck_through_the_kernels(kind):
    student = [
        randn(2, 6, 2, 1, seed=1).requires_grad_(),
        randn(2, 6, 1, 1, seed=2).requires_grad_(),
    ]
    teacher = [randn(2, 6, 2, 1, seed=3), randn(2, 6, 1, 1, seed=4)]
    weight = make_weight("mixed", 2, 3).double()
    assert gradcheck(lambda *s: kl_sum(s, teacher, weight, 3, kind, 2.0, "triton"), student)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_fused_kl_of_huge_logits_and_unread_nan_stays_finite(kind):
    student = torch.tensor([1e4, -1e4, 1e4, float("nan")], device=DEVICE).reshape(1, 1, 1, 4)
    teacher = torch.tensor([-1e4, 1e4, 1e4, 0.0], device=DEVICE).reshape(1, 1, 1, 4)
    weight = torch.tensor([[1.0, 1, 1, 0]], device=DEVICE)
    loss, (grad,) = run(lambda s: kl_sum(s, [teacher], weight, 1, kind, impl="triton"), [student])
    assert loss.isfinite() and grad.isfinite().all() and grad[..., 3] == 0


def detector(kind, sizes, num_classes):
    """What the comparison reads of a DenseDetector."""
    if kind == "RetinaNet":
        aspect, transform = [0.5, 1.0, 2.0], Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    else:  # FCOS
        aspect, transform = [1.0], Box2BoxTransformLinear(normalize_by_size=kind == "FCOS")
    generator = DefaultAnchorGenerator(
        sizes=[[s] for s in sizes], aspect_ratios=[aspect], strides=[8, 16], offset=0.5
    )
    return SimpleNamespace(
        num_classes=num_classes,
        box2box_transform=transform,
        anchor_generator=generator.to(DEVICE),
        num_anchors=len(aspect),
    )


def predictions(like, shapes, channels_last, dtype, seed):
    """Random outputs; deltas that make boxes near the anchors."""
    a, k = like.num_anchors, like.num_classes
    maps = [
        [layout(randn(2, c, h, w, seed=seed + i + c, scale=2).to(dtype), channels_last)
         for i, (h, w) in enumerate(shapes)]
        for c in (1, a * k, a * 4)
    ]  # fmt: skip
    return DenseOutput(*maps)


SCENE = {
    "boxes": [[[3, 3, 30, 40], [20, 10, 70, 55], [41, 41, 44, 43]], []],
    "all foreground": [[[-9, -9, 99, 99]], [[-9, -9, 99, 99]]],
    "nothing": [[], []],
}


@pytest.mark.parametrize("kinds", [("RetinaNet", "RetinaNet"), ("FCOS", "FCOS of pixels")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("scene", SCENE)
@pytest.mark.parametrize("kl", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("with_boxes", [True, False])
def test_one_pass_gives_the_qualities_and_the_kl(
    kinds, dtype, channels_last, scene, kl, with_boxes
):
    """The second image is smaller than the batch: it has padding."""
    shapes, sizes = [(7, 9), (4, 5)], [(56, 72), (37, 50)]
    detectors = [detector(kind, [32, 64], 5) for kind in kinds]
    boxes = [
        torch.tensor(b, dtype=torch.float32, device=DEVICE).reshape(-1, 4) for b in SCENE[scene]
    ]
    cells = split(boxes, sizes, shapes, [8, 16], impl="torch")
    classes = torch.tensor([[0, 4, 2], [1, 0, 0]], device=DEVICE)[:, : cells.boxes.shape[1]]
    outputs = [
        predictions(d, shapes, channels_last, dtype, 100 * i) for i, d in enumerate(detectors)
    ]
    plain, fused = (
        compare_predictions(
            *outputs, detectors, cells, classes, [8, 16], kl=kl, boxes=with_boxes, impl=impl
        )
        for impl in ("torch", "triton")
    )
    for name, expected in plain._asdict().items():
        got = getattr(fused, name)
        if name == "kl" and kl is None:
            assert got is None and expected is None
            continue
        assert got.dtype == torch.float32 and got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (fused.student_quality[cells.box_index == -2] == 0).all()


@pytest.mark.parametrize("kinds", [("RetinaNet", "FCOS"), ("FCOS", "RetinaNet")])
@pytest.mark.parametrize("kl", ["sigmoid", None])
def test_qualities_by_score_alone_need_no_boxes(kinds, kl):
    shapes, detectors = [(5, 6), (3, 3)], [detector(kind, [32, 64], 5) for kind in kinds]
    boxes = [torch.tensor([[3.0, 3, 30, 40], [20, 20, 29, 29]], device=DEVICE)] * 2
    cells = split(boxes, [(40, 48), (33, 48)], shapes, [8, 16], impl="torch")
    classes = torch.tensor([[4, 0], [1, 2]], device=DEVICE)
    outputs = [
        predictions(d, shapes, False, torch.float32, 50 * i)._replace(features=(), deltas=None)
        for i, d in enumerate(detectors)
    ]
    options = {"same_anchors": False, "kl": kl, "boxes": False}
    plain, fused = (
        compare_predictions(*outputs, detectors, cells, classes, [8, 16], impl=impl, **options)
        for impl in ("torch", "triton")
    )
    for d, output, quality in zip(detectors, outputs, plain[1:]):
        scores = [x.sigmoid().unflatten(1, (d.num_anchors, 5)).amax(1) for x in output.logits]
        scores = torch.cat([x.flatten(2) for x in scores], dim=2)  # (N, K, R), of the best anchor
        own = scores.gather(1, cells.owner(classes)[:, None])[:, 0]
        expected = torch.where(cells.foreground, own, (1 - scores.amax(1)) * cells.background)
        torch.testing.assert_close(quality, expected)
    assert cells.foreground.any() and (cells.box_index == PADDING).any()
    for expected, got in zip(plain, fused):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_heads_that_differ_are_compared_by_the_best_anchor_of_each_class():
    shapes = [(5, 6), (3, 3)]
    detectors = [detector(kind, [32, 64], 5) for kind in ("RetinaNet", "FCOS")]
    box = torch.tensor([[3.0, 3, 30, 40]], device=DEVICE)
    cells = split([box, box], [(40, 48)] * 2, shapes, [8, 16], impl="torch")
    classes = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    outputs = [
        predictions(d, shapes, False, torch.float32, 50 * i) for i, d in enumerate(detectors)
    ]
    plain, fused = (
        compare_predictions(
            *outputs, detectors, cells, classes, [8, 16], same_anchors=False, impl=impl
        )
        for impl in ("torch", "triton")
    )
    best = outputs[0].logits[0].unflatten(1, (3, 5)).amax(1)
    by_hand = kl_divergence(best, outputs[1].logits[0], 5, "sigmoid").flatten(1)
    inside = cells.background[:, :30]
    assert plain.student_quality.max() > 0 and inside.any()
    torch.testing.assert_close(plain.kl[:, :30], torch.where(inside, by_hand, 0))
    for expected, got in zip(plain, fused):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_detector_may_have_more_levels_than_are_compared():
    one = detector("RetinaNet", [32, 64], 5)
    box = torch.tensor([[3.0, 3, 30, 40]], device=DEVICE)
    cells = split([box, box], [(40, 48)] * 2, [(3, 3)], [16], impl="torch")
    classes = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    outputs = [predictions(one, [(3, 3)], False, torch.float32, seed) for seed in (0, 50)]
    plain, fused = (
        compare_predictions(*outputs, (one, one), cells, classes, [16], impl=impl)
        for impl in ("torch", "triton")
    )
    assert plain.student_quality[cells.foreground].max() > 0
    for expected, got in zip(plain, fused):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_box_coding_that_the_kernel_does_not_know_is_decoded_by_the_detector():
    class Halved:
        def apply_deltas(self, deltas, boxes):
            return boxes + deltas / 2

    shapes, known = [(2, 3), (1, 2)], detector("RetinaNet", [32, 64], 3)
    unknown = SimpleNamespace(**{**vars(known), "box2box_transform": Halved()})
    box = torch.tensor([[3.0, 3, 20, 14]], device=DEVICE)
    cells = split([box, box], [(16, 24)] * 2, shapes, [8, 16], impl="torch")
    classes = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    outputs = [predictions(known, shapes, False, torch.float32, seed) for seed in (0, 50)]
    plain, fused = (
        compare_predictions(*outputs, (unknown, known), cells, classes, [8, 16], impl=impl)
        for impl in ("torch", "triton")
    )
    for expected, got in zip(plain, fused):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_only_the_kl_on_background_has_a_gradient():
    shapes, one = [(2, 3), (1, 2)], detector("FCOS", [8, 16], 3)
    box = torch.tensor([[0.0, 0, 12, 16]], device=DEVICE)
    cells = split([box, box], [(16, 24)] * 2, shapes, [8, 16], impl="torch")
    classes = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    outputs = [predictions(one, shapes, False, torch.float32, seed) for seed in (0, 50)]
    for impl in ("torch", "triton"):
        leaf = outputs[0].logits[0].clone().requires_grad_()
        student = outputs[0]._replace(logits=[leaf, outputs[0].logits[1]])
        found = compare_predictions(
            student, outputs[1], (one, one), cells, classes, [8, 16], impl=impl
        )
        assert not found.student_quality.requires_grad and not found.teacher_quality.requires_grad
        found.kl.sum().backward()  # weight 1 also where the KL is masked
        touched = (leaf.grad != 0).any(1).flatten(1)
        assert torch.equal(touched, cells.background[:, :6])


def test_the_losses_compile_without_a_graph_break():
    shapes, one = [(2, 3), (1, 2)], detector("RetinaNet", [8, 16], 3)
    box = torch.tensor([[0.0, 0, 12, 16]], device=DEVICE)
    cells = split([box, box], [(16, 24)] * 2, shapes, [8, 16], impl="torch")
    classes = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    student, teacher = (predictions(one, shapes, False, torch.float32, seed) for seed in (0, 50))

    def loss(maps):
        cosine = cosine_loss(maps, teacher.logits, cells.weight, "triton")
        found = compare_predictions(
            student._replace(logits=maps),
            teacher,
            (one, one),
            cells,
            classes,
            [8, 16],
            impl="triton",
        )
        gate = (found.teacher_quality > found.student_quality).float()
        return cosine + (gate * found.kl).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, grads = run(loss, student.logits)
    got, compiled_grads = run(compiled, student.logits)
    torch.testing.assert_close(got, expected)
    for a, b in zip(compiled_grads, grads):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_the_comparison_is_registered_soundly():
    from fgbg_kd.ops import predictions_triton

    shapes, one = [(2, 2), (1, 1)], detector("RetinaNet", [8, 16], 3)
    student, teacher = (predictions(one, shapes, False, torch.float32, seed) for seed in (0, 50))
    arguments = (
        [s.requires_grad_() for s in student.logits],
        teacher.logits,
        [*student.deltas, *teacher.deltas],
        [*one.anchor_generator.cell_anchors] * 2,
        *(predictions_triton.box_coding(one),) * 2,
        [8, 16],
        torch.full((2, 5), BACKGROUND, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, 1, 4, device=DEVICE),
        torch.zeros(2, 1, dtype=torch.long, device=DEVICE),
        3, True, True, True, 1.5,
    )  # fmt: skip
    torch.library.opcheck(predictions_triton._compare, arguments)

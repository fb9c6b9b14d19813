"""The fused operators against a float64 reference, on a GPU or in Triton's interpreter."""

import pytest
import torch
from torch.autograd import gradcheck

from fgbg_kd.ops import cosine_loss, kl_loss

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


def test_the_losses_compile_without_a_graph_break():
    student, teacher = randn(2, 6, 2, 2, seed=1).float(), randn(2, 6, 2, 2, seed=2).float()
    weight = make_weight("mixed", 2, 4)

    def loss(features):
        cosine = cosine_loss(features, [teacher], weight, "triton")
        return cosine + kl_loss(features, [teacher], weight, 3, impl="triton")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(loss, [student]), run(compiled, [student])):
        torch.testing.assert_close(a, b)


def test_cosine_operator_is_registered_soundly():
    """torch.library's own checks: schema, fake tensors, autograd, as torch.compile needs them."""
    from fgbg_kd.ops.cosine_triton import weighted_cosine

    arguments = (
        randn(2, 3, 2, 2, seed=1).float().requires_grad_(),
        randn(2, 3, 2, 2, seed=2).float(),
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
        return kl_loss(logits, target, w, c, kind, temperature, impl)

    check(function, student, [s.double() for s in student])


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_kl_gradcheck_through_the_kernels(kind):
    student = [
        randn(2, 6, 2, 1, seed=1).requires_grad_(),
        randn(2, 6, 1, 1, seed=2).requires_grad_(),
    ]
    teacher = [randn(2, 6, 2, 1, seed=3), randn(2, 6, 1, 1, seed=4)]
    weight = make_weight("mixed", 2, 3).double()
    assert gradcheck(lambda *s: kl_loss(s, teacher, weight, 3, kind, 2.0, "triton"), student)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_fused_kl_of_huge_logits_and_unread_nan_stays_finite(kind):
    student = torch.tensor([1e4, -1e4, 1e4, float("nan")], device=DEVICE).reshape(1, 1, 1, 4)
    teacher = torch.tensor([-1e4, 1e4, 1e4, 0.0], device=DEVICE).reshape(1, 1, 1, 4)
    weight = torch.tensor([[1.0, 1, 1, 0]], device=DEVICE)
    loss, (grad,) = run(lambda s: kl_loss(s, [teacher], weight, 1, kind, impl="triton"), [student])
    assert loss.isfinite() and grad.isfinite().all() and grad[..., 3] == 0


def test_kl_operator_is_registered_soundly():
    from fgbg_kd.ops.kl_triton import weighted_kl

    student, teacher = randn(2, 6, 2, 2, seed=1).float(), randn(2, 6, 2, 2, seed=2).float()
    arguments = (student.requires_grad_(), teacher, make_weight("all", 2, 4), 3, True, 1.5)
    torch.library.opcheck(weighted_kl, arguments)

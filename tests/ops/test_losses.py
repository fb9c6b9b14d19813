"""Cosine and KL: values by hand, other implementations, float64 gradients, extreme inputs."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from fgbg_kd.ops import cosine_loss, cosine_similarity, kl_divergence


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- cosine ---


def test_cosine_by_hand():
    s = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    t = torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1)
    assert cosine_similarity(s, t).item() == pytest.approx(24 / 25)
    weight = torch.tensor([[2.0]])
    assert cosine_loss([s], [t], weight).item() == pytest.approx(2 / 25)
    assert cosine_loss([s], [-s], weight).item() == pytest.approx(4)


def test_cosine_is_torchs():
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    torch.testing.assert_close(cosine_similarity(s, t), F.cosine_similarity(s, t, dim=1))


def test_cosine_sees_direction_not_length():
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    torch.testing.assert_close(cosine_similarity(7 * s, 0.1 * t), cosine_similarity(s, t))


def test_cosine_gradient():
    s = [randn(2, 3, 2, 3).requires_grad_(), randn(2, 3, 1, 1, seed=2).requires_grad_()]
    t = [randn(2, 3, 2, 3, seed=1), randn(2, 3, 1, 1, seed=3)]
    weight = randn(2, 7, seed=4).abs()
    assert gradcheck(lambda *x: cosine_loss(x, t, weight), s)


def test_zero_vectors_give_a_finite_loss_and_no_gradient():
    s = torch.zeros(1, 4, 1, 3, requires_grad=True)
    t = torch.zeros(1, 4, 1, 3)
    t[..., 0] = 1.0
    loss = cosine_loss([s], [t], torch.ones(1, 3))
    loss.backward()
    assert loss.item() == 3 and (s.grad == 0).all()


def test_cosine_of_half_precision_is_summed_in_fp32():
    s, t = 300 * randn(1, 256, 4, 4, dtype=torch.float32), randn(1, 256, 4, 4, dtype=torch.float32)
    s, t = s.half(), t.half()  # the squares' sum overflows fp16
    got = cosine_similarity(s, t)
    assert got.dtype == torch.float32
    expected = F.cosine_similarity(s.double(), t.double(), dim=1).float()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_cells_of_weight_zero_get_no_gradient():
    s, t = randn(1, 3, 1, 2).requires_grad_(), randn(1, 3, 1, 2, seed=1)
    cosine_loss([s], [t], torch.tensor([[1.0, 0.0]])).backward()
    assert (s.grad[..., 0] != 0).all() and (s.grad[..., 1] == 0).all()


# --- KL ---


def test_sigmoid_kl_by_hand():
    # Bernoulli(0.75) to Bernoulli(0.5), twice (two classes).
    t = torch.full((1, 2, 1, 1), math.log(3.0))
    s = torch.zeros(1, 2, 1, 1)
    expected = 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_divergence(s, t, 2, "sigmoid").item() == pytest.approx(expected, rel=1e-5)


def test_softmax_kl_by_hand():
    # One class with logit log 3 beside the background's 0: probabilities 3/4, 1/4.
    t, s = torch.full((1, 1, 1, 1), math.log(3.0)), torch.zeros(1, 1, 1, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(s, t, 1, "softmax").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_kl_is_torchs(kind):
    s, t = 3 * randn(2, 3 * 4, 2, 2), 3 * randn(2, 3 * 4, 2, 2, seed=1)
    logits = [x.reshape(2, 3, 4, 2, 2) for x in (s, t)]
    if kind == "sigmoid":
        ls, lt = (torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], 2) for x in logits)
    else:
        ls, lt = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2).log_softmax(2) for x in logits)
    expected = F.kl_div(ls, lt, log_target=True, reduction="none").flatten(1, -3).sum(1)
    torch.testing.assert_close(kl_divergence(s, t, 4, kind), expected)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_gradient(kind, temperature):
    s, t = randn(2, 6, 2, 1).requires_grad_(), randn(2, 6, 2, 1, seed=1)
    assert gradcheck(lambda x: kl_divergence(x, t, 3, kind, temperature), s)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_temperature_divides_both_logits_and_its_square_multiplies_the_kl(kind, temperature):
    s, t = randn(2, 6, 2, 2), randn(2, 6, 2, 2, seed=1)
    expected = temperature**2 * kl_divergence(s / temperature, t / temperature, 3, kind)
    torch.testing.assert_close(kl_divergence(s, t, 3, kind, temperature), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_vector_has_a_direction_down_to_a_length_of_1e_6(impl):
    t = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    weight = torch.ones(1, 1)
    for length, expected in ((3e-6, 0.0), (3e-7, 1.0)):
        short = length * t / 5
        assert cosine_loss([short], [t], weight, impl).item() == pytest.approx(expected, abs=1e-4)
        assert cosine_loss([t], [short], weight, impl).item() == pytest.approx(expected, abs=1e-4)


def test_no_gradient_flows_into_teacher_or_weight():
    s, t = randn(1, 3, 2, 2).requires_grad_(), randn(1, 3, 2, 2, seed=1).requires_grad_()
    weight = randn(1, 4, seed=2).abs().requires_grad_()
    cosine_loss([s], [t], weight).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None and weight.grad is None


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_kl_of_equal_predictions_is_zero_and_else_positive(kind):
    s, t = randn(4, 6, 3, 3), randn(4, 6, 3, 3, seed=1)
    assert kl_divergence(s, s, 3, kind).abs().max() < 1e-12
    assert (kl_divergence(s, t, 3, kind) > 0).all()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_huge_logits_stay_finite(kind):
    s = torch.tensor([1e4, -1e4, 1e4, 0.0]).reshape(1, 1, 1, 4).requires_grad_()
    t = torch.tensor([-1e4, 1e4, 1e4, 1e4]).reshape(1, 1, 1, 4)
    loss = kl_divergence(s, t, 1, kind).sum()
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
    assert (s.grad.flatten()[:2] * torch.tensor([1, -1]) > 0).all()


def test_one_class_softmax_is_the_sigmoid():
    s, t = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    torch.testing.assert_close(kl_divergence(s, t, 1, "softmax"), kl_divergence(s, t, 1, "sigmoid"))


def test_small_kl_can_hide_a_large_angle():
    """An observation of the thesis. It is why the foreground uses cosine, not a softmax KL."""
    s, t = torch.tensor([10.0, 0, 0, 3.0]), torch.tensor([10.0, 0, 0, -3.0]) + 100
    kl = F.kl_div(s.log_softmax(0), t.log_softmax(0), log_target=True, reduction="sum")
    cosine = cosine_similarity(s.reshape(1, 4, 1, 1), t.reshape(1, 4, 1, 1)).item()
    assert kl < 0.01 and math.degrees(math.acos(cosine)) > 45

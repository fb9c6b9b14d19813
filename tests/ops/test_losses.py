"""Features and KL: values by hand, other implementations, float64 gradients, extreme inputs."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from fgbg_kd.ops import compare_features, cosine_similarity, kl_divergence, standardise

# Triton's interpreter runs the kernels if there is no GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).to(DEVICE)


def all_cells(n, cells):
    return torch.ones(n, cells, dtype=torch.bool, device=DEVICE)


# --- features ---


def test_cosine_by_hand():
    s = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    t = torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1)
    assert cosine_similarity(s, t).item() == pytest.approx(24 / 25)
    assert cosine_similarity(s, -s).item() == pytest.approx(-1)


def test_cosine_is_torchs():
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    torch.testing.assert_close(cosine_similarity(s, t), F.cosine_similarity(s, t, dim=1))


def test_cosine_sees_direction_not_length():
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    torch.testing.assert_close(cosine_similarity(7 * s, 0.1 * t), cosine_similarity(s, t))


def test_cosine_gradient():
    s, t = randn(2, 3, 2, 3).requires_grad_(), randn(2, 3, 2, 3, seed=1)
    assert gradcheck(lambda x: cosine_similarity(x, t), s)


def test_zero_vectors_have_the_cosine_0_and_no_gradient():
    s = torch.zeros(1, 4, 1, 3, requires_grad=True)
    t = torch.zeros(1, 4, 1, 3)
    t[..., 0] = 1.0
    cosine = cosine_similarity(s, t)
    cosine.sum().backward()
    assert (cosine == 0).all() and (s.grad == 0).all()


def test_cosine_of_half_precision_is_summed_in_fp32():
    s, t = 300 * randn(1, 256, 4, 4, dtype=torch.float32), randn(1, 256, 4, 4, dtype=torch.float32)
    s, t = s.half(), t.half()  # the squares' sum overflows fp16
    got = cosine_similarity(s, t)
    assert got.dtype == torch.float32
    expected = F.cosine_similarity(s.double(), t.double(), dim=1).float()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def scene(impl="torch"):
    """Two levels, padding in the second image, unused cells. Returns measures and inputs."""
    s = [randn(2, 3, 2, 3).requires_grad_(), randn(2, 3, 1, 2, seed=2).requires_grad_()]
    t = [randn(2, 3, 2, 3, seed=1), randn(2, 3, 1, 2, seed=3)]
    real = all_cells(2, 8)
    real[1, [2, 5]] = False
    used = randn(2, 8, seed=4) < 0.3
    return compare_features(s, t, real, used, impl), s, t, real, used


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_features_are_compared_after_scaling(impl):
    got, s, t, real, used = scene(impl)
    maps = [*zip(standardise(s, real), standardise(t, real))]
    cosine = torch.cat([cosine_similarity(a, b).flatten(1) for a, b in maps], 1)
    distance = torch.cat([(a - b).square().mean(1).flatten(1) / 2 for a, b in maps], 1)
    assert (used & ~real).any()
    torch.testing.assert_close(got.cosine, cosine * (used & real))
    torch.testing.assert_close(got.distance, distance * (used & real))


def test_the_distance_weighs_directions_by_lengths_and_compares_lengths():
    s, t = randn(1, 3, 1, 5), randn(1, 3, 1, 5, seed=1)
    found = compare_features([s], [t], all_cells(1, 5), all_cells(1, 5))
    of_s, of_t = (standardise([x], all_cells(1, 5))[0].norm(dim=1).flatten(1) for x in (s, t))
    expected = 2 * of_s * of_t * (1 - found.cosine) + (of_s - of_t) ** 2
    torch.testing.assert_close(found.distance, expected / 6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_each_level_has_its_own_number_of_channels(impl):
    s = [randn(1, 2, 2, 2).requires_grad_(), randn(1, 5, 1, 3, seed=1).requires_grad_()]
    every = all_cells(1, 7)
    found = compare_features(s, [-x for x in s], every, every, impl)
    expected = torch.cat([2 * x.square().mean(1).flatten(1) for x in standardise(s, every)], 1)
    torch.testing.assert_close(found.distance, expected)
    t = [randn(1, 2, 2, 2, seed=2), randn(1, 5, 1, 3, seed=3)]
    assert gradcheck(lambda *x: tuple(compare_features(x, t, every, every, impl)), s)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_comparison_does_not_depend_on_scale_and_offset_of_a_channel(impl):
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    every = all_cells(2, 12)
    scale, offset = randn(5, 1, 1, seed=2).abs() + 1, randn(5, 1, 1, seed=3)
    got = compare_features([scale * s + offset], [t], every, every, impl)
    expected = compare_features([s], [t], every, every, impl)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_features_gradient(impl):
    _, s, t, real, used = scene()
    assert gradcheck(lambda *x: tuple(compare_features(x, t, real, used, impl)), s)


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


def test_a_vector_has_a_direction_down_to_a_length_of_1e_6():
    t = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    for length, expected in ((3e-6, 1.0), (3e-7, 0.0)):
        short = length * t / 5
        assert cosine_similarity(short, t).item() == pytest.approx(expected, abs=1e-4)
        assert cosine_similarity(t, short).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_standardised_vector_has_a_direction_down_to_a_length_of_1e_6(impl):
    """Two cells of opposite features. Their variance is far below eps: z divides by sqrt(eps)."""
    t = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64, device=DEVICE).reshape(1, 2, 1, 2)
    every = all_cells(1, 2)
    for length, expected in ((3e-6, 1.0), (3e-7, 0.0)):
        short = length * (1e-5 / 2) ** 0.5 * t
        for pair in (([short], [t]), ([t], [short])):
            got = compare_features(*pair, every, every, impl).cosine
            torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_feature_that_is_not_a_number_stays_visible(impl, whose):
    maps = {"student": randn(1, 3, 2, 3), "teacher": randn(1, 3, 2, 3, seed=1)}
    maps[whose][0, 1, 1, 1] = torch.nan
    found = compare_features(*([x] for x in maps.values()), *[all_cells(1, 6)] * 2, impl)
    assert found.cosine.isnan().all() and found.distance.isnan().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("constant", [0.1, 3.3, 100.0])
def test_a_constant_map_has_no_direction_and_no_gradient(impl, constant):
    s = torch.full((4, 16, 5, 7), constant, device=DEVICE).requires_grad_()
    t = randn(4, 16, 5, 7, dtype=torch.float32)
    found = compare_features([s], [t], all_cells(4, 35), all_cells(4, 35), impl)
    (found.cosine + found.distance).sum().backward()
    assert (found.cosine == 0).all() and (s.grad == 0).all()
    of_teacher = standardise([t], all_cells(4, 35))[0].square().mean(1).flatten(1)
    torch.testing.assert_close(found.distance.detach(), of_teacher / 2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "student, teacher, cells",
    [
        ([(1, 2, 3, 3)], [(1, 3, 3, 3)], (1, 9)),
        ([(1, 2, 3, 3)], [(1, 2, 4, 3)], (1, 9)),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3), (1, 2, 1, 1)], (1, 9)),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], (1, 8)),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], (2, 9)),
    ],
)
def test_maps_and_masks_that_do_not_agree_are_refused(impl, student, teacher, cells):
    maps = ([randn(*shape) for shape in shapes] for shapes in (student, teacher))
    with pytest.raises(ValueError, match="shapes"):
        compare_features(*maps, all_cells(*cells), all_cells(*cells), impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_gradient_flows_into_the_teacher(impl):
    s, t = randn(1, 3, 2, 2).requires_grad_(), randn(1, 3, 2, 2, seed=1).requires_grad_()
    every = all_cells(1, 4)
    found = compare_features([s], [t], every, every, impl)
    ((found.cosine + found.distance) * randn(1, 4, seed=2)).sum().backward()
    assert s.grad.abs().sum() > 0 and t.grad is None


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
    """An observation of the thesis. So the foreground compares features, not a softmax KL."""
    s, t = torch.tensor([10.0, 0, 0, 3.0]), torch.tensor([10.0, 0, 0, -3.0]) + 100
    kl = F.kl_div(s.log_softmax(0), t.log_softmax(0), log_target=True, reduction="sum")
    cosine = cosine_similarity(s.reshape(1, 4, 1, 1), t.reshape(1, 4, 1, 1)).item()
    assert kl < 0.01 and math.degrees(math.acos(cosine)) > 45

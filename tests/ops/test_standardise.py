"""Standardised features: values by hand, padding, processes, precision, gradients."""

import sys

import pytest
import torch
from conftest import in_two_processes
from torch import distributed

from fgbg_kd.ops import standardise


def maps(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, 5, 6), (3, 2, 2, 3)
    features = [torch.randn(s, generator=generator, dtype=torch.float64) * 3 + 7 for s in shapes]
    return [x.to(dtype) for x in features], torch.rand(3, 36, generator=generator) < 0.7


def test_each_channel_has_mean_0_and_variance_1_over_the_cells_that_are_not_padding():
    features, real = maps()
    for x, mask in zip(standardise(features, real), real.split([30, 6], 1)):
        inside = x.flatten(2).transpose(1, 2)[mask]  # (cells, C)
        torch.testing.assert_close(inside.mean(0), torch.zeros(x.shape[1]), atol=1e-5, rtol=0)
        spread = inside.var(0, correction=0)
        torch.testing.assert_close(spread, torch.ones(x.shape[1]), atol=1e-4, rtol=0)


def test_what_stands_in_the_padding_changes_no_other_cell():
    features, real = maps()
    other = [x.clone() for x in features]
    for x, mask in zip(other, real.split([30, 6], 1)):
        x.flatten(2)[~mask[:, None].expand(-1, x.shape[1], -1)] = torch.inf
    found = [standardise(x, real) for x in (features, other)]
    for a, b, mask in zip(*found, real.split([30, 6], 1)):
        assert torch.equal(*(x.flatten(2).transpose(1, 2)[mask] for x in (a, b)))


def test_it_equals_batch_norm_if_nothing_is_padding():
    features, real = maps(torch.float64)
    found = standardise(features, torch.ones_like(real))
    for x, y in zip(features, found):
        wanted = torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-5)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_a_level_that_is_all_padding_and_a_constant_channel_give_finite_values_and_gradients():
    features = [torch.full((1, 2, 2, 2), 3.0, requires_grad=True) for _ in range(2)]
    real = torch.tensor([[True] * 4 + [False] * 4])
    found = standardise(features, real)
    sum(x.square().sum() for x in found).backward()
    assert found[0].abs().max() == 0
    assert all(x.isfinite().all() and f.grad.isfinite().all() for x, f in zip(found, features))


def test_a_small_spread_beside_a_large_mean_is_not_lost(monkeypatch):
    monkeypatch.setattr(sys.modules["fgbg_kd.ops.standardise"], "EPS", 0.0)
    x = 1000 + torch.tensor([0.0, 0.01, 0.02, 0.03]).reshape(1, 1, 2, 2)
    (found,) = standardise([x], torch.ones(1, 4, dtype=torch.bool))
    (wanted,) = standardise([x.double()], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)


def test_half_precision_is_reduced_in_fp32():
    features, real = maps(torch.float16)
    found = standardise(features, real)
    wanted = standardise([x.double() for x in features], real)
    assert all(x.dtype == torch.float32 for x in found)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_channel_that_is_constant_up_to_the_rounding_of_its_dtype_is_0(dtype):
    values = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    real = torch.ones(1, 16, dtype=torch.bool)
    step = 10 * torch.finfo(dtype).eps
    (constant,) = standardise([(10 + step / 4 * values).to(dtype)], real)
    assert constant.abs().max() == 0
    (varied,) = standardise([(10 + values).to(dtype)], real)
    assert varied.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_gradients_are_those_of_the_formula():
    features, real = maps(torch.float64)
    leaves = [x[:, :2].clone().requires_grad_() for x in features]
    assert torch.autograd.gradcheck(lambda *x: tuple(standardise(x, real)), leaves)


def far_from_zero():
    """Features of fp32 with a mean of 1000 and a spread of 0.01."""
    return [1000 + torch.arange(12.0).reshape(3, 1, 2, 2) / 256], torch.ones(3, 4, dtype=torch.bool)


def _worker(rank, folder):
    distributed.init_process_group("gloo")
    (far,), real = far_from_zero()
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    torch.save(standardise([far[part]], real[part])[0], f"{folder}/far{rank}.pt")
    features, real = maps(torch.float64)
    leaves = [x[part].clone().requires_grad_() for x in features]
    found = standardise(leaves, real[part])
    sum((x**3).sum() for x in found).backward()
    torch.save([[x.detach() for x in found], [x.grad for x in leaves]], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_values_and_gradients_of_one(tmp_path):
    in_two_processes(_worker, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    features, real = maps(torch.float64)
    leaves = [x.clone().requires_grad_() for x in features]
    found = standardise(leaves, real)
    sum((x**3).sum() for x in found).backward()
    for what, whole in enumerate((found, [x.grad for x in leaves])):
        for level, x in enumerate(whole):
            both = torch.cat([parts[0][what][level], parts[1][what][level]])
            torch.testing.assert_close(both, x.detach(), rtol=1e-9, atol=1e-9)
    both = torch.cat([torch.load(tmp_path / f"far{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(both, standardise(*far_from_zero())[0], rtol=1e-3, atol=1e-3)

"""The cosine term in two kernels. Each reads the features of student and teacher once.

The forward kernel stores three numbers per cell (dot product and squared norms), in fp32 or, if an
input is fp64, in fp64. The backward kernel writes the gradient once. Neither kernel reads cells of
weight 0. PyTorch sums over cells in a fixed order, so the same input gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    MIN_SQUARE,
    accumulation_dtype,
    empty_map_like,
    levels,
    on_device_of,
    triton_dtype,
)

# Size of a tile. In NCHW, cells are adjacent in memory. In channels_last, channels are.
CELLS, CHANNELS = 64, 16


@triton.jit
def cosine_forward_kernel(
    student,  # (N, C, HW), any strides
    teacher,  # likewise
    weight,  # (N, R) contiguous
    out,  # (3, N, R): dot, |s|^2, |t|^2
    channels,
    num_cells,  # HW of this level
    first,  # cell of this level in R
    all_cells,  # R
    s_n, s_c, s_p,
    t_n, t_c, t_p,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    exists = cell < num_cells
    at = n * all_cells + first + cell
    used = tl.load(weight + at, mask=exists, other=0.0) != 0
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    # These tiles are summed after the loop, so that no thread waits for another in the loop.
    dot = tl.zeros([CHANNELS, CELLS], ACC)
    ss, tt = dot, dot
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = (c < channels)[:, None] & used[None, :]
        s = tl.load(s_at[None, :] + c[:, None] * s_c, mask=mask, other=0.0).to(ACC)
        t = tl.load(t_at[None, :] + c[:, None] * t_c, mask=mask, other=0.0).to(ACC)
        dot += s * t
        ss += s * s
        tt += t * t
    plane = tl.num_programs(1).to(tl.int64) * all_cells
    tl.store(out + at, tl.sum(dot, 0), mask=exists)
    tl.store(out + plane + at, tl.sum(ss, 0), mask=exists)
    tl.store(out + 2 * plane + at, tl.sum(tt, 0), mask=exists)


@triton.jit
def cosine_backward_kernel(
    student,  # (N, C, HW), any strides
    teacher,  # likewise
    factors,  # (2, N, R) contiguous: of t and s in the gradient; both 0: the cell is not read
    grad,  # (N, C, HW), any strides
    channels,
    num_cells,
    first,
    all_cells,
    s_n, s_c, s_p,
    t_n, t_c, t_p,
    g_n, g_c, g_p,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = cell < num_cells
    at = n * all_cells + first + cell
    plane = tl.num_programs(2).to(tl.int64) * all_cells
    of_t = tl.load(factors + at, mask=exists, other=0.0)
    of_s = tl.load(factors + plane + at, mask=exists, other=0.0)
    whole = (c < channels)[:, None] & exists[None, :]
    mask = whole & ((of_t != 0) | (of_s != 0))[None, :]
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    s = tl.load(s_at[None, :] + c[:, None] * s_c, mask=mask, other=0.0).to(ACC)
    t = tl.load(t_at[None, :] + c[:, None] * t_c, mask=mask, other=0.0).to(ACC)
    g_at = grad + n * g_n + cell * g_p
    value = of_t[None, :] * t + of_s[None, :] * s
    tl.store(g_at[None, :] + c[:, None] * g_c, value.to(grad.dtype.element_ty), mask=whole)


@torch.library.custom_op("fgbg_kd::cosine_grad", mutates_args=())
def cosine_grad(
    student: Sequence[Tensor], teacher: Sequence[Tensor], factors: Tensor
) -> list[Tensor]:
    """Gradient for the student's features: factors[0] * teacher + factors[1] * student."""
    grads, factors = [empty_map_like(s) for s in student], factors.contiguous()
    with on_device_of(factors):
        for (first, n, c, h, w), *maps in zip(levels(student), student, teacher, grads):
            s, t, grad = (x.flatten(2) for x in maps)
            grid = (triton.cdiv(h * w, CELLS), triton.cdiv(c, CHANNELS), n)
            cosine_backward_kernel[grid](
                s, t, factors, grad, c, h * w, first, factors.shape[2],
                *s.stride(), *t.stride(), *grad.stride(),
                ACC=triton_dtype(factors.dtype), CELLS=CELLS, CHANNELS=CHANNELS,
            )  # fmt: skip
    return grads


@cosine_grad.register_fake
def _(student, teacher, factors):
    return [empty_map_like(s) for s in student]


@torch.library.custom_op("fgbg_kd::weighted_cosine", mutates_args=())
def weighted_cosine(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of weight * (1 - cos) over all cells, and the (3, N, R) sums for the gradient."""
    weight = weight.contiguous()
    sums = weight.new_empty(3, *weight.shape, dtype=accumulation_dtype(student[0], teacher[0]))
    with on_device_of(weight):
        for (first, n, c, h, w), *maps in zip(levels(student), student, teacher):
            s, t = (x.flatten(2) for x in maps)
            cosine_forward_kernel[(triton.cdiv(h * w, CELLS), n)](
                s, t, weight, sums, c, h * w, first, weight.shape[1],
                *s.stride(), *t.stride(),
                ACC=triton_dtype(sums.dtype), CELLS=CELLS, CHANNELS=CHANNELS,
            )  # fmt: skip
    cosine, *_ = _cosine(sums)
    used = weight != 0  # the other cells were not read
    return torch.where(used, weight * (1 - cosine), 0).sum(), sums


@weighted_cosine.register_fake
def _(student, teacher, weight):
    dtype = accumulation_dtype(student[0], teacher[0])
    sums = weight.new_empty(3, *weight.shape, dtype=dtype)
    return sums.new_empty((), dtype=torch.promote_types(dtype, weight.dtype)), sums


def _cosine(sums: Tensor):
    dot, ss, tt = sums
    valid = (ss > MIN_SQUARE) & (tt > MIN_SQUARE)
    ss, tt = torch.where(valid, ss, 1), torch.where(valid, tt, 1)
    inverse = (ss * tt).rsqrt() if ss.dtype == torch.float64 else ss.rsqrt() * tt.rsqrt()
    cosine = torch.where(valid, dot * inverse, 0)
    return cosine, inverse, ss, valid


def _setup(ctx, inputs, output):
    student, teacher, weight = inputs
    ctx.save_for_backward(*student, *teacher, weight, output[1])


def _backward(ctx, grad_loss, _grad_sums):
    *maps, weight, sums = ctx.saved_tensors
    student, teacher = maps[: len(maps) // 2], maps[len(maps) // 2 :]
    cosine, inverse, ss, valid = _cosine(sums)
    # d(1 - cos)/ds = -(t / (|s||t|) - cos s / |s|^2)
    scale = torch.where(valid, -grad_loss * weight.to(sums.dtype), 0)
    factors = torch.stack([scale * inverse, -scale * cosine / ss])
    return cosine_grad(student, teacher, factors), [None] * len(teacher), None


weighted_cosine.register_autograd(_backward, setup_context=_setup)

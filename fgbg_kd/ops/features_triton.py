"""The scalar products of standardised features in three kernels. None stores such features.

Let x be the features, x' = (x - mean) * scale, and u the gradient of a loss for the student's x'.
The forward kernel stores three numbers per cell: the dot product and the squared norms of x'.
Backward, the gradient for x is scale * (u - mean of u - x' * mean of (u x')), with means over the
cells of the level, because mean and scale depend on x. One kernel sums u and u x' per channel, and
another one writes the gradient. PyTorch sums over tiles and cells in a fixed order, so the same
input gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulation_dtype,
    empty_map_like,
    levels,
    on_device_of,
    triton_dtype,
)
from .standardise import summed_over_processes
from .standardise_triton import channel_statistics

# Size of a tile. In NCHW, cells are adjacent in memory. In channels_last, channels are.
CELLS, CHANNELS = 64, 16


@triton.jit
def _standardised(at, of_c, stats, c, channels, mask, ACC: tl.constexpr):
    """x' of a tile. ``stats``: mean and scale (2, C). Outside of ``mask`` it is 0."""
    mean = tl.load(stats + c, mask=c < channels, other=0.0)[:, None]
    scale = tl.load(stats + channels + c, mask=c < channels, other=0.0)[:, None]
    x = tl.load(at[None, :] + of_c[:, None], mask=mask, other=0.0).to(ACC)
    return tl.where(mask, (x - mean) * scale, 0.0)


@triton.jit
def products_kernel(
    student,  # (N, C, HW), any strides
    teacher,  # likewise
    marks,  # (N, R) int8, contiguous: 0 on padding, 2 in the cells that are used, else 1
    s_stats,  # (3, C): mean, scale, 1 / number of cells
    t_stats,
    out,  # (3, N, R): dot, |s'|^2, |t'|^2
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
    used = tl.load(marks + at, mask=exists, other=0) == 2
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    # These tiles are summed after the loop, so that no thread waits for another in the loop.
    dot = tl.zeros([CHANNELS, CELLS], ACC)
    ss, tt = dot, dot
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = (c < channels)[:, None] & used[None, :]
        s = _standardised(s_at, c * s_c, s_stats, c, channels, mask, ACC)
        t = _standardised(t_at, c * t_c, t_stats, c, channels, mask, ACC)
        dot += s * t
        ss += s * s
        tt += t * t
    plane = tl.num_programs(1).to(tl.int64) * all_cells
    tl.store(out + at, tl.sum(dot, 0), mask=exists)
    tl.store(out + plane + at, tl.sum(ss, 0), mask=exists)
    tl.store(out + 2 * plane + at, tl.sum(tt, 0), mask=exists)


@triton.jit
def channel_sums_kernel(
    student,  # (N, C, HW), any strides
    teacher,  # likewise
    factors,  # (2, N, R) contiguous: of t' and s' in u; both 0: the cell is not read
    s_stats,  # (3, C)
    t_stats,
    out,  # (2, tiles, N, C): sums of u and of u s'
    channels,
    num_cells,
    first,
    all_cells,
    s_n, s_c, s_p,
    t_n, t_c, t_p,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = cell < num_cells
    at = n * all_cells + first + cell
    factors_plane = tl.num_programs(2).to(tl.int64) * all_cells
    of_t = tl.load(factors + at, mask=exists, other=0.0)
    of_s = tl.load(factors + factors_plane + at, mask=exists, other=0.0)
    mask = (c < channels)[:, None] & ((of_t != 0) | (of_s != 0))[None, :]
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    s = _standardised(s_at, c * s_c, s_stats, c, channels, mask, ACC)
    t = _standardised(t_at, c * t_c, t_stats, c, channels, mask, ACC)
    u = of_t[None, :] * t + of_s[None, :] * s
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + n
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * channels
    out_at = out + row * channels + c
    tl.store(out_at, tl.sum(u, 1), mask=c < channels)
    tl.store(out_at + plane, tl.sum(u * s, 1), mask=c < channels)


@triton.jit
def products_grad_kernel(
    student,  # (N, C, HW), any strides
    teacher,  # likewise
    factors,  # (2, N, R) contiguous, as above
    marks,  # (N, R) int8, contiguous
    s_stats,  # (3, C)
    t_stats,
    means,  # (2, C): of u and of u s' over the cells of the level
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
    exists, in_c = cell < num_cells, c < channels
    at = n * all_cells + first + cell
    plane = tl.num_programs(2).to(tl.int64) * all_cells
    of_t = tl.load(factors + at, mask=exists, other=0.0)
    of_s = tl.load(factors + plane + at, mask=exists, other=0.0)
    real = in_c[:, None] & (tl.load(marks + at, mask=exists, other=0) != 0)[None, :]
    used = in_c[:, None] & ((of_t != 0) | (of_s != 0))[None, :]
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    s = _standardised(s_at, c * s_c, s_stats, c, channels, real, ACC)
    t = _standardised(t_at, c * t_c, t_stats, c, channels, used, ACC)
    scale = tl.load(s_stats + channels + c, mask=in_c, other=0.0)[:, None]
    mean_u = tl.load(means + c, mask=in_c, other=0.0)[:, None]
    mean_us = tl.load(means + channels + c, mask=in_c, other=0.0)[:, None]
    u = of_t[None, :] * t + of_s[None, :] * s
    value = tl.where(real, scale * (u - mean_u - s * mean_us), 0.0)
    g_at = grad + n * g_n + cell * g_p
    whole = in_c[:, None] & exists[None, :]
    tl.store(g_at[None, :] + c[:, None] * g_c, value.to(grad.dtype.element_ty), mask=whole)


def _launch(kernel, grid, maps, arguments, size, **constants) -> None:
    """Starts a kernel on a level.

    Args:
        maps: (N, C, H, W) each. The kernel takes them flattened, the first two as its first
            arguments and a gradient after the others, and then the strides of all.
        size: channels, cells of the level, its first cell, all cells.
    """
    student, teacher, *grad = (x.flatten(2) for x in maps)
    strides = [stride for x in (student, teacher, *grad) for stride in x.stride()]
    kernel[grid](
        student, teacher, *arguments, *grad, *size, *strides,
        CELLS=CELLS, CHANNELS=CHANNELS, **constants,
    )  # fmt: skip


@torch.library.custom_op("fgbg_kd::channel_sums", mutates_args=())
def channel_sums(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    factors: Tensor,
    s_stats: Sequence[Tensor],
    t_stats: Sequence[Tensor],
) -> list[Tensor]:
    """Per level (2, C): the sums of u and of u s' over the cells of this process."""
    factors, found = factors.contiguous(), []
    with on_device_of(factors):
        for (first, n, c, h, w), s, t, *stats in zip(
            levels(student), student, teacher, s_stats, t_stats
        ):
            tiles = triton.cdiv(h * w, CELLS)
            out = factors.new_empty(2, tiles * n, c)
            grid = (tiles, triton.cdiv(c, CHANNELS), n)
            size = (c, h * w, first, factors.shape[2])
            arguments = (factors, *stats, out)
            _launch(channel_sums_kernel, grid, (s, t), arguments, size, ACC=triton_dtype(out.dtype))
            found.append(out.sum(1))
    return found


@channel_sums.register_fake
def _(student, teacher, factors, s_stats, t_stats):
    return [factors.new_empty(2, s.shape[1]) for s in student]


@torch.library.custom_op("fgbg_kd::products_grad", mutates_args=())
def products_grad(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    factors: Tensor,
    marks: Tensor,
    s_stats: Sequence[Tensor],
    t_stats: Sequence[Tensor],
    means: Sequence[Tensor],
) -> list[Tensor]:
    """Gradient for the student's features.

    Args:
        means: per level (2, C): of u and of u s' over the cells of all processes.
    """
    grads = [empty_map_like(s) for s in student]
    factors, marks = factors.contiguous(), marks.contiguous()
    with on_device_of(factors):
        for (first, n, c, h, w), s, t, grad, *stats in zip(
            levels(student), student, teacher, grads, s_stats, t_stats, means
        ):
            grid = (triton.cdiv(h * w, CELLS), triton.cdiv(c, CHANNELS), n)
            size = (c, h * w, first, factors.shape[2])
            arguments, acc = (factors, marks, *stats), triton_dtype(factors.dtype)
            _launch(products_grad_kernel, grid, (s, t, grad), arguments, size, ACC=acc)
    return grads


@products_grad.register_fake
def _(student, teacher, factors, marks, s_stats, t_stats, means):
    return [empty_map_like(s) for s in student]


@torch.library.custom_op("fgbg_kd::products", mutates_args=())
def products(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    marks: Tensor,
    s_stats: Sequence[Tensor],
    t_stats: Sequence[Tensor],
) -> Tensor:
    """(3, N, R): s' t', |s'|^2 and |t'|^2 of each cell, 0 in unused cells.

    The gradient takes ``s_stats`` for the statistics of ``student``, and flows through them.
    """
    marks = marks.contiguous()
    dtype = accumulation_dtype(student[0], teacher[0])
    out = marks.new_empty(3, *marks.shape, dtype=dtype)
    with on_device_of(marks):
        for (first, n, c, h, w), s, t, *stats in zip(
            levels(student), student, teacher, s_stats, t_stats
        ):
            grid = (triton.cdiv(h * w, CELLS), n)
            size = (c, h * w, first, marks.shape[1])
            arguments, acc = (marks, *stats, out), triton_dtype(dtype)
            _launch(products_kernel, grid, (s, t), arguments, size, ACC=acc)
    return out


@products.register_fake
def _(student, teacher, marks, s_stats, t_stats):
    return marks.new_empty(3, *marks.shape, dtype=accumulation_dtype(student[0], teacher[0]))


def _setup(ctx, inputs, output):
    student, teacher, marks, s_stats, t_stats = inputs
    ctx.save_for_backward(*student, *teacher, *s_stats, *t_stats, marks)


def _backward(ctx, grad):
    *maps, marks = ctx.saved_tensors
    count = len(maps) // 4
    student, teacher, s_stats, t_stats = (maps[i * count : (i + 1) * count] for i in range(4))
    # u = grad[0] t' + 2 grad[1] s'. In unused cells the products are 0, whatever the features are.
    factors = torch.where(marks == 2, torch.stack([grad[0], 2 * grad[1]]), 0)
    totals = channel_sums(student, teacher, factors, s_stats, t_stats)
    totals = summed_over_processes([x.flatten() for x in totals])
    means = [x.unflatten(0, (2, -1)) * stats[2] for x, stats in zip(totals, s_stats)]
    grads = products_grad(student, teacher, factors, marks, s_stats, t_stats, means)
    return grads, [None] * count, None, [None] * count, [None] * count


products.register_autograd(_backward, setup_context=_setup)


def fused_products(
    student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor, used: Tensor
) -> Tensor:
    """(3, N, R): s' t', |s'|^2 and |t'|^2 of each cell by kernels. ``used`` is within ``real``."""
    marks = real.to(torch.int8) + used.to(torch.int8)
    dtype = accumulation_dtype(student[0], teacher[0])
    stats = [x.to(dtype) for x in channel_statistics([*student, *teacher], marks)]
    return products(student, teacher, marks, stats[: len(student)], stats[len(student) :])

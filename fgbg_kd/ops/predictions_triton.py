"""The comparison of predictions in two kernels. Each reads the logits of both detectors once.

The forward kernel computes the KL and both qualities in one pass and stores three numbers per cell.
It does not read padding. On a foreground cell it reads only the logits of the owner's class. The
gradient of the KL has a closed form. The backward kernel reads only background cells whose upstream
gradient is not 0, and writes the gradient once. Both kernels compute in fp32, or in fp64 if an
input is fp64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BACKGROUND,
    accumulation_dtype,
    empty_map_like,
    levels,
    on_device_of,
    triton_dtype,
)
from .split import Split

# The Bernoulli KL is a sum over all channels. So the kernel reads GROUP channels at a time, across
# anchors. Threads wait for each other only after the last tile. A softmax needs all classes of an
# anchor at once. Wider tiles are slow on small maps: few programs run, and each of these programs
# loops over all channels.
GROUP, CELLS = 16, 32
TILE = 1024  # maximum number of values in a tile; larger tiles spill registers on sm_80


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], exact up to rounding, even where 1 + e rounds to 1."""
    if e.dtype == tl.float64:
        u = 1 + e
        return tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))  # Kahan
    else:  # minimax of log(1 + e) / e, relative error 3e-8: no logarithm, no division
        p = e * 0.00523268804 - 0.0295052137
        p = p * e + 0.0782259107
        p = p * e - 0.136632428
        p = p * e + 0.191060051
        p = p * e - 0.24842982
        p = p * e + 0.333190978
        p = p * e - 0.499994934
        p = p * e + 0.99999994
        return p * e


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1, e) / (1 + e)


@triton.jit
def _bernoulli_kl(s, t):
    """KL(sigmoid(t) || sigmoid(s))."""
    e_s, e_t = tl.exp(-tl.abs(s)), tl.exp(-tl.abs(t))
    p_t = tl.where(t >= 0, 1, e_t) / (1 + e_t)
    log_partition = tl.maximum(s, 0.0) - tl.maximum(t, 0.0) + (_log1p(e_s) - _log1p(e_t))
    return log_partition - p_t * (s - t)


@triton.jit
def _log_softmax(x, mask):
    """Softmax over axis 0 and an implicit background of logit 0 -> log p, log p(background)."""
    x = tl.where(mask, x, float("-inf"))
    top = tl.maximum(tl.max(x, 0), 0.0)
    total = tl.sum(tl.exp(x - top[None, :]), 0) + tl.exp(-top)
    norm = top + tl.log(total)
    return x - norm[None, :], -norm


@triton.jit
def _highest(logits_at, z_c, channels, mask, ACC: tl.constexpr, CLASSES: tl.constexpr):
    """The largest logit of each cell."""
    highest = tl.zeros([CLASSES, mask.shape[0]], ACC) + float("-inf")
    for start in range(0, channels, CLASSES):
        channel = start + tl.arange(0, CLASSES)[:, None]
        read = (channel < channels) & mask[None, :]
        z = tl.load(logits_at[None, :] + channel * z_c, mask=read, other=float("-inf"))
        highest = tl.maximum(highest, z.to(ACC))
    return tl.max(highest, 0)


@triton.jit
def _own_quality(logits_at, z_c, num_anchors, classes, own_class, mask, ACC: tl.constexpr):
    """Sigmoid of the largest logit of own_class over anchors, per cell.

    logits_at: of class 0 of anchor 0.
    """
    best = tl.zeros([mask.shape[0]], ACC) + float("-inf")
    for a in range(num_anchors):
        z = tl.load(logits_at + (a * classes + own_class) * z_c, mask=mask, other=0.0).to(ACC)
        best = tl.maximum(best, z, propagate_nan=tl.PropagateNan.ALL)
    return _sigmoid(best)


@triton.jit
def compare_kernel(
    student,  # logits (N, A*K, HW), any strides
    teacher,  # likewise; without KL the anchors may differ
    box_index,  # (N, R) contiguous
    box_classes,  # (N, B) contiguous
    out,  # (3, N, R): KL, quality of student, of teacher
    s_channels,
    t_channels,
    classes,  # K
    group,  # channels per tile: K for a softmax, else GROUP
    num_cells,  # HW of this level
    first,  # cell of this level in R
    all_cells,  # R
    num_boxes,  # B
    s_n, s_c, s_p,
    t_n, t_c, t_p,
    INVERSE_T: tl.constexpr,  # a constant, since an argument would be rounded to fp32
    KL: tl.constexpr,
    SOFTMAX: tl.constexpr,
    QUALITY: tl.constexpr,
    ACC: tl.constexpr,
    CLASSES: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    exists = cell < num_cells
    at = n * all_cells + first + cell
    owner = tl.load(box_index + at, mask=exists, other=-2)
    background = owner == -1
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    plane = tl.num_programs(1).to(tl.int64) * all_cells
    if QUALITY:  # foreground first, so that its values need no registers below
        foreground = owner >= 0
        box = n * num_boxes + tl.where(foreground, owner, 0)
        own_class = tl.load(box_classes + box, mask=foreground, other=0)
        s_anchors, t_anchors = s_channels // classes, t_channels // classes
        s_good = _own_quality(s_at, s_c, s_anchors, classes, own_class, foreground, ACC)
        t_good = _own_quality(t_at, t_c, t_anchors, classes, own_class, foreground, ACC)
        other = exists & ~background  # foreground and padding; padding has quality 0
        tl.store(out + plane + at, tl.where(foreground, s_good, 0), mask=other)
        tl.store(out + 2 * plane + at, tl.where(foreground, t_good, 0), mask=other)
    if KL:
        k = tl.arange(0, CLASSES)
        # These tiles are summed after the loop, so that no thread waits for another in the loop.
        apart = tl.zeros([CLASSES, CELLS], ACC)
        s_max = tl.zeros([CLASSES, CELLS], ACC) + float("-inf")
        t_max = s_max
        rest = tl.zeros([CELLS], ACC)  # term of the softmax background
        for start in range(0, s_channels, group):
            channel = (start + k)[:, None]
            real = ((k < group) & (start + k < s_channels))[:, None] & (cell >= 0)[None, :]
            mask = real & background[None, :]
            s = tl.load(s_at[None, :] + channel * s_c, mask=mask, other=0.0).to(ACC)
            t = tl.load(t_at[None, :] + channel * t_c, mask=mask, other=0.0).to(ACC)
            if QUALITY:
                s_max = tl.maximum(s_max, tl.where(mask, s, float("-inf")))
                t_max = tl.maximum(t_max, tl.where(mask, t, float("-inf")))
            s, t = s * INVERSE_T, t * INVERSE_T
            if SOFTMAX:
                log_s, rest_s = _log_softmax(s, real)
                log_t, rest_t = _log_softmax(t, real)
                apart += tl.exp(log_t) * tl.where(real, log_t - log_s, 0)
                rest += tl.exp(rest_t) * (rest_t - rest_s)
            else:
                apart += tl.where(mask, _bernoulli_kl(s, t), 0)
        if QUALITY:
            s_highest, t_highest = tl.max(s_max, 0), tl.max(t_max, 0)
        total = tl.sum(apart, 0) + rest
        total = tl.where(background, total / (INVERSE_T * INVERSE_T), 0)
        tl.store(out + at, total, mask=exists)
    elif QUALITY:
        s_highest = _highest(s_at, s_c, s_channels, background, ACC, CLASSES)
        t_highest = _highest(t_at, t_c, t_channels, background, ACC, CLASSES)
    if QUALITY:
        tl.store(out + plane + at, 1 - _sigmoid(s_highest), mask=background)
        tl.store(out + 2 * plane + at, 1 - _sigmoid(t_highest), mask=background)


@triton.jit
def kl_backward_kernel(
    student,  # (N, A*K, HW), any strides
    teacher,  # likewise
    weight,  # (N, R) contiguous: upstream gradient of the KL; 0: the cell is not read
    grad,  # (N, A*K, HW), any strides
    channels,
    group,
    num_cells,
    first,
    all_cells,
    s_n, s_c, s_p,
    t_n, t_c, t_p,
    g_n, g_c, g_p,
    INVERSE_T: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ACC: tl.constexpr,
    CLASSES: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    exists = cell < num_cells
    w = tl.load(weight + n * all_cells + first + cell, mask=exists, other=0.0).to(ACC)
    used = exists & (w != 0)
    s_at, t_at = student + n * s_n + cell * s_p, teacher + n * t_n + cell * t_p
    g_at = grad + n * g_n + cell * g_p
    k = tl.arange(0, CLASSES)
    start = tl.program_id(2) * group
    channel = (start + k)[:, None]
    real = ((k < group) & (start + k < channels))[:, None] & (cell >= 0)[None, :]
    mask = real & used[None, :]
    s = tl.load(s_at[None, :] + channel * s_c, mask=mask, other=0.0).to(ACC) * INVERSE_T
    t = tl.load(t_at[None, :] + channel * t_c, mask=mask, other=0.0).to(ACC) * INVERSE_T
    if SOFTMAX:
        log_s, _ = _log_softmax(s, real)
        log_t, _ = _log_softmax(t, real)
        value = tl.exp(log_s) - tl.exp(log_t)
    else:
        value = _sigmoid(s) - _sigmoid(t)
    # The logits are divided by T, so the gradient of T^2 KL is T (p_s - p_t).
    value = tl.where(mask, value * (w / INVERSE_T)[None, :], 0)
    at = g_at[None, :] + channel * g_c
    tl.store(at, value.to(grad.dtype.element_ty), mask=real & exists[None, :])


def _tile(classes: int, softmax: bool) -> tuple[int, int, int]:
    """Channels per tile, these rounded up to a power of two, and cells per tile."""
    group = classes if softmax else GROUP
    block = triton.next_power_of_2(group)
    return group, block, max(1, min(CELLS, TILE // block))


@torch.library.custom_op("fgbg_kd::compare_predictions", mutates_args=())
def _compare(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    box_index: Tensor,
    box_classes: Tensor,
    num_classes: int,
    kl: bool,
    softmax: bool,
    quality: bool,
    temperature: float,
) -> Tensor:
    """(3, N, R): KL, student's quality, teacher's quality. Parts that are off are not written."""
    acc = accumulation_dtype(student[0], teacher[0])
    out = box_index.new_empty(3, *box_index.shape, dtype=acc)
    group, block, cells = _tile(num_classes, softmax)
    box_index, box_classes = box_index.contiguous(), box_classes.contiguous()
    with on_device_of(out):
        for (first, n, channels, h, w), *maps in zip(levels(student), student, teacher):
            s, t = (x.flatten(2) for x in maps)
            compare_kernel[(triton.cdiv(h * w, cells), n)](
                s, t, box_index, box_classes, out,
                channels, t.shape[1], num_classes, group, h * w, first, out.shape[2],
                box_classes.shape[1], *s.stride(), *t.stride(),
                INVERSE_T=1 / temperature, KL=kl, SOFTMAX=softmax, QUALITY=quality,
                ACC=triton_dtype(acc), CLASSES=block, CELLS=cells,
            )  # fmt: skip
    return out


@_compare.register_fake
def _(student, teacher, box_index, *options):
    dtype = accumulation_dtype(student[0], teacher[0])
    return box_index.new_empty(3, *box_index.shape, dtype=dtype)


@torch.library.custom_op("fgbg_kd::kl_grad", mutates_args=())
def kl_grad(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor,
    num_classes: int,
    softmax: bool,
    temperature: float,
) -> list[Tensor]:
    """Gradient of sum(weight * T^2 * KL(teacher || student)) for the student's logits."""
    grads, weight = [empty_map_like(s) for s in student], weight.contiguous()
    group, block, cells = _tile(num_classes, softmax)
    acc = triton_dtype(accumulation_dtype(student[0], teacher[0]))
    with on_device_of(weight):
        for (first, n, c, h, w), *maps in zip(levels(student), student, teacher, grads):
            s, t, grad = (x.flatten(2) for x in maps)
            kl_backward_kernel[(triton.cdiv(h * w, cells), n, triton.cdiv(c, group))](
                s, t, weight, grad, c, group, h * w, first, weight.shape[1],
                *s.stride(), *t.stride(), *grad.stride(),
                INVERSE_T=1 / temperature, SOFTMAX=softmax, ACC=acc, CLASSES=block, CELLS=cells,
            )  # fmt: skip
    return grads


@kl_grad.register_fake
def _(student, teacher, weight, num_classes, softmax, temperature):
    return [empty_map_like(s) for s in student]


def _setup(ctx, inputs, output):
    student, teacher, box_index, _, num_classes, kl, softmax, _, temperature = inputs
    ctx.options = (num_classes, softmax, temperature)
    ctx.kl = kl
    ctx.save_for_backward(*student, *teacher, box_index)


def _backward(ctx, grad):
    *maps, box_index = ctx.saved_tensors
    student, teacher = maps[: len(maps) // 2], maps[len(maps) // 2 :]
    grads = [None] * len(student)
    if ctx.kl:
        weight = torch.where(box_index == BACKGROUND, grad[0], 0)
        grads = kl_grad(student, teacher, weight, *ctx.options)
    return grads, [None] * len(teacher), *[None] * 7


_compare.register_autograd(_backward, setup_context=_setup)


def compare(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    cells: Split,
    gt_classes: Tensor,
    num_classes: int,
    kl: str | None,
    temperature: float,
    quality: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """KL and both qualities, as :func:`fgbg_kd.ops.compare_predictions` defines them."""
    out = _compare(
        list(student),
        list(teacher),
        cells.box_index,
        gt_classes,
        num_classes,
        kl is not None,
        kl == "softmax",
        quality,
        float(temperature),
    )
    good = out[1:].detach() if quality else (None, None)
    return (out[0] if kl else None), *good

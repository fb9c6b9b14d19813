"""The KL term in two kernels: both logit maps are read once forward, once back.

Nothing of the maps' size is kept between them: the gradient is known in closed form. Cells of
weight 0 are not read. Computed in fp32 (fp64 if given).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import accumulation_dtype, on_device_of, triton_dtype

TILE = 1024  # values of a tile; more spill registers on sm_80
# The Bernoulli KL is a sum over all channels: it goes through them by so many, whatever the anchor,
# which leaves the tile wide in cells (neighbours in memory). A softmax needs its anchor whole.
GROUP = 16


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(x)), exact to rounding also where exp(x) is under the rounding of 1."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))  # Kahan
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1, e) / (1 + e)


@triton.jit
def _log_softmax(x, mask):
    """Over axis 0 and an implicit background of logit 0 -> log p, log p(background)."""
    x = tl.where(mask, x, float("-inf"))
    top = tl.maximum(tl.max(x, 0), 0.0)
    total = tl.sum(tl.exp(x - top[None, :]), 0) + tl.exp(-top)
    norm = top + tl.log(total)
    return x - norm[None, :], -norm


@triton.jit
def kl_kernel(
    student,  # (N, A*K, H, W), any strides
    teacher,  # likewise
    weight,  # (N, HW) contiguous; in BACKWARD times the upstream gradient
    out,  # (N, HW) weighted KL; in BACKWARD the gradient (N, A*K, H, W), any strides
    channels,
    classes,  # of an anchor; channels of a group for the Bernoulli KL
    width,
    num_cells,
    s_n, s_c, s_h, s_w,
    t_n, t_c, t_h, t_w,
    o_n, o_c, o_h, o_w,
    INVERSE_T: tl.constexpr,  # a constant, since an argument would be rounded to fp32
    SOFTMAX: tl.constexpr,
    BACKWARD: tl.constexpr,
    ACC: tl.constexpr,
    CLASSES: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    exists = cell < num_cells
    w = tl.load(weight + n * num_cells + cell, mask=exists, other=0.0).to(ACC)
    used = exists & (w != 0)
    row, column = cell // width, cell % width
    s_at = student + n * s_n + row * s_h + column * s_w
    t_at = teacher + n * t_n + row * t_h + column * t_w
    o_at = out + n * o_n + row * o_h + column * o_w
    k = tl.arange(0, CLASSES)
    total = tl.zeros([CELLS], ACC)
    for first in range(0, channels, classes):
        channel = (first + k)[:, None]
        real = ((k < classes) & (first + k < channels))[:, None] & (cell >= 0)[None, :]
        mask = real & used[None, :]
        s = tl.load(s_at[None, :] + channel * s_c, mask=mask, other=0.0).to(ACC) * INVERSE_T
        t = tl.load(t_at[None, :] + channel * t_c, mask=mask, other=0.0).to(ACC) * INVERSE_T
        if SOFTMAX:
            log_s, rest_s = _log_softmax(s, real)
            log_t, rest_t = _log_softmax(t, real)
            p_t = tl.exp(log_t)
            if BACKWARD:
                value = tl.exp(log_s) - p_t
            else:
                kl = p_t * tl.where(real, log_t - log_s, 0)
                total += tl.sum(kl, 0) + tl.exp(rest_t) * (rest_t - rest_s)
        else:
            p_t = _sigmoid(t)
            if BACKWARD:
                value = _sigmoid(s) - p_t
            else:
                kl = _log1p_exp(s) - _log1p_exp(t) - p_t * (s - t)
                total += tl.sum(tl.where(mask, kl, 0), 0)
        if BACKWARD:
            # T^2 KL has 1/T from the logits: T (p_s - p_t)
            value = tl.where(mask, value * (w / INVERSE_T)[None, :], 0)
            at = o_at[None, :] + channel * o_c
            tl.store(at, value.to(out.dtype.element_ty), mask=real & exists[None, :])
    if not BACKWARD:
        loss = tl.where(used, total * w / (INVERSE_T * INVERSE_T), 0)
        tl.store(out + n * num_cells + cell, loss, mask=exists)


def _launch(student, teacher, weight, out, classes, softmax, temperature, backward) -> None:
    n, channels, h, w = student.shape
    group = classes if softmax else GROUP
    block = triton.next_power_of_2(group)
    cells = max(1, min(64, TILE // block))
    acc = triton_dtype(accumulation_dtype(student, teacher))
    strides = out.stride() if backward else (0, 0, 0, 0)
    with on_device_of(student):
        kl_kernel[(triton.cdiv(h * w, cells), n)](
            student, teacher, weight.contiguous(), out, channels, group, w, h * w,
            *student.stride(), *teacher.stride(), *strides, INVERSE_T=1 / temperature,
            SOFTMAX=softmax, BACKWARD=backward, ACC=acc, CLASSES=block, CELLS=cells,
        )  # fmt: skip


@torch.library.custom_op("fgbg_kd::weighted_kl", mutates_args=())
def weighted_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    num_classes: int,
    softmax: bool,
    temperature: float,
) -> Tensor:
    """Sum of weight * T^2 * KL(teacher || student) over the cells of one level."""
    n, _, h, w = student.shape
    out = student.new_empty(n, h * w, dtype=accumulation_dtype(student, teacher))
    _launch(student, teacher, weight, out, num_classes, softmax, temperature, backward=False)
    return out.sum()


@weighted_kl.register_fake
def _(student, teacher, weight, num_classes, softmax, temperature):
    return student.new_empty((), dtype=accumulation_dtype(student, teacher))


@torch.library.custom_op("fgbg_kd::weighted_kl_grad", mutates_args=())
def weighted_kl_grad(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    num_classes: int,
    softmax: bool,
    temperature: float,
) -> Tensor:
    """Gradient of :func:`weighted_kl` in the student's logits."""
    grad = torch.empty_like(student)
    _launch(student, teacher, weight, grad, num_classes, softmax, temperature, backward=True)
    return grad


@weighted_kl_grad.register_fake
def _(student, teacher, weight, num_classes, softmax, temperature):
    return torch.empty_like(student)


def _setup(ctx, inputs, output):
    student, teacher, weight, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, weight)


def _backward(ctx, grad):
    student, teacher, weight = ctx.saved_tensors
    weight = weight.to(grad.dtype) * grad
    return weighted_kl_grad(student, teacher, weight, *ctx.options), *[None] * 5


weighted_kl.register_autograd(_backward, setup_context=_setup)

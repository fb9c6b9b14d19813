"""Mean and scale of each channel, as :func:`fgbg_kd.ops.standardise` uses them, in one kernel.

The kernel reads the features once. Each program stores count, mean and sum of squared differences
of its tile. PyTorch combines the tiles in a fixed order, so the same input gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulation_dtype, levels, on_device_of, triton_dtype
from .standardise import scale_of, summed_over_processes

# Size of a tile. Three numbers are stored for each channel of a tile, so a tile has many cells.
CELLS, CHANNELS = 256, 16


@triton.jit
def moments_kernel(
    features,  # (N, C, HW), any strides
    marks,  # (N, R) int8, contiguous: 0 on padding
    out,  # (3, tiles, N, C): count, mean, sum of (x - mean)^2
    channels,
    num_cells,  # HW of this level
    first,  # cell of this level in R
    all_cells,  # R
    x_n, x_c, x_p,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = n * all_cells + first + cell
    real = tl.load(marks + at, mask=cell < num_cells, other=0) != 0
    mask = (c < channels)[:, None] & real[None, :]
    x_at = features + n * x_n + cell * x_p
    x = tl.load(x_at[None, :] + c[:, None] * x_c, mask=mask, other=0.0).to(ACC)
    count = tl.sum(mask.to(ACC), 1)
    mean = tl.sum(x, 1) / tl.maximum(count, 1.0)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + n
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * channels
    out_at = out + row * channels + c
    tl.store(out_at, count, mask=c < channels)
    tl.store(out_at + plane, mean, mask=c < channels)
    tl.store(out_at + 2 * plane, tl.sum(centred * centred, 1), mask=c < channels)


@torch.library.custom_op("fgbg_kd::moments", mutates_args=())
def moments(maps: Sequence[Tensor], marks: Tensor) -> list[Tensor]:
    """For each map (3, tiles * N, C): count, mean and sum of squared differences of each tile.

    Args:
        maps: (N, C, H_l, W_l) for each level, of one detector or of several, one after another.
        marks: (N, R) int8, 0 on padding.
    """
    marks, found = marks.contiguous(), []
    with on_device_of(marks):
        for (first, n, c, h, w), x in zip(levels(maps), maps):
            first %= marks.shape[1]  # the next detector's levels begin at cell 0 again
            tiles = triton.cdiv(h * w, CELLS)
            out = x.new_empty(3, tiles * n, c, dtype=accumulation_dtype(x))
            flat = x.flatten(2)
            moments_kernel[(tiles, triton.cdiv(c, CHANNELS), n)](
                flat, marks, out, c, h * w, first, marks.shape[1], *flat.stride(),
                ACC=triton_dtype(out.dtype), CELLS=CELLS, CHANNELS=CHANNELS,
            )  # fmt: skip
            found.append(out)
    return found


@moments.register_fake
def _(maps, marks):
    return [
        x.new_empty(3, triton.cdiv(h * w, CELLS) * n, c, dtype=accumulation_dtype(x))
        for (_, n, c, h, w), x in zip(levels(maps), maps)
    ]


def channel_statistics(maps: Sequence[Tensor], marks: Tensor) -> list[Tensor]:
    """For each map (3, C): mean, scale, 1 / number of cells, over all processes.

    The scale is :func:`fgbg_kd.ops.standardise.scale_of`. Maps of student and teacher need one
    call, so that processes exchange sums twice only.

    Args:
        maps, marks: as for :func:`moments`. No gradient flows into them.
    """
    tiles = moments([x.detach() for x in maps], marks)
    totals = summed_over_processes(
        [torch.cat([n.sum(0), (n * mean).sum(0)]) for n, mean, _ in tiles]
    )
    counts = [x.chunk(2)[0].clamp(min=1) for x in totals]
    means = [x.chunk(2)[1] / n for x, n in zip(totals, counts)]
    squares = summed_over_processes(
        [
            (square + n * (part - mean).square()).sum(0)
            for (n, part, square), mean in zip(tiles, means)
        ]
    )
    return [
        torch.stack([mean, scale_of(square / n, mean, x.dtype), 1 / n])
        for mean, square, n, x in zip(means, squares, counts, maps)
    ]

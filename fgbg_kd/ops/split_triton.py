"""The split as one kernel. Each cell loops over the boxes of its image.

Time: number of cells times boxes per image. Memory: only the output, 4 bytes per cell.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, upload

BLOCK = 256


@triton.jit
def _fitting_level(area, levels, LEVELS: tl.constexpr):
    """The first level whose stride is over sqrt(area) / 14, else the last."""
    side = tl.sqrt_rn(tl.maximum(area, 0.0))
    level = tl.zeros([area.shape[0]], tl.int32)
    for i in tl.static_range(LEVELS - 1):
        bound = tl.load(levels + i * 4 + 2).to(tl.float32) * 14
        level += (side >= bound).to(tl.int32)
    return level


@triton.jit
def box_index_kernel(
    boxes,  # (N, B, 4) fp32
    sizes,  # (N, 2) fp32: height, width
    levels,  # (L, 4) int32: H, W, stride, first cell
    out,  # (N, R) int32
    num_cells,
    num_boxes,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = cell < num_cells
    level = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(1, LEVELS):
        level += (cell >= tl.load(levels + i * 4 + 3)).to(tl.int32)
    h, w = tl.load(levels + level * 4), tl.load(levels + level * 4 + 1)
    stride = tl.load(levels + level * 4 + 2).to(tl.float32)
    position = cell - tl.load(levels + level * 4 + 3)
    row, column = position // w, position % w
    y, x = (row.to(tl.float32) + 0.5) * stride, (column.to(tl.float32) + 0.5) * stride
    # The same address for the whole block, so that values of boxes and images are vectors too.
    same = cell * 0
    height, width = tl.load(sizes + n * 2 + same), tl.load(sizes + n * 2 + 1 + same)
    padding = (y >= height) | (x >= width)
    # Divisions round to nearest, because fast divisions could move a box's edge by one cell.
    last_row = tl.minimum(tl.ceil(tl.div_rn(height, stride) - 0.5), h) - 1
    last_column = tl.minimum(tl.ceil(tl.div_rn(width, stride) - 0.5), w) - 1

    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    owner = tl.full([BLOCK], -1, tl.int32)
    for b in range(num_boxes):
        box = boxes + (n * num_boxes + b) * 4 + same
        x0, y0, x1, y1 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        number = (x0 == x0) & (y0 == y0) & (x1 == x1) & (y1 == y1)  # not NaN
        x0, x1 = tl.minimum(tl.maximum(x0, 0.0), width), tl.minimum(tl.maximum(x1, 0.0), width)
        y0, y1 = tl.minimum(tl.maximum(y0, 0.0), height), tl.minimum(tl.maximum(y1, 0.0), height)
        area = (x1 - x0) * (y1 - y0)
        here = (number & (x1 > x0) & (y1 > y0)) & exists
        if SCALE:
            here = here & (_fitting_level(area, levels, LEVELS) == level)
        inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        # tiny: the box contains no cell centre of this level. It is enough to check the first
        # centre at or after the box's upper left corner.
        first_row = tl.ceil(tl.div_rn(y0, stride) - 0.5)
        first_column = tl.ceil(tl.div_rn(x0, stride) - 0.5)
        tiny = (first_row > last_row) | ((first_row + 0.5) * stride >= y1)
        tiny = tiny | (first_column > last_column) | ((first_column + 0.5) * stride >= x1)
        middle_row = tl.floor(tl.div_rn((y0 + y1) * 0.5, stride))
        middle_column = tl.floor(tl.div_rn((x0 + x1) * 0.5, stride))
        home_cell = (row.to(tl.float32) == tl.minimum(middle_row, last_row)) & (
            column.to(tl.float32) == tl.minimum(middle_column, last_column)
        )
        # Strictly smaller, so that the first of several equal boxes keeps the cell.
        wins = here & tl.where(tiny, home_cell, inside) & (area < smallest)
        owner = tl.where(wins, b, owner)
        smallest = tl.where(wins, area, smallest)
    tl.store(out + n * num_cells + cell, tl.where(padding, -2, owner), mask=exists)


@torch.library.custom_op("fgbg_kd::box_index", mutates_args=())
def _box_index(
    boxes: Tensor, sizes: Tensor, shapes: list[int], strides: list[int], scale: bool
) -> Tensor:
    rows, num_images, num_cells = [], len(boxes), 0
    for h, w, stride in zip(shapes[::2], shapes[1::2], strides):
        rows.append((h, w, stride, num_cells))
        num_cells += h * w
    out = boxes.new_empty(num_images, num_cells, dtype=torch.int32)
    levels = upload(rows, boxes, torch.int32)
    with on_device_of(boxes):
        box_index_kernel[(triton.cdiv(num_cells, BLOCK), num_images)](
            boxes.contiguous(),
            sizes,
            levels,
            out,
            num_cells,
            boxes.shape[1],
            LEVELS=len(rows),
            SCALE=scale,
            BLOCK=BLOCK,
        )
    return out


@_box_index.register_fake
def _(boxes, sizes, shapes, strides, scale):
    cells = sum(h * w for h, w in zip(shapes[::2], shapes[1::2]))
    return boxes.new_empty(boxes.shape[0], cells, dtype=torch.int32)


def box_index(
    boxes: Tensor,
    sizes: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    assign: str,
) -> Tensor:
    """(N, R) int32, as :func:`fgbg_kd.ops.split` defines it.

    Args:
        boxes: (N, B, 4) fp32, padded with empty boxes.
        sizes: (N, 2) fp32, height and width.
        level_shapes, strides, assign: as for ``split``.
    """
    shapes = [int(v) for shape in level_shapes for v in shape]
    return _box_index(boxes, sizes, shapes, [int(s) for s in strides], assign == "scale")

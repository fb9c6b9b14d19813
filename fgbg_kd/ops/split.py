"""The split: from ground-truth boxes to foreground, background and padding cells.

Shapes: N images, B boxes per image (padded), L feature levels of stride s_l and shape (H_l, W_l),
R = sum of H_l * W_l cells per image, ordered by level, then row, then column.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import BACKGROUND, PADDING, upload, use_triton

# Number of boxes that are compared with all cells of a level at once. It limits the memory to
# _CHUNK ints per cell for any number of boxes.
_CHUNK = 16


class Split(NamedTuple):
    """Which box owns each cell.

    Attributes:
        box_index: (N, R) int32, index of the owning box in its image's list; -1 background,
            -2 padding.
        weight: (N, R) float32, of :func:`split` or :meth:`weighted` for a foreground cell; 0
            elsewhere.
        boxes: (N, max(B, 1), 4) float32, the boxes as XYXY pixels, padded with zeros.
        level_shapes: (H_l, W_l) per level.
    """

    box_index: Tensor
    weight: Tensor
    boxes: Tensor
    level_shapes: tuple[tuple[int, int], ...]

    @property
    def foreground(self) -> Tensor:
        """(N, R) bool."""
        return self.box_index >= 0

    @property
    def background(self) -> Tensor:
        """(N, R) bool."""
        return self.box_index == BACKGROUND

    @property
    def real(self) -> Tensor:
        """(N, R) bool, all cells but padding."""
        return self.box_index != PADDING

    @property
    def _owner_index(self) -> Tensor:
        """(N, R) int64, ``box_index`` with 0 for cells without a box."""
        return self.box_index.clamp(min=0).long()

    def owner(self, per_box: Tensor) -> Tensor:
        """Spreads a value per box, (N, B, ...), to the cells of the box: (N, R, ...).

        Cells without a box get the value of box 0. Mask these cells.
        """
        index = self._owner_index.reshape(*self.box_index.shape, *[1] * (per_box.dim() - 2))
        return per_box.gather(1, index.expand(-1, -1, *per_box.shape[2:]))

    def best_of_box(self, quality: Tensor) -> Tensor:
        """(N, B): the highest quality in the cells of each box; 0 if the box has no cell.

        Args:
            quality: (N, R) of at least 0.
        """
        best = quality.new_zeros(len(quality), self.boxes.shape[1])
        quality = torch.where(self.foreground, quality, 0)
        return best.scatter_reduce(1, self._owner_index, quality, "amax")

    def weighted(self, quality: Tensor) -> "Split":
        """The same cells with other weights: an object's weight of 1 is shared by its cells.

        Each cell gets a part in proportion to its quality. If the quality is 0 in all cells of an
        object, the parts are equal.

        Args:
            quality: (N, R) in [0, 1].
        """
        # Integers, because a sum of floats depends on the order of its terms, and a GPU has none.
        part = ((quality.nan_to_num(0) * 2**30).long() + 1) * self.foreground
        total = part.new_zeros(len(part), self.boxes.shape[1])
        total = total.scatter_add(1, self._owner_index, part)
        weight = (part / self.owner(total).clamp(min=1)).float()
        # A NaN has no integer. It stays visible in the loss, which stops the training.
        lost = (quality.isnan() & self.foreground).any(1, keepdim=True) & self.foreground
        return self._replace(weight=torch.where(lost, torch.nan, weight))


@torch.no_grad()
def split(
    gt_boxes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    level_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    assign: str,
    impl: str = "auto",
) -> Split:
    """Splits the cells of all levels and images into foreground, background and padding.

    On a level of stride s, the centre of cell (y, x) is the image point ((x+.5)s, (y+.5)s). Boxes
    are clipped to their image. A box that is then empty or contains NaN owns nothing.

    - A cell belongs to a box if the cell's centre lies in [x0, x1) x [y0, y1). If several boxes
      contain the centre, the smallest box owns the cell. Among boxes of equal area, the first in
      the list owns the cell.
    - If a box contains no cell centre of a level, it owns the cell that contains the box's centre.
      If this cell is padding, it owns the nearest cell that is not padding. So a small object is
      not lost on a coarse level, unless a smaller box owns the same cell.
    - A cell whose centre lies outside its image is padding.

    Args:
        gt_boxes: N tensors (B_i, 4), XYXY in pixels of the (unpadded) image; B_i may be 0.
        image_sizes: N pairs (height, width) in pixels, before padding.
        level_shapes: L pairs (H_l, W_l) of the padded batch's feature maps.
        strides: L strides in pixels.
        assign: "all": every box is used on every level (FGD). "scale": each box is used on the
            first level whose stride is over sqrt(area) / 14, else on the last level (DeFeat). A box
            with sqrt(area) under 112 pixels is on stride 8.
        impl: "torch": plain PyTorch, the definition; "triton": one kernel; "auto": Triton on CUDA.

    Raises:
        ValueError: the arguments do not fit together.
    """
    _check(gt_boxes, image_sizes, level_shapes, strides, assign)
    boxes = pack([b.float() for b in gt_boxes])  # (N, B, 4)
    sizes = upload(image_sizes, boxes, boxes.dtype)  # (N, 2)
    if use_triton(impl, boxes):
        from .split_triton import box_index  # imported on first use: Triton is optional

        index = box_index(boxes, sizes, level_shapes, strides, assign)
    else:
        index = _box_index(boxes, sizes, level_shapes, strides, assign)
    weight = _cell_weights(index, level_shapes, boxes.shape[1])
    return Split(index, weight, boxes, tuple((int(h), int(w)) for h, w in level_shapes))


def pack(per_box: Sequence[Tensor]) -> Tensor:
    """N tensors (B_i, ...) -> (N, B, ...) padded with zeros, B = the largest B_i, but at least 1.

    The number of launches does not grow with N.
    """
    packed = torch.cat([*per_box, per_box[0].new_zeros(1, *per_box[0].shape[1:])])
    width, last, start, rows = max(1, *map(len, per_box)), len(packed) - 1, 0, []
    for values in per_box:
        stop = start + len(values)
        rows.append([*range(start, stop), *[last] * (width - len(values))])
        start = stop
    return packed[upload(rows, packed, torch.long)]


def _box_index(boxes: Tensor, sizes: Tensor, level_shapes, strides, assign: str) -> Tensor:
    """The definition, in plain PyTorch: (N, R) int32."""
    num_boxes = boxes.shape[1]
    height, width = sizes.unbind(-1)  # (N,)
    x0, y0, x1, y1 = boxes.unbind(-1)  # (N, B)
    zero = x0.new_zeros(())
    x0, x1 = (torch.clamp(x, zero, width[:, None]) for x in (x0, x1))
    y0, y1 = (torch.clamp(y, zero, height[:, None]) for y in (y0, y1))
    valid = (x1 > x0) & (y1 > y0)  # False for NaN
    area = torch.where(valid, (x1 - x0) * (y1 - y0), torch.inf)
    order = area.argsort(dim=1, stable=True)  # priority: smallest area, then list order
    x0, y0, x1, y1, area, valid = (t.gather(1, order) for t in (x0, y0, x1, y1, area, valid))
    home = _level_of_size(area, strides) if assign == "scale" else None

    winners = []
    for level, ((h, w), stride) in enumerate(zip(level_shapes, strides)):
        here = valid if home is None else valid & (home == level)
        rows = _covered(y0, y1, h, stride, height)  # (N, B, H), (N, B), (N, H)
        columns = _covered(x0, x1, w, stride, width)
        winners.append(_smallest_box(rows, columns, here).flatten(1))
    winner = torch.cat(winners, dim=1)  # (N, R) position in order; B: no box; B + 1: padding

    index = order.gather(1, winner.clamp(max=num_boxes - 1).long())
    index = torch.where(winner == num_boxes, BACKGROUND, index)
    return torch.where(winner > num_boxes, PADDING, index).int()


def _covered(lo: Tensor, hi: Tensor, size: int, stride: int, extent: Tensor):
    """On one axis of a level: centres that each box covers, cell of the box's centre, padding.

    Returns:
        (N, B, size) bool, (N, B) int64 (-1 if the axis has no cell inside the image), (N, size)
        bool.
    """
    centre = (torch.arange(size, device=lo.device, dtype=lo.dtype) + 0.5) * stride
    covered = (centre >= lo[..., None]) & (centre < hi[..., None])
    padding = centre >= extent[:, None]
    last = (~padding).sum(1) - 1  # (N,)
    middle = ((lo + hi) / 2).nan_to_num(0)
    middle = (middle / stride).floor().long()
    return covered, torch.minimum(middle, last[:, None]), padding


def _smallest_box(rows, columns, here: Tensor) -> Tensor:
    """(N, H, W) position in sorted order of the box that owns each cell.

    B: no box; B + 1: padding. Boxes are processed in chunks, for all images at once.
    """
    (in_y, mid_y, pad_y), (in_x, mid_x, pad_x) = rows, columns
    num_boxes, h, w = in_y.shape[1], in_y.shape[2], in_x.shape[2]
    tiny = ~(in_y.any(2) & in_x.any(2))  # (N, B): covers no centre of this level
    at_y = torch.arange(h, device=in_y.device) == mid_y[..., None]
    at_x = torch.arange(w, device=in_y.device) == mid_x[..., None]
    in_y = torch.where(tiny[..., None], at_y, in_y) & here[..., None]
    in_x = torch.where(tiny[..., None], at_x, in_x)
    winner = torch.where(pad_y[:, :, None] | pad_x[:, None, :], num_boxes + 1, num_boxes).int()
    for i in range(0, num_boxes, _CHUNK):
        inside = in_y[:, i : i + _CHUNK, :, None] & in_x[:, i : i + _CHUNK, None, :]
        # int32: a minimum of int64 is ten times slower on a CPU.
        rank = torch.arange(i, i + inside.shape[1], device=inside.device, dtype=torch.int32)
        rank = rank[:, None, None]
        winner = torch.minimum(winner, torch.where(inside, rank, num_boxes + 1).amin(1))
    return winner


def _level_of_size(area: Tensor, strides: Sequence[int]) -> Tensor:
    """(N, B) int64: the first level whose stride is over sqrt(area) / 14, else the last."""
    bounds = 14 * upload(list(strides[:-1]), area, area.dtype)  # stride 8: under 112 px, ...
    return (area.sqrt()[..., None] >= bounds).sum(-1)


def _cell_weights(index: Tensor, level_shapes, num_boxes: int) -> Tensor:
    """(N, R) float32: 1 / (number of the box's cells on that level), 0 where no box owns the cell.

    So large and small objects have equal weights.
    """
    foreground = index >= 0
    level = torch.repeat_interleave(
        torch.arange(len(level_shapes), device=index.device),
        upload([h * w for h, w in level_shapes], index, torch.long),
        output_size=index.shape[1],
    )  # (R,)
    key = index.clamp(min=0) + level * num_boxes  # (N, R): one bin per box and level
    count = key.new_zeros(len(index), len(level_shapes) * num_boxes)
    count = count.scatter_add(1, key, foreground.long())  # integer sums: any order gives the same
    return foreground / count.gather(1, key).clamp(min=1)


def _check(gt_boxes, image_sizes, level_shapes, strides, assign) -> None:
    if len(gt_boxes) == 0 or len(gt_boxes) != len(image_sizes):
        raise ValueError(
            f"{len(gt_boxes)} box lists for {len(image_sizes)} images: give one list per image "
            "(empty if there are no objects)."
        )
    if len(level_shapes) == 0 or len(level_shapes) != len(strides):
        raise ValueError(f"{len(level_shapes)} feature levels but {len(strides)} strides.")
    if assign not in ("all", "scale"):
        raise ValueError(f"assign is {assign!r}: choose 'all' or 'scale'.")
    for boxes in gt_boxes:
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes have shape {tuple(boxes.shape)}: give (B, 4), XYXY in pixels.")

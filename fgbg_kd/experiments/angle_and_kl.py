"""Angle and KL of feature vectors: vectors whose softmax has a small KL can have a large angle.

The thesis derives the foreground loss from this observation.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from ..detectors.dense import channel_order
from ..distiller import FgBgDistiller
from ..ops import cosine_similarity
from ..utils.errors import DataError
from .cell_maps import run_both
from .drawing import STUDENT_COLOR, TEACHER_COLOR

_SMALLEST = 0.02  # this share of the cells counts as cells with a small KL


class Vectors(NamedTuple):
    """The feature vectors of foreground cells from many images: M cells with C channels.

    Attributes:
        student, teacher: M tensors (C,). The student's are adapted to the teacher's channels.
        kl: (M,) KL(softmax of teacher || softmax of student) over channels, in nats.
        angle: (M,) between the two vectors, in degrees.
        place: M tuples (number of the image, stride in pixels, y, x in cells).
    """

    student: list[Tensor]
    teacher: list[Tensor]
    kl: Tensor
    angle: Tensor
    place: list[tuple[int, int, int, int]]

    def most_telling(self) -> int:
        """Index of the cell with the largest angle, among the 2 % of cells with the smallest KL."""
        few = max(1, round(_SMALLEST * len(self.kl)))
        small = self.kl.argsort()[:few]
        return int(small[self.angle[small].argmax()])


@torch.no_grad()
def collect(
    distiller: FgBgDistiller, inputs: Iterable[dict], adapters: Sequence[nn.Module]
) -> Vectors:
    """The vectors of the foreground cells in some images.

    The vectors of the student are adapted to the teacher's channels.

    Args:
        inputs: a dict with "image" and "instances" for each image.
        adapters: one module per level, from the student's to the teacher's channels.

    Raises:
        DataError: no image has an object.
    """
    vectors = Vectors([], [], [], [], [])
    for number, one in enumerate(inputs):
        batch = run_both(distiller, one)
        cells = batch.split("all")
        masks = cells.foreground.split([h * w for h, w in cells.level_shapes], dim=1)
        levels = zip(adapters, batch.student.features, batch.teacher.features)
        for stride, mask, shape, (phi, s, t) in zip(
            batch.strides, masks, cells.level_shapes, levels
        ):
            s, t = phi(s).float(), t.float()
            mask = mask[0].reshape(shape)
            kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
            angle = cosine_similarity(s, t).clamp(-1, 1).arccos().rad2deg()
            vectors.student.extend(s[0, :, mask].T.cpu())
            vectors.teacher.extend(t[0, :, mask].T.cpu())
            vectors.kl.append(kl[0][mask].cpu())
            vectors.angle.append(angle[0][mask].cpu())
            vectors.place.extend((number, stride, y, x) for y, x in mask.nonzero().tolist())
    if not vectors.place:
        raise DataError("None of the images has an object: choose other images.")
    return vectors._replace(kl=torch.cat(vectors.kl), angle=torch.cat(vectors.angle))


def draw_angle_and_kl(distiller: FgBgDistiller, vectors: Vectors, inputs: dict) -> np.ndarray:
    """Draws the two vectors of a cell, their softmax, and the KL and angle of all cells.

    The cell is :meth:`Vectors.most_telling`.

    Args:
        inputs: the model input with the image of this cell.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    best = vectors.most_telling()
    figure = Figure(figsize=(10.6, 3.9), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["image", "features", "cells"], ["image", "softmax", "cells"]], width_ratios=[1, 1.6, 1.2]
    )
    _, stride, y, x = vectors.place[best]
    image_format = channel_order(distiller.student)
    image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0).cpu(), image_format)
    _draw_cell(axes["image"], image.clip(0, 255).astype(np.uint8), stride, y, x)
    _draw_vectors(axes["features"], axes["softmax"], vectors, best)
    _draw_all_cells(axes["cells"], vectors, best)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _draw_cell(ax, image: np.ndarray, stride: int, y: int, x: int) -> None:
    ax.imshow(image)
    corner = (x * stride - 0.5, y * stride - 0.5)
    ax.add_patch(Rectangle(corner, stride, stride, fill=False, color="white", linewidth=4))
    ax.add_patch(Rectangle(corner, stride, stride, fill=False, color="black", linewidth=2))
    ax.set(xticks=[], yticks=[], title=f"one cell of stride {stride}")


def _draw_vectors(features, softmax, vectors: Vectors, cell: int) -> None:
    order = vectors.teacher[cell].argsort(descending=True)
    channels = np.arange(len(order))
    for name, of, color in (
        ("teacher", vectors.teacher, TEACHER_COLOR),
        ("student", vectors.student, STUDENT_COLOR),
    ):
        vector = of[cell][order]
        features.plot(channels, vector, ".-", color=color, linewidth=1, label=name)
        softmax.plot(channels, F.softmax(vector, dim=0), ".-", color=color, linewidth=1)
    features.axhline(0, color="0.7", linewidth=0.8)
    features.set_title(f"its feature vectors: angle {float(vectors.angle[cell]):.0f}°")
    features.set_xticklabels([])
    features.legend(loc="lower left", frameon=False)
    softmax.set(
        title=f"their softmax: KL {float(vectors.kl[cell]):.2f} nats",
        ylim=(0, 0.1),
        xlabel="channels, ordered by the teacher's feature",
    )


def _draw_all_cells(ax, vectors: Vectors, cell: int) -> None:
    ax.scatter(vectors.kl, vectors.angle, s=3, color="0.6", linewidths=0)
    marked = float(vectors.kl[cell]), float(vectors.angle[cell])
    ax.plot(*marked, "o", color="#D55E00", markersize=9)
    ax.axhline(90, color="0.7", linewidth=0.8, linestyle="--")
    ax.set(
        xscale="log",
        ylim=(0, 180),
        yticks=range(0, 181, 45),
        xlabel="KL of softmax (nats)",
        ylabel="angle (degrees)",
        title=f"all {len(vectors.kl)} foreground cells",
    )

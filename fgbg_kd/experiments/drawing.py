"""Pictures of distillation: detections in the first row, maps of the cells below."""

from collections.abc import Sequence

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from ..detectors.dense import DenseView, channel_order, num_classes_of
from ..distiller import FgBgDistiller
from ..matching import dense_student
from ..ops import BACKGROUND
from ..utils.fonts import readable
from .cell_maps import CellMaps, cell_maps, evaluating

# The colours of Okabe and Ito. Colour-blind readers can distinguish them.
TEACHER_COLOR, STUDENT_COLOR = "#E69F00", "#0072B2"
_OBJECTS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_SCORE = 0.3  # detections with a lower score are not drawn
_PANEL = 2.7  # width of a panel in inches; an inch has 100 pixels


def confident(detector: nn.Module, inputs: dict, image_format: str) -> Instances:
    """The detections in an image with a score of at least 0.3.

    Args:
        image_format: order of the channels of ``inputs["image"]``: "RGB", "BGR" or "L".

    Returns:
        Instances on the CPU, in pixels of the image tensor.
    """
    image = inputs["image"]
    if channel_order(detector) != image_format:  # one is RGB, the other BGR
        image = image.flip(0)
    with evaluating(detector):
        found = detector([{"image": image}])[0]["instances"].to("cpu")
    return found[found.scores >= _SCORE]


def confident_teacher(
    distiller: FgBgDistiller, inputs: dict, image_format: str
) -> dict[str, Instances]:
    """{"teacher": its detections (:func:`confident`)}.

    {} if it is a two-stage detector with another number of classes than the student: its class
    numbers have no names here.
    """
    detector = distiller.teacher.detector
    known = (None, dense_student(distiller.student).num_classes)
    if not isinstance(distiller.teacher.view, DenseView) and num_classes_of(detector) not in known:
        return {}
    return {"teacher": confident(detector, inputs, image_format)}


def draw_distillation(distiller: FgBgDistiller, inputs: dict) -> np.ndarray:
    """Draws the panels of an image during training.

    The student, its batch statistics and the random state do not change.

    Args:
        inputs: "image" and "instances", as from a training mapper.

    Returns:
        (3, H, W) uint8 RGB, the format of Detectron2's EventStorage.
    """
    order = channel_order(distiller.student)
    (inputs,) = dense_student(distiller.student).as_seen([inputs])
    found = confident_teacher(distiller, inputs, order)
    found["student"] = confident(distiller.student, inputs, order)
    maps = {"student": cell_maps(distiller, inputs)}
    return draw_panels(inputs, order, maps, found).transpose(2, 0, 1)


def draw_panels(
    inputs: dict,
    image_format: str,
    maps: dict[str, CellMaps],
    detections: dict[str, Instances],
    classes: Sequence[str] | None = None,
    title: str = "",
) -> np.ndarray:
    """Draws a row with ground truth and detections, and a row with maps for each level.

    Args:
        inputs: "image" (C, H, W) in 0..255 with the channels of ``image_format``, and "instances".
        maps: maps by name of the student. Each student has a column for its cosine. Split, gate and
            KL are drawn only for the last student.
        detections: instances by name of the detector, in pixels of the image.
        classes: names of the classes; None: their numbers are drawn.
        title: above all panels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0).cpu(), image_format)
    image = image.clip(0, 255).astype(np.uint8)
    truth = inputs["instances"].to("cpu")
    last, columns = maps[next(reversed(maps))], _columns(maps)
    count, rows = max(len(columns), 1 + len(detections)), 1 + len(last.strides)
    height = _PANEL * image.shape[0] / image.shape[1] + 0.3
    figure = Figure(figsize=(_PANEL * count + 0.3, height * rows + 0.9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    ratios = [height] * rows + [0.15]
    axes = figure.subplots(rows + 1, count, squeeze=False, height_ratios=ratios)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, (name, instances) in zip(axes[0], {"ground truth": truth, **detections}.items()):
        ax.imshow(_with_boxes(image, instances, classes))
        number = "" if instances is truth else f", {len(instances)} detections"
        ax.set_title(name + number, fontsize=10)
    boxes = truth.gt_boxes.tensor.tolist()
    for level, (stride, shape) in enumerate(zip(last.strides, last.cells.level_shapes)):
        for ax, (name, column) in zip(axes[1 + level], columns.items()):
            column.draw(ax, image, level, stride, name)
            _outline(ax, boxes, _OBJECTS if name == "split" else ("white",))
        label = f"stride {stride}: {shape[0]} x {shape[1]} cells"
        axes[1 + level, 0].set_ylabel(label, fontsize=10)
    for ax, column in zip(axes[-1], columns.values()):
        column.draw_key(ax)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _outline(ax, boxes: Sequence[Sequence[float]], colors: Sequence[str]) -> None:
    for i, box in enumerate(boxes):
        x0, y0, x1, y1 = (v - 0.5 for v in box)  # imshow places the centre of a pixel at its index
        color = colors[i % len(colors)]
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=color))


def _with_boxes(image: np.ndarray, instances: Instances, classes: Sequence[str] | None):
    """Ground truth or detections, in the size of a panel."""
    is_truth = instances.has("gt_boxes")
    boxes = instances.gt_boxes if is_truth else instances.pred_boxes
    numbers = instances.gt_classes if is_truth else instances.pred_classes
    scores = None if is_truth else instances.scores
    scale = 1.3 * 100 * _PANEL / image.shape[1]  # so that labels can be read in the panel
    return draw_boxes(image, boxes.tensor, numbers, classes, scores, scale)


def draw_boxes(
    image: np.ndarray,
    boxes: Tensor,
    numbers: Tensor,
    classes: Sequence[str] | None = None,
    scores: Tensor | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """Boxes with labels, by Detectron2's Visualizer. A class has the same colour everywhere.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4), XYXY in pixels.
        numbers: (M,) of their classes.
        classes: names by number; None: numbers are the labels.
        scores: (M,) in [0, 1], part of the labels; None: left out.
        scale: of the picture to the image.

    Returns:
        (H * scale, W * scale, 3) uint8 RGB.
    """
    colors = [to_rgb(_OBJECTS[c % len(_OBJECTS)]) for c in numbers.tolist()]
    with readable(classes or ()) as names:
        labels = [names[c] if names else str(c) for c in numbers.tolist()]
        if scores is not None:
            labels = [f"{name} {s:.0%}" for name, s in zip(labels, scores.tolist())]
        drawn = Visualizer(image, scale=scale).overlay_instances(
            boxes=boxes, labels=labels, assigned_colors=colors, alpha=1
        )
        return drawn.get_image()


class _Column:
    """A column of panels, one per level: a value for each cell, drawn over the image.

    Args:
        values: (H_l, W_l) for each level. NaN is not drawn.
        notes: second line of the title, for each level.
        key: label of the colour bar, or {meaning: colour}.
        options: arguments of imshow.
    """

    def __init__(self, values, notes, key, **options):
        self.values, self.notes, self.key, self.options = values, notes, key, options

    def draw(self, ax, image: np.ndarray, level: int, stride: int, name: str) -> None:
        h, w = self.values[level].shape
        ax.imshow(image.mean(2), cmap="gray", vmin=-60, vmax=380)
        ax.set_title(f"{name}\n{self.notes[level]}", fontsize=9)
        # A cell has stride x stride pixels. The map can be larger than the image.
        extent = (-0.5, w * stride - 0.5, h * stride - 0.5, -0.5)
        self.drawn = ax.imshow(self.values[level], extent=extent, alpha=0.75, **self.options)
        ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))

    def draw_key(self, ax) -> None:
        if isinstance(self.key, dict):
            patches = [Patch(color=color, label=label) for label, color in self.key.items()]
            ax.legend(handles=patches, loc="upper center", fontsize=9, frameon=False)
            return
        even = [float(self.drawn.norm.inverse(x)) for x in (0, 1 / 3, 2 / 3, 1)]
        bar = ax.figure.colorbar(self.drawn, cax=ax, orientation="horizontal", ticks=even)
        bar.ax.set_xticklabels([f"{x:.2g}" for x in even], fontsize=8)
        bar.set_label(self.key, fontsize=9)


def _columns(maps: dict[str, CellMaps]) -> dict[str, _Column]:
    """The columns by title."""
    last = maps[next(reversed(maps))]
    owner = _levels(last, last.cells.box_index)
    foreground, background = [x >= 0 for x in owner], [x == BACKGROUND for x in owner]
    columns = {
        "split": _Column(
            _only([x % len(_OBJECTS) for x in owner], foreground),
            [f"{m.sum()} foreground cells" for m in foreground],
            {"foreground, a colour per object": _OBJECTS[0], "background": "0.7"},
            cmap=ListedColormap(_OBJECTS),
            vmin=-0.5,
            vmax=len(_OBJECTS) - 0.5,
        )
    }
    if last.gate is not None:
        columns["gate"] = _gate_column(_levels(last, last.gate), foreground, background)
    for name, one in maps.items():
        if one.cosine is not None:
            cosine = _levels(one, one.cosine)
            columns[f"cosine, {name}"] = _Column(
                _only(cosine, foreground),
                [f"mean {x}" for x in _means(cosine, foreground, "{:.2f}")],
                "cosine of student and teacher",
                cmap="viridis",
                vmin=0,
                vmax=1,
            )
    if last.kl is not None:
        kl = _only(_levels(last, last.kl), background)
        columns["background KL"] = _Column(
            kl,
            [f"sum {np.nansum(x):.2g}" for x in kl],
            "KL, times the gate if there is one",
            cmap="magma",
            norm=PowerNorm(0.5, 0, max(float(last.kl.max()), 1e-9)),
        )
    return columns


def _gate_column(gate, foreground, background) -> _Column:
    shares = [_means(gate, masks, "{:.2f}") for masks in (foreground, background)]
    return _Column(
        _only(gate, [f | b for f, b in zip(foreground, background)]),
        [f"mean over cells: foreground {f}, background {b}" for f, b in zip(*shares)],
        {"1: follows fully": TEACHER_COLOR, "0: does not follow": STUDENT_COLOR},
        cmap=LinearSegmentedColormap.from_list("gate", [STUDENT_COLOR, TEACHER_COLOR]),
        vmin=0,
        vmax=1,
    )


def _levels(maps: CellMaps, values: Tensor) -> list[np.ndarray]:
    """(1, R) -> (H_l, W_l) per level."""
    shapes = maps.cells.level_shapes
    parts = values[0].cpu().float().split([h * w for h, w in shapes])
    return [x.reshape(shape).numpy() for x, shape in zip(parts, shapes)]


def _only(values, masks) -> list[np.ndarray]:
    """For each level, the values inside the mask, and NaN outside."""
    return [np.where(mask, x, np.nan) for x, mask in zip(values, masks)]


def _means(values, masks, form: str) -> list[str]:
    """For each level, the mean of the values inside the mask, as text."""
    return [form.format(x[m].mean()) if m.any() else "none" for x, m in zip(values, masks)]

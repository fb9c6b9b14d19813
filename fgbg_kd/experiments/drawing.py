"""What distillation sees in an image: the split, the gate, both losses cell by cell, detections."""

import copy
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from ..config import method_defaults
from ..detectors.dense import channel_order
from ..detectors.load import load_exactly
from ..distiller import FgBgDistiller
from ..matching import dense_student
from ..methods import Batch, FgBg
from ..ops import BACKGROUND, Split, cosine_similarity, teacher_gate
from ..utils.errors import CheckpointError

# Okabe and Ito's colours, which everybody can tell apart.
TEACHER_COLOR, STUDENT_COLOR = "#E69F00", "#0072B2"
_OBJECTS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_SCORE = 0.3  # detections under it are not drawn
_PANEL = 2.7  # width of a panel in inches, of 100 pixels


class CellMaps(NamedTuple):
    """One image, cell by cell; R = cells of all levels, as in :class:`~fgbg_kd.ops.Split`.

    Attributes:
        cells: the split.
        strides: in pixels, per level.
        cosine: (1, R) of the student's adapted and the teacher's features. None where they have
            other channels and there is no adapter.
        gate: (1, R), 1 where the student learns from the teacher. None for a teacher that is not
            dense.
        kl: (1, R), the background KL times the gate, as it enters the loss. None likewise.
        margin: of the gate.
    """

    cells: Split
    strides: Sequence[int]
    cosine: Tensor | None = None
    gate: Tensor | None = None
    kl: Tensor | None = None
    margin: float = 0.0


def observe(distiller: FgBgDistiller, inputs: dict) -> Batch:
    """One image and its "instances" through student and teacher, without a gradient.

    The student is in eval mode for it. The teacher's head runs even if the method does not need it.
    """
    student, teacher = dense_student(distiller.student), distiller.teacher
    dense = teacher.view.dense
    with torch.no_grad(), inference_context(distiller.student):
        images = student.preprocess([inputs])
        output = student.with_boxes(student.run(images.tensor))
        target = teacher(images, [inputs], student, logits=dense, boxes=dense, cached=False)
        gt = [inputs["instances"].to(distiller.device)]
        return distiller.match(output, target, images, gt)


@torch.no_grad()
def cell_maps(
    distiller: FgBgDistiller, inputs: dict, adapters: Sequence[nn.Module] | None = None
) -> CellMaps:
    """The maps of one image, by the options of FgBg; for another method, by FgBg's defaults.

    A gate that is off shows where it would be open.

    Args:
        inputs: "image" and "instances", as a training mapper gives them.
        adapters: from student to teacher features, per level; None: those of the method.
    """
    fgbg = distiller.method
    if not isinstance(fgbg, FgBg):
        fgbg = SimpleNamespace(**method_defaults("FgBg"))
    batch = observe(distiller, inputs)
    cells = batch.split(fgbg.assign)
    student, teacher = batch.student, batch.teacher
    cosine, adapters = None, adapters or own_adapters(distiller)
    if adapters is not None:
        adapted = [phi(f) for phi, f in zip(adapters, student.features)]
        levels = zip(adapted, teacher.features)
        cosine = torch.cat([cosine_similarity(s, t).flatten(1) for s, t in levels], dim=1)
    if teacher.logits is None:
        return CellMaps(cells, batch.strides, cosine)
    found = batch.compare(
        cells, boxes=fgbg.gate_quality == "box", kl=fgbg.kl, temperature=fgbg.temperature
    )
    off = fgbg.gate == "off"
    gate = teacher_gate(
        found.student_quality,
        found.teacher_quality,
        cells,
        mode="cell" if off else fgbg.gate,
        margin=fgbg.gate_margin,
    )
    kl = found.kl if off else found.kl * gate
    return CellMaps(cells, batch.strides, cosine, gate, kl, fgbg.gate_margin)


def own_adapters(distiller: FgBgDistiller) -> Sequence[nn.Module] | None:
    """The method's adapters; identities where it has none and needs none; else None."""
    adapters = getattr(distiller.method, "adapters", ())
    if len(adapters) == len(distiller.levels):
        return adapters
    same = all(s == t for s, t in (level.channels for level in distiller.levels))
    return [nn.Identity() for _ in distiller.levels] if same else None


@torch.no_grad()
def fit_adapters(distiller: FgBgDistiller, inputs: Iterable[dict]) -> list[nn.Module]:
    """A 1x1 convolution per level from the student's to the teacher's features by least squares.

    It makes a student comparable that never had adapters, a plain one. Fitted on the foreground
    cells of the images, each object with the same weight.
    """
    sums = [0.0] * len(distiller.levels)
    for one in inputs:
        batch = observe(distiller, one)
        cells = batch.split("all")
        weights = cells.weight.split([h * w for h, w in cells.level_shapes], dim=1)
        for i, (s, t) in enumerate(zip(batch.student.features, batch.teacher.features)):
            s, t = (x.flatten(2)[0].T.double() for x in (s, t))  # (cells, C)
            s = torch.cat([s, s.new_ones(len(s), 1)], dim=1)
            weighted = s.T * weights[i][0].double()
            sums[i] = sums[i] + torch.cat([weighted @ s, weighted @ t], dim=1)
    adapters = []
    for level, total in zip(distiller.levels, sums):
        channels = level.channels[0]
        gram, product = total[:, : channels + 1], total[:, channels + 1 :]
        # A little ridge: a level of few cells does not determine all of the map.
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(channels + 1).to(gram)
        solution = torch.linalg.solve(gram + ridge, product).float()  # (C + 1, C of the teacher)
        phi = nn.Conv2d(*level.channels, kernel_size=1).to(distiller.device)
        phi.weight.copy_(solution[:-1].T[:, :, None, None])
        phi.bias.copy_(solution[-1])
        adapters.append(phi)
    return adapters


def load_student(
    distiller: FgBgDistiller, weights: str, training: Iterable[dict]
) -> Sequence[nn.Module] | None:
    """Gives the distiller a student of its own with a checkpoint's weights.

    Args:
        weights: of a distilled or a plain student.
        training: images to fit adapters on (:func:`fit_adapters`), where some are needed and the
            checkpoint has none.

    Returns:
        Adapters of this student.

    Raises:
        CheckpointError: a checkpoint of another detector or method.
    """
    distiller.student = copy.deepcopy(distiller.student)
    distiller.method = copy.deepcopy(distiller.method)
    rest = load_exactly(distiller.student, weights)
    adapters = own_adapters(distiller)
    if "method" in rest:
        try:
            distiller.method.load_state_dict(rest["method"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{weights} was distilled by another MODEL.KD than this config's: {error}"
            ) from None
    elif adapters is None or any(True for phi in adapters for _ in phi.parameters()):
        adapters = fit_adapters(distiller, training)
    return adapters


@torch.no_grad()
def confident(detector: nn.Module, inputs: dict, image_format: str) -> Instances:
    """Detections of one image at its own size, on the CPU.

    Args:
        image_format: "RGB" or "BGR", the order of ``inputs["image"]``.

    Returns:
        Those of a score of 0.3 and more.
    """
    image = inputs["image"]
    image = image if channel_order(detector) == image_format else image.flip(0)
    with inference_context(detector):
        found = detector([{"image": image}])[0]["instances"].to("cpu")
    return found[found.scores >= _SCORE]


def draw_training(distiller: FgBgDistiller, inputs: dict) -> np.ndarray:
    """The panels of one image of a batch, as Detectron2's EventStorage takes them.

    Returns:
        (3, H, W) uint8, RGB.
    """
    order = channel_order(distiller.student)
    detectors = {"teacher": distiller.teacher.detector, "student": distiller.student}
    found = {name: confident(d, inputs, order) for name, d in detectors.items()}
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
    """A row with ground truth and detections, then a row of maps per level.

    Args:
        inputs: "image" (3, H, W) in 0..255 of ``image_format``, and "instances".
        maps: by name of the student. Each has its column of cosines; split, gate and KL are those
            of the last.
        detections: by name of the detector, in the image's coordinates.
        classes: their names; None: numbers.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0).cpu(), image_format)
    image = image.clip(0, 255).astype(np.uint8)
    truth = inputs["instances"].to("cpu")
    last = maps[next(reversed(maps))]
    columns = _columns(maps)
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
    for level, stride in enumerate(last.strides):
        for ax, (title, panel) in zip(axes[1 + level], columns.items()):
            ax.imshow(image.mean(2), cmap="gray", vmin=-60, vmax=380)
            ax.set_title(f"{title}\n{panel.notes[level]}", fontsize=9)
            panel.draw(ax, level, stride)
            for i, box in enumerate(truth.gt_boxes.tensor.tolist()):
                x0, y0, x1, y1 = (v - 0.5 for v in box)  # a pixel of imshow is centred on a number
                color = _OBJECTS[i % len(_OBJECTS)] if title == "split" else "white"
                ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=color))
            ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
        shape = "{} x {}".format(*last.cells.level_shapes[level])
        axes[1 + level, 0].set_ylabel(f"stride {stride}: {shape} cells", fontsize=10)
    for ax, panel in zip(axes[-1], columns.values()):
        panel.draw_key(ax)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _with_boxes(image: np.ndarray, instances: Instances, classes) -> np.ndarray:
    """Ground truth or detections by Detectron2's Visualizer, a colour per class."""
    is_truth = instances.has("gt_boxes")
    boxes = instances.gt_boxes if is_truth else instances.pred_boxes
    numbers = (instances.gt_classes if is_truth else instances.pred_classes).tolist()
    labels = [classes[c] if classes else str(c) for c in numbers]
    if not is_truth:
        labels = [f"{name} {s:.0%}" for name, s in zip(labels, instances.scores.tolist())]
    colors = [to_rgb(_OBJECTS[c % len(_OBJECTS)]) for c in numbers]
    scale = 1.3 * 100 * _PANEL / image.shape[1]  # so that labels can be read in the panel
    drawn = Visualizer(image, scale=scale).overlay_instances(
        boxes=boxes.tensor, labels=labels, assigned_colors=colors, alpha=1
    )
    return drawn.get_image()


class _Map:
    """A column of panels: one value per cell, over the image.

    Args:
        values: per level (H_l, W_l); NaN is not drawn.
        notes: second line of the title, per level.
        key: label of the colour bar, or what colours mean.
        options: of imshow.
    """

    def __init__(self, values, notes, key, **options):
        self.values, self.notes, self.key, self.options = values, notes, key, options

    def draw(self, ax, level: int, stride: int) -> None:
        h, w = self.values[level].shape
        # A cell is stride x stride pixels, also where the map is larger than the image.
        extent = (-0.5, w * stride - 0.5, h * stride - 0.5, -0.5)
        self.drawn = ax.imshow(self.values[level], extent=extent, alpha=0.75, **self.options)

    def draw_key(self, ax) -> None:
        if isinstance(self.key, dict):
            patches = [Patch(color=color, label=label) for label, color in self.key.items()]
            ax.legend(handles=patches, loc="upper center", fontsize=9, frameon=False)
            return
        even = [float(self.drawn.norm.inverse(x)) for x in (0, 1 / 3, 2 / 3, 1)]
        bar = ax.figure.colorbar(self.drawn, cax=ax, orientation="horizontal", ticks=even)
        bar.ax.set_xticklabels([f"{x:.2g}" for x in even], fontsize=8)
        bar.set_label(self.key, fontsize=9)


def _columns(maps: dict[str, CellMaps]) -> dict[str, _Map]:
    last = maps[next(reversed(maps))]
    shapes = last.cells.level_shapes

    def levels(values):
        apart = values[0].cpu().float().split([h * w for h, w in shapes])
        return [x.reshape(shape).numpy() for x, shape in zip(apart, shapes)]

    owner = levels(last.cells.box_index)
    foreground, background = [x >= 0 for x in owner], [x == BACKGROUND for x in owner]

    def only(values, masks):
        return [np.where(mask, x, np.nan) for x, mask in zip(values, masks)]

    def means(values, masks, form):
        return [form.format(x[m].mean()) if m.any() else "none" for x, m in zip(values, masks)]

    columns = {
        "split": _Map(
            only([x % len(_OBJECTS) for x in owner], foreground),
            [f"{m.sum()} cells of foreground" for m in foreground],
            {"foreground, a colour per object": _OBJECTS[0], "background": "0.7"},
            cmap=ListedColormap(_OBJECTS),
            vmin=-0.5,
            vmax=len(_OBJECTS) - 0.5,
        )
    }
    if last.gate is not None:
        gate = levels(last.gate)
        shares = [means(gate, masks, "{:.0%}") for masks in (foreground, background)]
        margin = f" {'-' if last.margin < 0 else '+'} {abs(last.margin):g}" if last.margin else ""
        columns[f"gate: teacher > student{margin}"] = _Map(
            only(gate, [f | b for f, b in zip(foreground, background)]),
            [f"open: foreground {f}, background {b}" for f, b in zip(*shares)],
            {"good enough to learn from": TEACHER_COLOR, "not good enough": STUDENT_COLOR},
            cmap=LinearSegmentedColormap.from_list("gate", [STUDENT_COLOR, TEACHER_COLOR]),
            vmin=0,
            vmax=1,
        )
    for name, one in maps.items():
        if one.cosine is not None:
            cosine = levels(one.cosine)
            columns[f"cosine, {name}"] = _Map(
                only(cosine, foreground),
                [f"mean {x}" for x in means(cosine, foreground, "{:.2f}")],
                "cosine of student and teacher",
                cmap="viridis",
                vmin=0,
                vmax=1,
            )
    if last.kl is not None:
        kl = only(levels(last.kl), background)
        columns["background KL"] = _Map(
            kl,
            [f"sum {np.nansum(x):.2g}" for x in kl],
            "KL where the gate is open",
            cmap="magma",
            norm=PowerNorm(0.5, 0, max(float(last.kl.max()), 1e-9)),
        )
    return columns

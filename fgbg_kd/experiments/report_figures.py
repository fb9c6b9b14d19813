"""The figures of the report, as text for an HTML page."""

import base64
import io

import cv2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from .method_specs import PLAIN, TEACHER
from .run_folder import DISTILLED, Run

_COLORS = {
    TEACHER: ["#555555", "#999999"],
    PLAIN: ["#0072B2", "#56B4E9"],
    DISTILLED: ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#8C564B", "#7F6BB3"],
}
_POINTS = 400  # a curve with more points is drawn by means of neighbouring points


def colors_of(groups: dict[str, list[Run]]) -> dict[str, str]:
    """A colour for each group. Each role has its own colours."""
    colors, used = {}, dict.fromkeys(_COLORS, 0)
    for name, members in groups.items():
        role = members[0].role
        colors[name] = _COLORS[role][used[role] % len(_COLORS[role])]
        used[role] += 1
    return colors


def bars(values: dict[str, list], names: list[str], colors: dict[str, str], title: str) -> Markup:
    """Draws bars of AP with a colour per group, as inline SVG.

    Args:
        values: for each group, a number or None for each name.
        names: labels under the bars.
        colors: colour of each group.
        title: description of the figure for screen readers.
    """
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(values)
    for i, (group, heights) in enumerate(values.items()):
        x = np.arange(len(names)) + (i - (len(values) - 1) / 2) * width
        axes.bar(x, [v or 0 for v in heights], width, color=colors[group], label=group)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 12 else 0)
    axes.set_ylabel("AP")
    axes.legend(frameon=False, ncols=len(values), fontsize=9)
    return _svg(figure, title)


def curves(runs: list[Run], colors) -> dict[str, Markup]:
    """Draws losses, gates and AP over the iterations.

    Args:
        runs: the runs, with a line for each.
        colors: colour of each group.

    Returns:
        {title: inline SVG}.
    """
    keys = {k for r in runs for row in r.rows for k in row}
    sections = {
        "Losses": sorted(k for k in keys if k.startswith("loss") or k == "total_loss"),
        "Gate (mean)": sorted(k for k in keys if k.endswith("_gate")),
        "AP over iterations": [k for k in ("bbox/AP", "bbox/AP50", "bbox/AP75") if k in keys],
    }
    return {name: _plot(runs, of, colors, name) for name, of in sections.items() if of}


def _plot(runs: list[Run], keys: list[str], colors, title: str) -> Markup:
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    lines = {}
    for ax, key in zip(axes, keys):
        for run in runs:
            points = [(r["iteration"], r[key]) for r in run.rows if key in r]
            if points:
                few = "o" if len(points) < 3 else ""
                (line,) = ax.plot(
                    *_thinned(points).T, color=colors[run.group], linewidth=1, marker=few, alpha=0.8
                )
                lines.setdefault(run.group, line)
        ax.set_title(key, fontsize=10)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0, top=1 if "_gate" in key else None)
        ax.tick_params(labelsize=8)
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    names = list(lines)
    figure.legend(
        lines.values(), names, loc="outside upper center", ncols=min(5, len(names)), frameon=False
    )
    return _svg(figure, title)


def _thinned(points) -> np.ndarray:
    """Means of neighbouring points: (N, 2) to (M, 2), where M is at most _POINTS."""
    values = np.array(points, dtype=float)
    parts = np.array_split(values, min(len(values), _POINTS))
    return np.stack([part.mean(0) for part in parts])


def _svg(figure: Figure, title: str) -> Markup:
    """A figure as inline SVG. Its texts are text elements, not outlines."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def jpeg(picture: np.ndarray) -> str:
    """A picture (H, W, 3) in BGR as base64 of a JPEG."""
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return base64.b64encode(data).decode()

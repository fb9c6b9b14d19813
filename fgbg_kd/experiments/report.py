"""A page of HTML about finished runs: tables, curves, pictures, configuration; all in one file."""

import base64
import contextlib
import datetime
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from .cost import cost
from .run_folder import DISTILLED, Run, find_runs, load_run, versions
from .runner import METRICS
from .settings import keys_read
from .side_by_side import draw_side_by_side, read_input
from .tables import PLAIN, TEACHER, average, number, paired, signed
from .tide import KINDS, detection_errors, image_scores, tide, truth_of

_COLORS = {TEACHER: ["#555555", "#999999"], PLAIN: ["#0072B2", "#56B4E9"]}
_DISTILLED_COLORS = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#8C564B", "#7F6BB3"]
_SCORE = 0.3  # detections under it are neither counted nor drawn
_COUNT = 3  # images that gained most, and that lost most
_POINTS = 400  # of a curve at most: neighbours are averaged


def write_report(folders: Sequence[Path], output: Path, say: Callable[[str], None]) -> None:
    """Reads the runs, measures what they do not hold, and writes the page.

    What cannot be shown (without checkpoints, data or tidecv) is named on the page.

    Args:
        say: is told what is being done.

    Raises:
        ValueError: no runs, or damaged files of a run.
        OSError: the page cannot be written; shows before anything is measured.
    """
    runs = find_runs(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.open("a").close()
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    colors = _colors(groups)
    plain = _baselines(groups)
    lacks: list[str] = []
    load = functools.cache(load_run)
    page = _template().render(
        title=f"Runs of {Path(folders[0]).resolve().name}",
        subtitle=f"{len(runs)} runs: {', '.join(f'{len(m)} {g}' for g, m in groups.items())}",
        colors=colors,
        gains=_gains(groups, plain, lacks),
        results=_results(groups, load, say, lacks),
        classes=_classes(groups, colors),
        errors=_errors(groups, say, lacks),
        curves=_curves(runs, colors),
        pictures=_pictures(groups, plain, load, say, lacks),
        lacks=lacks,
        differences=_differences({g: m[0].config for g, m in groups.items()}),
        configs={g: (m[0].folder / "config.yaml").read_text() for g, m in groups.items()},
        versions=_side_by_side({g: versions(m[0].folder) for g, m in groups.items()}),
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        sources=", ".join(map(str, folders)),
    )
    output.write_text(page)


def _template() -> jinja2.Template:
    text = Path(__file__).with_name("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text)


def _colors(groups: dict[str, list[Run]]) -> dict[str, str]:
    palettes = {**_COLORS, DISTILLED: _DISTILLED_COLORS}
    colors, used = {}, dict.fromkeys(palettes, 0)
    for name, members in groups.items():
        palette = palettes[members[0].role]
        colors[name] = palette[used[members[0].role] % len(palette)]
        used[members[0].role] += 1
    return colors


@contextlib.contextmanager
def _or_lacks(lacks: list[str], what: str):
    """Notes what could not be made, and why, and goes on."""
    try:
        yield
    except (ValueError, OSError) as error:
        lacks.append(f"{what}: {error}")


# --- numbers ---


def _baselines(groups) -> dict[str, str | None]:
    """Of each distilled group the first plain one that differs in nothing but distillation."""
    plain = {g: m[0] for g, m in groups.items() if m[0].role == PLAIN}
    distilled = {g: m[0] for g, m in groups.items() if m[0].role == DISTILLED}
    return {
        name: next((g for g, p in plain.items() if p.trained_as(run)), None)
        for name, run in distilled.items()
    }


def _gains(groups, plain: dict, lacks: list[str]) -> list[tuple[str, str, str, str]]:
    """Of each distilled group: its name, mean paired gain, over which plain one, and of what."""
    aps = {g: {r.seed: r.result["AP"] for r in m if "AP" in r.result} for g, m in groups.items()}
    gains = []
    for name, base in plain.items():
        gain = paired(aps[name], aps[base]) if base else None
        if gain:
            count = len(aps[name].keys() & aps[base].keys())
            seeds = (
                "one seed" if count == 1 else f"{count} seeds (95 % interval of the mean, paired)"
            )
            gains.append((name, signed(gain, 1), base, seeds))
        else:
            lacks.append(
                f"{name}: its gain, which needs a plain run to its end of the same student, data, "
                "solver and seed, on the same test set"
            )
    return gains


def _mean(members: list[Run], key: str) -> float | None:
    return average([r.result for r in members], key)


def _results(groups, load, say, lacks) -> dict:
    rows = {}
    for name, members in groups.items():
        aps = [r.result["AP"] for r in members if "AP" in r.result]
        lacks += [
            f"{name}, seed {r.seed}: its AP, for it was not evaluated after its last iteration"
            for r in members
            if "AP" not in r.result
        ]
        seeds = ", ".join(f"{v:.1f}" for v in aps) if len(aps) > 1 else "–"
        cells = [number(_mean(members, METRICS[0]), 2), seeds]
        cells += [number(_mean(members, m)) for m in METRICS[1:]]
        say(f"{name}: parameters, GFLOPs, latency")
        costs = {}
        with _or_lacks(lacks, f"{name}: parameters, GFLOPs and time"):
            cfg, model, records = load(members[0])
            costs = cost(model, read_input(cfg, records[0]["file_name"]))
        for key, digits in (("parameters_m", 3), ("gflops", 3), ("ms_per_image", 1)):
            cells.append(number(costs.get(key), digits))
        rows[name] = cells
    columns = ["", "AP", "each seed", *METRICS[1:], "parameters (M)", "GFLOPs", "ms / image"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    note = (
        "COCO AP (0 to 100) after the last iteration, means over seeds. GFLOPs of backbone and "
        "head, one multiply-add counted once. ms: median time of one image, measured now "
        f"({device}, {torch.get_num_threads()} threads)."
    )
    return {"columns": columns, "rows": rows, "note": note}


def _classes(groups, colors) -> dict | None:
    names = sorted({k for m in groups.values() for r in m for k in r.result if k.startswith("AP-")})
    if not names:
        return None
    means = {g: [_mean(members, k) for k in names] for g, members in groups.items()}
    rows = {
        name.removeprefix("AP-"): [number(means[g][i]) for g in groups]
        for i, name in enumerate(names)
    }
    figure = None
    if len(names) <= 30:
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        axes, width = figure.subplots(), 0.8 / len(groups)
        for i, (group, values) in enumerate(means.items()):
            x = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
            axes.bar(x, [v or 0 for v in values], width, color=colors[group], label=group)
        axes.set_xticks(range(len(names)), rows, rotation=30 if len(names) > 12 else 0)
        axes.set_ylabel("AP")
        axes.legend(frameon=False, ncols=len(groups), fontsize=9)
        figure = _svg(figure, "AP by class")
    return {
        "title": "AP by class",
        "figure": figure,
        "columns": ["class", *groups],
        "rows": rows,
        "note": "Means over seeds.",
    }


_ABOUT_ERRORS = (
    "TIDE (Bolya et al., 2020): points of AP50 that mending all errors of a kind would bring, "
    "means over seeds. Class, place, both, duplicates, background taken for an object, "
    "objects missed; then all false positives and all false negatives."
)


def _errors(groups, say, lacks) -> dict | None:
    rows = {}
    with _or_lacks(lacks, "Kinds of errors"):
        tide()
        for name, members in groups.items():
            say(f"{name}: kinds of errors")
            with _or_lacks(lacks, f"{name}: kinds of errors"):
                found = [_errors_of(run) for run in members]
                rows[name] = [number(average(found, k)) for k in KINDS]
    if not rows:
        return None
    return {
        "title": "Kinds of errors",
        "figure": None,
        "columns": ["", *KINDS],
        "rows": rows,
        "note": _ABOUT_ERRORS,
    }


def _errors_of(run: Run) -> dict[str, float]:
    truth = truth_of(run.config)
    if truth is None:
        raise ValueError("no COCO file is known of its test set.")
    with contextlib.redirect_stdout(io.StringIO()):  # tidecv talks
        return detection_errors(truth, run.detections)


# --- curves ---


def _curves(runs: list[Run], colors) -> dict[str, Markup]:
    keys = {k for r in runs for row in r.rows for k in row}
    sections = {
        "Losses": sorted(k for k in keys if k.startswith("loss") or k == "total_loss"),
        "Shares of cells: where the teacher guides (gate), where it is better": sorted(
            k for k in keys if k.endswith(("_gate", "_better"))
        ),
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
    """(M, 2), M at most _POINTS, by means of neighbours."""
    values = np.array(points, dtype=float)
    parts = np.array_split(values, min(len(values), _POINTS))
    return np.stack([part.mean(0) for part in parts])


def _svg(figure: Figure, title: str) -> Markup:
    """Inline SVG whose text is text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


# --- pictures ---


def _pictures(groups, plain: dict, load, say, lacks) -> list[dict]:
    """Sections of the images that gained and lost most, from a plain run to that of the same seed
    in the best distilled group."""
    sections = []
    with _or_lacks(lacks, "Pictures"):
        pairs = [
            (before, after)
            for name, base in plain.items()
            for after in groups[name]
            for before in groups.get(base, ())
            if before.seed == after.seed
        ]
        if not pairs:
            raise ValueError(
                "they need a plain and a distilled run of one test set, number of iterations and "
                "seed."
            )
        before, distilled = max(pairs, key=lambda p: _mean(groups[p[1].group], "AP") or 0)
        teachers = [m[0] for m in groups.values() if m[0].role == TEACHER]
        teacher = next((t for t in teachers if t.task[:2] == distilled.task[:2]), None)
        say("looking for the largest gains and losses")
        old, new = _scores(before, distilled)
        gain = {image: new[image] - old[image] for image in old}
        cfg, _, records = load(distilled)
        records = {r["image_id"]: r for r in records}
        models = {}
        for run in filter(None, (teacher, before, distilled)):
            with _or_lacks(lacks, f"{run.group}: its detections in the pictures"):
                models[run.group] = load(run)[1]
        order = sorted(gain, key=lambda image: (-gain[image], image))
        for title, images in (
            ("Images that gained most", [i for i in order[:_COUNT] if gain[i] > 0]),
            ("Images that lost most", [i for i in order[::-1][:_COUNT] if gain[i] < 0]),
        ):
            pictures = {}
            for image in images:
                say(f"{title.lower()}: image {image}")
                picture = draw_side_by_side(cfg, records[image], models, _SCORE, width=270)
                name = Path(records[image]["file_name"]).name
                caption = f"{name}: F1 {old[image]:.2f} to {new[image]:.2f} ({gain[image]:+.2f})"
                pictures[caption] = _jpeg(picture)
            sections.append({"title": title, "pictures": pictures, "note": ""})
        better, worse = (sum(1 for g in gain.values() if g * sign > 0) for sign in (1, -1))
        sections[-1]["note"] = (
            f"{distilled.group} against {before.group}, seed {distilled.seed}: better on {better}, "
            f"worse on {worse} of {len(gain)} images. F1 of detections of a score of {_SCORE} and "
            "more (those drawn), IoU over 0.5."
        )
    return sections


def _scores(before: Run, after: Run) -> list[dict[int, float]]:
    truth = truth_of(after.config)
    if truth is None or truth_of(before.config) != truth:
        raise ValueError(f"{before.group} and {after.group} have no known test set in common.")
    return [image_scores(truth, run.detections, _SCORE) for run in (before, after)]


def _jpeg(picture: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return base64.b64encode(data).decode()


# --- configuration and versions ---


def _differences(configs: dict[str, dict]) -> dict:
    """Keys that are read in some of the configs and whose values are not the same in all."""
    table = _side_by_side({name: keys_read(config) for name, config in configs.items()})
    unlike = {k: v for k, v in table["rows"].items() if len(set(v)) > 1}
    for key in ("OUTPUT_DIR", "SEED", "train.output_dir", "train.seed"):
        unlike.pop(key, None)
    return {**table, "rows": unlike}


def _side_by_side(values: dict[str, dict]) -> dict:
    keys = dict.fromkeys(k for v in values.values() for k in v)
    rows = {k: [str(v.get(k, "–")) for v in values.values()] for k in keys}
    return {"columns": ["", *values], "rows": rows}

"""An HTML page about finished runs in one file: tables, curves, pictures and configuration."""

import contextlib
import datetime
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import torch

from ..utils.errors import DataError, FgBgError, RunError
from .cost import cost
from .method_specs import PLAIN, TEACHER
from .paired_statistics import average, paired_difference
from .report_figures import bars, colors_of, curves, jpeg
from .run_folder import DISTILLED, Run, find_runs, load_run, versions
from .runner import METRICS
from .settings import keys_read
from .side_by_side import draw_side_by_side, read_input
from .tables import number, signed
from .tide import KINDS, detection_errors, image_scores, tide, truth_of

_SCORE = 0.3  # detections with a lower score are neither counted nor drawn
_COUNT = 3  # pictures of images with the largest gain, and of images with the largest loss


def write_report(folders: Sequence[Path], output: Path, say: Callable[[str], None]) -> None:
    """Writes a page about all runs in and below some folders.

    It measures three things that the runs do not record: the cost, the kinds of errors and the F1
    of each image. If a checkpoint, data or tidecv is missing, the page says which parts it lacks.

    Args:
        folders: folders of runs, or folders that contain them.
        output: path of the page.
        say: a function that gets a line about each step.

    Raises:
        RunError: there are no runs, or a file of a run is damaged.
        OSError: the page cannot be written. This is checked before the measurements.
    """
    runs = find_runs(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.open("a").close()
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    colors = colors_of(groups)
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
        curves=curves(runs, colors),
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


@contextlib.contextmanager
def _or_lacks(lacks: list[str], what: str):
    """If the block fails, adds the reason to ``lacks`` and continues after the block."""
    try:
        yield
    except (FgBgError, ValueError, OSError) as error:
        lacks.append(f"{what}: {error}")


# --- numbers ---


def _baselines(groups) -> dict[str, str | None]:
    """For each distilled group, the first plain group that differs only in distillation."""
    plain = {g: m[0] for g, m in groups.items() if m[0].role == PLAIN}
    distilled = {g: m[0] for g, m in groups.items() if m[0].role == DISTILLED}
    return {
        name: next((g for g, p in plain.items() if p.trained_as(run)), None)
        for name, run in distilled.items()
    }


def _gains(groups, plain: dict, lacks: list[str]) -> list[tuple[str, str, str, str]]:
    """For each distilled group: its name, its mean gain, the plain group, the number of seeds."""
    aps = {g: {r.seed: r.result["AP"] for r in m if "AP" in r.result} for g, m in groups.items()}
    gains = []
    for name, base in plain.items():
        gain = paired_difference(aps[name], aps[base]) if base else None
        if gain:
            count = len(aps[name].keys() & aps[base].keys())
            seeds = (
                "one seed" if count == 1 else f"{count} seeds (95 % interval of the mean, paired)"
            )
            gains.append((name, signed(gain, 1), base, seeds))
        else:
            lacks.append(
                f"{name}: its gain. It needs a plain run with the same student, data, solver, seed "
                "and test set, trained to the end"
            )
    return gains


def _mean(members: list[Run], key: str) -> float | None:
    return average([r.result for r in members], key)


def _results(groups, load, say, lacks) -> dict:
    rows = {}
    for name, members in groups.items():
        aps = [r.result["AP"] for r in members if "AP" in r.result]
        lacks += [
            f"{name}, seed {r.seed}: its AP. It was not evaluated after its last iteration, or its "
            "AP is not a number"
            for r in members
            if "AP" not in r.result
        ]
        seeds = ", ".join(f"{v:.1f}" for v in aps) if len(aps) > 1 else "–"
        cells = [number(_mean(members, METRICS[0]), 2), seeds]
        cells += [number(_mean(members, m)) for m in METRICS[1:]]
        say(f"{name}: parameters, GFLOPs, latency")
        costs = {}
        with _or_lacks(lacks, f"{name}: parameters, GFLOPs and time"):
            cfg, model, images = load(members[0])
            costs = cost(model, read_input(cfg, images[0]["file_name"]))
        for key, digits in (("parameters_m", 3), ("gflops", 3), ("ms_per_image", 1)):
            cells.append(number(costs.get(key), digits))
        rows[name] = cells
    columns = ["", "AP", "each seed", *METRICS[1:], "parameters (M)", "GFLOPs", "ms / image"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    note = (
        "COCO AP (0 to 100) after the last iteration, mean over seeds. GFLOPs: backbone and head; "
        "one multiply-add is one FLOP. ms: median time of one image, measured for this page "
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
    # Bars of more classes cannot be read.
    figure = bars(means, list(rows), colors, "AP by class") if len(names) <= 30 else None
    return {
        "title": "AP by class",
        "figure": figure,
        "columns": ["class", *groups],
        "rows": rows,
        "note": "Mean over seeds.",
    }


_ABOUT_ERRORS = (
    "TIDE (Bolya et al., 2020): the points that AP50 would gain without any error of a kind, mean "
    "over seeds. The kinds are: wrong class, wrong place, both, duplicate, background detected as "
    "an object, missed object. The last columns are all false positives and all false negatives."
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
        raise DataError("the COCO file of its test set is not known: set DATASETS.TEST_JSON.")
    with contextlib.redirect_stdout(io.StringIO()):  # tidecv prints
        return detection_errors(truth, run.detections)


# --- pictures ---


def _pictures(groups, plain: dict, load, say, lacks) -> list[dict]:
    """Sections with the images that gained most and that lost most.

    A distilled run of the best group is compared with the plain run of the same seed.
    """
    sections = []
    with _or_lacks(lacks, "Pictures"):
        before, after = _best_pair(groups, plain)
        teachers = [m[0] for m in groups.values() if m[0].role == TEACHER]
        teacher = next((t for t in teachers if t.task[:2] == after.task[:2]), None)
        say("looking for the largest gains and losses")
        old, new = _scores(before, after)
        gain = {image: new[image] - old[image] for image in old}
        cfg, _, images = load(after)
        images = {image["image_id"]: image for image in images}
        models = {}
        for run in filter(None, (teacher, before, after)):
            with _or_lacks(lacks, f"{run.group}: its detections in the pictures"):
                models[run.group] = load(run)[:2]
        order = sorted(gain, key=lambda image: (-gain[image], image))
        for title, chosen in (
            ("Images that gained most", [i for i in order[:_COUNT] if gain[i] > 0]),
            ("Images that lost most", [i for i in order[::-1][:_COUNT] if gain[i] < 0]),
        ):
            pictures = {}
            for i in chosen:
                say(f"{title.lower()}: image {i}")
                picture = draw_side_by_side(cfg, images[i], models, _SCORE, width=270)
                name = Path(images[i]["file_name"]).name
                caption = f"{name}: F1 {old[i]:.2f} to {new[i]:.2f} ({gain[i]:+.2f})"
                pictures[caption] = jpeg(picture)
            sections.append({"title": title, "pictures": pictures, "note": ""})
        better, worse = (sum(1 for g in gain.values() if g * sign > 0) for sign in (1, -1))
        sections[-1]["note"] = (
            f"{after.group} against {before.group}, seed {after.seed}: better on {better}, worse "
            f"on {worse} of {len(gain)} images. F1 counts detections with a score of at least "
            f"{_SCORE}. A match has an IoU over 0.5. The pictures show these detections; where "
            "several overlap, only the best."
        )
    return sections


def _best_pair(groups, plain: dict) -> tuple[Run, Run]:
    """A plain and a distilled run with one seed, from the distilled group with the highest AP."""
    pairs = [
        (before, after)
        for name, base in plain.items()
        for after in groups[name]
        for before in groups.get(base, ())
        if before.seed == after.seed
    ]
    if not pairs:
        raise RunError(
            "they need a plain and a distilled run with the same test set, the same number of "
            "iterations and the same seed."
        )
    return max(pairs, key=lambda p: _mean(groups[p[1].group], "AP") or 0)


def _scores(before: Run, after: Run) -> list[dict[int, float]]:
    """For both runs, F1 by image id."""
    truth = truth_of(after.config)
    if truth is None or truth_of(before.config) != truth:
        raise DataError(f"{before.group} and {after.group} have no known test set in common.")
    return [image_scores(truth, run.detections, _SCORE) for run in (before, after)]


# --- configuration and versions ---


def _differences(configs: dict[str, dict]) -> dict:
    """The keys that a run reads and whose values differ between the configs."""
    table = _side_by_side({name: keys_read(config) for name, config in configs.items()})
    unlike = {k: v for k, v in table["rows"].items() if len(set(v)) > 1}
    for key in ("OUTPUT_DIR", "SEED", "train.output_dir", "train.seed"):
        unlike.pop(key, None)
    return {**table, "rows": unlike}


def _side_by_side(values: dict[str, dict]) -> dict:
    keys = dict.fromkeys(k for v in values.values() for k in v)
    rows = {k: [str(v.get(k, "–")) for v in values.values()] for k in keys}
    return {"columns": ["", *values], "rows": rows}

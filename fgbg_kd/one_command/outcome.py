"""What the command ends with: exported file, report and the table of all detectors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from torch import nn

from ..data.images import pick, read_image
from ..deploy import export_config, resized
from ..detectors.load import load_detector
from ..engine import load_config
from ..experiments.report import write_report
from ..utils.errors import FgBgError
from ..utils.markdown import table_of
from .measure import HEADINGS, has_onnx, measure


def result_rows(
    config: Path,
    weights: Path,
    teacher: nn.Module,
    aps: dict[str, dict],
    device: str,
) -> list[dict]:
    """A row for each detector: AP, AP50 and cost on this machine, for a test image.

    Args:
        config, weights: of the student.
        aps: "AP" and "AP50" of the teacher and of the students, by name. The teacher is first.
    """
    cfg = load_config(str(config))
    about = {
        "input_size": None,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
    }
    image = resized(_test_image(cfg), about)
    built = {"teacher": lambda: teacher, "student": lambda: load_detector(cfg, str(weights))}
    costs = measure(built, image.shape[:2], device, image=image)
    rows = []
    for name, ap in aps.items():
        cost = costs[0 if name == "teacher" else 1]
        metrics = {k: round(ap[k], 2) if ap.get(k) is not None else None for k in ("AP", "AP50")}
        rows.append({"name": name, **metrics, **{k: v for k, v in cost.items() if k != "name"}})
    return rows


def _test_image(cfg) -> np.ndarray:
    (record,) = pick(DatasetCatalog.get(cfg.DATASETS.TEST[0]), 1)
    return read_image(record["file_name"], "RGB")


def result_table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    cells = [{k: "–" if v is None else v for k, v in row.items()} for row in rows]
    return table_of(cells, HEADINGS)


def write_onnx(
    config: Path, weights: Path, output: Path, say: Callable[[str], None]
) -> Path | None:
    """Exports the student and checks the file; None: it cannot be written, which is said."""
    if not has_onnx():
        say(f"{output.name} is not written: pip install -e '.[export]'")
        return None
    try:
        export_config(str(config), str(weights), output, say=say)
    except FgBgError as error:
        say(f"{output.name} is not written: {error}")
        return None
    return output


def write_page(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The report about the trainings in a folder; None: it cannot be written, which is said."""
    output = folder / "report.html"
    try:
        write_report([folder], output, lambda text: None)
    except (FgBgError, ValueError, OSError) as error:
        say(f"report.html is not written: {error}")
        return None
    return output

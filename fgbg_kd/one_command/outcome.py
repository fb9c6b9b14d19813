"""The end of the command: exported files, report and the table of all detectors."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog

from ..data import test_size_of
from ..data.images import pick, read_image
from ..deploy import average_precision, export_files, resized
from ..detectors.load import load_detector
from ..engine import FgBgTrainer, load_config, read_for
from ..experiments.report import write_report
from ..experiments.side_by_side import draw_side_by_side
from ..experiments.visualize import write
from ..teacher import Teacher
from ..utils.errors import FgBgError
from ..utils.files import read_json, sha256_of, sha256_of_text, write_whole
from ..utils.packages import installed
from .measure import has_onnx, measure

_DRAWN, _SCORE = 4, 0.3  # test images in the picture; detections with a lower score are left out


class Openvino(NamedTuple):
    """The student for OpenVINO.

    Attributes:
        openvino: file with weights in fp16.
        int8: file with convolutions in int8.
        int8_ap: AP of the int8 file on the test set (0 to 100).
    """

    openvino: Path
    int8: Path
    int8_ap: float


def result_rows(
    config: Path,
    weights: Path,
    teacher: Teacher,
    aps: dict[str, dict],
    device: str,
    small: Openvino | None = None,
) -> list[dict]:
    """A row for each detector: AP, AP50, and its cost for one test image on this machine.

    The image has the test size of each detector.

    Args:
        config, weights: of the student.
        aps: "AP" and "AP50" of the teacher and of the students, by name. The teacher is first.
        small: OpenVINO files of the distilled student. They add columns.
    """
    cfg = load_config(str(config))
    image = _test_image(cfg)
    sides = {"teacher": teacher.test_size or test_size_of(cfg), "student": test_size_of(cfg)}
    images = {
        name: resized(image, {"input_size": None, "min_size": low, "max_size": high})
        for name, (low, high) in sides.items()
    }
    built = {
        "teacher": lambda: teacher.detector,
        "student": lambda: load_detector(cfg, str(weights)),
    }
    files = {}
    if small:
        files = {("student", f"{x}_ms"): str(getattr(small, x)) for x in ("openvino", "int8")}
    costs = measure(built, images, device, files=files)
    rows = []
    for name, ap in aps.items():
        cost = costs[0 if name == "teacher" else 1]
        metrics = {k: round(ap[k], 2) if ap.get(k) is not None else None for k in ("AP", "AP50")}
        if small:
            metrics["int8_AP"] = round(small.int8_ap, 2) if name == "distilled" else None
        rows.append({"name": name, **metrics, **{k: v for k, v in cost.items() if k != "name"}})
    return rows


def _test_image(cfg) -> np.ndarray:
    (record,) = pick(DatasetCatalog.get(cfg.DATASETS.TEST[0]), 1)
    return read_image(record["file_name"], "RGB")


def write_onnx(
    config: Path, weights: Path, output: Path, say: Callable[[str], None]
) -> Path | None:
    """Exports the student and checks the file. None: it is not written, and ``say`` gets why."""
    if not has_onnx():
        say(
            f"{output.name} is not written, because the packages onnx and onnxruntime are not "
            "installed: pip install -e '.[export]'"
        )
        return None
    try:
        export_files(str(config), str(weights), output, say=say)
    except Exception as error:  # the exporter raises many types, and the training is done
        say(f"{output.name} is not written: {type(error).__name__}: {error}")
        return None
    return output


def write_openvino(
    config: Path, weights: Path, folder: Path, say: Callable[[str], None]
) -> Openvino | None:
    """Exports the student for OpenVINO and measures the AP of its int8 file.

    The result is kept in a file. None: the files are not written, and ``say`` gets why.
    """
    if not installed("openvino", "nncf"):
        say(
            "OpenVINO files are not written, because the packages openvino and nncf are not "
            "installed: pip install -e '.[openvino]'"
        )
        return None
    files, kept = (folder / "student.xml", folder / "student.int8.xml"), folder / "openvino.json"
    key = sha256_of_text(sha256_of(weights) + config.read_text())
    if all(f.is_file() for f in (*files, kept)) and read_json(kept)["weights"] == key:
        return Openvino(*files, read_json(kept)["int8_AP"])
    try:
        found = export_files(str(config), str(weights), files[0], half=True, int8="static", say=say)
        say("int8: evaluating")
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools and NNCF print
            ap = average_precision(found.cfg, found.detectors[str(files[1])])
    except Exception as error:  # OpenVINO and NNCF raise many types, and the training is done
        written = ", ".join(f.name for f in files if f.is_file()) or "nothing"
        say(f"OpenVINO: {type(error).__name__}: {error}. Written: {written}.")
        return None
    write_whole(kept, json.dumps({"weights": key, "int8_AP": ap}))
    return Openvino(*files, ap)


def write_picture(folder: Path, students: Sequence[str], with_teacher: bool) -> Path:
    """Draws ground truth, teacher and students on a few test images, in comparison.jpg.

    Args:
        folder: of student.yaml, distilled.yaml and the trainings.
        students: names of the trainings.
        with_teacher: whether the teacher has the classes of the data.
    """
    cfg = load_config(str(folder / "student.yaml"))
    models = {}
    if with_teacher:  # built as in the training, where it has the student's classes
        teacher = FgBgTrainer.build_model(load_config(str(folder / "distilled.yaml"))).teacher
        models["teacher"] = read_for(teacher, cfg), teacher.detector
    for name in students:
        models[name] = cfg, load_detector(cfg, str(folder / name / "model_final.pth"))
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    rows = [draw_side_by_side(cfg, r, models, _SCORE) for r in pick(records, _DRAWN)]
    write(folder / "comparison.jpg", np.vstack(rows)[:, :, ::-1])
    return folder / "comparison.jpg"


def write_page(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The report about the trainings in a folder. None: not written, and ``say`` gets why."""
    output = folder / "report.html"
    try:
        write_report([folder], output, lambda text: None)
    except (FgBgError, ValueError, OSError) as error:
        say(f"report.html is not written: {error}")
        return None
    return output

"""The kinds of errors of a detector, and its F1 on each image.

The kinds and their cost in AP are defined by TIDE (Bolya et al., ECCV 2020). tidecv measures them.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.evaluator import prepare_truth
from ..utils.errors import DataError, RunError
from ..utils.files import read_json, write_whole

# Wrong class, wrong place, both, duplicate, background detected as an object, missed object. The
# last two are all false positives and all false negatives.
KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FalsePos", "FalseNeg")


def tide():
    """The tidecv module.

    Raises:
        RunError: it is not installed. The message says how to install it.
    """
    try:
        import tidecv
    except ImportError as error:
        # The requirements of tidecv would overwrite the installed OpenCV with opencv-python.
        raise RunError(
            f"Kinds of errors need tidecv ({error}). Install it: make analysis, or "
            "pip install -e '.[analysis]' and then pip install --no-deps tidecv==1.0.1"
        ) from None
    return tidecv


def detection_errors(truth: str | Path, results: str | Path) -> dict[str, float]:
    """dAP50 of each of :data:`KINDS`: the points that AP50 would gain without errors of this kind.

    Args:
        truth: COCO-format annotations.
        results: COCO-format detections on the same images (:func:`detections_of`).

    Raises:
        RunError: tidecv is not installed.
        DataError: there are no annotations.
    """
    tidecv, coco = tide(), read_json(Path(truth))
    if not coco.get("annotations"):
        raise DataError(
            f"{truth} has no annotations: kinds of errors need annotations. Name another file."
        )
    if not read_json(Path(results)):  # tidecv divides by zero
        return dict.fromkeys(KINDS, 0.0) | dict.fromkeys(("Miss", "FalseNeg"), 100.0)
    objects = tidecv.Data("truth", max_dets=100)  # tidecv's own reader asks for masks
    for image in coco["images"]:
        objects.add_image(image["id"], image["file_name"])
    for category in coco["categories"]:
        objects.add_class(category["id"], category["name"])
    for a in coco["annotations"]:
        add = objects.add_ignore_region if a.get("iscrowd") else objects.add_ground_truth
        add(a["image_id"], a["category_id"], a["bbox"])
    evaluation = tidecv.TIDE()
    detections = tidecv.datasets.COCOResult(str(results), name="run")
    evaluation.evaluate(objects, detections, mode=tidecv.TIDE.BOX, name="run")
    costs = evaluation.get_main_errors()["run"] | evaluation.get_special_errors()["run"]
    return {kind: round(float(costs[kind]), 4) for kind in KINDS}


def truth_of(settings: dict) -> Path | None:
    """Path of the COCO-format annotations of a run's test set.

    None if the config does not name exactly one set, or if the JSON file of the set is not known.

    Args:
        settings: a YAML or a Python config as {"A.B.C": value}.
    """
    if settings.get("DATASETS.TEST_JSON"):
        return Path(settings["DATASETS.TEST_JSON"])
    names = settings.get("DATASETS.TEST") or settings.get("dataloader.test.dataset.names") or []
    names = [names] if isinstance(names, str) else names
    known = MetadataCatalog.get(names[0]).get("json_file") if len(names) == 1 else None
    return Path(known) if known else None


def has_objects(truth: Path) -> bool:
    """Whether COCO-format annotations have a box that counts. Otherwise AP is not defined."""
    return any(not a.get("iscrowd") for a in read_json(truth).get("annotations", ()))


def detections_of(folder: Path) -> Path:
    """The file to which Detectron2's COCOEvaluator writes the detections of a run."""
    return folder / "inference" / "coco_instances_results.json"


def run_errors(folder: Path) -> dict[str, float]:
    """:func:`detection_errors` of a run by :class:`.runner.Runner`.

    They are measured once and written to errors.json in the folder of the run.

    Raises:
        RunError: the annotations of its test set are not known.
    """
    kept = folder / "errors.json"
    if not kept.is_file():
        truth = truth_of(read_json(folder / "settings.json"))
        if truth is None:
            raise RunError(
                f"{folder}: kinds of errors need the COCO file of the test set. Name it in "
                "DATASETS.TEST_JSON."
            )
        write_whole(kept, json.dumps(detection_errors(truth, detections_of(folder))))
    return read_json(kept)


def image_scores(truth: Path, results: Path, score: float) -> dict[int, float]:
    """F1 of each image by image id. A detection matches an object with an IoU over 0.5.

    F1 of an image without objects is 1 if nothing is detected in it, otherwise 0.

    Args:
        truth: COCO-format annotations.
        results: COCO-format detections.
        score: detections with a lower score are left out.
    """
    found = [d for d in read_json(results) if d["score"] >= score]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = COCO(str(truth))
        prepare_truth(coco)
        evaluation = COCOeval(coco, coco.loadRes(found) if found else COCO(), "bbox")
        parameters = evaluation.params
        parameters.imgIds, parameters.catIds = sorted(coco.imgs), sorted(coco.cats)
        parameters.iouThrs, parameters.maxDets = np.array([0.5]), [100]
        parameters.areaRng, parameters.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    counts = {image: np.zeros(3) for image in coco.imgs}  # matched, wrong, objects
    for one in filter(None, evaluation.evalImgs):
        matched, counted = one["dtMatches"][0] > 0, ~one["dtIgnore"][0].astype(bool)
        objects = sum(1 for ignored in one["gtIgnore"] if not ignored)
        counts[one["image_id"]] += [(matched & counted).sum(), (~matched & counted).sum(), objects]
    return {
        image: float(2 * right / (right + wrong + objects)) if wrong + objects else 1.0
        for image, (right, wrong, objects) in counts.items()
    }

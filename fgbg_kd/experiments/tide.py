"""Where a detector errs: what kinds of errors cost how much AP (TIDE: Bolya et al., ECCV 2020, by
tidecv), and on which images."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..utils.files import read_json, write_whole

# dAP50 if all errors of a kind were mended: class, place, both, duplicates, background taken for
# an object, objects missed; then all false positives and all false negatives.
KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FalsePos", "FalseNeg")


def tide():
    """The tidecv module.

    Raises:
        ValueError: it is not installed; says how.
    """
    try:
        import tidecv
    except ImportError as error:
        # Its own requirements would put opencv-python over the OpenCV that is there.
        raise ValueError(
            f"Error analysis needs tidecv ({error}): pip install -e '.[analysis]', then "
            "pip install --no-deps tidecv==1.0.1"
        ) from None
    return tidecv


def detection_errors(truth: str | Path, results: str | Path) -> dict[str, float]:
    """dAP50 of each of KINDS, in points of AP: how much higher AP50 were without these errors.

    Args:
        truth: COCO-format annotations.
        results: COCO-format detections of the same images (:func:`detections_of`).

    Raises:
        ValueError: tidecv is not installed, or there are no annotations.
    """
    tidecv, coco = tide(), read_json(Path(truth))
    if not coco.get("annotations"):
        raise ValueError(f"{truth} has no annotations.")
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
    analysis = tidecv.TIDE()
    detections = tidecv.datasets.COCOResult(str(results), name="run")
    analysis.evaluate(objects, detections, mode=tidecv.TIDE.BOX, name="run")
    errors = analysis.get_main_errors()["run"] | analysis.get_special_errors()["run"]
    return {kind: round(float(errors[kind]), 4) for kind in KINDS}


def truth_of(settings: dict) -> Path | None:
    """COCO-format annotations of a run's test set; None where no one set's are known.

    Args:
        settings: its config, YAML's or Python's, as {"A.B.C": value}.
    """
    if settings.get("DATASETS.TEST_JSON"):
        return Path(settings["DATASETS.TEST_JSON"])
    names = settings.get("DATASETS.TEST") or settings.get("dataloader.test.dataset.names") or []
    names = [names] if isinstance(names, str) else names
    known = MetadataCatalog.get(names[0]).get("json_file") if len(names) == 1 else None
    return Path(known) if known else None


def has_objects(truth: Path) -> bool:
    """Whether COCO-format annotations have a box to be found, without which there is no AP."""
    return any(not a.get("iscrowd") for a in read_json(truth).get("annotations", ()))


def detections_of(folder: Path) -> Path:
    """Where Detectron2's COCOEvaluator leaves the detections of a run."""
    return folder / "inference" / "coco_instances_results.json"


def run_errors(folder: Path) -> dict[str, float]:
    """:func:`detection_errors` of a finished run (fgbg_kd.experiments.runner); kept in errors.json beside it.

    Raises:
        ValueError: the annotations of its test set are not known.
    """
    kept = folder / "errors.json"
    if not kept.is_file():
        truth = truth_of(read_json(folder / "settings.json"))
        if truth is None:
            raise ValueError(f"{folder}: no COCO file is known of its test set: no kinds of errors")
        write_whole(kept, json.dumps(detection_errors(truth, detections_of(folder))))
    return read_json(kept)


def image_scores(truth: Path, results: Path, score: float) -> dict[int, float]:
    """F1 of each image: detections of a score of so much and more against objects, IoU over 0.5.

    An image without objects has 1 if nothing is found in it, else 0.
    """
    found = [d for d in read_json(results) if d["score"] >= score]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        coco = COCO(str(truth))
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

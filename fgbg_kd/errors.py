"""What kind of errors cost a detector how much AP: TIDE (Bolya et al., ECCV 2020), by tidecv."""

import json
from pathlib import Path

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
        results: COCO-format detections of the same images (COCOEvaluator writes them to
            inference/coco_instances_results.json).
    """
    tidecv, coco = tide(), json.loads(Path(truth).read_text())
    if not json.loads(Path(results).read_text()):  # tidecv divides by zero
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


def run_errors(folder: Path) -> dict[str, float]:
    """:func:`detection_errors` of a finished run (fgbg_kd.runs); kept in errors.json beside it."""
    from detectron2.data import MetadataCatalog

    kept = folder / "errors.json"
    if not kept.is_file():
        settings = json.loads((folder / "settings.json").read_text())
        truth = settings["DATASETS.TEST_JSON"]
        truth = truth or MetadataCatalog.get(settings["DATASETS.TEST"][0]).json_file
        found = detection_errors(truth, folder / "inference" / "coco_instances_results.json")
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())

"""Photos without labels in training: the teacher's confident detections are used as their boxes.

The teacher runs once before the training. It first runs over labelled training images. They show
which detections are right, and this gives the lowest score of a confident detection. Then it runs
over the photos. The result is a COCO file. A resumed run reads this file, because the teacher and
the photos are the same.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from ..data.coco_files import box_records
from ..data.unlabeled import find_photos
from ..detectors.dense import DenseView
from ..teacher import Teacher
from ..utils.errors import ConfigError, TeacherError
from ..utils.files import digest_of_files, read_json, sha256_of_text, write_whole
from .loader import ResumableLoader

logger = logging.getLogger(__name__)

_MEASURED = 300  # largest number of labelled images on which the precision is measured
_IOU = 0.5  # smallest IoU of a right detection with its object


class Unlabeled(NamedTuple):
    """Photos without labels, and how a training uses them.

    Attributes:
        folders: paths of the folders that hold the photos.
        share: share of the photos in a batch, between 0 and 1.
        precision: see :func:`score_threshold`.
        file: path of the COCO file of the detections. It is read if it was made from the same
            teacher, photos and labelled images. Otherwise it is made.
        training: dataset dicts of the labelled set.
        tests: names of test sets. Their images are left out.
        classes: names of the student's classes; None: not known.
        mapper: reads images for the teacher, as in a test.
        longest: largest side of an image in training, in pixels; 0: not known.
        filter_empty: whether photos without a confident detection are left out.
    """

    folders: Sequence[str]
    share: float
    precision: float
    file: str
    training: Sequence[dict]
    tests: Sequence[str]
    classes: Sequence[str] | None
    mapper: Callable[[dict], dict]
    longest: int = 0
    filter_empty: bool = True


def add_unlabeled(loader, teacher: Teacher | None, wanted: Unlabeled) -> None:
    """Mixes photos without labels into the batches of a loader.

    Raises:
        ConfigError: there is no teacher, a value is not valid, or ``wanted.file`` was written by
            another program.
        DataError: a photo cannot be used, or there is none.
        TeacherError: the teacher is two-stage, or its detections are not right often enough.
    """
    if teacher is None:
        raise ConfigError(
            "DATASETS.UNLABELED needs a teacher, but this is plain training: distil (MODEL."
            "META_ARCHITECTURE FgBgDistiller and MODEL.KD.TEACHER), or set DATASETS.UNLABELED ()."
        )
    check_teacher(teacher)
    if not isinstance(loader, ResumableLoader):
        raise ConfigError(
            f"Photos without labels need a ResumableLoader, not a {type(loader).__name__}: use "
            "Detectron2's build_detection_train_loader without other options."
        )
    without = loader.number_of(wanted.share)  # before the teacher runs, because it can refuse
    if not 0 < wanted.precision <= 1:
        raise ConfigError(
            f"MODEL.KD.UNLABELED.PRECISION is {wanted.precision}: give a number over 0, at most 1."
        )
    tests = (record for name in wanted.tests for record in DatasetCatalog.get(name))
    photos = find_photos(wanted.folders, wanted.training, tests, wanted.longest)
    records = _with_detections(teacher, photos, wanted, loader.num_workers)
    kept = [r for r in records if r["annotations"]] if wanted.filter_empty else records
    if not kept:
        raise TeacherError(
            f"The teacher detects nothing with confidence on {len(photos)} photos of "
            "DATASETS.UNLABELED: lower MODEL.KD.UNLABELED.PRECISION, or set DATASETS.UNLABELED ()."
        )
    loader.mix(kept, wanted.share)
    logger.info(
        f"In each batch, each process has {loader.batch_size} images. {without} of them are photos "
        f"without labels. {len(kept)} photos are used. {len(records) - len(kept)} photos without a "
        "confident detection are left out."
    )


def check_teacher(teacher: Teacher) -> None:
    """Refuses a two-stage teacher, because its classes are not matched to the student's.

    Raises:
        TeacherError: the teacher is two-stage.
    """
    if not isinstance(teacher.view, DenseView):
        raise TeacherError(
            f"DATASETS.UNLABELED needs a one-stage teacher, but this one is a {teacher.view.name}: "
            "its classes are not matched to the student's. Use a one-stage teacher, or set "
            "DATASETS.UNLABELED ()."
        )


def _with_detections(
    teacher: Teacher, photos: list[dict], wanted: Unlabeled, num_workers: int
) -> list[dict]:
    """Dataset dicts of the photos with confident detections as annotations.

    The detections are read from the file if it was made from the same teacher, photos and labelled
    images.
    """

    def ask(records: Sequence[dict], threshold: float = 0.0) -> list[dict]:
        return detections(teacher.detector, records, wanted.mapper, threshold, num_workers)

    places = np.linspace(0, len(wanted.training) - 1, min(len(wanted.training), _MEASURED))
    labeled = [wanted.training[i] for i in places.astype(int)]
    about = {
        "teacher": _identity(teacher),
        "reading": [str(getattr(wanted.mapper, k, "")) for k in ("image_format", "augmentations")],
        "photos": [list(p.values()) for p in photos],
        "labeled": [[r["file_name"], _boxes(r)] for r in labeled],
        "files": digest_of_files(Path(r["file_name"]) for r in [*photos, *labeled]),
        "precision": wanted.precision,
    }
    key, file = sha256_of_text(json.dumps(about)), Path(wanted.file)
    content = _read(file)
    known = bool(content) and content["info"].get("key") == key
    if content and not known:
        logger.warning(
            f"{file} is made anew, because it was made from another teacher, other photos, other "
            "labelled images or another PRECISION. A resumed run does not continue exactly."
        )
    if not all(comm.all_gather(known)):  # all processes run the teacher, or none does
        logger.info(f"The teacher runs over {len(labeled)} labelled images of the training set.")
        threshold = score_threshold(ask(labeled), labeled, wanted.precision)
        logger.info(f"The teacher runs over {len(photos)} photos without labels.")
        info = {"key": key, "score_threshold": threshold}
        names = wanted.classes or [f"class {i}" for i in range(teacher.view.num_classes)]
        content = _coco(photos, ask(photos, threshold), info, names)
        if comm.is_main_process():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(content))
    logger.info(
        f"{file}: {len(content['annotations'])} detections with a score of at least "
        f"{content['info']['score_threshold']:.3f} on {len(photos)} photos without labels."
    )
    return box_records(content, "", {c["id"]: c["id"] for c in content["categories"]})


def _identity(teacher: Teacher) -> list:
    """Everything on which a teacher's detections depend. The first entry is a hash of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(teacher.detector.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    normalization = [x.tolist() for x in teacher.view.normalization]
    return [digest.hexdigest(), normalization, teacher.view.suppression]


def _read(file: Path) -> dict:
    """The content of a file of detections; {} if there is no file.

    Raises:
        ConfigError: the file was written by another program. It is not overwritten.
    """
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except ValueError:
        content = None
    if not (isinstance(content, dict) and "score_threshold" in (content.get("info") or {})):
        raise ConfigError(
            f"MODEL.KD.UNLABELED.FILE {file} was not written by a training with photos without "
            "labels: name another file."
        )
    return content


class _Detections(DatasetEvaluator):
    """Collects detections as COCO's results: a list of dicts, the same in all processes."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def reset(self):
        self.found = []

    def process(self, inputs, outputs):
        for x, output in zip(inputs, outputs):
            found = instances_to_coco_json(output["instances"].to("cpu"), x["image_id"])
            self.found += [d for d in found if d["score"] >= self.threshold]

    def evaluate(self):
        return [d for part in comm.all_gather(self.found) for d in part]


def detections(
    detector: nn.Module,
    records: Sequence[dict],
    mapper: Callable[[dict], dict],
    threshold: float = 0.0,
    num_workers: int = 0,
) -> list[dict]:
    """A detector's detections as COCO's results.

    Args:
        detector: of Detectron2.
        records: dataset dicts of images.
        mapper: reads an image, as in a test.
        threshold: detections with a lower score are left out.
        num_workers: number of loading processes.

    Returns:
        Dicts with "image_id" (place in ``records``), "category_id" (class number), "bbox" (x, y,
        width, height in pixels) and "score".
    """
    keys = ("file_name", "height", "width")
    images = [{**{k: r[k] for k in keys}, "image_id": i} for i, r in enumerate(records)]
    loader = build_detection_test_loader(images, mapper=mapper, num_workers=num_workers)
    return inference_on_dataset(detector, loader, _Detections(threshold))


def score_threshold(found: list[dict], records: Sequence[dict], precision: float) -> float:
    """The lowest score s such that enough of the detections with a score of at least s are right.

    A detection is right if its IoU with an object of its class is at least 0.5. Each object is
    found at most once, by the detection with the highest score (COCO's matching). Detections of
    crowds do not count.

    Args:
        found: the result of :func:`detections` for the records.
        records: dataset dicts with annotations.
        precision: share of these detections that must be right, over 0 and at most 1.

    Raises:
        TeacherError: no score gives this share.
    """
    scores, right = _judged(found, records)
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    rate = np.cumsum(right) / np.arange(1, len(right) + 1)
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # equal scores stay together
    good = np.flatnonzero(last & (rate >= precision))
    if not len(good):
        best = (
            f"at most {rate[last].max():.2f} of them are right" if len(rate) else "there are none"
        )
        raise TeacherError(
            f"The teacher's detections on {len(records)} labelled training images are not right "
            f"often enough for MODEL.KD.UNLABELED.PRECISION {precision}: {best} (IoU {_IOU}, right "
            "class). Check that the teacher was trained on these classes and with this INPUT. Or "
            "lower PRECISION, or set DATASETS.UNLABELED ()."
        )
    n = good[-1] + 1
    objects = sum(not a.get("iscrowd", 0) for r in records for a in r.get("annotations", ()))
    logger.info(
        f"From a score of {scores[n - 1]:.3f} on, {rate[n - 1]:.2f} of the teacher's detections on "
        f"{len(records)} labelled training images are right: {right[:n].sum()} of {n}. They are "
        f"{right[:n].sum() / max(objects, 1):.2f} of the objects."
    )
    return float(scores[n - 1])


def _judged(found: list[dict], records: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (D,), and whether each detection is right (D,). Detections of crowds are left out."""
    if not found:
        return np.zeros(0), np.zeros(0, bool)
    truth = COCO()
    boxes = [{**b, "image_id": i} for i, r in enumerate(records) for b in _boxes(r)]
    number = 1 + max(x["category_id"] for x in [*found, *boxes])
    truth.dataset = _coco(records, boxes, {}, [""] * number)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in found]), "bbox")
        evaluation.params.iouThrs = np.array([_IOU])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [max(100, len(found))]
        evaluation.evaluate()
    rows = [e for e in evaluation.evalImgs if e is not None]
    scores, matches, ignored = (
        np.concatenate([np.ravel(e[k]) for e in rows])
        for k in ("dtScores", "dtMatches", "dtIgnore")
    )
    counted = ~ignored.astype(bool)
    return scores[counted], matches[counted] > 0


def _boxes(record: dict) -> list[dict]:
    """The annotations of a dataset dict in COCO's form, with the class number as category_id."""
    return [
        {
            "bbox": [
                float(v) for v in BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS)
            ],
            "category_id": a["category_id"],
            "iscrowd": int(a.get("iscrowd", 0)),
        }
        for a in record.get("annotations", ())
    ]


def _coco(
    records: Sequence[dict], boxes: Sequence[dict], info: dict, classes: Sequence[str]
) -> dict:
    """A COCO file of these images and boxes. The id of an image is its index in ``records``."""
    keys = ("file_name", "height", "width")
    return {
        "info": info,
        "images": [{"id": i, **{k: r[k] for k in keys}} for i, r in enumerate(records)],
        "annotations": [
            {"iscrowd": 0, **b, "id": i, "area": b["bbox"][2] * b["bbox"][3]}
            for i, b in enumerate(boxes, 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }

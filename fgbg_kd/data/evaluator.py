"""Detectron2's COCO evaluator for boxes. It also handles unusual files and pycocotools versions."""

import contextlib
import io
import logging
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO

logger = logging.getLogger(__name__)


def prepare_truth(coco: COCO) -> None:
    """Makes pycocotools evaluate unusual files.

    pycocotools 2.0.9 and 2.0.10 raise a KeyError without "info". All versions take the annotation
    id 0 for "no object", so an object with this id would never be found. Roboflow and Label Studio
    number from 0.
    """
    coco.dataset.setdefault("info", {})
    for number, annotation in enumerate(coco.dataset.get("annotations", ()), 1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco.createIndex()


class BoxEvaluator(COCOEvaluator):
    """COCOEvaluator for boxes.

    It differs from COCOEvaluator in five ways:

    - A file without "info", or with the annotation id 0, is evaluated (:func:`prepare_truth`).
    - A set that was registered in Python is written to a COCO file anew. COCOEvaluator takes the
      file of an earlier run, even if the annotations have changed.
    - If nothing was detected, AP is 0, not NaN.
    - If AP cannot be computed, the log says why.
    - The AP of each class has the right name, even if the file and the training set number the
      classes differently.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        """
        Args:
            dataset_name: a registered set with a COCO file.
            output_dir: folder for the detections. None: they are not written.
        """
        if output_dir and not hasattr(MetadataCatalog.get(dataset_name), "json_file"):
            if comm.is_main_process():
                Path(output_dir, f"{dataset_name}_coco_format.json").unlink(missing_ok=True)
            comm.synchronize()
        super().__init__(dataset_name, tasks=("bbox",), output_dir=output_dir)
        prepare_truth(self._coco_api)
        objects = self._coco_api.dataset.get("annotations", ())
        self._objects = sum(not a.get("iscrowd", 0) for a in objects)
        ids = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
        self._class_order = [ids[i] for i in sorted(ids)] if ids else None

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        if class_names and self._class_order:  # pycocotools sorts by category id
            class_names = [class_names[i] for i in self._class_order]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if not self._objects:
            logger.warning(
                "AP cannot be computed: the test set has no objects (or only crowds). Add "
                "annotations to the test set, or set DATASETS.TEST ()."
            )
        elif coco_eval is None:
            logger.warning(
                "AP is 0: the detector detected nothing in the test set. Lower the score threshold "
                "(SCORE_THRESH_TEST), or check the weights."
            )
            return dict.fromkeys(results, 0.0)
        return results

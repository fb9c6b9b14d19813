"""One image is evaluated before training, so that a broken evaluation stops the run at once."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable

import torch
from detectron2.data import MapDataset
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Boxes, Instances
from torch import nn

from ..utils.errors import EvaluationError, FgBgError

logger = logging.getLogger(__name__)

# A test set: its loader and its evaluators.
Evaluation = tuple[Iterable, list[DatasetEvaluator]]


class EvaluationTrial(HookBase):
    """Evaluates the first image of every test set before the first iteration.

    It does not change the training: each iteration has random numbers of its own, and the model
    goes back to training mode.
    """

    def __init__(self, model: nn.Module, evaluations: Callable[[], Iterable[Evaluation]]):
        """
        Args:
            model: not distributed. Each process evaluates the image by itself.
            evaluations: makes the loader and the evaluators of each test set.
        """
        self.model, self.evaluations = model, evaluations

    def before_train(self):
        """
        Raises:
            EvaluationError: the evaluation raises an error.
        """
        tried = 0
        try:
            with _silence():
                for loader, evaluators in self.evaluations():
                    _try(self.model, loader, evaluators)
                    tried += 1
        except FgBgError:
            raise
        except Exception as error:  # whatever a dependency, a file or a model raises
            raise EvaluationError(
                f"The evaluation on the test set does not work ({type(error).__name__}: {error}). "
                "It was tried on one image before training. Fix the cause (--traceback shows where "
                "it is), or train without a test set: DATASETS.TEST ()."
            ) from error
        if tried:
            logger.info("The evaluation was tried on one image of the test set: it works.")


@contextlib.contextmanager
def _silence():
    """Tables of one image would look like results."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _try(model: nn.Module, loader: Iterable, evaluators: list[DatasetEvaluator]) -> None:
    inputs = _first(loader)
    if not inputs:
        return
    with inference_context(model), torch.no_grad():
        outputs = model(inputs)
    _invent_a_detection(outputs[0])
    for evaluator in evaluators:
        evaluator.reset()
        evaluator.process(inputs, outputs)
        if isinstance(evaluator, COCOEvaluator):
            evaluator._output_dir = None  # the files of a previous evaluation stay
            evaluator.evaluate(img_ids=[inputs[0]["image_id"]])
        else:
            evaluator.evaluate()


def _first(loader: Iterable) -> list[dict]:
    """The first image, without the loader's processes where that is possible."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, MapDataset):
        return [dataset[0]] if len(dataset) else []
    return next(iter(loader), [])[:1]


def _invent_a_detection(output: dict) -> None:
    """An untrained detector finds nothing, and COCO's evaluation of nothing is not tried."""
    found = output.get("instances")
    boxes_only = {"pred_boxes", "scores", "pred_classes"}
    if found is None or len(found) or set(found.get_fields()) != boxes_only:
        return
    height, width = found.image_size
    output["instances"] = Instances(
        (height, width),
        pred_boxes=Boxes(torch.tensor([[0.0, 0.0, width, height]])),
        scores=torch.ones(1),
        pred_classes=torch.zeros(1, dtype=torch.int64),
    )

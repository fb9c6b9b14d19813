"""Stops a run at the first loss that is not finite, and saves the input of the loss to a file.

The file is a checkpoint with the weights before the step and the batch. From it, tools/replay.py
computes the losses again and shows which values are not finite.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from ..detectors.dense import DenseView, DetectorView, lenient_view
from ..teacher import autocast
from ..utils.errors import NonFiniteLossError
from ..utils.files import whole
from .hooks import beside_detector, detector_of, unwrapped


class FiniteTrainer(SimpleTrainer):
    """SimpleTrainer that checks the losses of each process.

    SimpleTrainer copies the losses to the CPU anyway, so the check does not wait for the GPU again.
    """

    def __init__(self, model: nn.Module, data_loader, optimizer, *, output_dir: str, seed: int):
        super().__init__(model, data_loader, optimizer)
        self.output_dir, self.seed = output_dir, seed
        self._last = _LastInput()
        model.register_forward_pre_hook(self._last)

    @property
    def batch(self) -> list[dict]:
        """The last input of the model."""
        return self._last.batch

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], *args, **kwargs):
        loss_dict = {name: loss.detach().cpu() for name, loss in loss_dict.items()}
        bad = [
            f"{name} is {loss.item()}" for name, loss in loss_dict.items() if not loss.isfinite()
        ]
        if bad:
            self._stop(bad)
        super()._write_metrics(loss_dict, *args, **kwargs)

    def _stop(self, bad: list[str]):
        path = os.path.join(
            self.output_dir, f"not_finite_{self.iter:07d}_rank{comm.get_rank()}.pth"
        )
        model = unwrapped(self.model)
        names = ", ".join(str(x.get("file_name", "?")) for x in self.batch)
        message = f"Iteration {self.iter}: {' and '.join(bad)}. Images: {names}."
        try:
            state = {"iteration": self.iter, "seed": self.seed, "rank": comm.get_rank()}
            save_batch(path, model, self.batch, {**state, "loss_normalizer": self._last.normalizer})
            message += f" The images and the weights are in {path}: use tools/replay.py."
        except OSError as error:
            message += f" The images could not be saved: {error}."
        if comm.get_world_size() == 1:  # with more, SyncBN would wait for the others
            device = next(model.parameters()).device.type
            try:
                with torch.autocast(device, enabled=isinstance(self, AMPTrainer)):
                    message += f" {not_finite(model, self.batch)}"
            except Exception as error:  # such as out of memory: the loss must still be reported
                message += f" The first value that is not finite could not be found ({error})."
        raise NonFiniteLossError(message)


class _LastInput:
    """Keeps the last input of a model. A copy of the model copies it, but not the trainer."""

    batch, normalizer = (), None

    def __call__(self, model, inputs):
        self.batch = inputs[0]
        student = lenient_view(detector_of(unwrapped(model)))
        self.normalizer = student.loss_normalizer if student else None


class FiniteAMPTrainer(FiniteTrainer, AMPTrainer):
    """AMPTrainer with the check of FiniteTrainer."""

    def load_state_dict(self, state_dict):
        """Loads the state of a training with or without mixed precision."""
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict(), **state_dict})


def save_batch(path: str, model: nn.Module, batch: list[dict], state: dict) -> None:
    """Writes a checkpoint of the student, the adapters and the batch atomically.

    Args:
        state: other values that the losses depend on. Its keys differ from the checkpoint's keys.
    """
    rows = []
    for x in batch:
        row = {k: v for k, v in x.items() if isinstance(v, (Tensor, int, float, str))}
        if "instances" in x:
            row["gt_boxes"] = x["instances"].gt_boxes.tensor
            row["gt_classes"] = x["instances"].gt_classes
        rows.append(row)
    content = {"model": detector_of(model).state_dict(), "batch": rows, **state}
    content |= {name: part.state_dict() for name, part in beside_detector(model).items()}
    with whole(Path(path)) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # torch raises it for a full disk
            raise OSError(str(error)) from error


def load_batch(saved: dict) -> list[dict]:
    """The batch in a file of :func:`save_batch`, as input of a Detectron2 model."""
    batch = []
    for row in saved["batch"]:
        x = dict(row)
        if "gt_boxes" in x:
            instances = x["instances"] = Instances(x["image"].shape[-2:])
            instances.gt_boxes, instances.gt_classes = Boxes(x.pop("gt_boxes")), x.pop("gt_classes")
        batch.append(x)
    return batch


@torch.no_grad()
def not_finite(model: nn.Module, batch: list[dict], losses: Iterable[Tensor] = ()) -> str:
    """Says in a sentence which parameters, features or predictions are not finite for a batch.

    Args:
        losses: the losses of the batch, if they were computed again.
    """
    found = [k for k, v in model.named_parameters() if not v.isfinite().all()]
    found = [f"the parameters {', '.join(found[:5])}{', ...' * (len(found) > 5)}"] if found else []
    detector = detector_of(model)
    student = lenient_view(detector)
    if isinstance(student, DenseView):
        images = student.preprocess(batch)
        name = "the model" if detector is model else "the student"
        found += _bad_levels(name, student, images.tensor)
        if detector is not model and model.teacher is not None:
            teacher = model.teacher
            with autocast(teacher.precision, images.tensor.device):  # as in training
                inputs = teacher.input_of(images, student)
                found += _bad_levels("the teacher", teacher.view, inputs)
    elif not found:
        return "The parameters are finite. Features are examined in dense detectors only."
    losses = list(losses)
    if found:
        return f"Not finite: {'; '.join(found)}."
    if losses and all(x.isfinite().all() for x in losses):
        return (
            "All values are finite, the losses too: this batch alone is not the reason. If the "
            "training has several processes, replay the files of the others."
        )
    return "Parameters, features and predictions are finite: the loss itself overflows."


def _bad_levels(name: str, of: DetectorView, images: Tensor) -> list[str]:
    found, output = [], of.run(images)
    parts = {"features": output.features}
    if isinstance(of, DenseView):
        parts |= of.named_predictions(output)
    for what, maps in parts.items():
        bad = [x.name for x, m in zip(of.levels, maps) if not m.isfinite().all()]
        if bad:
            found.append(f"{what} of {name} on {', '.join(bad)}")
    return found

"""Exports a detector to a file, and to a smaller file in int8."""

import json
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from ..data.classes import categories_of, set_categories
from ..detectors.load import load_detector, read_detector_config, weights_of
from ..utils.errors import DeployError
from ..utils.files import whole
from ..utils.packages import need
from .deployable import METADATA, OUTPUTS, Deployable, dense_view
from .openvino_file import quantize_openvino, write_openvino

FORMATS = (".onnx", ".pt", ".xml")

logger = logging.getLogger(__name__)


def load_for_deployment(config: str, weights: str, need_ids: bool = True) -> tuple[nn.Module, dict]:
    """Loads the detector of a YAML config and describes it.

    The detector of a distillation config is the student.

    Args:
        config: a path, or a name in the model zoo.
        weights: its checkpoint. "": the checkpoint that the config names.
        need_ids: see :func:`describe`.

    Raises:
        DeployError: the config is not YAML, or its detector cannot be deployed or described.
        ConfigError: the config does not exist.
        CheckpointError: the weights do not fill the detector exactly.
    """
    if config.endswith(".py"):
        raise DeployError(
            f"{config} is a Python config. Only a YAML config can be deployed: write a YAML "
            "config with the same detector. It loads the same checkpoint."
        )
    cfg = read_detector_config(config)
    detector = load_detector(cfg, weights or weights_of(config, cfg))
    return detector, describe(cfg, detector, need_ids)


def describe(cfg: CfgNode, detector: nn.Module, need_ids: bool = True) -> dict:
    """What a user of a detector needs to know, as values that JSON can hold.

    Args:
        need_ids: what to do if the config's data do not give the categories. True: raise an error.
            False: number the classes and log a warning.

    Returns:
        A dictionary with these keys.

        - "categories": COCO's [{"id", "name"}, ...] in the order of the classes' numbers.
        - "min_size", "max_size": an image is resized so that its shorter side is "min_size". If its
          longer side would exceed "max_size", the longer side is "max_size" (INPUT.MIN_SIZE_TEST,
          INPUT.MAX_SIZE_TEST).
        - "input_size": [height, width] if the detector takes one size only; otherwise None.
        - "suppression": keyword arguments of :func:`suppress`.

    Raises:
        DeployError: the detector cannot be deployed, or the config's data do not give the
            categories.
    """
    of = dense_view(detector)
    if of.square_size and cfg.INPUT.MAX_SIZE_TEST > of.square_size:
        raise DeployError(
            f"The {of.name} pads images to {of.square_size}x{of.square_size} pixels, and "
            f"INPUT.MAX_SIZE_TEST is {cfg.INPUT.MAX_SIZE_TEST}: set it to {of.square_size}."
        )
    return {
        "categories": _categories(cfg, of.num_classes, need_ids),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "input_size": list(of.input_size) if of.input_size else None,
        "suppression": of.suppression,
    }


def _categories(cfg: CfgNode, number: int, need_ids: bool) -> list[dict]:
    problems = []
    for part in ("TRAIN", "TEST"):
        path, sets = cfg.DATASETS[f"{part}_JSON"], cfg.DATASETS[part]
        if path and not os.path.isfile(path):
            problems.append(f"DATASETS.{part}_JSON {path} does not exist")
            break  # the test file may number the classes in another order
        if not path and not sets:
            continue
        found = categories_of(path) if path else set_categories(sets[0])
        if len(found) == number:
            return found
        problems.append(
            f"DATASETS.{part} has {len(found)} categories for {number} classes"
            if found
            else f"the set {sets[0]} is not registered with class names (--import)"
        )
    if problems:
        unknown = f"Class names and COCO ids are not known: {', '.join(problems)}."
        if need_ids:
            raise DeployError(f"{unknown} Put the file there, or correct the config.")
        logger.warning(f"{unknown} The classes are numbered.")
    return [{"id": i + 1, "name": f"class {i}"} for i in range(number)]


def export(
    detector: nn.Module,
    about: dict,
    output: str,
    image: np.ndarray,
    nms_inside: bool = True,
    half: bool = False,
) -> None:
    """Exports a detector to a file.

    Args:
        detector, about: results of :func:`load_for_deployment`.
        output: name.onnx, name.pt for TorchScript, or name.xml for OpenVINO (with name.bin).
        image: an example, (H, W, 3) uint8. The file also takes other sizes, unless the detector
            has an "input_size".
        nms_inside: False: the file returns candidates.
        half: the OpenVINO file holds its weights in fp16.

    Raises:
        DeployError: ``output`` has another suffix, or the package onnx or openvino is missing.
    """
    if Path(output).suffix not in FORMATS:
        raise DeployError(
            f"{output}: give a name that ends in .onnx, in .xml for OpenVINO, or in .pt for "
            "TorchScript."
        )
    about = {**about, "nms_inside": nms_inside}
    model, example = Deployable(detector, nms_inside), torch.from_numpy(image.copy())
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    if output.endswith(".xml"):
        write_openvino(model, about, Path(output), image, half)
        return
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch warns that sizes are traced, which is intended. It also warns that this exporter
        # is the older one. The newer exporter does not support how Detectron2 uses the number of
        # boxes.
        warnings.simplefilter("ignore")
        if output.endswith(".pt"):
            extra = {METADATA: json.dumps(about)}
            traced = torch.jit.trace(model, (example,), check_trace=False)
            torch.jit.save(traced, output, _extra_files=extra)
            return
        onnx = need("onnx", "export", DeployError)
        torch.onnx.export(
            model,
            (example,),
            output,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_axes=_dynamic_axes(about),
        )
        written = onnx.load(output)
        onnx.helper.set_model_props(written, {METADATA: json.dumps(about)})
        onnx.save(written, output)


def _dynamic_axes(about: dict) -> dict:
    """The sizes that may differ from the example's. A detector of one input size refuses others."""
    axes = {name: {0: "M"} for name in OUTPUTS}
    return axes if about["input_size"] else {"image": {0: "height", 1: "width"}, **axes}


def quantize(source: str, output: str, images: Iterable[np.ndarray] | None = None) -> None:
    """Writes a file with int8 convolutions, using the quantiser of onnxruntime or NNCF (OpenVINO).

    If it fails or is interrupted, an existing output file is not changed.

    Args:
        source: an ONNX or OpenVINO file from :func:`export`.
        output: of the same format.
        images: (H, W, 3) uint8 RGB. They give the ranges of activations (static quantisation).
            None: the ranges are taken from each image when the file is run (dynamic; ONNX only).

    Raises:
        DeployError: the package onnxruntime, openvino or nncf is missing, or OpenVINO gets no
            images.
    """
    if source.endswith(".xml"):
        if images is None:
            raise DeployError("OpenVINO has static int8 only: give images (--int8 static).")
        quantize_openvino(source, output, images)
        return
    need("onnxruntime", "export", DeployError)
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder, whole(Path(output)) as partial:
        prepared = os.path.join(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        if images is None:
            # On CPUs, onnxruntime's integer convolution takes unsigned weights only.
            q.quantize_dynamic(
                prepared, partial, op_types_to_quantize=["Conv"], weight_type=q.QuantType.QUInt8
            )
            return

        class Reader(q.CalibrationDataReader):
            rest = iter(images)

            def get_next(self):
                image = next(self.rest, None)
                return None if image is None else {"image": image}

        q.quantize_static(
            prepared, partial, Reader(), op_types_to_quantize=["Conv"], per_channel=True
        )

"""Writing a detector into a file of its own, and into a smaller one in int8."""

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
from detectron2.data import MetadataCatalog
from torch import nn

from ..detectors.load import load_detector, read_detector_config, weights_of
from ..utils.errors import DeployError
from ..utils.files import whole
from .deployable import OUTPUTS, Deployable, dense_view

FORMATS = (".onnx", ".pt")
METADATA = "fgbg_kd.json"  # its name in either kind of file

logger = logging.getLogger(__name__)


def load_for_deployment(config: str, weights: str, need_ids: bool = True) -> tuple[nn.Module, dict]:
    """The (student's) detector of a YAML config, whole or not at all, and its :func:`describe`.

    Raises:
        DeployError: a config that is not YAML, not of a RetinaNet or FCOS, or as :func:`describe`.
        ConfigError: no such config.
        CheckpointError: weights that do not fill the detector exactly.
    """
    cfg = read_detector_config(config)
    if not isinstance(cfg, CfgNode):
        raise DeployError(f"{config}: only a detector of a YAML config is exported.")
    detector = load_detector(cfg, weights or weights_of(config, cfg))
    dense_view(detector)
    return detector, describe(cfg, detector, need_ids)


def describe(cfg: CfgNode, detector: nn.Module, need_ids: bool = True) -> dict:
    """What a user of a detector needs to know, in JSON's types.

    Args:
        need_ids: False: where the data that the config names do not give the categories, the
            classes are numbered, with a warning.

    Returns:
        "categories": COCO's, [{"id", "name"}, ...] in the order of the classes' numbers;
        "min_size", "max_size": the shorter side's length to resize to, and the longer's limit;
        "suppression": keyword arguments of :func:`suppress`.

    Raises:
        DeployError: the data that the config names do not give the categories.
    """
    return {
        "categories": _categories(cfg, dense_view(detector).num_classes, need_ids),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "suppression": dense_view(detector).suppression,
    }


def _categories(cfg: CfgNode, number: int, need_ids: bool) -> list[dict]:
    problems = []
    for part in ("TRAIN", "TEST"):
        path, found = cfg.DATASETS[f"{part}_JSON"], []
        if os.path.isfile(path):
            found = json.loads(Path(path).read_text())["categories"]
        elif path:
            problems.append(f"DATASETS.{part}_JSON {path} is not there")
        elif cfg.DATASETS[part]:
            known = MetadataCatalog.get(cfg.DATASETS[part][0])
            ids = known.get("thing_dataset_id_to_contiguous_id") or {}
            found = [{"id": i, "name": known.thing_classes[n]} for i, n in ids.items()]
        if len(found) == number:
            found = sorted(found, key=lambda c: c["id"])
            return [{"id": c["id"], "name": c["name"]} for c in found]
        if found:
            problems.append(f"DATASETS.{part} has {len(found)} categories for {number} classes")
    if problems:
        unknown = f"Names and COCO ids of the classes are not known: {', '.join(problems)}."
        if need_ids:
            raise DeployError(f"{unknown} Put the file there, or correct the config.")
        logger.warning(f"{unknown} They are numbered.")
    return [{"id": i + 1, "name": f"class {i}"} for i in range(number)]


def export(
    detector: nn.Module, about: dict, output: str, image: np.ndarray, nms_inside: bool = True
) -> None:
    """Writes a detector into a file.

    Args:
        detector, about: of :func:`load_for_deployment`.
        output: name.onnx or name.pt (TorchScript).
        image: (H, W, 3) uint8, an example; the file takes other sizes as well.
        nms_inside: False: the file gives candidates.
    """
    if Path(output).suffix not in FORMATS:
        raise DeployError(f"{output}: give a name in .onnx, or in .pt for TorchScript.")
    about = {**about, "nms_inside": nms_inside}
    model, example = Deployable(detector, nms_inside), torch.from_numpy(image.copy())
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        # That sizes are traced, which they are to be, and that the tracing exporter is the old one:
        # Detectron2's detectors ask for the number of boxes too often for the new one.
        warnings.simplefilter("ignore")
        if output.endswith(".pt"):
            extra = {METADATA: json.dumps(about)}
            traced = torch.jit.trace(model, (example,), check_trace=False)
            torch.jit.save(traced, output, _extra_files=extra)
            return
        onnx = need("onnx")
        torch.onnx.export(
            model,
            (example,),
            output,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_axes={"image": {0: "height", 1: "width"}, **{k: {0: "M"} for k in OUTPUTS}},
        )
        written = onnx.load(output)
        onnx.helper.set_model_props(written, {METADATA: json.dumps(about)})
        onnx.save(written, output)


def quantize(source: str, output: str, images: Iterable[np.ndarray] | None = None) -> None:
    """Writes an ONNX file with its convolutions in int8, by onnxruntime's own quantiser.

    The file is there whole, as it was before, or not at all.

    Args:
        images: (H, W, 3) uint8, RGB, from which the ranges of activations are taken (static);
            None: they are taken anew in every image that the file is run on (dynamic).
    """
    need("onnxruntime")
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder, whole(Path(output)) as partial:
        prepared = os.path.join(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        if images is None:
            # onnxruntime's integer convolution of a CPU knows unsigned weights only.
            q.quantize_dynamic(
                prepared, partial, op_types_to_quantize=["Conv"], weight_type=q.QuantType.QUInt8
            )
        else:

            class Reader(q.CalibrationDataReader):
                rest = iter(images)

                def get_next(self):
                    image = next(self.rest, None)
                    return None if image is None else {"image": image}

            q.quantize_static(
                prepared, partial, Reader(), op_types_to_quantize=["Conv"], per_channel=True
            )


def need(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise DeployError(f"No {name} here: pip install -e '.[export]'.") from error

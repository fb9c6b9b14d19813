"""Writes and opens OpenVINO files: name.xml with the network, and name.bin with the weights.

The package openvino is needed, and nncf for int8: ``pip install -e '.[openvino]'``.
"""

import contextlib
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..utils.errors import DeployError
from ..utils.files import whole
from ..utils.packages import need
from .deployable import METADATA, OUTPUTS


def write_openvino(
    model: nn.Module, about: dict, output: Path, image: np.ndarray, half: bool
) -> None:
    """Writes a detector.

    Args:
        model: a :class:`~.deployable.Deployable`.
        about: the metadata.
        output: path of name.xml. name.bin is written beside it.
        image: an example, (H, W, 3) uint8.
        half: whether the file holds its weights in fp16. The computation is still in fp32.

    Raises:
        DeployError: the package openvino is missing.
    """
    openvino = _need("openvino")
    example = torch.from_numpy(image.copy())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that sizes are traced, which is intended
        traced = torch.jit.trace(model, (example,), check_trace=False)
        network = openvino.convert_model(traced, example_input=example)
    network.reshape(list(image.shape) if about["input_size"] else [-1, -1, 3])
    network.input(0).get_tensor().set_names({"image"})
    for node, name in zip(network.outputs, OUTPUTS):
        node.get_tensor().set_names({name})
    network.set_rt_info(json.dumps(about), METADATA)
    openvino.save_model(network, output, compress_to_fp16=half)


def quantize_openvino(source: str, output: str, images: Iterable[np.ndarray]) -> None:
    """Writes an OpenVINO file with int8 convolutions, by NNCF's post-training quantisation.

    If it fails or is interrupted, an existing output file is not changed.

    Args:
        source, output: paths of name.xml.
        images: (H, W, 3) uint8 RGB. They give the ranges of activations.

    Raises:
        DeployError: the package openvino or nncf is missing.
    """
    openvino, nncf = _need("openvino"), _need("nncf")
    nncf.set_log_level(logging.ERROR)
    images = list(images)
    network = _core(openvino).read_model(source)
    about = network.get_rt_info(METADATA).value
    smaller = nncf.quantize(network, nncf.Dataset(images), subset_size=len(images))
    smaller.set_rt_info(about, METADATA)
    with whole_pair(Path(output)) as partial:
        openvino.save_model(smaller, partial, compress_to_fp16=False)


@contextlib.contextmanager
def whole_pair(output: Path) -> Iterator[Path]:
    """Like :func:`~fgbg_kd.utils.files.whole`, for name.xml and the name.bin beside it."""
    with whole(output.with_suffix(".bin")), whole(output) as partial:
        yield partial


def open_openvino(file: str) -> tuple[Callable, str]:
    """A function from an image to the outputs of a file, and the metadata of the file.

    Operators that are not int8 compute in fp32, as PyTorch does. Without this setting, OpenVINO
    would choose bf16 on some CPUs.

    Raises:
        DeployError: the package openvino is missing.
    """
    core = _core(_need("openvino"))
    network = core.read_model(file)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # of one image
    }
    compiled = core.compile_model(network, "CPU", options)

    def run(image: np.ndarray) -> list[np.ndarray]:
        found = compiled(image)
        return [found[name] for name in OUTPUTS]

    known = network.has_rt_info(METADATA)
    return run, network.get_rt_info(METADATA).value if known else ""


@functools.cache
def _core(openvino: ModuleType) -> Any:
    """The Core of OpenVINO that all detectors of this process share.

    Each Core replaces the stack on which signals are handled, and restores the previous stack when
    it is deleted. If an older Core is deleted first, the newer one restores a stack that no longer
    exists. The next signal then ends the process. So one Core is made, and never deleted.
    """
    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return core


def _need(name: str) -> ModuleType:
    # OpenVINO and NNCF send usage statistics with this package, if they can import it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return need(name, "openvino", DeployError)

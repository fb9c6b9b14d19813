"""A cache of the teacher's outputs, for training without augmentation."""

import hashlib
from collections.abc import Callable

import torch
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor

from .detectors.dense import DenseOutput
from .utils.errors import ConfigError

_NEEDS = "MODEL.KD.TEACHER.CACHE needs images that do not change from epoch to epoch"
_FIX = "Set INPUT.RANDOM_FLIP none, no INPUT.CROP and one INPUT.MIN_SIZE_TRAIN, or CACHE False."


class TeacherCache:
    """Keeps the teacher's outputs for every image in host memory.

    The outputs depend on the image's pixels and on the padded size of its batch. If the pixels
    change, the cache raises an error. If the padded size changes, the outputs are computed again
    and replace the cached outputs. So the cache holds one set of outputs per image and process.
    """

    def __init__(self):
        self._outputs: dict[str | bytes, tuple[bytes, torch.Size, DenseOutput]] = {}

    def __call__(
        self, run: Callable[[Tensor], DenseOutput], inputs: Tensor, batched_inputs: list[dict]
    ) -> DenseOutput:
        """The teacher's outputs for a batch, from the cache where possible.

        Args:
            run: computes the teacher's outputs for a batch (M, 3, H, W).
            inputs: (N, 3, H, W), the batch with the teacher's normalisation and padding.
            batched_inputs: the N Detectron2 inputs from which ``inputs`` was made.

        Returns:
            The result of ``run(inputs)``, up to rounding. ``run`` gets only the images that are not
            cached yet.

        Raises:
            ValueError: the pixels of an image file have changed.
        """
        size = inputs.shape[2:]
        pixels = [_digest(x["image"]) for x in batched_inputs]
        names = [x.get("file_name", p) for x, p in zip(batched_inputs, pixels)]
        missing = []
        for i, name in enumerate(names):
            kept_pixels, kept_size, _ = self._outputs.get(name, (pixels[i], None, None))
            if kept_pixels != pixels[i]:
                raise ConfigError(
                    f"{_NEEDS}: {name} has other pixels than in an earlier epoch. {_FIX}"
                )
            if kept_size != size:
                missing.append(i)
        if missing:
            output = run(inputs[missing])
            for row, i in enumerate(missing):
                kept = _per_map(lambda x, n=row: x[n].to("cpu", copy=True), output)
                self._outputs[names[i]] = pixels[i], size, kept
        rows = [self._outputs[name][2] for name in names]
        return _per_map(lambda *images: torch.stack(images).to(inputs.device), *rows)


def _per_map(fn, *outputs: DenseOutput) -> DenseOutput:
    """Applies fn to each map. The arguments of fn are this map in all outputs."""
    return DenseOutput(
        *(levels[0] and [fn(*maps) for maps in zip(*levels)] for levels in zip(*outputs))
    )


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy(force=True), digest_size=16).digest()


def check_fixed_input(mapper) -> None:
    """Refuses augmentations that change an image from epoch to epoch.

    Args:
        mapper: a mapper with ``augmentations``, such as Detectron2's DatasetMapper. Other mappers
            are not checked.

    Raises:
        ValueError: an augmentation may change an image. The message names all of them.
    """
    found = []
    for augmentation in getattr(getattr(mapper, "augmentations", None), "augs", ()):
        sizes = getattr(augmentation, "short_edge_length", ())
        if not (isinstance(augmentation, ResizeShortestEdge) and len(set(sizes)) == 1):
            found.append(str(augmentation))
    if found:
        raise ConfigError(f"{_NEEDS}, but the input has {', '.join(found)}. {_FIX}")

"""The teacher's outputs, computed once an image: for training without augmentation."""

import hashlib
from collections.abc import Callable

import torch
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor

from .methods import DenseOutput

_NEEDS = "MODEL.KD.TEACHER.CACHE needs images that do not change from epoch to epoch"
_MEND = "Use INPUT.RANDOM_FLIP none, no INPUT.CROP and one INPUT.MIN_SIZE_TRAIN, or CACHE False."


class TeacherCache:
    """Keeps the teacher's outputs of every image in host memory.

    They depend on the pixels and on the padded size of the batch as well. An image whose pixels
    change is refused; one in a batch of another size is computed anew, and replaces what was kept.
    So memory is that of the outputs of a data set (each worker its own); it ends with the run.
    """

    def __init__(self):
        self._outputs: dict[str | bytes, tuple[bytes, torch.Size, DenseOutput]] = {}

    def __call__(
        self, run: Callable[[Tensor], DenseOutput], inputs: Tensor, batched_inputs: list[dict]
    ) -> DenseOutput:
        """
        Args:
            run: the teacher, from (M, 3, H, W) to its outputs.
            inputs: (N, 3, H, W), the batch as the teacher wants it.
            batched_inputs: N inputs of Detectron2, from which ``inputs`` comes.

        Returns:
            What ``run(inputs)`` would, up to rounding; ``run`` gets the images that are not known.

        Raises:
            ValueError: an image file comes with other pixels than before.
        """
        size = inputs.shape[2:]
        pixels = [_digest(x["image"]) for x in batched_inputs]
        names = [x.get("file_name", p) for x, p in zip(batched_inputs, pixels)]
        missing = []
        for i, name in enumerate(names):
            kept_pixels, kept_size, _ = self._outputs.get(name, (pixels[i], None, None))
            if kept_pixels != pixels[i]:
                raise ValueError(f"{_NEEDS}: {name} came with other pixels than before. {_MEND}")
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
    """fn of each map that the outputs have, with the same map of all of them as arguments."""
    return DenseOutput(
        *(levels[0] and [fn(*maps) for maps in zip(*levels)] for levels in zip(*outputs))
    )


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy(force=True), digest_size=16).digest()


def check_fixed_input(mapper) -> None:
    """A cache serves images that come the same every time.

    Args:
        mapper: Detectron2's DatasetMapper, or another whose augmentations are not known.

    Raises:
        ValueError: names the augmentations that draw at random.
    """
    found = []
    for augmentation in getattr(getattr(mapper, "augmentations", None), "augs", ()):
        sizes = getattr(augmentation, "short_edge_length", ())
        if not (isinstance(augmentation, ResizeShortestEdge) and len(set(sizes)) == 1):
            found.append(str(augmentation))
    if found:
        raise ValueError(f"{_NEEDS}, but the input has {', '.join(found)}. {_MEND}")

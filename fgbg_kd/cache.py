"""The teacher's outputs, computed once an image: for training without augmentation."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from .methods import DenseOutput


class TeacherCache:
    """Keeps the teacher's outputs of every image in host memory.

    An image is known by its pixels and by the padded size of its batch, on which its outputs
    depend as well: one that is augmented, or in a batch of another size, is computed anew and kept
    beside. Memory is that of the outputs of a data set (each worker its own); it ends with the run.
    """

    def __init__(self):
        self._outputs: dict[tuple, DenseOutput] = {}

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
        """
        keys = [(_digest(x["image"]), x["image"].shape, inputs.shape[2:]) for x in batched_inputs]
        missing = [i for i, key in enumerate(keys) if key not in self._outputs]
        if missing:
            output = run(inputs[missing])
            for row, i in enumerate(missing):
                self._outputs[keys[i]] = _per_map(
                    lambda x, n=row: x[n].to("cpu", copy=True), output
                )
        rows = [self._outputs[key] for key in keys]
        return _per_map(lambda *images: torch.stack(images).to(inputs.device), *rows)


def _per_map(fn, *outputs: DenseOutput) -> DenseOutput:
    """fn of each map that the outputs have, with the same map of all of them as arguments."""
    return DenseOutput(
        *(levels[0] and [fn(*maps) for maps in zip(*levels)] for levels in zip(*outputs))
    )


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy(force=True), digest_size=16).digest()


def check_fixed_input(cfg) -> None:
    """A cache serves images that come the same every time.

    Raises:
        ValueError: names the keys of INPUT that draw at random.
    """
    sizes, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    found = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        found.append(f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r} (use none)")
    if cfg.INPUT.CROP.ENABLED:
        found.append("INPUT.CROP.ENABLED is True (use False)")
    if len(set(sizes)) > 1:
        found.append(f"INPUT.MIN_SIZE_TRAIN is {tuple(sizes)}, by {sampling!r} (use one size)")
    if found:
        raise ValueError(
            "MODEL.KD.TEACHER.CACHE needs images that do not change from epoch to epoch, but "
            f"{', '.join(found)}. Or set CACHE False."
        )

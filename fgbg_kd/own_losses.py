"""The student's own losses, on labelled images and on photos without labels."""

from collections.abc import Sequence

from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .detectors.dense import DenseOutput, DenseView
from .utils.errors import ConfigError


def labeled_first(batched_inputs: list[dict]) -> tuple[list[dict], int]:
    """The batch with its labelled images first, and their number.

    Photos without labels have the entry "unlabeled": True.

    Raises:
        ConfigError: there is no labelled image.
    """
    photos = [x for x in batched_inputs if x.get("unlabeled")]
    if not photos:
        return batched_inputs, len(batched_inputs)
    labeled = [x for x in batched_inputs if not x.get("unlabeled")]
    if not labeled:
        raise ConfigError(
            'All images of a batch are marked "unlabeled": the loader must put a labelled image '
            "into each batch, as ResumableLoader.mix does."
        )
    return labeled + photos, len(labeled)


def own_losses(
    student: DenseView,
    images: ImageList,
    output: DenseOutput,
    gt: Sequence[Instances],
    labeled: int,
    unlabeled_weight: float,
) -> dict[str, Tensor]:
    """The student's own losses.

    L = L(labelled images) + unlabeled_weight * L(photos without labels), each the detector's
    own loss, as in Sohn et al. 2020 (STAC, arXiv 2005.04757), section 3. The terms of the second
    part have names with the suffix "_unlabeled". With weight 0 they are absent.

    Args:
        images, output: the student's batch, and its output.
        gt: N Instances. Those of photos without labels hold the teacher's detections.
        labeled: number of labelled images, which come first.
    """
    if labeled == len(gt):
        return student.losses(images, output, gt)

    def losses_on(part: slice) -> dict[str, Tensor]:
        pictures = ImageList(images.tensor[part], images.image_sizes[part])
        return student.losses(pictures, output.of_images(part), gt[part])

    losses = losses_on(slice(labeled))
    if unlabeled_weight > 0:
        # Detectron2's detectors keep a running mean of their normaliser. It stays that of the
        # labelled images.
        normalizer = student.loss_normalizer
        if normalizer is not None:
            student.loss_normalizer = normalizer * (len(gt) - labeled) / labeled
        with get_event_storage().name_scope("unlabeled"):  # the detector logs numbers too
            soft = losses_on(slice(labeled, None))
        if normalizer is not None:
            student.loss_normalizer = normalizer
        losses |= {f"{k}_unlabeled": unlabeled_weight * v for k, v in soft.items()}
    return losses

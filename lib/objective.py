"""What is minimised: the terms of the loss of a batch, and their weighted sum."""

from typing import NamedTuple

import segmentation_models_pytorch as smp
import torch

from lib.batches import Batch
from lib.classes import IGNORE_INDEX
from lib.data.samples import Samples
from lib.losses import masked_l1, median_frequency_weights, segmentation_terms
from lib.model import Prediction
from lib.parameters import check_choice

CLASS_WEIGHTS = ("none", "median")


class Losses(NamedTuple):
    """Scalar terms of one batch, unweighted, but for `total`, which is what is minimised."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    soft_iou: torch.Tensor
    lovasz: torch.Tensor
    depth_l1: torch.Tensor


def total_loss(
    prediction: Prediction,
    batch: Batch,
    soft_iou_weight: float,
    soft_iou_pooling: str,
    depth_weight: float,
    class_weights: torch.Tensor | None = None,
    lovasz_weight: float = 0.0,
) -> Losses:
    """The weighted sum of the terms, and each of them; one that is not asked for is 0, but for soft IoU."""
    weights = None if class_weights is None else class_weights.to(batch.label.device, non_blocking=True)
    cross_entropy, soft_iou = segmentation_terms(prediction.logits, batch.label, soft_iou_pooling, weights)
    lovasz = depth_l1 = torch.zeros_like(cross_entropy)
    total = cross_entropy if soft_iou_weight == 0 else cross_entropy + soft_iou_weight * soft_iou
    if lovasz_weight:
        lovasz = lovasz_loss(prediction.logits, batch.label)
        total = total + lovasz_weight * lovasz
    if prediction.depth is not None:
        depth_l1 = masked_l1(prediction.depth, batch.depth, batch.valid_depth)
        total = total + depth_weight * depth_l1
    return Losses(total, cross_entropy, soft_iou, lovasz, depth_l1)


def lovasz_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Lovász-softmax over the batch (Berman, Triki and Blaschko, CVPR 2018), as segmentation-models-pytorch has it.

    It sorts the pixels of each class, for which a GPU waits; a batch without a labelled pixel, which it can't sort,
    gives 0.
    """
    if labels.device.type == "cpu" and not (labels != IGNORE_INDEX).any():
        return logits.sum() * 0
    return smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)(logits.float(), labels)


def choose_class_weights(class_weights: str, train: Samples) -> torch.Tensor | None:
    """`(C,)` for the cross-entropy: none, or by median frequency of the training labels."""
    check_choice("class_weights", class_weights, CLASS_WEIGHTS)
    return None if class_weights == "none" else median_frequency_weights(train.label, len(train.classes))

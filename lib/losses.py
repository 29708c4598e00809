"""Cross-entropy with soft IoU for segmentation, masked L1 for depth, and their total."""

from typing import NamedTuple

import torch

from lib.data import IGNORE_INDEX, check_choice

POOLINGS = ("batch", "image", "exp061")


class Losses(NamedTuple):
    """Scalar terms of one batch; `total` is what is minimised."""

    total: torch.Tensor
    segmentation: torch.Tensor
    depth: torch.Tensor


class _ClassSums(torch.autograd.Function):
    """Sums over the labelled pixels of each image, by class, with the gradient in closed form.

    Returns cross-entropy, intersection sum(p*y), prediction sum(p) and truth sum(y), each `(N, C)`,
    with p the softmax and y the one-hot truth. Only logits, labels and one log-sum-exp a pixel are
    kept for the backward pass: no one-hot, no second softmax.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = logits.flatten(2).to(torch.promote_types(logits.dtype, torch.float32))  # (N, C, P)
        labelled = labels.flatten(1) != IGNORE_INDEX  # (N, P)
        truth = torch.where(labelled, labels.flatten(1), 0).long()
        log_partition = scores.logsumexp(1)
        log_truth = torch.where(labelled, scores.gather(1, truth[:, None])[:, 0] - log_partition, 0)
        prediction = ((scores - log_partition[:, None]).exp() * labelled[:, None]).sum(2)
        ctx.save_for_backward(logits, labels, log_partition)

        def by_class(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(prediction).scatter_add_(1, truth, values)

        count = by_class(labelled.to(scores.dtype))
        ctx.mark_non_differentiable(count)
        return by_class(-log_truth), by_class(log_truth.exp() * labelled), prediction, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_cross_entropy, d_intersection, d_prediction, _) -> tuple[torch.Tensor, None]:
        logits, labels, log_partition = ctx.saved_tensors
        labelled = labels.flatten(1) != IGNORE_INDEX
        truth = torch.where(labelled, labels.flatten(1), 0).long()
        softmax = (logits.flatten(2).to(log_partition.dtype) - log_partition[:, None]).exp()
        truth_softmax = softmax.gather(1, truth[:, None])[:, 0]
        at_truth = truth_softmax * d_intersection.gather(1, truth) - d_cross_entropy.gather(1, truth)
        mean = torch.einsum("nc,ncp->np", d_prediction, softmax) + at_truth
        gradient = softmax * (d_prediction[:, :, None] - mean[:, None])
        gradient.scatter_add_(1, truth[:, None], at_truth[:, None])
        return (gradient * labelled[:, None]).to(logits.dtype).view(logits.shape), None


def soft_iou_loss(logits: torch.Tensor, labels: torch.Tensor, pooling: str = "batch") -> torch.Tensor:
    """1 - soft IoU: intersection over union with class probabilities in place of decisions.

    Per class, over pixels with a label: I = sum(p*y), U = sum(p) + sum(y) - I, after Rahman and
    Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks", ISVC 2016.

    Args:
        logits: `(N, C, H, W)`, any floating type; sums are taken in float32 or wider.
        labels: `(N, H, W)` integers 0..C-1, 255 = ignore.
        pooling: `batch`: I and U of the whole batch, averaged over the classes present in it, the
            form of the mIoU itself. `image`: per image, averaged over (image, class) pairs with the
            class present. `exp061`: per image I / (U + 1e-6), averaged over images x classes present
            in the batch; a pair whose class is absent from the image adds a constant 1 without
            gradient, so a perfect prediction does not give 0 and an unlabelled image costs 1. Kept to
            reproduce Exp061.

    Returns:
        A scalar; 0, with zero gradient, for a batch without a labelled pixel.
    """
    check_choice("soft_iou_pooling", pooling, POOLINGS)
    _check_labels(logits, labels)
    return _soft_iou(*_ClassSums.apply(logits, labels)[1:], pooling)


def _soft_iou(intersection: torch.Tensor, prediction: torch.Tensor, count: torch.Tensor, pooling: str) -> torch.Tensor:
    if pooling == "batch":
        intersection, prediction, count = (sums.sum(0) for sums in (intersection, prediction, count))
    union = prediction + count - intersection
    if pooling == "exp061":
        present = (count.sum(0) > 0).expand_as(count)
        iou = intersection / (union + 1e-6)
    else:
        present = count > 0
        iou = intersection / torch.where(present, union, 1)
    return torch.where(present, 1 - iou, 0).sum() / present.sum().clip(min=1)


def segmentation_loss(
    logits: torch.Tensor, labels: torch.Tensor, soft_iou_weight: float, soft_iou_pooling: str = "batch"
) -> torch.Tensor:
    """Mean cross-entropy over labelled pixels plus weighted soft IoU; arguments as `soft_iou_loss`."""
    check_choice("soft_iou_pooling", soft_iou_pooling, POOLINGS)
    _check_labels(logits, labels)
    cross_entropy, intersection, prediction, count = _ClassSums.apply(logits, labels)
    loss = cross_entropy.sum() / count.sum().clip(min=1)
    if soft_iou_weight == 0:
        return loss
    return loss + soft_iou_weight * _soft_iou(intersection, prediction, count, soft_iou_pooling)


def _check_labels(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"labels: found shape {tuple(labels.shape)} with logits {tuple(logits.shape)}, "
            "expected (N, H, W) with (N, C, H, W)"
        )
    if labels.device.type == "cpu":  # elsewhere the check would wait for the device at every step
        wrong = labels[(labels >= logits.shape[1]) & (labels != IGNORE_INDEX)]
        if len(wrong):
            raise ValueError(
                f"labels: found the value {int(wrong[0])}, expected 0..{logits.shape[1] - 1} or {IGNORE_INDEX} = ignore"
            )


def masked_l1(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference where `valid`, of tensors of one shape; 0 where nothing is."""
    if not prediction.shape == target.shape == valid.shape:
        raise ValueError(
            f"depth: found shapes {tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(valid.shape)} of "
            "prediction, target and valid, expected one shape"
        )
    difference = torch.where(valid, prediction.float() - target, 0)
    return difference.abs().sum() / valid.sum().clip(min=1)


def total_loss(
    logits: torch.Tensor,
    depth: torch.Tensor | None,
    labels: torch.Tensor,
    depth_target: torch.Tensor,
    valid_depth: torch.Tensor,
    soft_iou_weight: float,
    soft_iou_pooling: str,
    depth_weight: float,
) -> Losses:
    """Segmentation loss plus weighted depth loss; without a depth head (None) the latter is 0.

    Shapes: logits `(N, C, H, W)`, labels `(N, H, W)`, the depths and the mask `(N, 1, H, W)`.
    """
    segmentation = segmentation_loss(logits, labels, soft_iou_weight, soft_iou_pooling)
    if depth is None:
        return Losses(segmentation, segmentation, torch.zeros_like(segmentation))
    depth_l1 = masked_l1(depth, depth_target, valid_depth)
    return Losses(segmentation + depth_weight * depth_l1, segmentation, depth_l1)

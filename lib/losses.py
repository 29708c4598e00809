"""Losses: cross-entropy and soft IoU (computed in one pass), Lovász-softmax, and masked L1 for depth."""

from collections.abc import Iterator

import numpy as np
import segmentation_models_pytorch as smp
import torch

from lib.classes import IGNORE_INDEX
from lib.options import check_options

CPU_CHUNK = 2**18  # logits per chunk; fits in the CPU's L2 cache
GPU_CHUNK = 2**26  # logits per chunk; enough to occupy a GPU


def soft_iou_loss(logits: torch.Tensor, labels: torch.Tensor, pooling: str = "batch") -> torch.Tensor:
    """Compute the soft IoU loss: 1 - IoU, with class probabilities in place of hard decisions.

    The soft IoU of a class is I / U, where I = sum(p*y) and U = sum(p) + sum(y) - I are sums over labelled
    pixels, p is the softmax probability and y the one-hot label. See Rahman and Wang, "Optimizing
    Intersection-Over-Union in Deep Neural Networks", ISVC 2016.

    Args:
        logits: `(N, C, H, W)`, any floating dtype; sums are computed in float32 or wider.
        labels: `(N, H, W)` integer class indices 0..C-1, 255 = ignore.
        pooling: how the images of a batch are combined:
            - `batch`: sum I and U over the batch, then average over the classes with a labelled pixel in the
              batch. The mIoU does the same over a whole set of images.
            - `image`: compute I / U per image, then average over the (image, class) pairs in which the image
              has a pixel of the class.
            - `exp061`: compute I / (U + 1e-6) per image, then average over every image paired with every
              class that occurs in the batch. A class that is absent from an image adds a constant 1 without
              gradient, so even a perfect prediction can have a loss above 0. Kept to reproduce Exp061
              (notebooks/experiments/exp061.yaml).

    Returns:
        A scalar; 0 with zero gradient if the batch has no labelled pixel.
    """
    return segmentation_losses(logits, labels, 1, pooling)[2]


def segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    soft_iou_weight: float,
    soft_iou_pooling: str = "batch",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the mean cross-entropy over labelled pixels plus the weighted soft IoU loss.

    Args:
        logits: `(N, C, H, W)`, any floating dtype; sums are computed in float32 or wider.
        labels: `(N, H, W)` integer class indices 0..C-1, 255 = ignore.
        soft_iou_weight: weight of the soft IoU loss; 0 for cross-entropy alone.
        soft_iou_pooling: see `pooling` of `soft_iou_loss`.
        class_weights: `(C,)` class weights of the cross-entropy, which becomes a weighted mean as in
            `torch.nn.CrossEntropyLoss`; if None, all pixels have equal weight.

    Returns:
        A scalar; 0 with zero gradient if the batch has no labelled pixel.
    """
    return segmentation_losses(logits, labels, soft_iou_weight, soft_iou_pooling, class_weights)[0]


def segmentation_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    soft_iou_weight: float,
    soft_iou_pooling: str = "batch",
    class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `segmentation_loss` and its two terms in one pass.

    Returns:
        Three scalars: the total, the mean cross-entropy, and the soft IoU loss before weighting.

    Raises:
        ValueError: if the pooling is unknown, the shapes don't match, or a label is out of range (checked
            only on the CPU).
    """
    check_options(soft_iou_pooling=soft_iou_pooling)
    _check_labels(logits, labels)
    cross_entropy, intersection, count, prediction = _ClassSums.apply(logits, labels)  # (N, C) each
    soft_iou = _soft_iou_loss(intersection, count, prediction, soft_iou_pooling)
    if class_weights is not None:
        class_weights = class_weights.to(logits.device, non_blocking=True)
        cross_entropy = class_weights * cross_entropy
        count = class_weights * count
    divisor = count.sum()
    mean_cross_entropy = cross_entropy.sum() / torch.where(divisor > 0, divisor, 1)
    total = mean_cross_entropy
    if soft_iou_weight != 0:
        total = mean_cross_entropy + soft_iou_weight * soft_iou
    return total, mean_cross_entropy, soft_iou


def _soft_iou_loss(
    intersection: torch.Tensor, count: torch.Tensor, prediction: torch.Tensor, pooling: str
) -> torch.Tensor:
    if pooling == "batch":  # the sums are (C,) from here on, otherwise (N, C)
        intersection, count, prediction = (sums.sum(0) for sums in (intersection, count, prediction))
    union = prediction + count - intersection
    if pooling == "exp061":
        present = (count.sum(0) > 0).expand_as(count)
        iou = intersection / (union + 1e-6)
    else:
        present = count > 0
        iou = intersection / torch.where(present, union, 1)
    return torch.where(present, 1 - iou, 0).sum() / present.sum().clip(min=1)


def lovasz_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the Lovász-softmax loss over the batch, as implemented in segmentation-models-pytorch.

    See Berman, Triki and Blaschko, CVPR 2018. It sorts all labelled pixels once for each class that is
    present, which makes the CPU wait for a GPU. The loss is 0 if the batch has no labelled pixel.

    Args:
        logits: `(N, C, H, W)`, any floating dtype; computed in float32.
        labels: `(N, H, W)` integer class indices 0..C-1, 255 = ignore.
    """
    loss = smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)
    return loss(logits.float(), labels).sum()  # without labelled pixels, the loss is an empty tensor


def median_frequency_weights(labels: np.ndarray, class_count: int) -> torch.Tensor:
    """Compute class weights by median frequency balancing.

    The weight of a class is the median of all class frequencies divided by its own frequency. The frequency
    of a class is its share of the labelled pixels in the images that contain it. See Eigen and Fergus,
    "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale Convolutional
    Architecture", ICCV 2015.

    Args:
        labels: `(N, H, W)` class indices of the training images, 255 = ignore.
        class_count: number of classes C.

    Returns:
        `(C,)` float32; 1 for a class that does not occur.
    """
    pixels = np.stack([np.bincount(image.ravel(), minlength=256)[:class_count] for image in labels])
    pixels_where_present = np.where(pixels > 0, pixels.sum(1, keepdims=True), 0).sum(0)
    frequency = np.ma.divide(pixels.sum(0), pixels_where_present)  # masked where a class does not occur
    weights = np.ma.divide(np.ma.median(frequency), frequency)
    return torch.from_numpy(weights.filled(1).astype(np.float32))


def masked_l1(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute the mean absolute error over pixels where `valid` is True; 0 if there are none.

    Raises:
        ValueError: if the three tensors differ in shape.
    """
    if not prediction.shape == target.shape == valid.shape:
        raise ValueError(
            f"depth: found shapes {tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(valid.shape)} "
            "of prediction, target and valid, expected one shape"
        )
    difference = torch.where(valid, prediction.float() - target, 0)
    return difference.abs().sum() / valid.sum().clip(min=1)


def _check_labels(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"labels: found shape {tuple(labels.shape)} with logits {tuple(logits.shape)}, "
            "expected (N, H, W) with (N, C, H, W)"
        )
    if labels.device.type == "cpu":  # on a GPU, the check would synchronise at every step
        invalid = labels[(labels < 0) | ((labels >= logits.shape[1]) & (labels != IGNORE_INDEX))]
        if len(invalid):
            raise ValueError(
                f"labels: found the value {int(invalid[0])}, expected 0..{logits.shape[1] - 1} or "
                f"{IGNORE_INDEX} = ignore"
            )


class _ClassSums(torch.autograd.Function):
    """Sums over labelled pixels, by image and class, with a closed-form gradient.

    The output is `(4, N, C)`: cross-entropy, intersection sum(p*y), label count sum(y) and prediction sum(p),
    where p is the softmax and y the one-hot label. Only the logits, the labels and one log-sum-exp per pixel
    are saved for the backward pass. Images are processed in chunks of rows, so that the softmax of a chunk
    stays in the cache.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sums, log_sum_exp = zip(*(_class_sums(*chunk) for chunk in _row_chunks(logits, labels)), strict=True)
        ctx.save_for_backward(logits, labels, torch.cat(log_sum_exp, 1))
        return torch.stack(sums).sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_sums: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels, log_sum_exp = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _row_chunks(gradient, logits, labels, log_sum_exp):
            _write_gradient(d_sums, *chunk)
        return gradient, None


def _row_chunks(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Iterate over tensors `(..., H, W)` in matching chunks of rows."""
    chunk_size = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    rows = max(1, chunk_size // max(1, logits[:, :, :1].numel()))
    return zip(*(tensor.split(rows, -2) for tensor in (logits, *others)), strict=True)


def _class_sums(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums `(4, N, C)` of `_ClassSums` and the log-sum-exp `(N, H, W)` of the logits.

    The log-sum-exp of unlabelled pixels is set to inf, so that their softmax is 0 in the backward pass.
    """
    scores = logits.flatten(2).to(torch.promote_types(logits.dtype, torch.float32))  # (N, C, P)
    labelled = labels.flatten(1) != IGNORE_INDEX
    index = torch.where(labelled, labels.flatten(1), 0).long()
    max_score = scores.amax(1)
    exp_scores = (scores - max_score[:, None]).exp()  # unnormalised softmax
    divisor = exp_scores.sum(1)
    prediction = (exp_scores * (labelled / divisor)[:, None]).sum(2)
    log_sum_exp = torch.where(labelled, max_score + divisor.log(), torch.inf)
    log_prob = scores.gather(1, index[:, None])[:, 0] - log_sum_exp
    values = torch.stack((torch.where(labelled, -log_prob, 0), log_prob.exp(), labelled.to(scores.dtype)))
    by_class = values.new_zeros(3, *prediction.shape).scatter_add(2, index.expand_as(values), values)
    return torch.cat((by_class, prediction[None])), log_sum_exp.view(labels.shape)


def _write_gradient(
    d_sums: torch.Tensor,
    gradient: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_sum_exp: torch.Tensor,
) -> None:
    """Write the gradient with respect to the logits into `gradient`.

    `d_sums` is the gradient with respect to the sums of `_ClassSums`: dI for the intersection, dCE for the
    cross-entropy and dP for the prediction. With softmax p and one-hot label y, the derivative with respect
    to logit c is g_c - p_c sum(g), where g_c = y_c (p_c dI_c - dCE_c) + p_c dP_c.
    """
    d_cross_entropy, d_intersection, _, d_prediction = d_sums[..., None]
    softmax = (logits.to(log_sum_exp.dtype) - log_sum_exp[:, None]).exp().flatten(2)
    one_hot = labels.flatten(1)[:, None] == torch.arange(logits.shape[1], device=logits.device)[:, None]
    label_term = torch.where(one_hot, softmax * d_intersection - d_cross_entropy, 0)
    sum_g = label_term.addcmul(softmax, d_prediction).sum(1, keepdim=True)
    gradient.copy_(label_term.addcmul(softmax, d_prediction - sum_g).view(gradient.shape))

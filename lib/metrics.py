"""Confusion counts per image, then scores: counts add up, scores do not.

IoU averaged over batches or images is another number than the mIoU that papers report, so every
score here pools counts first.
"""

import numpy as np
import torch

from lib.data import IGNORE_INDEX

Array = np.ndarray | torch.Tensor


def confusion_counts(prediction: Array, labels: Array, class_count: int) -> Array:
    """How often each class was taken for which, per image.

    Args:
        prediction: `(N, ...)` integers 0..C-1.
        labels: integers of the same shape, 255 = ignore.
        class_count: C.

    Returns:
        `(N, C, C)` int64, rows = truth, columns = prediction; a tensor for tensors, else numpy.

    Raises:
        ValueError: shapes that differ, or values that are no class.
    """
    if isinstance(prediction, np.ndarray):
        return confusion_counts(torch.as_tensor(prediction), torch.as_tensor(labels), class_count).numpy()
    if prediction.shape != labels.shape or prediction.ndim < 2:
        raise ValueError(
            f"prediction: found shape {tuple(prediction.shape)} with labels {tuple(labels.shape)}, "
            "expected one shape (N, H, W)"
        )
    count = len(labels)
    prediction, labels = prediction.reshape(count, -1).long(), labels.reshape(count, -1).long()
    labelled = labels != IGNORE_INDEX
    for name, values in (("prediction", prediction), ("labels", labels)):
        wrong = labelled & ((values < 0) | (values >= class_count))
        if wrong.any():
            raise ValueError(
                f"{name}: found the value {int(values[wrong][0])}, expected 0..{class_count - 1}"
                + (f" or {IGNORE_INDEX} = ignore" if name == "labels" else "")
            )
    # one more cell an image collects the ignored pixels
    cell = torch.where(labelled, labels * class_count + prediction, class_count**2)
    cell += (class_count**2 + 1) * torch.arange(count, device=cell.device)[:, None]
    counts = torch.bincount(cell.flatten(), minlength=count * (class_count**2 + 1))
    return counts.view(count, -1)[:, :-1].reshape(count, class_count, class_count)


def _pool(counts: Array) -> np.ndarray:
    counts = counts.cpu().numpy() if isinstance(counts, torch.Tensor) else np.asarray(counts)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"counts: found shape {counts.shape}, expected (..., C, C)")
    return counts.reshape(-1, *counts.shape[-2:]).sum(0)


def _pool_labelled(counts: Array) -> np.ndarray:
    pooled = _pool(counts)
    if not pooled.any():
        raise ValueError("counts: all zero; without a labelled pixel there is no score")
    return pooled


def iou(counts: Array) -> np.ndarray:
    """Intersection over union, `(C,)` float64, pooled over all leading axes of `(..., C, C)` counts.

    NaN for a class in neither truth nor prediction.
    """
    pooled = _pool(counts)
    hits = np.diagonal(pooled)
    union = pooled.sum(0) + pooled.sum(1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def mean_iou(counts: Array) -> float:
    """Mean of `iou` over the classes in truth or prediction; say how many with `averaged_classes`.

    Raises:
        ValueError: no labelled pixel.
    """
    return float(np.nanmean(iou(_pool_labelled(counts))))


def averaged_classes(counts: Array) -> int:
    """How many classes `mean_iou` averages."""
    return int(np.isfinite(iou(counts)).sum())


def pixel_accuracy(counts: Array) -> float:
    """Share of labelled pixels that are right, pooled over all leading axes.

    Raises:
        ValueError: no labelled pixel.
    """
    pooled = _pool_labelled(counts)
    return float(np.trace(pooled) / pooled.sum())

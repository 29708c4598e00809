"""Metrics: confusion matrices per image first, then scores. Counts add up, scores do not.

IoU averaged over batches or images is another number than the mIoU that papers report, so every score of a
set of images pools counts first.
"""

import math

import cv2
import numpy as np
import torch

from lib.classes import IGNORE_INDEX

Array = np.ndarray | torch.Tensor
DEPTH = "depth (m)"
DISTANCE = "distance to a boundary (% of the width)"
REGION = "size of the region (% of the image)"


def confusion_counts(prediction: Array, labels: Array, class_count: int) -> Array:
    """Confusion matrices per image.

    Args:
        prediction: `(N, ...)` integers 0..C-1.
        labels: integers of the same shape, 255 = ignore.
        class_count: C.

    Returns:
        `(N, C, C)` int64, rows = ground truth, columns = prediction; a tensor for tensors, else numpy.

    Raises:
        ValueError: shapes that differ, or values that are no class.
    """
    if isinstance(prediction, np.ndarray):
        # copies, as torch warns of memory maps that are read-only
        copies = [torch.from_numpy(np.array(array)) for array in (prediction, labels)]
        return confusion_counts(*copies, class_count).numpy()
    if prediction.shape != labels.shape or prediction.ndim < 2:
        raise ValueError(
            f"prediction: found shape {tuple(prediction.shape)} with labels {tuple(labels.shape)}, "
            "expected one shape (N, H, W)"
        )
    if not labels.numel():
        return labels.new_zeros((len(labels), class_count, class_count), dtype=torch.int64)
    # image by image the arrays stay in a CPU's cache
    return torch.stack([_image_counts(*pair, class_count) for pair in zip(prediction, labels, strict=True)])


def _image_counts(prediction: torch.Tensor, labels: torch.Tensor, class_count: int) -> torch.Tensor:
    """`(C, C)` of one image. Every label 0..255 is counted; those that are no class must have no pixel."""
    if _outside(prediction, class_count):
        prediction = torch.where(labels == IGNORE_INDEX, 0, prediction)  # predictions there do not count
    if strange := _outside(prediction, class_count):
        raise ValueError(f"prediction: found the value {strange[0]}, expected 0..{class_count - 1}")
    expected = f"0..{class_count - 1} or {IGNORE_INDEX} = ignore"
    if strange := _outside(labels, 256):
        raise ValueError(f"labels: found the value {strange[0]}, expected {expected}")
    narrow = torch.int16 if 256 * class_count < 2**15 else torch.int32  # less to move
    cells = labels.to(narrow) * class_count + prediction.to(narrow)
    counts = torch.bincount(cells.flatten(), minlength=256 * class_count).view(256, class_count)
    # rows of values that are neither a class nor 255
    strange = counts[class_count:IGNORE_INDEX].any(1).nonzero().flatten()
    if len(strange):
        raise ValueError(f"labels: found the value {class_count + int(strange[0])}, expected {expected}")
    return counts[:class_count]


def _outside(values: torch.Tensor, count: int) -> list[int]:
    """The least and the greatest value, if not within 0..count - 1."""
    return [value for value in torch.stack(values.aminmax()).tolist() if not 0 <= value < count]


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


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part of the whole, both numbers of pixels; NaN where there is no pixel."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def iou(counts: Array) -> np.ndarray:
    """Intersection over union, `(C,)` float64, pooled over all leading axes of `(..., C, C)` counts.

    NaN for a class in neither truth nor prediction.
    """
    pooled = _pool(counts)
    hits = np.diagonal(pooled)
    return _share(hits, pooled.sum(0) + pooled.sum(1) - hits)


def truth_iou(counts: Array) -> np.ndarray:
    """As `iou`, but NaN for every class that is not in the truth."""
    return np.where(_pool(counts).sum(1) > 0, iou(counts), np.nan)


def mean_iou(counts: Array) -> float:
    """Mean of `iou` over the classes in the truth: the mIoU that this project reports.

    Classes that are only predicted are left out, so that all runs and epochs average the same classes of the
    same images.

    Raises:
        ValueError: no labelled pixel.
    """
    ious = truth_iou(_pool_labelled(counts))
    return float(ious[np.isfinite(ious)].mean())


def averaged_classes(counts: Array) -> int:
    """How many classes `mean_iou` averages."""
    return int(np.isfinite(truth_iou(counts)).sum())


def chance_iou(support: Array) -> Array:
    """IoU at chance level, p / (2 - p): of random labels with the classes' shares p of pixels."""
    return support / (2 - support)


def chance_miou(counts: Array) -> float:
    """Mean of `chance_iou` over the classes in the truth.

    Raises:
        ValueError: no labelled pixel.
    """
    truth = _pool_labelled(counts).sum(1)
    return float(chance_iou(truth[truth > 0] / truth.sum()).mean())


def pixel_accuracy(counts: Array) -> float:
    """Share of labelled pixels that are right, pooled over all leading axes.

    Raises:
        ValueError: no labelled pixel.
    """
    pooled = _pool_labelled(counts)
    return float(np.trace(pooled) / pooled.sum())


def class_accuracy(counts: Array) -> np.ndarray:
    """Recall, `(C,)`: share of each class's pixels that are right; NaN for a class not in the truth."""
    pooled = _pool(counts)
    return _share(np.diagonal(pooled), pooled.sum(1))


def frequency_weighted_iou(counts: Array) -> float:
    """IoU averaged over classes by their share of the labelled pixels."""
    pooled = _pool_labelled(counts)
    return float(np.nansum(iou(pooled) * pooled.sum(1)) / pooled.sum())


def fill_unlabelled(label: np.ndarray) -> np.ndarray:
    """`(H, W)` with the nearest label in every unlabelled pixel; unchanged where nothing is labelled."""
    unlabelled = (label == IGNORE_INDEX).astype(np.uint8)
    if unlabelled.all() or not unlabelled.any():
        return label
    _, source = cv2.distanceTransformWithLabels(unlabelled, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    nearest = np.zeros(source.max() + 1, label.dtype)
    nearest[source[unlabelled == 0]] = label[unlabelled == 0]
    return nearest[source]


def boundary_counts(
    prediction: np.ndarray, labels: np.ndarray, class_count: int, width: float = 0.02
) -> np.ndarray:
    """The counts behind boundary IoU: only pixels near the boundary of their region count.

    After Cheng et al., "Boundary IoU", CVPR 2021, with bands as wide as theirs. What differs, as labels here
    have unlabelled slivers around nearly every region: the ground truth's boundaries are taken after every
    unlabelled pixel has the nearest label, the prediction's where the prediction alone has them, and of both
    bands only labelled pixels count. The border of the image is no boundary. Bands are pooled over images, as
    the IoU is.

    Args:
        prediction: `(N, H, W)` classes.
        labels: `(N, H, W)` classes, 255 = ignore.
        class_count: C.
        width: of the band inside each region, as a share of the image's diagonal.

    Returns:
        `(N, C, 3)` int64: labelled pixels of the class in both bands, in the truth's, in the prediction's.
    """
    reach = max(1, round(width * float(np.hypot(*labels.shape[1:]))))
    counts = np.zeros((len(labels), class_count, 3), np.int64)
    for image, (truth, decided) in enumerate(zip(labels, prediction, strict=True)):
        regions = fill_unlabelled(truth), decided.astype(np.uint8)
        bands = [
            np.where(truth == IGNORE_INDEX, IGNORE_INDEX, _inner_band(region, reach)) for region in regions
        ]
        both = np.where(bands[0] == bands[1], bands[0], IGNORE_INDEX)
        for column, band in enumerate((both, *bands)):
            counts[image, :, column] = np.bincount(band.ravel(), minlength=256)[:class_count]
    return counts


def _inner_band(regions: np.ndarray, reach: int) -> np.ndarray:
    """The class of each pixel that has another class at most `reach` rows and columns away, 255 elsewhere."""
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return np.where(cv2.erode(regions, kernel) != cv2.dilate(regions, kernel), regions, IGNORE_INDEX)


def boundary_iou(boundary: np.ndarray) -> np.ndarray:
    """`(C,)` from `(N, C, 3)` `boundary_counts`, pooled over images; NaN for a class in neither band."""
    both, truth, prediction = boundary.sum(0).T
    return _share(both, truth + prediction - both)


def strata_edges(farthest_m: float) -> dict[str, tuple[float, ...]]:
    """Edges between the bins that pixels are told apart by; the first bin of the depth is missing depth."""
    depth = (0.001, *(round(share * farthest_m, 6) for share in (0.1, 0.2, 0.3, 0.4, 0.6)))
    return {DEPTH: depth, DISTANCE: (1, 2, 4, 8, 16), REGION: (0.3, 1, 3, 10, 30)}


def strata_counts(
    prediction: np.ndarray,
    label: np.ndarray,
    depth: np.ndarray,
    class_count: int,
    edges: dict[str, tuple[float, ...]],
) -> dict[str, np.ndarray]:
    """Confusion matrices of one image, `(bins, C, C)` int64 for each name in `edges`, rows = ground truth.

    Args:
        prediction: `(H, W)` classes.
        label: `(H, W)` classes, 255 = ignore.
        depth: `(H, W)` millimetres, 0 = missing.
        class_count: C.
        edges: from `strata_edges`.
    """
    labelled = label != IGNORE_INDEX
    cell = label[labelled].astype(np.int64) * class_count + prediction[labelled]
    counts = {}
    for name, bins in pixel_strata(label, depth, edges).items():
        shape = (len(edges[name]) + 1, class_count, class_count)
        cells = bins[labelled] * class_count**2 + cell
        counts[name] = np.bincount(cells, minlength=math.prod(shape)).reshape(shape)
    return counts


def pixel_strata(
    label: np.ndarray, depth: np.ndarray, edges: dict[str, tuple[float, ...]]
) -> dict[str, np.ndarray]:
    """For each name in `edges` the bin of every pixel, `(H, W)` integers."""
    values = {
        DEPTH: depth / 1000,
        DISTANCE: 100 * boundary_distance(label),
        REGION: 100 * region_shares(label),
    }
    return {name: np.searchsorted(between, values[name], side="right") for name, between in edges.items()}


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest boundary between two classes, as a share of the width.

    Unlabelled pixels take the class of the nearest label first: the boundary runs in the middle of the
    slivers between segments, and where nothing is labelled on one side there is none.
    """
    label = fill_unlabelled(label)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))  # a pixel and its four neighbours
    inside = (cv2.erode(label, cross) == cv2.dilate(label, cross)).astype(np.uint8)
    if inside.all():
        return np.ones(label.shape, np.float32)
    return (cv2.distanceTransform(inside, cv2.DIST_L2, 5) + 0.5) / label.shape[1]


def region_shares(label: np.ndarray) -> np.ndarray:
    """Of each pixel, which share of the image its connected segment of one class takes."""
    shares = np.zeros(label.shape)
    for index in np.unique(label):
        _, segment, stats, _ = cv2.connectedComponentsWithStats((label == index).astype(np.uint8))
        stats[0, cv2.CC_STAT_AREA] = 0  # all other classes
        shares += stats[segment, cv2.CC_STAT_AREA] / label.size
    return shares


def depth_sums(prediction_m: np.ndarray, depth_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`(4,)`: valid pixels, and over them sums of relative error, squared error, and ratios below 1.25."""
    prediction, truth = np.maximum(prediction_m[valid], 1e-3), depth_m[valid]
    close = np.maximum(prediction / truth, truth / prediction) < 1.25
    errors = prediction - truth
    return np.array([len(truth), (np.abs(errors) / truth).sum(), (errors**2).sum(), close.sum()], np.float64)


def depth_scores(sums: np.ndarray) -> dict[str, float]:
    """AbsRel, RMSE in metres and share of ratios below 1.25 from pooled `depth_sums`; NaN without a pixel."""
    valid, relative, squared, close = sums if sums[0] else np.full(4, np.nan)
    return {
        "abs_rel": relative / valid,
        "rmse_m": float(np.sqrt(squared / valid)),
        "delta_1.25": close / valid,
    }


def image_accuracy(counts: np.ndarray) -> np.ndarray:
    """Pixel accuracy of each image, `(N,)`; NaN for an image without a labelled pixel."""
    return _share(np.trace(counts, axis1=1, axis2=2), counts.sum((1, 2)))


def all_scores(counts: Array) -> dict[str, float]:
    """The scalar scores of a set of images."""
    return {
        "miou": mean_iou(counts),
        "averaged_classes": averaged_classes(counts),
        "pixel_accuracy": pixel_accuracy(counts),
        "mean_class_accuracy": float(np.nanmean(class_accuracy(_pool_labelled(counts)))),
        "frequency_weighted_iou": frequency_weighted_iou(counts),
    }

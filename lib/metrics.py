"""Metrics, computed in two steps: one confusion matrix per image, then scores from the pooled matrices.

Counts add up, scores do not: averaging the IoU over batches or images does not give the mIoU that papers
report. Every score of a set of images therefore pools the counts first.
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
    """Compute one confusion matrix per image.

    Args:
        prediction: `(N, ...)` class indices 0..C-1; any integers where the label is 255.
        labels: class indices of the same shape, 255 = ignore.
        class_count: number of classes C.

    Returns:
        `(N, C, C)` int64, rows = ground truth, columns = prediction; a numpy array or a tensor, like the
        inputs.

    Raises:
        ValueError: if the shapes differ or a value is not a class index.
    """
    if isinstance(prediction, np.ndarray):
        # copy: torch warns about read-only memory maps
        copies = [torch.from_numpy(np.array(array)) for array in (prediction, labels)]
        return confusion_counts(*copies, class_count).numpy()
    if prediction.shape != labels.shape or prediction.ndim < 2:
        raise ValueError(
            f"prediction: found shape {tuple(prediction.shape)} with labels {tuple(labels.shape)}, "
            "expected one shape (N, H, W)"
        )
    if not labels.numel():
        return labels.new_zeros((len(labels), class_count, class_count), dtype=torch.int64)
    # one image at a time, so that the arrays stay in the CPU cache
    return torch.stack([_image_counts(*pair, class_count) for pair in zip(prediction, labels, strict=True)])


def _image_counts(prediction: torch.Tensor, labels: torch.Tensor, class_count: int) -> torch.Tensor:
    """Return the `(C, C)` confusion matrix of one image.

    All label values 0..255 are counted, which also reveals values that are neither a class nor 255.
    """
    if _out_of_range(prediction, class_count):
        prediction = torch.where(labels == IGNORE_INDEX, 0, prediction)  # ignored pixels may have any value
    if invalid := _out_of_range(prediction, class_count):
        raise ValueError(f"prediction: found the value {invalid[0]}, expected 0..{class_count - 1}")
    expected = f"0..{class_count - 1} or {IGNORE_INDEX} = ignore"
    if invalid := _out_of_range(labels, 256):
        raise ValueError(f"labels: found the value {invalid[0]}, expected {expected}")
    dtype = torch.int16 if 256 * class_count < 2**15 else torch.int32  # narrow: less memory traffic
    cells = labels.to(dtype) * class_count + prediction.to(dtype)
    counts = torch.bincount(cells.flatten(), minlength=256 * class_count).view(256, class_count)
    # label values that are neither a class nor 255
    invalid = counts[class_count:IGNORE_INDEX].any(1).nonzero().flatten()
    if len(invalid):
        raise ValueError(f"labels: found the value {class_count + int(invalid[0])}, expected {expected}")
    return counts[:class_count]


def _out_of_range(values: torch.Tensor, count: int) -> list[int]:
    """Return the minimum and the maximum of the values, each only if it is outside 0..count - 1."""
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


def _divide_counts(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide pixel counts element-wise; NaN where `denominator` is 0."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def iou(counts: Array) -> np.ndarray:
    """Compute the IoU of each class, pooled over all leading axes of confusion matrices `(..., C, C)`.

    Returns:
        `(C,)` float64; NaN for a class in neither ground truth nor prediction.
    """
    pooled = _pool(counts)
    intersection = np.diagonal(pooled)
    return _divide_counts(intersection, pooled.sum(0) + pooled.sum(1) - intersection)


def truth_iou(counts: Array) -> np.ndarray:
    """Compute `iou`, with NaN for every class that is not in the ground truth."""
    return np.where(_pool(counts).sum(1) > 0, iou(counts), np.nan)


def mean_iou(counts: Array) -> float:
    """Compute the mIoU that this project reports: the mean of `iou` over the classes in the ground truth.

    Classes that are only predicted are left out, so that all runs and epochs on the same images average the
    same classes.

    Raises:
        ValueError: if no pixel is labelled.
    """
    ious = truth_iou(_pool_labelled(counts))
    return float(ious[np.isfinite(ious)].mean())


def averaged_classes(counts: Array) -> int:
    """Return the number of classes that `mean_iou` averages."""
    return int(np.isfinite(truth_iou(counts)).sum())


def chance_iou(support: Array) -> Array:
    """Compute the chance-level IoU, p / (2 - p), of classes with pixel shares p = `support`.

    This is the IoU of random predictions with the same class frequencies.
    """
    return support / (2 - support)


def chance_miou(counts: Array) -> float:
    """Compute the mean of `chance_iou` over the classes in the ground truth.

    Raises:
        ValueError: if no pixel is labelled.
    """
    truth = _pool_labelled(counts).sum(1)
    return float(chance_iou(truth[truth > 0] / truth.sum()).mean())


def pixel_accuracy(counts: Array) -> float:
    """Compute the share of labelled pixels that are predicted correctly, pooled over all leading axes.

    Raises:
        ValueError: if no pixel is labelled.
    """
    pooled = _pool_labelled(counts)
    return float(np.trace(pooled) / pooled.sum())


def class_accuracy(counts: Array) -> np.ndarray:
    """Compute the recall of each class: the share of its pixels that are predicted correctly.

    Returns:
        `(C,)` float64; NaN for a class that is not in the ground truth.
    """
    pooled = _pool(counts)
    return _divide_counts(np.diagonal(pooled), pooled.sum(1))


def frequency_weighted_iou(counts: Array) -> float:
    """Compute the mean of `iou`, weighted by the share of labelled pixels of each class.

    Raises:
        ValueError: if no pixel is labelled.
    """
    pooled = _pool_labelled(counts)
    return float(np.nansum(iou(pooled) * pooled.sum(1)) / pooled.sum())


def fill_unlabelled(label: np.ndarray) -> np.ndarray:
    """Set each unlabelled pixel of an `(H, W)` label map to the nearest label.

    A label map without labelled pixels is returned unchanged.
    """
    unlabelled = (label == IGNORE_INDEX).astype(np.uint8)
    if unlabelled.all() or not unlabelled.any():
        return label
    _, source = cv2.distanceTransformWithLabels(unlabelled, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    source_labels = np.zeros(source.max() + 1, label.dtype)
    source_labels[source[unlabelled == 0]] = label[unlabelled == 0]
    return source_labels[source]


def boundary_counts(
    prediction: np.ndarray, labels: np.ndarray, class_count: int, width: float = 0.02
) -> np.ndarray:
    """Count the pixels for `boundary_iou`, which considers only a band inside the boundary of each region.

    The method and the band width follow Cheng et al., "Boundary IoU", CVPR 2021, with changes for labels that
    have unlabelled slivers around nearly every region:
    - Ground-truth boundaries are computed after every unlabelled pixel is set to the nearest label.
    - Predicted boundaries are computed from the prediction alone.
    - In either band, only labelled pixels are counted.

    The image border is not a boundary. Like `iou`, `boundary_iou` pools the counts over images.

    Args:
        prediction: `(N, H, W)` class indices.
        labels: `(N, H, W)` class indices, 255 = ignore.
        class_count: number of classes C.
        width: band width as a fraction of the image diagonal.

    Returns:
        `(N, C, 3)` int64: labelled pixels of each class in both bands, in the ground truth's band, and in the
        prediction's band.
    """
    radius = max(1, round(width * float(np.hypot(*labels.shape[1:]))))
    counts = np.zeros((len(labels), class_count, 3), np.int64)
    for image, (truth, predicted) in enumerate(zip(labels, prediction, strict=True)):
        label_maps = fill_unlabelled(truth), predicted.astype(np.uint8)
        bands = [
            np.where(truth == IGNORE_INDEX, IGNORE_INDEX, _inner_band(label_map, radius))
            for label_map in label_maps
        ]
        intersection = np.where(bands[0] == bands[1], bands[0], IGNORE_INDEX)
        for column, band in enumerate((intersection, *bands)):
            counts[image, :, column] = np.bincount(band.ravel(), minlength=256)[:class_count]
    return counts


def _inner_band(label_map: np.ndarray, radius: int) -> np.ndarray:
    """Keep the class of pixels with another class within `radius` rows and columns; set the others to 255."""
    kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return np.where(cv2.erode(label_map, kernel) != cv2.dilate(label_map, kernel), label_map, IGNORE_INDEX)


def boundary_iou(boundary: np.ndarray) -> np.ndarray:
    """Compute the boundary IoU of each class, pooled over the images of `(N, C, 3)` `boundary_counts`.

    Returns:
        `(C,)` float64; NaN for a class in neither band.
    """
    intersection, truth, prediction = boundary.sum(0).T
    return _divide_counts(intersection, truth + prediction - intersection)


def strata_edges(farthest_m: float) -> dict[str, tuple[float, ...]]:
    """Return the inner bin edges for stratifying pixels by depth, boundary distance and region size.

    N edges separate N + 1 bins. The first depth bin contains the pixels without depth.

    Args:
        farthest_m: upper end of the depth range in metres.
    """
    depth = (0.001, *(round(fraction * farthest_m, 6) for fraction in (0.1, 0.2, 0.3, 0.4, 0.6)))
    return {DEPTH: depth, DISTANCE: (1, 2, 4, 8, 16), REGION: (0.3, 1, 3, 10, 30)}


def strata_counts(
    prediction: np.ndarray,
    label: np.ndarray,
    depth: np.ndarray,
    class_count: int,
    edges: dict[str, tuple[float, ...]],
) -> dict[str, np.ndarray]:
    """Compute the confusion matrices of one image for each bin of depth, boundary distance and region size.

    Args:
        prediction: `(H, W)` class indices.
        label: `(H, W)` class indices, 255 = ignore.
        depth: `(H, W)` millimetres, 0 = missing.
        class_count: number of classes C.
        edges: bin edges from `strata_edges`.

    Returns:
        `(bins, C, C)` int64 for each name in `edges`, rows = ground truth.
    """
    labelled = label != IGNORE_INDEX
    class_pairs = label[labelled].astype(np.int64) * class_count + prediction[labelled]
    counts = {}
    for name, bins in pixel_strata(label, depth, edges).items():
        shape = (len(edges[name]) + 1, class_count, class_count)
        cells = bins[labelled] * class_count**2 + class_pairs
        counts[name] = np.bincount(cells, minlength=math.prod(shape)).reshape(shape)
    return counts


def pixel_strata(
    label: np.ndarray, depth: np.ndarray, edges: dict[str, tuple[float, ...]]
) -> dict[str, np.ndarray]:
    """Return the bin index of every pixel, `(H, W)` integers, for each name in `edges`."""
    values = {
        DEPTH: depth / 1000,
        DISTANCE: 100 * boundary_distance(label),
        REGION: 100 * region_shares(label),
    }
    return {name: np.searchsorted(bin_edges, values[name], side="right") for name, bin_edges in edges.items()}


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Compute the distance of each pixel to the nearest class boundary, as a fraction of the image width.

    Unlabelled pixels are first set to the nearest label. Boundaries therefore run along the middle of the
    slivers between regions. An unlabelled area with labels on one side only does not create a boundary.

    Returns:
        `(H, W)` float32; 1 everywhere if there is no boundary.
    """
    label = fill_unlabelled(label)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))  # a pixel and its four neighbours
    inside = (cv2.erode(label, cross) == cv2.dilate(label, cross)).astype(np.uint8)
    if inside.all():
        return np.ones(label.shape, np.float32)
    return (cv2.distanceTransform(inside, cv2.DIST_L2, 5) + 0.5) / label.shape[1]


def region_shares(label: np.ndarray) -> np.ndarray:
    """Compute for each pixel the share of the image covered by its region, `(H, W)` float64.

    A region is a connected set of pixels of one class.
    """
    shares = np.zeros(label.shape)
    for index in np.unique(label):
        _, component, stats, _ = cv2.connectedComponentsWithStats((label == index).astype(np.uint8))
        stats[0, cv2.CC_STAT_AREA] = 0  # component 0 is all other classes
        shares += stats[component, cv2.CC_STAT_AREA] / label.size
    return shares


def depth_sums(prediction_m: np.ndarray, depth_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Sum the depth errors of all valid pixels, for `depth_scores`.

    The sums of several images can be added. Predictions below 1 mm are set to 1 mm.

    Args:
        prediction_m: predicted depth in metres.
        depth_m: measured depth in metres, same shape.
        valid: bool of the same shape; only these pixels are used.

    Returns:
        `(4,)` float64: number of valid pixels, sum of relative errors, sum of squared errors in m², number of
        pixels with max(prediction / truth, truth / prediction) < 1.25.
    """
    prediction, truth = np.maximum(prediction_m[valid], 1e-3), depth_m[valid]
    within_threshold = np.maximum(prediction / truth, truth / prediction) < 1.25
    errors = prediction - truth
    return np.array(
        [len(truth), (np.abs(errors) / truth).sum(), (errors**2).sum(), within_threshold.sum()], np.float64
    )


def depth_scores(sums: np.ndarray) -> dict[str, float]:
    """Compute AbsRel, RMSE in metres and the share of ratios below 1.25 from pooled `depth_sums`.

    All scores are NaN if there is no valid pixel.
    """
    valid, relative, squared, within_threshold = sums if sums[0] else np.full(4, np.nan)
    return {
        "abs_rel": relative / valid,
        "rmse_m": float(np.sqrt(squared / valid)),
        "delta_1.25": within_threshold / valid,
    }


def image_accuracy(counts: np.ndarray) -> np.ndarray:
    """Compute the pixel accuracy of each image, `(N,)`; NaN for an image without labelled pixels."""
    return _divide_counts(np.trace(counts, axis1=1, axis2=2), counts.sum((1, 2)))


def all_scores(counts: Array) -> dict[str, float]:
    """Compute all scalar scores of a set of images.

    Raises:
        ValueError: if no pixel is labelled.
    """
    return {
        "miou": mean_iou(counts),
        "averaged_classes": averaged_classes(counts),
        "pixel_accuracy": pixel_accuracy(counts),
        "mean_class_accuracy": float(np.nanmean(class_accuracy(_pool_labelled(counts)))),
        "frequency_weighted_iou": frequency_weighted_iou(counts),
    }

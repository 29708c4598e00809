"""Predict classes, confidence and depth of samples at their native size, and count the predictions."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from lib.batches import Batch, check_depth, decode_depth, encode_batch, plain_batch
from lib.classes import check_same_classes
from lib.data import Samples
from lib.data.samples import resize_samples
from lib.device import autocast, explain_out_of_memory
from lib.metrics import boundary_counts, confusion_counts, depth_sums, strata_counts, strata_edges
from lib.model import Prediction
from lib.options import check_options

# Test-time augmentation averages the class probabilities of these (zoom, flipped) views. The first view is
# the plain one, from which depth is predicted. Views of the same zoom are adjacent.
VIEWS = {
    "none": [(1.0, False)],
    "flip": [(1.0, False), (1.0, True)],
    "scales": [(zoom, flipped) for zoom in (1.0, 0.8, 1.25) for flipped in (False, True)],
}
MAX_SCORES_BYTES = 2**28  # class scores at native size per chunk of rows; averaging views takes 1 GiB
MAX_STRATA_CLASSES = 60  # with more, confusion matrices by scene and stratum would take too much memory
MAX_BATCH_PIXELS = 2**24  # maximum per batch: one image of 12 megapixels, or 54 of 480x640
Loss = Callable[[Prediction, Batch], tuple[torch.Tensor, ...]]


class Predicted(NamedTuple):
    """A batch of samples with its predictions at native size.

    Attributes:
        samples: the batch of samples.
        labels: `(B, H, W)` uint8 predicted class indices.
        confidence: `(B, H, W)` float32 probability of the predicted class; None unless computed.
        depth_m: `(B, H, W)` float32 predicted depth in metres; None without a depth head.
        losses: `(terms,)` loss terms, computed at the network's working size; None without a loss.
    """

    samples: Samples
    labels: np.ndarray
    confidence: np.ndarray | None = None
    depth_m: np.ndarray | None = None
    losses: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Counts:
    """Confusion matrices per image, as saved in `counts.npz` and `evaluation/SPLIT.npz` of a run.

    If labels are held back, all counts are 0.

    Attributes:
        names: `(N,)` image names.
        scene: `(N,)` scene of each image; None if unknown.
        classes: names of the C classes.
        counts: `(N, C, C)` int64, rows = ground truth, columns = prediction.
    """

    names: np.ndarray
    scene: np.ndarray | None
    classes: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation(Counts):
    """`Counts` with predictions, losses and further counts.

    `keep` and `thorough` are arguments of `count_predictions`.

    Attributes:
        predicted: `(N, H, W)` uint8 class indices; a list of `(H, W)` arrays if sizes differ; an empty list
            without `keep`.
        boundary: `(N, C, 3)` int64, see `boundary_counts`; None without `thorough`.
        depth: `(4,)` float64, see `depth_sums`; zeros without a depth head, None without `thorough`.
        losses: mean of each loss term over batches, whatever their sizes; None without a loss.
        strata: `{name: (G, bins, C, C)}` uint32 for the G scenes in the order of `np.unique(scene)`, see
            `strata_counts`; None if scenes are unknown, if there are more than 60 classes, or without
            `thorough`.
    """

    predicted: np.ndarray | list[np.ndarray]
    boundary: np.ndarray | None
    depth: np.ndarray | None
    losses: list[float] | None
    strata: dict[str, np.ndarray] | None = None


def evaluate(
    model: nn.Module,
    samples: Samples | Iterable[Samples],
    batch_size: int = 8,
    tta: str = "none",
    precision: str = "fp32",
    loss: Loss | None = None,
) -> Evaluation:
    """Evaluate a network on samples at their native size.

    Images are resized to the network's working size, `model.config.size`. Class scores are upsampled to the
    native size before the argmax, at most 1 GiB at a time.

    Args:
        model: network from `build_model` or `load_model`.
        samples: one `Samples`, or an iterable of `Samples` that may differ in image size, such as
            `iterate_samples` returns.
        batch_size: maximum number of images per batch; affects only the speed and the losses, which are
            averaged over batches.
        tta: test-time augmentation: `none`, `flip`, or `scales` (three zooms, each with and without flip).
        precision: `fp32` or `bf16`.
        loss: function of a prediction and an encoded batch, both at the working size, that returns the loss
            terms.

    Raises:
        ValueError: if there are no images, their classes differ from the network's, or they lack the depth
            that the network takes.
        MemoryError: if the GPU or the CPU runs out of memory.
    """
    return count_predictions(predict(model, samples, batch_size, tta, precision, loss), keep=True)


@explain_out_of_memory("lower batch_size if the notebook has it, or use device cpu")
def predict(
    model: nn.Module,
    samples: Samples | Iterable[Samples],
    batch_size: int = 8,
    tta: str = "none",
    precision: str = "fp32",
    loss: Loss | None = None,
    confidence: bool = False,
) -> Iterator[Predicted]:
    """Yield predictions batch by batch, in the order of the samples.

    With `confidence`, the probability of each pixel's predicted class is computed too. See `evaluate` for the
    other arguments.
    """
    check_options(tta=tta, batch_size=batch_size)
    model.eval()
    for chunk in [samples] if isinstance(samples, Samples) else samples:
        check_same_classes(model.config.classes, chunk.classes, "the network", "the data")
        step = batch_size
        if loss is None:  # losses are averaged over batches of exactly `batch_size`
            step = max(1, min(batch_size, MAX_BATCH_PIXELS // math.prod(chunk.size)))
        for start in range(0, len(chunk), step):
            batch = chunk[start : start + step]
            check_depth(model.config, batch)
            logits, depth_m, losses = _predict_views(model, batch, precision, VIEWS[tta], loss)
            labels, confidence_map = _predict_labels(logits, batch.size, confidence)
            yield Predicted(batch, labels, confidence_map, depth_m, losses)


def decide(scores: torch.Tensor) -> torch.Tensor:
    """Return the most likely class, `(N, H, W)`, from scores `(N, C, H, W)`."""
    return scores.max(1).indices  # on a CPU, max is three times as fast as argmax


@torch.inference_mode()
def _predict_views(
    model: nn.Module, batch: Samples, precision: str, views: list[tuple[float, bool]], loss: Loss | None
) -> tuple[list[torch.Tensor], np.ndarray | None, torch.Tensor | None]:
    """Return the logits of all views, and the depth and the losses of the first view.

    Logits are `(B, C, H, W)` at the size of their view, flipped back if necessary. Depth is `(B, H, W)` in
    metres at the native size, or None without a depth head. Losses are `(terms,)`, or None without a loss.
    """
    config, device = model.config, next(model.parameters()).device
    logits, depth_m, losses = [], None, None
    for flipped, view in _make_views(batch, views, config.size):
        encoded = encode_batch(plain_batch(view), config, device)
        with autocast(device, precision):
            prediction = model(encoded.inputs)
        if not logits and prediction.depth is not None:
            linear = _upsample(prediction.depth.float(), batch.size)[:, 0]
            depth_m = decode_depth(linear, config.depth_range_m).cpu().numpy()
        if not logits and loss is not None:
            losses = torch.stack(loss(prediction, encoded))
        logits.append((prediction.logits.flip(-1) if flipped else prediction.logits).float())
    return logits, depth_m, losses


@torch.inference_mode()
def _predict_labels(
    view_logits: list[torch.Tensor], size: tuple[int, int], with_confidence: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the most likely class `(B, H, W)` and, if `with_confidence`, its probability (otherwise None).

    To limit memory, scores are upsampled to `size` in chunks of rows.
    """
    count, class_count = view_logits[0].shape[:2]
    labels = np.empty((count, *size), np.uint8)
    confidence = np.empty((count, *size), np.float32) if with_confidence else None
    step = max(1, MAX_SCORES_BYTES // (4 * count * class_count * size[1]))
    for start in range(0, size[0], step):
        rows = slice(start, min(start + step, size[0]))
        total = 0
        for logits in view_logits:
            scores = _upsample(logits, size, rows)
            total = total + (scores.softmax(1) if len(view_logits) > 1 else scores)
        labels[:, rows] = decide(total).byte().cpu().numpy()
        if confidence is not None:
            probabilities = total / len(view_logits) if len(view_logits) > 1 else total.softmax(1)
            confidence[:, rows] = probabilities.amax(1).cpu().numpy()
    return labels, confidence


def _make_views(
    batch: Samples, views: list[tuple[float, bool]], size: tuple[int, int]
) -> Iterator[tuple[bool, Samples]]:
    """Yield `(flipped, batch)` for each view, resized to the network's working `size` times the zoom."""
    for zoom, group in itertools.groupby(views, lambda pair: pair[0]):  # resize once per zoom
        view = resize_samples(batch, tuple(round(zoom * length) for length in size))
        if zoom != 1:  # objects enlarged by a zoom look nearer
            view = replace(view, depth=np.rint(view.depth_or_missing / zoom).clip(0, 65535).astype(np.uint16))
        for _, flipped in group:
            yield (
                flipped,
                view.map(lambda array: array[:, :, ::-1] if array.ndim >= 3 else array) if flipped else view,
            )


def _upsample(scores: torch.Tensor, size: tuple[int, int], rows: slice | None = None) -> torch.Tensor:
    """Return `interpolate(scores, size, mode="bilinear")`, or only the given rows of it."""
    if rows is None or rows == slice(0, size[0]):
        return scores if scores.shape[2:] == size else interpolate(scores, size, mode="bilinear")
    height = scores.shape[2]
    centres = torch.arange(rows.start, rows.stop, device=scores.device) + 0.5
    source_rows = (centres * (height / size[0]) - 0.5).clamp(0, height - 1)
    above = source_rows.long()
    below = (above + 1).clamp(max=height - 1)
    weight = (source_rows - above)[:, None]
    blended = scores[:, :, above] * (1 - weight) + scores[:, :, below] * weight
    return interpolate(blended, (len(source_rows), size[1]), mode="bilinear")


def mean_losses(losses: list[torch.Tensor]) -> list[float]:
    """Return the mean of each loss term over batches, whatever their sizes.

    It is computed in float64, which not every device supports, and therefore on the CPU.
    """
    return torch.stack(losses).cpu().double().mean(0).tolist()


def count_predictions(batches: Iterable[Predicted], thorough: bool = False, keep: bool = False) -> Evaluation:
    """Compare predictions with the labels and return the counts.

    Args:
        batches: predictions from `predict` or any other source.
        thorough: whether to also compute boundary counts, depth sums and strata counts.
        keep: whether to return the predictions too, which takes one byte per pixel.

    Raises:
        ValueError: if there are no images.
    """
    # lists over batches, by field of `Evaluation`; depth sums are 0 without a depth head
    collected = defaultdict(list, depth=[np.zeros(4)])
    strata = {}
    for batch in batches:
        samples, predicted = batch.samples, batch.labels
        truth = samples.labels_or_ignored
        collected["names"].append(samples.names)
        collected["scene"].append(samples.scene)
        collected["counts"].append(confusion_counts(predicted, truth, len(samples.classes)))
        collected["losses"].append(batch.losses)
        if keep:
            collected["predicted"].extend(predicted)
        if thorough:
            collected["boundary"].append(boundary_counts(predicted, truth, len(samples.classes)))
            _add_strata(strata, samples, predicted)
        if thorough and batch.depth_m is not None:
            depth_m = samples.depth_or_missing / 1000
            collected["depth"].append(depth_sums(batch.depth_m, depth_m, samples.measured_depth))
    if not collected["names"]:
        raise ValueError(
            "split: found no image to evaluate; with validation none there are no validation images, use "
            "split test"
        )
    same_size = len({mask.shape for mask in collected["predicted"]}) == 1
    return Evaluation(
        names=np.concatenate(collected["names"]),
        scene=None if collected["scene"][0] is None else np.concatenate(collected["scene"]),
        classes=samples.classes,
        counts=np.concatenate(collected["counts"]),
        predicted=np.stack(collected["predicted"]) if same_size else collected["predicted"],
        boundary=np.concatenate(collected["boundary"]) if thorough else None,
        depth=np.sum(collected["depth"], axis=0) if thorough else None,
        losses=None if collected["losses"][0] is None else mean_losses(collected["losses"]),
        strata={name: _stack_scenes(by_scene) for name, by_scene in strata.items()} if strata else None,
    )


def _add_strata(strata: dict, samples: Samples, predicted: np.ndarray) -> None:
    """Add the confusion matrices of a batch to `strata`, which is `{name: {scene: (bins, C, C)}}`."""
    if samples.scene is None or len(samples.classes) > MAX_STRATA_CLASSES:
        return
    edges = strata_edges(samples.depth_range_m[1])
    images = zip(predicted, samples.labels_or_ignored, samples.depth_or_missing, strict=True)
    for scene, image in zip(samples.scene.tolist(), images, strict=True):
        for name, counts in strata_counts(*image, len(samples.classes), edges).items():
            by_scene = strata.setdefault(name, {})
            by_scene[scene] = by_scene.get(scene, 0) + counts.astype(np.uint32)


def _stack_scenes(by_scene: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([by_scene[scene] for scene in sorted(by_scene)])

"""A model over samples: predictions, counts per image, losses; at the working size or the labels' own."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from lib.batches import FARTHEST_M, NEAREST_M, Batch, encode_batch, plain_batches
from lib.classes import CLASS_NAMES, IGNORE_INDEX
from lib.data.samples import Samples, resize_samples
from lib.device import autocast
from lib.metrics import boundary_counts, confusion_counts, depth_sums
from lib.notebook import progress_bar
from lib.parameters import check_choice

# Test-time augmentation averages the class probabilities of these (zoom, flipped) views.
VIEWS = {
    "none": [(1.0, False)],
    "flip": [(1.0, False), (1.0, True)],
    "scales": [(zoom, flipped) for zoom in (1.0, 0.8, 1.25) for flipped in (False, True)],
}


class Evaluation(NamedTuple):
    """Counts per image `(N, C, C)` int64 tensor, and the plain mean over batches of each loss term."""

    counts: torch.Tensor
    losses: list[float]


def predict_batches(
    model: nn.Module, samples: Samples, inputs: str, depth_encoding: str, batch_size: int, precision: str
) -> Iterator[tuple[NamedTuple, Batch]]:
    """Yield (`Prediction`, `Batch`) in sample order, one batch in memory at a time."""
    model.eval()
    device = next(model.parameters()).device
    for raw in plain_batches(samples, batch_size):
        with torch.inference_mode(), autocast(device, precision):
            batch = encode_batch(raw, inputs, depth_encoding, device)
            prediction = model(batch.inputs)
        yield prediction, batch  # outside: a generator would leave its caller in inference mode


def evaluate(
    model: nn.Module,
    samples: Samples,
    inputs: str,
    depth_encoding: str,
    batch_size: int,
    precision: str,
    loss: Callable[[NamedTuple, Batch], tuple[torch.Tensor, ...]],
) -> Evaluation:
    """Counts and losses of labelled samples at their own size."""
    counts, losses = [], []
    for prediction, batch in predict_batches(model, samples, inputs, depth_encoding, batch_size, precision):
        with torch.inference_mode():
            counts.append(confusion_counts(decide(prediction.logits), batch.label, len(CLASS_NAMES)))
            losses.append(torch.stack(loss(prediction, batch)))
    return Evaluation(torch.cat(counts).cpu(), torch.stack(losses).double().mean(0).tolist())


def decide(scores: torch.Tensor) -> torch.Tensor:
    """The most likely class, `(N, H, W)`, from `(N, C, H, W)`: on a CPU `max` is thrice as fast as `argmax`."""
    return scores.max(1).indices


def predict_labels(
    model: nn.Module, samples: Samples, inputs: str, depth_encoding: str, batch_size: int, precision: str = "fp32"
) -> np.ndarray:
    """The most likely class of each pixel, `(N, H, W)` uint8, at the samples' own size."""
    batches = predict_batches(model, samples, inputs, depth_encoding, batch_size, precision)
    return np.concatenate([decide(prediction.logits).byte().cpu().numpy() for prediction, _ in batches])


class NativeEvaluation(NamedTuple):
    """What is known of a model on samples at the size of their labels.

    Attributes:
        counts: `(N, C, C)` int64, rows = truth.
        boundary: `(N, C, 3)` int64, see `boundary_counts`.
        depth: `(4,)` float64, see `depth_sums`; zeros without a depth head.
        predicted: `(N, H, W)` uint8.
    """

    counts: np.ndarray
    boundary: np.ndarray
    depth: np.ndarray
    predicted: np.ndarray


def evaluate_native(
    model: nn.Module,
    samples: Samples,
    size: tuple[int, int],
    inputs: str,
    depth_encoding: str,
    batch_size: int,
    precision: str = "fp32",
    tta: str = "none",
) -> NativeEvaluation:
    """Score samples at their own size: inputs shrink to `size`, class scores grow back before the decision.

    One batch of scores is in memory at a time. Where labels are held back all counts are 0.

    Args:
        model: the network.
        samples: at their native size.
        size: (height, width) that the network works at.
        inputs, depth_encoding: as in training.
        batch_size: images at a time; changes nothing but speed.
        precision: fp32 or bf16.
        tta: test-time augmentation: `none`, `flip`, or `scales` (three zooms, each flipped too).
    """
    check_choice("tta", tta, VIEWS)
    _check_batches(samples, batch_size)
    model.eval()
    parts, predicted = [], np.empty(samples.depth.shape, np.uint8)
    with progress_bar(f"predicting, tta {tta}", len(samples)) as bar:
        for start in range(0, len(samples), batch_size):
            piece = samples[start : start + batch_size]
            scores, depth_m = _predict_views(model, piece, size, inputs, depth_encoding, precision, VIEWS[tta])
            decided = decide(scores).byte().cpu().numpy()
            predicted[start : start + batch_size] = decided
            label = np.full(piece.depth.shape, IGNORE_INDEX, np.uint8) if piece.label is None else piece.label
            valid = piece.depth > 0 if piece.measured is None else (piece.depth > 0) & piece.measured
            sums = np.zeros(4) if depth_m is None else depth_sums(depth_m, piece.depth / 1000, valid)
            counts = confusion_counts(decided, label, len(CLASS_NAMES))
            parts.append((counts, boundary_counts(decided, label, len(CLASS_NAMES)), sums))
            bar.update(len(piece))
    counts, boundary, sums = zip(*parts, strict=True)
    return NativeEvaluation(np.concatenate(counts), np.concatenate(boundary), np.sum(sums, axis=0), predicted)


def predict_confidence(
    model: nn.Module, samples: Samples, size: tuple[int, int], inputs: str, depth_encoding: str, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield classes `(B, H, W)` uint8 and their probabilities `(B, H, W)` float32, decided as in `evaluate_native`."""
    _check_batches(samples, batch_size)
    model.eval()
    for start in range(0, len(samples), batch_size):
        piece = samples[start : start + batch_size]
        logits, _ = _predict_views(model, piece, size, inputs, depth_encoding, "fp32", VIEWS["none"])
        probability, decided = logits.softmax(1).max(1)
        yield decided.byte().cpu().numpy(), probability.cpu().numpy()


def _check_batches(samples: Samples, batch_size: int) -> None:
    if not len(samples):
        raise ValueError("part: found no image to evaluate; nothing validates in split official, use part test")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")


def _predict_views(
    model: nn.Module,
    piece: Samples,
    size: tuple[int, int],
    inputs: str,
    depth_encoding: str,
    precision: str,
    views: list[tuple[float, bool]],
) -> tuple[torch.Tensor, np.ndarray | None]:
    """At the piece's size logits `(B, C, H, W)`, of several views summed probabilities; the first's depth in metres."""
    device, total, depth_m = next(model.parameters()).device, 0, None
    for zoom, flipped in views:
        resized = resize_samples(piece, tuple(round(zoom * length) for length in size))
        # enlarged by a zoom, things look as if they were nearer
        nearer = np.rint(resized.depth / zoom).clip(0, 65535).astype(np.uint16)
        columns = slice(None, None, -1 if flipped else 1)
        view = Samples(piece.names, resized.image[:, :, columns], nearer[:, :, columns])
        with torch.inference_mode(), autocast(device, precision):
            batch = encode_batch(next(plain_batches(view, len(view))), inputs, depth_encoding, device)
            logits, depth = model(batch.inputs)
        with torch.inference_mode():
            grown = interpolate(logits.float().flip(-1) if flipped else logits.float(), piece.size, mode="bilinear")
            total = total + (grown.softmax(1) if len(views) > 1 else grown)
            if depth is not None and depth_m is None:
                linear = interpolate(depth.float(), piece.size, mode="bilinear")[:, 0].cpu().numpy()
                depth_m = NEAREST_M + linear * (FARTHEST_M - NEAREST_M)
    return total, depth_m

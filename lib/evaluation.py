"""A model over samples: predictions, counts per image, losses."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lib.data import CLASS_NAMES, Samples
from lib.dataset import Batch, encode_batch, plain_batches
from lib.metrics import confusion_counts


class Evaluation(NamedTuple):
    """Counts per image `(N, C, C)` int64 tensor, and the plain mean over batches of each loss term."""

    counts: torch.Tensor
    losses: list[float]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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
            counts.append(confusion_counts(prediction.logits.argmax(1), batch.label, len(CLASS_NAMES)))
            losses.append(torch.stack(loss(prediction, batch)))
    return Evaluation(torch.cat(counts).cpu(), torch.stack(losses).double().mean(0).tolist())


def predict_labels(
    model: nn.Module, samples: Samples, inputs: str, depth_encoding: str, batch_size: int, precision: str = "fp32"
) -> np.ndarray:
    """The most likely class of each pixel, `(N, H, W)` uint8, at the samples' own size."""
    batches = predict_batches(model, samples, inputs, depth_encoding, batch_size, precision)
    return np.concatenate([prediction.logits.argmax(1).byte().cpu().numpy() for prediction, _ in batches])

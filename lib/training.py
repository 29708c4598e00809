"""Train a network: the device, one epoch, and `fit` with its checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.batches import AUGMENTATIONS, DEPTH_ENCODINGS, INPUT_CHANNELS, Batch, RawBatch, encode_batch, training_loader
from lib.classes import CLASS_NAMES
from lib.data.samples import Samples
from lib.data.splits import SPLITS
from lib.device import PRECISIONS, autocast, choose_device, choose_precision
from lib.evaluation import evaluate
from lib.files import load_checkpoint, save_checkpoint
from lib.losses import POOLINGS, masked_l1, segmentation_loss
from lib.metrics import mean_iou, pixel_accuracy
from lib.model import Prediction, save_model
from lib.notebook import progress_bar
from lib.parameters import check_choice
from lib.runs import release_run, write_history, write_report, write_scores

SCHEDULES = ("cosine", "one_cycle")
CHECKPOINT_SECONDS = 300  # an epoch that takes longer is saved within
FINITE_STEPS = 20  # between looks at the losses: each look makes a GPU wait


def fit(
    model: nn.Module,
    train: Samples,
    valid: Samples,
    run: Path,
    *,
    inputs: str,
    depth_encoding: str,
    soft_iou_weight: float,
    soft_iou_pooling: str,
    depth_weight: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    schedule: str,
    ema_decay: float = 0.0,
    augment: str,
    workers: int,
    precision: str,
    device: str,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's row of the history once everything about it is on disk.

    Where the run's folder holds a `last.pt`, training goes on from it, to the bit on a CPU, and the
    rows of the epochs before it are yielded first. Into the folder go `history.csv`, `last.pt` (also
    within long epochs) and, of the epoch with the best validation mIoU (the last one where nothing
    validates), `best.pt`, `scores.json` and `counts.npz`; in the end `report.md`. With an `ema_decay`
    the averaged weights are validated and kept as `best.pt`. Parameters mean
    what they mean in `train.ipynb`. The `seconds` of a resumed epoch count from where it was resumed.

    Raises:
        ValueError: a parameter out of range; it is named.
        CheckpointError: `last.pt` can't be read.
        FloatingPointError: a loss is not finite; the images of its batch are named.
        OSError: something can't be written; what was there before is intact.
    """
    check_options(
        inputs=inputs, depth_encoding=depth_encoding, soft_iou_pooling=soft_iou_pooling,
        soft_iou_weight=soft_iou_weight, depth_weight=depth_weight, epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, weight_decay=weight_decay, schedule=schedule, ema_decay=ema_decay, augment=augment,
        workers=workers, precision=precision, seed=seed,
    )  # fmt: skip
    try:
        where = choose_device(device)
        precision = choose_precision(precision, where)
        model.to(where)
        if where.type == "cuda":  # where channels_last and a search for the fastest convolutions pay
            model.to(memory_format=torch.channels_last)
            torch.backends.cudnn.benchmark = True
        loader = training_loader(train, augment, batch_size, workers, seed)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
        scheduler = build_schedule(schedule, optimizer, learning_rate, epochs, len(loader))
        average = build_average(model, ema_decay)
        judged = model if average is None else average.module
        encode = partial(encode_batch, inputs=inputs, depth_encoding=depth_encoding, device=where)

        def loss(prediction: Prediction, batch: Batch) -> Losses:
            return total_loss(*prediction, *batch[1:], soft_iou_weight, soft_iou_pooling, depth_weight)

        def step(raw: RawBatch) -> torch.Tensor:
            total = training_step(model, encode(raw), loss, optimizer, precision)
            if schedule == "one_cycle":
                scheduler.step()
            if average is not None:
                average.update_parameters(model)
            return total

        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        parts |= {} if average is None else {"average": average}
        progress = restore_progress(run / "last.pt", parts, f"{where.type} in {precision}")
        save = partial(save_progress, run / "last.pt", parts, progress)
        history = progress["history"]
        first = len(history) + 1
        yield from list(history)
        with progress_bar(
            "training", epochs * len(loader), len(history) * len(loader) + len(progress["losses"])
        ) as bar:
            for epoch in range(first, epochs + 1):
                started = time.perf_counter()
                bar.set_description(f"epoch {epoch} of {epochs}")
                progress["row"] = row = progress["row"] or {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
                loader.batch_sampler.epoch, loader.batch_sampler.skip = epoch, len(progress["losses"])
                row["train_loss"] = train_epoch(model, step, loader, progress["losses"], save, bar, train.names)
                if schedule == "cosine":
                    scheduler.step()
                scores, counts = validate(judged, valid, inputs, depth_encoding, batch_size, precision, loss)
                row |= scores | {"seconds": time.perf_counter() - started}
                if not len(valid) or row["valid_miou"] > max((past["valid_miou"] for past in history), default=-1):
                    save_model(judged, run / "best.pt")
                    write_scores(run, row, valid.names, counts)
                history.append(row)
                write_history(run, history)
                progress |= {"losses": [], "row": {}}
                save()
                yield row
        if first <= epochs or not (run / "report.md").exists():
            write_report(run)
    finally:
        release_run(run)


def check_options(**options: object) -> None:
    """Raise a ValueError that names a training parameter out of its choices or its range; others pass."""
    choices = {
        "inputs": INPUT_CHANNELS, "depth_encoding": DEPTH_ENCODINGS, "soft_iou_pooling": POOLINGS,
        "schedule": SCHEDULES, "augment": AUGMENTATIONS, "precision": PRECISIONS, "split": SPLITS,
    }  # fmt: skip
    least = {"epochs": 1, "batch_size": 2, "image_height": 1, "image_width": 1, "workers": 0, "seed": 0}
    least |= dict.fromkeys(("ema_decay", "weight_decay", "soft_iou_weight", "depth_weight"), 0)
    for name, value in options.items():
        if name in choices:
            check_choice(name, value, choices[name])
        elif name in least and not least[name] <= value < math.inf:
            raise ValueError(f"{name}: found {value}, expected {least[name]} or more")
        elif name == "ema_decay" and value >= 1:
            raise ValueError(f"{name}: found {value}, expected a number below 1 such as 0.99, or 0 for no average")
        elif name == "learning_rate" and not 0 < value < 1:
            raise ValueError(f"{name}: found {value}, expected a number between 0 and 1, such as 0.0001")


def build_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, learning_rate: float, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`cosine`: to 0 over the epochs, stepped once an epoch; `one_cycle`: stepped after every batch."""
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=epochs * steps)


def build_average(model: nn.Module, ema_decay: float) -> AveragedModel | None:
    """A copy of the model that will follow its weights and statistics as an exponential moving average."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True) if ema_decay else None


def training_step(model: nn.Module, batch: Batch, loss: Callable, optimizer, precision: str) -> torch.Tensor:
    """Forward, backward, update; returns the loss where it is, because `.item()` would make a GPU wait."""
    with autocast(batch.inputs.device, precision):
        prediction = model(batch.inputs)
    total = loss(prediction, batch).total
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total.detach()


def train_epoch(
    model: nn.Module,
    step: Callable[[RawBatch], torch.Tensor],
    loader: DataLoader,
    losses: list[torch.Tensor],
    save: Callable[[], None],
    bar: tqdm,
    names: np.ndarray,
) -> float:
    """Train on the batches that are left of an epoch; returns the mean loss over all of its batches.

    Args:
        model: set to training mode.
        step: trains on one batch and returns its loss.
        loader: the batches that are left.
        losses: of the batches before these; grows.
        save: called every few minutes.
        bar: moved on by one a batch.
        names: of the training images, for an error message.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    model.train()
    saved, positions = time.monotonic(), []
    for raw in loader:
        losses.append(step(raw))
        positions.append(raw.position)
        bar.update()
        overdue = time.monotonic() - saved > CHECKPOINT_SECONDS
        if overdue or len(positions) % FINITE_STEPS == 0:
            _check_finite(model, losses[-len(positions) :], positions, names)
        if overdue:
            save()
            saved = time.monotonic()
    _check_finite(model, losses[-len(positions) :], positions, names)
    return float(torch.stack(losses).double().mean())


def _check_finite(
    model: nn.Module, losses: list[torch.Tensor], positions: list[torch.Tensor], names: np.ndarray
) -> None:
    """Losses, and the weights too: a finite loss can have a gradient that is not."""
    wrong = (~torch.stack(losses).isfinite()).nonzero().flatten().tolist()
    finite = torch.stack([weights.isfinite().all() for weights in model.parameters()]).all()
    if positions and (wrong or not finite):
        batch = wrong[0] if wrong else -1
        found = f"training loss: found {losses[batch].item()}" if wrong else "weights: found nan or inf"
        raise FloatingPointError(
            f"{found}, expected a number, for the batch of the images {', '.join(names[positions[batch].numpy()])}. "
            "last.pt and best.pt still hold the state before. Look at these images; if they are sound, lower "
            "learning_rate or use precision fp32"
        )


def validate(
    model: nn.Module, valid: Samples, inputs: str, depth_encoding: str, batch_size: int, precision: str, loss: Callable
) -> tuple[dict[str, float], np.ndarray]:
    """The history's columns about validation and the counts per image; NaN where nothing validates."""
    if not len(valid):
        nothing = dict.fromkeys(("valid_loss", "valid_depth_l1", "valid_miou", "valid_pixel_acc"), math.nan)
        return nothing, np.zeros((0, len(CLASS_NAMES), len(CLASS_NAMES)), np.int64)
    counts, (total, _, depth_l1) = evaluate(model, valid, inputs, depth_encoding, batch_size, precision, loss)
    scores = {"valid_loss": total, "valid_depth_l1": depth_l1}
    return scores | {"valid_miou": mean_iou(counts), "valid_pixel_acc": pixel_accuracy(counts)}, counts.numpy()


def save_progress(path: Path, parts: dict, progress: dict) -> None:
    """Everything that training goes on from: `progress` is the history, and the epoch that has begun."""
    state = {part: owner.state_dict() for part, owner in parts.items()}
    state["rng"] = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    save_checkpoint(state | {"progress": progress}, path)


def restore_progress(path: Path, parts: dict, computed: str) -> dict:
    """Undo `save_progress`; where there is no such file, nothing has been done yet.

    Raises:
        ValueError: what was saved was computed otherwise: `computed` names device and precision.
    """
    if not path.exists():
        return {"history": [], "losses": [], "row": {}, "computed": computed}
    state = load_checkpoint(path, "cpu", (*parts, "rng", "progress"))
    before = state["progress"].get("computed", "an unknown device")
    if before != computed:
        raise ValueError(
            f"resume: {path.parent.name!r} was trained on {before}, found {computed}; pass the same device and "
            "precision, or start another run_name with resume False"
        )
    for part, owner in parts.items():
        owner.load_state_dict(state[part])
    torch.set_rng_state(state["rng"][0])
    if torch.cuda.is_available() and len(state["rng"]) > 1:
        torch.cuda.set_rng_state_all(state["rng"][1:])
    device = next(parts["model"].parameters()).device
    state["progress"]["losses"] = [loss.to(device) for loss in state["progress"]["losses"]]
    return state["progress"]


class Losses(NamedTuple):
    """Scalar terms of one batch; `total` is what is minimised."""

    total: torch.Tensor
    segmentation: torch.Tensor
    depth: torch.Tensor


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

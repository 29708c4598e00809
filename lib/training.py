"""Train a network: the total loss of a batch, an epoch, and `fit` with its checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.batches import AUGMENTATIONS, Batch, RawBatch, encode_batch
from lib.checkpoints import checksums, restore_progress, save_progress
from lib.data.samples import Samples
from lib.data.splits import FOLDS, SPLITS
from lib.device import PRECISIONS, autocast, choose_device, choose_precision
from lib.evaluation import Evaluation, evaluate
from lib.losses import POOLINGS
from lib.metrics import mean_iou, pixel_accuracy
from lib.model import (
    ARCHITECTURES,
    DEPTH_ENCODINGS,
    INPUT_CHANNELS,
    Prediction,
    SegmentationDepthNet,
    build_model,
    save_model,
)
from lib.notebook import progress_bar
from lib.objective import CLASS_WEIGHTS, Losses
from lib.parameters import check_choice
from lib.runs import find_run, write_history, write_report, write_scores

SCHEDULES = ("cosine", "one_cycle")
KEEP = ("best", "last")
CHECKPOINT_SECONDS = 300  # an epoch that takes longer is saved within
FINITE_STEPS = 20  # between looks at the losses: each look makes a GPU wait


def build_network(parameters: dict, classes: tuple[str, ...]) -> SegmentationDepthNet:
    """The network that the parameters of `train.ipynb` describe, with the weights that their seed gives it."""
    torch.manual_seed(parameters["seed"])
    start_from = parameters["start_from"]
    return build_model(
        encoder_weights=parameters["encoder_weights"],
        start_from=find_run(start_from) / "best.pt" if start_from else None,
        classes=classes,
        size=(parameters["image_height"], parameters["image_width"]),
        depth_head=parameters["depth_weight"] > 0,
        **{name: parameters[name] for name in ("inputs", "depth_encoding", "architecture", "encoder")},
    )


def fit(
    build: Callable[[], nn.Module],
    loader: DataLoader,
    valid: Samples,
    run: Path,
    *,
    loss: Callable[[Prediction, Batch], Losses],
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    schedule: str = "one_cycle",
    encoder_lr_scale: float = 1.0,
    ema_decay: float = 0.0,
    keep: str = "best",
    precision: str = "auto",
    device: str = "auto",
) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's row of the history once everything about it is on disk.

    Where the run's folder holds a `last.pt`, training goes on from it, to the bit on a CPU, and the
    rows of the epochs before it are yielded first. Into the folder go `history.csv`, `last.pt` (also
    within long epochs) and, of the epoch that is kept, `best.pt`, `scores.json` and `counts.npz`; in the
    end `report.md`. The `seconds` of a resumed epoch count from where it was resumed.

    Args:
        build: makes the network, the same each time: what a cell trained before is never trained on.
        loader: from `training_loader`.
        valid: scored after each epoch; may be empty.
        run: the folder, held by `open_run`.
        loss: of a prediction and a batch.
        epochs, learning_rate, weight_decay, schedule, encoder_lr_scale: see `train.ipynb`.
        ema_decay: of an average of the weights, which is then validated and kept; 0 for none.
        keep: `best`, the epoch of the highest validation mIoU (the last where nothing validates), or `last`.
        precision, device: `auto` for what suits this machine.

    Raises:
        ValueError: a parameter out of range, or data that changed since the run was started; it is named.
        CheckpointError: `last.pt` can't be read.
        FloatingPointError: a loss is not finite; the images of its batch are named.
        OSError: something can't be written; what was there before is intact.
    """
    check_options(epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay, schedule=schedule,
                  encoder_lr_scale=encoder_lr_scale, ema_decay=ema_decay, keep=keep)  # fmt: skip
    where = choose_device(device)
    precision = choose_precision(precision, where)
    model = _place(build(), where)
    optimizer = build_optimizer(model, learning_rate, encoder_lr_scale, weight_decay)
    scheduler = build_schedule(schedule, optimizer, epochs, len(loader))
    average = build_average(model, ema_decay)
    judged = model if average is None else average.module
    train, batch_size = loader.dataset.samples, loader.batch_sampler.batch_size

    def step(raw: RawBatch) -> torch.Tensor:
        terms = training_step(model, encode_batch(raw, model.config, where), loss, optimizer, precision)
        if schedule == "one_cycle":
            scheduler.step()
        if average is not None:
            average.update_parameters(model)
        return terms

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts |= {} if average is None else {"average": average}
    made_of = {
        "computed": f"{where.type} in {precision}",
        "data": checksums(train, "train") | checksums(valid, "valid"),
    }
    progress = restore_progress(run / "last.pt", parts, made_of, where)
    save = partial(save_progress, run / "last.pt", parts, progress, where)
    history, losses = progress["history"], progress["losses"]
    first = len(history) + 1
    yield from list(history)
    with progress_bar("training", epochs * len(loader), len(history) * len(loader) + len(losses)) as bar:
        for epoch in range(first, epochs + 1):
            started = time.perf_counter()
            bar.set_description(f"epoch {epoch} of {epochs}")
            progress["row"] = row = progress["row"] or {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[-1]}
            loader.batch_sampler.epoch, loader.batch_sampler.skip = epoch, len(losses)
            row |= _columns("train", train_epoch(model, step, loader, losses, save, bar))
            if schedule == "cosine":
                scheduler.step()
            bar.set_description(f"epoch {epoch} of {epochs}, validating")
            scored = evaluate(judged, valid, batch_size, precision=precision, loss=loss) if len(valid) else None
            bar.set_description(f"epoch {epoch} of {epochs}")
            row |= describe_validation(scored) | {"seconds": time.perf_counter() - started}
            by_score = keep == "best" and scored is not None
            if _is_best(row, history) if by_score else epoch == epochs:
                save_model(judged, run / "best.pt")
                write_scores(run, row, scored)
            history.append(row)
            write_history(run, history)
            losses.clear()
            progress["row"] = {}
            save()
            yield row
    if first <= epochs or not (run / "report.md").exists():
        write_report(run)


def _place(model: nn.Module, device: torch.device) -> nn.Module:
    """On the device, there in the layout and with the search for convolutions that pay."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def _is_best(row: dict[str, float], history: list[dict[str, float]]) -> bool:
    return row["valid_miou"] > max((past["valid_miou"] for past in history), default=-1)


def check_options(**options: object) -> None:
    """Raise a ValueError that names a training parameter out of its choices or its range; others pass."""
    choices = {
        "inputs": INPUT_CHANNELS, "depth_encoding": DEPTH_ENCODINGS, "soft_iou_pooling": POOLINGS,
        "schedule": SCHEDULES, "augment": AUGMENTATIONS, "precision": PRECISIONS, "split": SPLITS, "keep": KEEP,
        "class_weights": CLASS_WEIGHTS, "architecture": ARCHITECTURES,
        "fold": range(FOLDS),
    }  # fmt: skip
    least = {"epochs": 1, "batch_size": 2, "image_height": 1, "image_width": 1, "workers": 0, "seed": 0}
    least |= dict.fromkeys(
        ("ema_decay", "weight_decay", "soft_iou_weight", "depth_weight", "lovasz_weight", "encoder_lr_scale"), 0
    )
    for name, value in options.items():
        if name in choices:
            check_choice(name, value, choices[name])
        elif name in least and not least[name] <= value < math.inf:
            raise ValueError(f"{name}: found {value}, expected {least[name]} or more")
        elif name == "ema_decay" and value >= 1:
            raise ValueError(f"{name}: found {value}, expected a number below 1 such as 0.99, or 0 for no average")
        elif name == "learning_rate" and not 0 < value < 1:
            raise ValueError(f"{name}: found {value}, expected a number between 0 and 1, such as 0.0001")


def build_optimizer(
    model: SegmentationDepthNet, learning_rate: float, encoder_lr_scale: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, with a share of the learning rate for the encoder."""
    encoder = list(model.net.encoder.parameters())
    known = {id(weights) for weights in encoder}
    others = [weights for weights in model.parameters() if id(weights) not in known]
    groups = [{"params": encoder, "lr": encoder_lr_scale * learning_rate}, {"params": others}]
    return torch.optim.AdamW(groups, learning_rate, weight_decay=weight_decay, fused=True)


def build_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`cosine`: to 0 over the epochs, stepped once an epoch; `one_cycle`: stepped after every batch."""
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    highest = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=highest, total_steps=epochs * steps)


def build_average(model: nn.Module, ema_decay: float) -> AveragedModel | None:
    """A copy of the model that will follow its weights and statistics as an exponential moving average."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True) if ema_decay else None


def training_step(model: nn.Module, batch: Batch, loss: Callable, optimizer, precision: str) -> torch.Tensor:
    """Forward, backward, update; returns the terms where they are, because `.item()` would make a GPU wait."""
    with autocast(batch.inputs.device, precision):
        prediction = model(batch.inputs)
    losses = loss(prediction, batch)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    return torch.stack(losses).detach()


def train_epoch(
    model: nn.Module,
    step: Callable[[RawBatch], torch.Tensor],
    loader: DataLoader,
    losses: list[torch.Tensor],
    save: Callable[[], None],
    bar: tqdm,
) -> list[float]:
    """Train on the batches that are left of an epoch; returns the mean of each term over all of its batches.

    Args:
        model: set to training mode.
        step: trains on one batch and returns the terms of its loss.
        loader: the batches that are left.
        losses: of the batches before these; grows.
        save: called every few minutes.
        bar: says which epoch; it adds the batch, and the loss each time that it looks at it anyway.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    model.train()
    names = loader.dataset.samples.names
    saved, positions, words = time.monotonic(), [], bar.desc.removesuffix(": ")
    for raw in loader:
        losses.append(step(raw))
        positions.append(raw.position)
        bar.set_description(f"{words}, batch {len(losses)} of {len(loader)}", refresh=False)
        bar.update()
        overdue = time.monotonic() - saved > CHECKPOINT_SECONDS
        if overdue or len(positions) % FINITE_STEPS == 0:
            _check_finite(model, losses[-len(positions) :], positions, names)
            bar.set_postfix_str(f"loss {losses[-1][0].item():.3f}", refresh=False)
        if overdue:
            save()
            saved = time.monotonic()
    _check_finite(model, losses[-len(positions) :], positions, names)
    return torch.stack(losses).double().mean(0).tolist()


def _check_finite(
    model: nn.Module, losses: list[torch.Tensor], positions: list[torch.Tensor], names: np.ndarray
) -> None:
    """Losses, and the weights too: a finite loss can have a gradient that is not."""
    wrong = (~torch.stack(losses)[:, 0].isfinite()).nonzero().flatten().tolist() if losses else []
    finite = torch.stack([weights.isfinite().all() for weights in model.parameters()]).all()
    if positions and (wrong or not finite):
        batch = wrong[0] if wrong else -1
        found = f"training loss: found {losses[batch][0].item()}" if wrong else "weights: found nan or inf"
        raise FloatingPointError(
            f"{found}, expected a number, for the batch of the images {', '.join(names[positions[batch].numpy()])}. "
            "last.pt and best.pt still hold the state before. Look at these images; if they are sound, lower "
            "learning_rate or use precision fp32"
        )


def describe_validation(scored: Evaluation | None) -> dict[str, float]:
    """The history's columns about validation; NaN where nothing validates."""
    if scored is None:
        return _columns("valid", [math.nan] * len(Losses._fields)) | {
            "valid_miou": math.nan,
            "valid_pixel_acc": math.nan,
        }
    scores = {"valid_miou": mean_iou(scored.counts), "valid_pixel_acc": pixel_accuracy(scored.counts)}
    return _columns("valid", scored.losses) | scores


def _columns(prefix: str, terms: list[float]) -> dict[str, float]:
    """Columns of the history: `train_loss` is the total, then each term by itself."""
    names = [f"{prefix}_{'loss' if name == 'total' else name}" for name in Losses._fields]
    return dict(zip(names, terms, strict=True))

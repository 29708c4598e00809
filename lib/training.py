"""Train a network: the total loss of a batch, an epoch, and `fit` with its checkpoints."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.batches import AUGMENTATIONS, Batch, RawBatch, check_depth, encode_batch
from lib.classes import IGNORE_INDEX
from lib.data.samples import DEPTH_RANGE_M, Samples
from lib.data.validation import FOLDS
from lib.device import PRECISIONS, autocast, choose_device, choose_precision, explain_out_of_memory
from lib.evaluation import Evaluation, Loss, evaluate, mean_losses
from lib.losses import POOLINGS, lovasz_loss, masked_l1, median_frequency_weights, segmentation_terms
from lib.metrics import mean_truth_iou, pixel_accuracy
from lib.model import (
    ARCHITECTURES,
    DEPTH_ENCODINGS,
    INPUT_CHANNELS,
    Prediction,
    SegmentationDepthNet,
    build_model,
    save_model,
)
from lib.options import VALIDATIONS, check_choice
from lib.progress import progress_bar
from lib.runs import write_history, write_scores
from lib.runs.checkpoints import checksums, restore_progress, save_progress
from lib.runs.report import write_report

CHECKPOINT_SECONDS = 30  # that an interrupted run loses at most; a large network takes a second to write
FINITE_STEPS = 20  # between looks at the losses: each look makes a GPU wait
CLASS_WEIGHTS = ("none", "median")


class Losses(NamedTuple):
    """Scalar terms of one batch, unweighted, but for `total`, which is what is minimised."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    soft_iou: torch.Tensor
    lovasz: torch.Tensor
    depth_l1: torch.Tensor


def total_loss(
    prediction: Prediction,
    batch: Batch,
    soft_iou_weight: float,
    soft_iou_pooling: str,
    depth_weight: float,
    class_weights: torch.Tensor | None = None,
    lovasz_weight: float = 0.0,
) -> Losses:
    """The weighted sum of the terms, and each of them; one that is not asked for is 0, but for soft IoU."""
    weights = None if class_weights is None else class_weights.to(batch.label.device, non_blocking=True)
    cross_entropy, soft_iou = segmentation_terms(prediction.logits, batch.label, soft_iou_pooling, weights)
    lovasz = depth_l1 = torch.zeros_like(cross_entropy)
    total = cross_entropy if soft_iou_weight == 0 else cross_entropy + soft_iou_weight * soft_iou
    if lovasz_weight:
        lovasz = lovasz_loss(prediction.logits, batch.label)
        total = total + lovasz_weight * lovasz
    if prediction.depth is not None:
        depth_l1 = masked_l1(prediction.depth, batch.depth, batch.valid_depth)
        total = total + depth_weight * depth_l1
    return Losses(total, cross_entropy, soft_iou, lovasz, depth_l1)


def choose_class_weights(class_weights: str, train: Samples) -> torch.Tensor | None:
    """`(C,)` for the cross-entropy: none, or by median frequency of the training labels."""
    check_choice("class_weights", class_weights, CLASS_WEIGHTS)
    return None if class_weights == "none" else median_frequency_weights(train.label, len(train.classes))


def build_network(
    parameters: dict, classes: tuple[str, ...], depth_range_m: tuple[float, float] = DEPTH_RANGE_M
) -> SegmentationDepthNet:
    """The network that the parameters of `train.ipynb` describe for these data, with the weights of their seed."""
    torch.manual_seed(parameters["seed"])
    return build_model(
        encoder_weights=parameters["encoder_weights"],
        classes=classes,
        depth_range_m=depth_range_m,
        size=(parameters["image_height"], parameters["image_width"]),
        depth_head=parameters["depth_weight"] > 0,
        **{name: parameters[name] for name in ("inputs", "depth_encoding", "architecture", "encoder")},
    )


@explain_out_of_memory
def fit(
    build: Callable[[], nn.Module],
    loader: DataLoader,
    valid: Samples,
    run: Path,
    *,
    loss: Loss,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    schedule: str = "one_cycle",
    encoder_lr_scale: float = 1.0,
    ema_decay: float = 0.0,
    checkpoint: str = "best",
    precision: str = "auto",
    device: str = "auto",
) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's row of the history.

    Where the run's folder holds a `last.pt`, training goes on from it, to the bit on a CPU, and the
    rows of the epochs before it are yielded first. Into the folder go, together, every 30 seconds after a step
    or an epoch, and in the end, `last.pt`, `history.csv` and, of the epoch that is kept, `best.pt`, `scores.json`
    and `counts.npz`; then `report.md`. The `seconds` of a resumed epoch count from where it was resumed.

    Args:
        build: makes the network, the same each time: what a cell trained before is never trained on.
        loader: from `training_loader`.
        valid: scored after each epoch; may be empty.
        run: the folder, held by `open_run`.
        loss: of a prediction and a batch.
        epochs, learning_rate, weight_decay, schedule, encoder_lr_scale: see `train.ipynb`.
        ema_decay: of an average of the weights, which is then validated and kept; 0 for none.
        checkpoint: `best`, the epoch of the highest validation mIoU (the last where nothing validates), or `last`.
        precision, device: `auto` for what suits this machine.

    Raises:
        ValueError: a parameter out of range, a label that is no class, or data that changed since the run was
            started; it is named.
        MemoryError: a GPU's memory does not suffice.
        CheckpointError: `last.pt` can't be read.
        FloatingPointError: a loss is not finite; the images of its batch are named.
        OSError: something can't be written; what was there before is intact.
    """
    check_options(epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay, schedule=schedule,
                  encoder_lr_scale=encoder_lr_scale, ema_decay=ema_decay, checkpoint=checkpoint)  # fmt: skip
    where = choose_device(device)
    precision = choose_precision(precision, where)
    loader.pin_memory = where.type == "cuda"  # pinning opens a GPU, also for a run on the CPU
    model = _place(build(), where)
    optimizer = build_optimizer(model, learning_rate, encoder_lr_scale, weight_decay)
    scheduler = build_schedule(schedule, optimizer, epochs, len(loader))
    average = copy.deepcopy(model) if ema_decay else None
    judged = model if average is None else average
    train, batch_size = loader.dataset.samples, loader.batch_sampler.batch_size
    _check_labels({"train": train, "valid": valid}, len(model.config.classes))
    for samples in (train, valid):
        check_depth(model.config, samples, trains=True)

    def step(raw: RawBatch) -> torch.Tensor:
        terms = training_step(model, encode_batch(raw, model.config, where), loss, optimizer, precision)
        if schedule == "one_cycle":
            scheduler.step()
        if average is not None:
            follow(average, model, ema_decay if history or losses else 0.0)
        return terms

    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    stateful |= {} if average is None else {"average": average}
    data = checksums(train, "train") | checksums(valid, "valid")
    made_of = {"computed": f"{where.type} in {precision}", "data": data}
    progress = restore_progress(run / "last.pt", stateful, made_of, where)
    history, losses, kept, saved = progress["history"], progress["losses"], [], [time.monotonic()]
    first = len(history) + 1

    def save(check: Callable[[], None] = lambda: None, seconds: float = CHECKPOINT_SECONDS) -> None:
        """All together, or last.pt would go on beside a best.pt of epochs that it does not know; not too often."""
        if time.monotonic() - saved[0] <= seconds:
            return
        check()
        if kept:
            save_model(kept[0], run / "best.pt")
            write_scores(run, *kept[1:])
            kept.clear()
        if history:
            write_history(run, history)
        save_progress(run / "last.pt", stateful, progress, where)
        saved[0] = time.monotonic()

    yield from list(history)
    with progress_bar("training", epochs * len(loader), len(history) * len(loader) + len(losses)) as bar:
        for epoch in range(first, epochs + 1):
            started = time.perf_counter()
            bar.set_description(f"epoch {epoch} of {epochs}")
            progress["row"] = row = progress["row"] or {
                "epoch": epoch,
                "learning_rate": scheduler.get_last_lr()[-1],
            }
            loader.batch_sampler.epoch, loader.batch_sampler.skip = epoch, len(losses)
            row |= _columns("train", train_epoch(model, step, loader, losses, save, bar))
            if schedule == "cosine":
                scheduler.step()
            bar.set_description(f"epoch {epoch} of {epochs}, validating")
            scored = (
                evaluate(judged, valid, batch_size, precision=precision, loss=loss) if len(valid) else None
            )
            bar.set_description(f"epoch {epoch} of {epochs}")
            row |= describe_validation(scored) | {"seconds": time.perf_counter() - started}
            by_score = checkpoint == "best" and scored is not None
            best_before = max((past["valid_miou"] for past in history), default=-1)
            if row["valid_miou"] > best_before if by_score else epoch == epochs:
                kept[:] = copy.deepcopy(judged).cpu(), row, scored
            history.append(row)
            losses.clear()
            progress["row"] = {}
            save(seconds=-1 if epoch == epochs else CHECKPOINT_SECONDS)
            yield row
    if first <= epochs or not (run / "report.md").exists():
        write_report(run)


def _place(model: nn.Module, device: torch.device) -> nn.Module:
    """On the device, there in the layout and with the search for convolutions that pay."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def check_options(**options: object) -> None:
    """Raise a ValueError that names a training parameter out of its choices or its range; others pass."""
    choices = {
        "inputs": INPUT_CHANNELS, "depth_encoding": DEPTH_ENCODINGS, "soft_iou_pooling": POOLINGS,
        "schedule": ("cosine", "one_cycle"), "augment": AUGMENTATIONS, "precision": PRECISIONS, "validation": VALIDATIONS,
        "checkpoint": ("best", "last"), "class_weights": CLASS_WEIGHTS, "architecture": ARCHITECTURES, "fold": range(FOLDS),
    }  # fmt: skip
    least = {"epochs": 1, "batch_size": 2, "image_height": 1, "image_width": 1, "num_workers": 0, "seed": 0}
    factors = (
        "ema_decay",
        "weight_decay",
        "soft_iou_weight",
        "depth_weight",
        "lovasz_weight",
        "encoder_lr_scale",
    )
    least |= dict.fromkeys(factors, 0)
    for name, value in options.items():
        if name in choices:
            check_choice(name, value, choices[name])
        elif name in least and not least[name] <= value < math.inf:
            raise ValueError(f"{name}: found {value}, expected {least[name]} or more")
        elif name == "ema_decay" and value >= 1:
            raise ValueError(
                f"{name}: found {value}, expected a number below 1 such as 0.99, or 0 for no average"
            )
        elif name == "learning_rate" and not 0 < value < 1:
            raise ValueError(f"{name}: found {value}, expected a number between 0 and 1, such as 0.0001")


def build_optimizer(
    model: SegmentationDepthNet, learning_rate: float, encoder_lr_scale: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, with a share of the learning rate for the encoder."""
    encoder = list(model.net.encoder.parameters())
    others = [weights for name, weights in model.named_parameters() if not name.startswith("net.encoder.")]
    groups = [{"params": encoder, "lr": encoder_lr_scale * learning_rate}, {"params": others}]
    return torch.optim.AdamW(groups, learning_rate, weight_decay=weight_decay, fused=True)


def build_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`cosine`: to 0 over the epochs, stepped once an epoch; `one_cycle`: stepped after every batch."""
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    highest = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=highest, total_steps=epochs * steps)


def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move an exponential moving average of weights and statistics on; a decay of 0 copies them.

    As torch's `AveragedModel` does, without the counter on the device, whose reading lets a GPU wait at each step.
    """
    states = average.state_dict().values(), model.state_dict().values()
    averaged, current = ([value for value in state if value.is_floating_point()] for state in states)
    torch._foreach_lerp_(averaged, current, 1 - decay)


def _check_labels(samples_by_split: dict[str, Samples], class_count: int) -> None:
    """On a GPU a label that is no class would end in an assertion, steps later and without a name."""
    for split, samples in samples_by_split.items():
        for name, label in zip(samples.names, samples.labels_or_ignored, strict=True):
            wrong = label[(label >= class_count) & (label != IGNORE_INDEX)]
            if len(wrong):
                raise ValueError(
                    f"label: found the value {wrong[0]} in {split}/{name}, expected 0..{class_count - 1} or "
                    f"{IGNORE_INDEX} = unlabelled; say in dataset.yaml which values mean which classes"
                )


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
    save: Callable[[Callable[[], None]], None],
    bar: tqdm,
) -> list[float]:
    """Train on the batches that are left of an epoch; returns the mean of each term over all of its batches.

    `losses` has those of the batches before, and grows. `save` is called after each batch, with what to do before it
    saves. `bar` says which epoch; it adds the batch, and the loss each time that it is looked at anyway.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    model.train()
    positions, words = [], bar.desc.removesuffix(": ")
    check = partial(_check_finite, model, losses, positions, loader.dataset.samples.names)
    for raw in loader:
        losses.append(step(raw))
        positions.append(raw.position)
        bar.set_description(f"{words}, batch {len(losses)} of {len(loader)}", refresh=False)
        bar.update()
        if len(positions) % FINITE_STEPS == 0:
            check()
            bar.set_postfix_str(f"loss {losses[-1][0].item():.3f}", refresh=False)
        save(check)
    check()
    return mean_losses(losses)


def _check_finite(model: nn.Module, losses: list[torch.Tensor], positions: list, names: np.ndarray) -> None:
    """The last losses, and the weights too: a finite loss can have a gradient that is not."""
    losses = losses[len(losses) - len(positions) :]
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
    terms, scores = [math.nan] * len(Losses._fields), (math.nan, math.nan)
    if scored is not None:
        terms, scores = scored.losses, (mean_truth_iou(scored.counts), pixel_accuracy(scored.counts))
    return _columns("valid", terms) | dict(zip(("valid_miou", "valid_pixel_acc"), scores, strict=True))


def _columns(prefix: str, terms: list[float]) -> dict[str, float]:
    """Columns of the history: `train_loss` is the total, then each term by itself."""
    names = [f"{prefix}_{'loss' if name == 'total' else name}" for name in Losses._fields]
    return dict(zip(names, terms, strict=True))

"""Train a network: the loss of a batch, a step, an epoch, and `fit`, which also keeps what was computed."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.batches import Batch, RawBatch, check_depth, encode_batch
from lib.data.samples import Samples
from lib.device import (
    autocast,
    choose_device,
    choose_precision,
    describe_memory,
    explain_out_of_memory,
    move_model,
)
from lib.evaluation import Evaluation, Loss, evaluate, mean_losses
from lib.losses import lovasz_loss, masked_l1, median_frequency_weights, segmentation_losses
from lib.metrics import mean_iou, pixel_accuracy
from lib.model import Prediction, SegmentationDepthNet, build_model
from lib.options import check_options
from lib.progress import progress_bar
from lib.runs import find_weights, read_history, run_state
from lib.runs.checkpoints import Checkpoint, fingerprint
from lib.runs.report import write_report

FINITE_STEPS = 20  # between checks of the losses: each check makes a GPU wait


class Losses(NamedTuple):
    """Scalar terms of one batch, before their weights, and `total`, the weighted sum that is minimised.

    `soft_iou` is the loss, 1 - soft IoU; `lovasz` and `depth_l1` are 0 where they are not used.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    soft_iou: torch.Tensor
    lovasz: torch.Tensor
    depth_l1: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """What is minimised: `segmentation_loss`, plus a weighted Lovász-softmax, plus weighted L1 of depth.

    Attributes:
        soft_iou_weight, soft_iou_pooling, class_weights: see `segmentation_loss`.
        depth_weight: of `masked_l1` on the depth head's output.
        lovasz_weight: of `lovasz_loss`.
    """

    soft_iou_weight: float = 0.5
    soft_iou_pooling: str = "batch"
    depth_weight: float = 0.1
    class_weights: torch.Tensor | None = None
    lovasz_weight: float = 0.0

    def __post_init__(self) -> None:
        check_options(
            soft_iou_weight=self.soft_iou_weight,
            soft_iou_pooling=self.soft_iou_pooling,
            depth_weight=self.depth_weight,
            lovasz_weight=self.lovasz_weight,
        )

    def __call__(self, prediction: Prediction, batch: Batch) -> Losses:
        """The terms for one batch. Soft IoU is computed with weight 0 too, since it costs nothing."""
        total, cross_entropy, soft_iou = segmentation_losses(
            prediction.logits, batch.label, self.soft_iou_weight, self.soft_iou_pooling, self.class_weights
        )
        lovasz = depth_l1 = torch.zeros_like(total)
        if self.lovasz_weight:
            lovasz = lovasz_loss(prediction.logits, batch.label)
            total = total + self.lovasz_weight * lovasz
        if prediction.depth is not None:
            depth_l1 = masked_l1(prediction.depth, batch.depth, batch.valid_depth)
            total = total + self.depth_weight * depth_l1
        return Losses(total, cross_entropy, soft_iou, lovasz, depth_l1)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term by its name in `Losses`."""
        return {
            "cross_entropy": 1,
            "soft_iou": self.soft_iou_weight,
            "lovasz": self.lovasz_weight,
            "depth_l1": self.depth_weight,
        }


def build_objective(parameters: dict, train: Samples) -> Objective:
    """The objective that the parameters of `train.ipynb` describe; class weights are from training labels."""
    check_options(class_weights=parameters["class_weights"])
    is_weighted = parameters["class_weights"] == "median"
    weights = median_frequency_weights(train.label, len(train.classes)) if is_weighted else None
    names = ("soft_iou_weight", "soft_iou_pooling", "depth_weight", "lovasz_weight")
    return Objective(class_weights=weights, **{name: parameters[name] for name in names})


@dataclass(frozen=True)
class Optimisation:
    """How it is minimised, by AdamW; the names are those of `train.ipynb`.

    Attributes:
        epochs: passes over the training images.
        learning_rate: at its highest.
        weight_decay: of AdamW.
        schedule: of the learning rate: `one_cycle`, updated every batch, or `cosine` to 0, every epoch.
        encoder_lr_scale: learning rate of the encoder over that of the rest.
        checkpoint: the epoch that is kept: `best`, of the highest validation mIoU (the last epoch without
            validation images), or `last`.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    schedule: str = "one_cycle"
    encoder_lr_scale: float = 1.0
    checkpoint: str = "best"

    def __post_init__(self) -> None:
        check_options(**vars(self))

    @classmethod
    def of(cls, parameters: dict) -> "Optimisation":
        """That of the parameters of `train.ipynb`."""
        return cls(**{name: parameters[name] for name in cls.__dataclass_fields__})

    def build_optimizer(self, model: SegmentationDepthNet) -> torch.optim.AdamW:
        """AdamW with two groups of parameters: the encoder's and the others."""
        others = [
            weights for name, weights in model.named_parameters() if not name.startswith("net.encoder.")
        ]
        groups = [
            {"params": model.net.encoder.parameters(), "lr": self.encoder_lr_scale * self.learning_rate},
            {"params": others},
        ]
        return torch.optim.AdamW(groups, self.learning_rate, weight_decay=self.weight_decay, fused=True)

    def build_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule over all epochs of so many steps."""
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs)
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=self.epochs * steps,
        )

    def keeps(self, row: dict, history: list[dict]) -> bool:
        """Whether the epoch of this row is the one to keep so far; the history has the epochs before it."""
        if self.checkpoint == "last" or math.isnan(row["valid_miou"]):
            return row["epoch"] == self.epochs
        return row["valid_miou"] > max((past["valid_miou"] for past in history), default=-1)


def build_network(
    parameters: dict, classes: tuple[str, ...], depth_range_m: tuple[float, float]
) -> SegmentationDepthNet:
    """The network that the parameters of `train.ipynb` describe for these data, initialised by their seed."""
    torch.manual_seed(parameters["seed"])
    init_from = parameters["init_from"]
    return build_model(
        encoder_weights=parameters["encoder_weights"],
        rgb_normalisation=parameters["rgb_normalisation"],
        init_from=find_weights(init_from) if init_from else None,
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
    objective: Objective,
    optimisation: Optimisation,
    precision: str = "auto",
    device: str = "auto",
) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's row of the history.

    Where the run's folder holds a `last.pt`, training continues from it, on a CPU exactly, and the rows of
    earlier epochs are yielded first; a finished run only yields its rows. What is written, and when: see
    `Checkpoint`. In the end `report.md` is written. A resumed epoch's `seconds` count from its resumption.

    Args:
        build: makes the network, the same each time, so that a cell run again never trains a trained one.
        loader: from `training_loader`.
        valid: scored after each epoch; may be empty.
        run: the folder, opened by `open_run`.
        objective: called with a prediction and a batch.
        optimisation: epochs, learning rate and its schedule, and which epoch is kept.
        precision, device: `auto` for what suits this machine.

    Raises:
        ValueError: a device or precision that is not available, or data changed since the run was started.
        MemoryError: a GPU's memory does not suffice.
        CheckpointError: `last.pt` can't be read.
        FloatingPointError: a loss is not finite; the images of its batch are named.
        OSError: something can't be written; what was there before is intact.
    """
    if run_state(run).trained:
        yield from read_history(run).to_dict("records")
        return
    place = choose_device(device)
    precision = choose_precision(precision, place)
    train = loader.dataset.samples
    loader.pin_memory = place.type == "cuda"  # pinning opens a GPU, also for a run on the CPU
    model = move_model(build(), place)
    for samples in (train, valid):
        check_depth(model.config, samples, trains=True)
    optimizer = optimisation.build_optimizer(model)
    scheduler = optimisation.build_schedule(optimizer, len(loader))
    state = Checkpoint(run, {"model": model, "optimizer": optimizer, "scheduler": scheduler}, place)
    state.restore(fingerprint(f"{place.type} in {precision}", train, valid))
    yield from list(state.history)

    def step(raw: RawBatch) -> torch.Tensor:
        terms = training_step(model, encode_batch(raw, model.config, place), objective, optimizer, precision)
        if optimisation.schedule == "one_cycle":
            scheduler.step()
        return terms

    batches = optimisation.epochs * len(loader)
    with progress_bar("training", batches, len(state.history) * len(loader) + len(state.losses)) as bar:
        for epoch in range(len(state.history) + 1, optimisation.epochs + 1):
            started = time.perf_counter()
            bar.set_description(f"epoch {epoch} of {optimisation.epochs}")
            row = state.begin_epoch(epoch, scheduler.get_last_lr()[-1])
            loader.batch_sampler.start(epoch, skip=len(state.losses))  # a loss per finished batch
            row |= _columns("train", train_epoch(model, step, loader, state, bar))
            if optimisation.schedule == "cosine":
                scheduler.step()
            scored = None
            if len(valid):
                bar.set_description(f"epoch {epoch} of {optimisation.epochs}, validating")
                batch_size = loader.batch_sampler.batch_size
                scored = evaluate(model, valid, batch_size, precision=precision, loss=objective)
            row |= describe_validation(scored) | {"seconds": time.perf_counter() - started}
            if optimisation.keeps(row, state.history):
                state.keep(model, row, scored)
            state.end_epoch(row)
            if epoch == optimisation.epochs or state.is_due():
                state.save()
            bar.set_description(f"epoch {epoch} of {optimisation.epochs}")
            yield row
    write_report(run)
    state.finish()


def training_step(
    model: nn.Module, batch: Batch, objective: Loss, optimizer: torch.optim.Optimizer, precision: str
) -> torch.Tensor:
    """Forward, backward, update; returns the loss terms on the device, as `.item()` would make a GPU wait."""
    with autocast(batch.inputs.device, precision):
        prediction = model(batch.inputs)
    losses = objective(prediction, batch)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    return torch.stack(losses).detach()


def train_epoch(
    model: nn.Module,
    step: Callable[[RawBatch], torch.Tensor],
    loader: DataLoader,
    state: Checkpoint,
    bar: tqdm,
) -> list[float]:
    """Train on the rest of an epoch; returns the mean of each term of the loss over all of its batches.

    Raises:
        FloatingPointError: a loss or a weight is not finite.
    """
    model.train()
    words = bar.desc.removesuffix(": ")
    names = loader.dataset.samples.names
    # of the batches of this pass; those before were checked when they were saved
    positions: list[torch.Tensor] = []
    for raw in loader:
        state.losses.append(step(raw))
        positions.append(raw.position)
        bar.set_description(f"{words}, batch {len(state.losses)} of {len(loader)}", refresh=False)
        bar.update()
        if (len(positions) - 1) % FINITE_STEPS == 0:  # the first step already shows what memory it takes
            _check_finite(model, state.losses, positions, names)
            loss = state.losses[-1][0].item()
            bar.set_postfix_str(f"loss {loss:.3f}, {describe_memory(state.device)}", refresh=False)
        if state.is_due():
            _check_finite(model, state.losses, positions, names)
            state.save()
    _check_finite(model, state.losses, positions, names)
    return mean_losses(state.losses)


def _check_finite(
    model: nn.Module, losses: list[torch.Tensor], positions: list[torch.Tensor], names: np.ndarray
) -> None:
    """Check the last losses, and the weights too: a finite loss can have a gradient that is not."""
    if not positions:
        return
    losses = losses[-len(positions) :]
    wrong = (~torch.stack(losses)[:, 0].isfinite()).nonzero().flatten().tolist()
    finite = torch.stack([weights.isfinite().all() for weights in model.parameters()]).all()
    if wrong or not finite:
        batch = wrong[0] if wrong else -1
        found = f"training loss: found {losses[batch][0].item()}" if wrong else "weights: found nan or inf"
        raise FloatingPointError(
            f"{found}, expected a number, for the batch of the images "
            f"{', '.join(names[positions[batch].numpy()])}. last.pt and best.pt, where they exist, are from "
            "before it. Check these images; if they are fine, lower learning_rate or use precision fp32"
        )


def describe_validation(scored: Evaluation | None) -> dict[str, float]:
    """The history's columns about validation; NaN without validation images."""
    if scored is None:
        return _columns("valid", [math.nan] * len(Losses._fields)) | {
            "valid_miou": math.nan,
            "valid_pixel_acc": math.nan,
        }
    return _columns("valid", scored.losses) | {
        "valid_miou": mean_iou(scored.counts),
        "valid_pixel_acc": pixel_accuracy(scored.counts),
    }


def _columns(prefix: str, terms: list[float]) -> dict[str, float]:
    """Columns of the history: `train_loss` is the total, then each term by itself."""
    names = [f"{prefix}_{'loss' if name == 'total' else name}" for name in Losses._fields]
    return dict(zip(names, terms, strict=True))

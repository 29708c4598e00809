"""Training: the objective, the optimiser settings, and `fit`, the training loop with checkpoints."""

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

FINITE_CHECK_INTERVAL = 20  # steps between checks for non-finite losses; each check synchronises with the GPU


class Losses(NamedTuple):
    """The unweighted scalar loss terms of one batch and `total`, their weighted sum, which is minimised.

    `soft_iou` is the loss, 1 - soft IoU. `lovasz` is 0 if its weight is 0, and `depth_l1` is 0 without a
    depth head.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    soft_iou: torch.Tensor
    lovasz: torch.Tensor
    depth_l1: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """The training objective: `segmentation_loss` plus weighted Lovász-softmax and depth L1 losses.

    Attributes:
        soft_iou_weight, soft_iou_pooling, class_weights: see `segmentation_loss`.
        depth_weight: weight of `masked_l1` on the depth head's output.
        lovasz_weight: weight of `lovasz_loss`.
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
        """Return the losses of one batch. Soft IoU is computed even with weight 0, at no extra cost."""
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
        """The weight of each loss term, keyed by its name in `Losses`."""
        return {
            "cross_entropy": 1,
            "soft_iou": self.soft_iou_weight,
            "lovasz": self.lovasz_weight,
            "depth_l1": self.depth_weight,
        }


def build_objective(parameters: dict, train: Samples) -> Objective:
    """Build the objective from the parameters of `train.ipynb`, with class weights from training labels."""
    check_options(class_weights=parameters["class_weights"])
    is_weighted = parameters["class_weights"] == "median"
    weights = median_frequency_weights(train.label, len(train.classes)) if is_weighted else None
    names = ("soft_iou_weight", "soft_iou_pooling", "depth_weight", "lovasz_weight")
    return Objective(class_weights=weights, **{name: parameters[name] for name in names})


@dataclass(frozen=True)
class Optimisation:
    """AdamW optimisation settings, named as in `train.ipynb`.

    Attributes:
        epochs: number of passes over the training images.
        learning_rate: peak learning rate.
        weight_decay: weight decay of AdamW.
        schedule: learning rate schedule: `one_cycle`, updated after every batch, or `cosine`, which decays
            to 0 and is updated after every epoch.
        encoder_lr_scale: ratio of the encoder's learning rate to that of the other parameters.
        checkpoint: epoch to keep: `best` for the highest validation mIoU (the last epoch if there are no
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
        """Create the settings from the parameters of `train.ipynb`."""
        return cls(**{name: parameters[name] for name in cls.__dataclass_fields__})

    def build_optimizer(self, model: SegmentationDepthNet) -> torch.optim.AdamW:
        """Build AdamW with two parameter groups: the encoder first, then everything else."""
        others = [
            parameter for name, parameter in model.named_parameters() if not name.startswith("net.encoder.")
        ]
        groups = [
            {"params": model.net.encoder.parameters(), "lr": self.encoder_lr_scale * self.learning_rate},
            {"params": others},
        ]
        return torch.optim.AdamW(groups, self.learning_rate, weight_decay=self.weight_decay, fused=True)

    def build_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the learning rate schedule for all epochs, with `steps` batches per epoch."""
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs)
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=self.epochs * steps,
        )

    def keeps(self, row: dict, history: list[dict]) -> bool:
        """Whether to keep the epoch of this row, given the history of all earlier epochs."""
        if self.checkpoint == "last" or math.isnan(row["valid_miou"]):
            return row["epoch"] == self.epochs
        return row["valid_miou"] > max((past["valid_miou"] for past in history), default=-1)


def build_network(
    parameters: dict, classes: tuple[str, ...], depth_range_m: tuple[float, float]
) -> SegmentationDepthNet:
    """Set torch's seed and build the network, both from the parameters of `train.ipynb`."""
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


@explain_out_of_memory("use precision bf16, or lower batch_size, or image_height and image_width")
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
    """Train a network and yield the history row of each epoch.

    If the run's folder contains `last.pt`, training resumes from it, and the rows of earlier epochs are
    yielded first. On a CPU, the result is exactly that of an uninterrupted run. The `seconds` of a resumed
    epoch include only the time since it was resumed. If the run is finished, its rows are yielded without
    training.

    `Checkpoint` lists the files that are saved during training. `report.md` is written at the end.

    Args:
        build: returns a new network, initialised in the same way on each call, so that rerunning a notebook
            cell does not continue training a trained network.
        loader: training batches from `training_loader`.
        valid: validation samples, scored after each epoch; may be empty.
        run: folder of the run, from `open_run`.
        objective: computes the losses from a prediction and a batch.
        optimisation: epochs, optimiser settings, and which epoch to keep.
        precision, device: see `choose_precision` and `choose_device`; `auto` selects by hardware.

    Raises:
        ValueError: if the device is unavailable, the precision is unknown, the samples lack depth that the
            network needs, or a resumed run was started with another device, precision or data.
        MemoryError: if the GPU or the CPU runs out of memory.
        CheckpointError: if `last.pt` can't be read.
        FloatingPointError: if a loss or a weight is not finite; the message lists the images of the batch.
        OSError: if a file can't be written; earlier files are intact.
    """
    if run_state(run).trained:
        yield from read_history(run).to_dict("records")
        return
    torch_device = choose_device(device)
    precision = choose_precision(precision, torch_device)
    train = loader.dataset.samples
    loader.pin_memory = torch_device.type == "cuda"  # pinning initialises CUDA, even for a run on the CPU
    model = move_model(build(), torch_device)
    for samples in (train, valid):
        check_depth(model.config, samples, trains=True)
    optimizer = optimisation.build_optimizer(model)
    scheduler = optimisation.build_schedule(optimizer, len(loader))
    state = Checkpoint(run, {"model": model, "optimizer": optimizer, "scheduler": scheduler}, torch_device)
    state.restore(fingerprint(f"{torch_device.type} in {precision}", train, valid))
    yield from list(state.history)

    def step(raw: RawBatch) -> torch.Tensor:
        terms = training_step(
            model, encode_batch(raw, model.config, torch_device), objective, optimizer, precision
        )
        if optimisation.schedule == "one_cycle":
            scheduler.step()
        return terms

    total_steps = optimisation.epochs * len(loader)
    with progress_bar("training", total_steps, len(state.history) * len(loader) + len(state.losses)) as bar:
        for epoch in range(len(state.history) + 1, optimisation.epochs + 1):
            start = time.perf_counter()
            bar.set_description(f"epoch {epoch} of {optimisation.epochs}")
            row = state.begin_epoch(epoch, scheduler.get_last_lr()[-1])
            loader.batch_sampler.start(epoch, skip=len(state.losses))  # `losses`: one per finished batch
            row |= _loss_columns("train", train_epoch(model, step, loader, state, bar))
            if optimisation.schedule == "cosine":
                scheduler.step()
            scored = None
            if len(valid):
                bar.set_description(f"epoch {epoch} of {optimisation.epochs}, validating")
                batch_size = loader.batch_sampler.batch_size
                scored = evaluate(model, valid, batch_size, precision=precision, loss=objective)
            row |= describe_validation(scored) | {"seconds": time.perf_counter() - start}
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
    """Run one optimisation step and return the detached loss terms, in the order of `Losses`.

    The terms stay on the device, because `.item()` would synchronise with the GPU.
    """
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
    """Train on the remaining batches of an epoch and return the epoch's mean of each loss term.

    Raises:
        FloatingPointError: if a loss or a weight is not finite.
    """
    model.train()
    description = bar.desc.removesuffix(": ")
    names = loader.dataset.samples.names
    # of the batches of this call; in a resumed epoch, the losses before them were checked when saved
    positions: list[torch.Tensor] = []
    for raw in loader:
        state.losses.append(step(raw))
        positions.append(raw.position)
        bar.set_description(f"{description}, batch {len(state.losses)} of {len(loader)}", refresh=False)
        bar.update()
        if (len(positions) - 1) % FINITE_CHECK_INTERVAL == 0:  # also after the first step, to show memory use
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
    """Check the last losses and all weights, because a finite loss can have a non-finite gradient.

    Args:
        model: the network.
        losses: loss terms of the epoch's batches so far.
        positions: positions of the images of the last of these batches, which are checked.
        names: names of the training images.

    Raises:
        FloatingPointError: if a loss or a weight is not finite. The message lists the images of the batch, or
            of the last batch in the case of a weight.
    """
    if not positions:
        return
    losses = losses[-len(positions) :]
    nonfinite = (~torch.stack(losses)[:, 0].isfinite()).nonzero().flatten().tolist()
    has_finite_weights = torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()
    if nonfinite or not has_finite_weights:
        batch = nonfinite[0] if nonfinite else -1
        problem = (
            f"training loss: found {losses[batch][0].item()}" if nonfinite else "weights: found nan or inf"
        )
        raise FloatingPointError(
            f"{problem}, expected a number, for the batch of the images "
            f"{', '.join(names[positions[batch].numpy()])}. last.pt and best.pt, where they exist, are from "
            "before it. Check these images; if they are fine, lower learning_rate or use precision fp32"
        )


def describe_validation(scored: Evaluation | None) -> dict[str, float]:
    """Return the validation columns of a history row; they are NaN without validation images."""
    if scored is None:
        return _loss_columns("valid", [math.nan] * len(Losses._fields)) | {
            "valid_miou": math.nan,
            "valid_pixel_acc": math.nan,
        }
    return _loss_columns("valid", scored.losses) | {
        "valid_miou": mean_iou(scored.counts),
        "valid_pixel_acc": pixel_accuracy(scored.counts),
    }


def _loss_columns(prefix: str, terms: list[float]) -> dict[str, float]:
    """Return loss columns of a history row: the total, such as `train_loss`, and each unweighted term."""
    names = [f"{prefix}_{'loss' if name == 'total' else name}" for name in Losses._fields]
    return dict(zip(names, terms, strict=True))

"""Train a network: the device, one epoch, and `fit` with its checkpoints."""

import math
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from lib.data import Samples, check_choice, progress_bar
from lib.dataset import Batch, encode_batch, training_loader
from lib.evaluation import autocast, evaluate
from lib.losses import Losses, total_loss
from lib.metrics import mean_iou, pixel_accuracy
from lib.model import Prediction, save_atomically, save_model
from lib.runs import write_history, write_report, write_scores

SCHEDULES = ("cosine", "one_cycle")
PRECISIONS = ("auto", "fp32", "bf16")


def choose_device(device: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; anything else must be there.

    Raises:
        ValueError: no such device here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # describe_device tells of a driver that is too old
        if torch.cuda.is_available():
            available.insert(0, "cuda")
    if device == "auto":
        return torch.device(available[0])
    if device.split(":")[0] not in available:
        raise ValueError(f"device: found {device!r}, torch {torch.__version__} has auto, {', '.join(available)} here")
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` takes bf16 where the hardware computes in it, else fp32."""
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    if device.type == "cpu":  # emulated, bf16 is several times slower than fp32
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def describe_device(device: str, precision: str) -> str:
    """What `fit` will run on, and a GPU that is there but can't be used."""
    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    line = f"{chosen.type} ({name}), {choose_precision(precision, chosen)}, torch {torch.__version__}"
    if chosen.type == "cpu" and device == "auto" and _has_nvidia_gpu():
        line += (
            "\nAn NVIDIA GPU is installed, but this torch can't use it and trains on the CPU. The usual reason is a "
            f"driver older than CUDA {torch.version.cuda}: update it, or install a torch and torchvision built for it"
        )
    return line


def _has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout


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
    augment: str,
    workers: int,
    precision: str,
    device: str,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Train, and yield each epoch's row of the history once everything about it is on disk.

    Into the run's folder go `history.csv`, `last.pt`, and of the epoch with the best validation mIoU
    (the last one where nothing validates) `best.pt`, `scores.json` and `counts.npz`; in the end
    `report.md`. Parameters mean what they mean in `train.ipynb`.

    Raises:
        ValueError: a parameter out of range; it is named.
        FloatingPointError: the loss of an epoch is not finite.
    """
    _check_ranges(epochs=epochs, learning_rate=learning_rate)
    where = choose_device(device)
    precision = choose_precision(precision, where)
    model.to(where)
    loader = training_loader(train, augment, batch_size, workers, seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    scheduler = build_schedule(schedule, optimizer, learning_rate, epochs, len(loader))
    encode = partial(encode_batch, inputs=inputs, depth_encoding=depth_encoding, device=where)

    def loss(prediction: Prediction, batch: Batch) -> Losses:
        return total_loss(*prediction, *batch[1:], soft_iou_weight, soft_iou_pooling, depth_weight)

    history, best_miou = [], -math.inf
    with progress_bar("training", epochs * len(loader)) as bar:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            bar.set_description(f"epoch {epoch} of {epochs}")
            row = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
            loader.batch_sampler.epoch = epoch
            step = scheduler.step if schedule == "one_cycle" else None
            row["train_loss"] = train_epoch(model, map(encode, loader), loss, optimizer, step, precision, bar)
            if step is None:
                scheduler.step()
            counts = torch.zeros(0)
            row |= dict.fromkeys(("valid_loss", "valid_depth_l1", "valid_miou", "valid_pixel_acc"), math.nan)
            if len(valid):
                counts, (row["valid_loss"], _, row["valid_depth_l1"]) = evaluate(
                    model, valid, inputs, depth_encoding, batch_size, precision, loss
                )
                row |= {"valid_miou": mean_iou(counts), "valid_pixel_acc": pixel_accuracy(counts)}
            row["seconds"] = time.perf_counter() - started
            history.append(row)
            if not len(valid) or row["valid_miou"] > best_miou:
                best_miou = row["valid_miou"]
                save_model(model, run / "best.pt")
                write_scores(run, row, valid.names, counts.numpy())
            save_atomically(
                {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "scheduler": scheduler.state_dict()}, run / "last.pt",
            )  # fmt: skip
            write_history(run, history)
            yield row
    write_report(run)


def _check_ranges(epochs: int, learning_rate: float) -> None:
    if epochs < 1:
        raise ValueError(f"epochs: found {epochs}, expected 1 or more")
    if not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate: found {learning_rate}, expected a number between 0 and 1, such as 0.0001")


def build_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, learning_rate: float, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`cosine`: to 0 over the epochs, stepped once an epoch; `one_cycle`: stepped after every batch."""
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=epochs * steps)


def train_epoch(model, batches, loss, optimizer, after_step, precision: str, bar: tqdm) -> float:
    """One pass over encoded batches; returns the mean loss over batches.

    `after_step` is called after each optimizer step, or None.

    Raises:
        FloatingPointError: that mean is not finite.
    """
    model.train()
    losses = []
    for batch in batches:
        with autocast(batch.inputs.device, precision):
            prediction = model(batch.inputs)
        total = loss(prediction, batch).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if after_step is not None:
            after_step()
        losses.append(total.detach())  # no .item(): it would stop a GPU at every step
        bar.update()
    mean = float(torch.stack(losses).double().mean())
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"training loss: found {mean}, expected a number; best.pt holds the best epoch so far. Lower "
            "learning_rate, or use precision fp32"
        )
    return mean

"""The same experiment, plainly written: files decoded at every step, float32, one-hot soft IoU."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.batches import build_augmentation


def naive_soft_iou(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Soft IoU loss, pooled over the batch and averaged over the classes present in it."""
    labelled = (labels != 255)[:, None]
    truth = (
        F.one_hot(torch.where(labels == 255, 0, labels), logits.shape[1]).movedim(-1, 1).float() * labelled
    )
    softmax = logits.softmax(1) * labelled
    intersection = (softmax * truth).sum((0, 2, 3))
    union = (softmax + truth - softmax * truth).sum((0, 2, 3))
    present = truth.sum((0, 2, 3)) > 0
    return 1 - (intersection[present] / union[present]).mean()


class PlainSet(torch.utils.data.Dataset):
    """Reads, resizes, augments and encodes an image at each access."""

    def __init__(self, root: Path, names: np.ndarray, size: tuple[int, int], augment: str) -> None:
        folders = [root / "train" / kind for kind in ("image", "depth", "label")]
        self.files = [[next(folder.glob(f"{name}.*")) for folder in folders] for name in names]
        self.size, self.augmentation = size, build_augmentation(augment, size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        image, depth, label = (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in self.files[position])
        height, width = self.size
        image = cv2.resize(image[..., ::-1], (width, height))
        depth, label = (
            cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) for mask in (depth, label)
        )
        if self.augmentation is not None:
            result = self.augmentation(image=image, mask=label + np.uint8(1), depth=depth)
            image, depth, label = result["image"], result["depth"], result["mask"] - np.uint8(1)
        rgb = (image / np.float32(255) - (0.525, 0.443, 0.400)) / (0.281, 0.281, 0.293)
        metres = np.clip(depth / 1000, 0.71, 10)
        inverse = np.where(depth > 0, (1 / metres - 0.1) / (1 / 0.71 - 0.1), 0)
        inputs = np.concatenate((rgb, inverse[..., None]), -1).transpose(2, 0, 1).astype(np.float32)
        target = ((metres - 0.71) / (10 - 0.71)).astype(np.float32)
        return tuple(torch.from_numpy(array) for array in (inputs, label.astype(np.int64), target, depth > 0))


def plain_epochs(
    model: nn.Module,
    root: Path,
    train: np.ndarray,
    valid: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
    augment: str,
    learning_rate: float,
) -> Iterator[float]:
    """Yield the seconds of each epoch: training, validation and a checkpoint."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0001)
    batches = torch.utils.data.DataLoader(
        PlainSet(root, train, size, augment), batch_size, shuffle=True, drop_last=True
    )
    held_out = torch.utils.data.DataLoader(PlainSet(root, valid, size, "none"), batch_size)

    def loss(inputs, label, target, measured) -> tuple[torch.Tensor, torch.Tensor]:
        logits, depth = model(inputs)
        segmentation = F.cross_entropy(logits, label, ignore_index=255) + 0.5 * naive_soft_iou(logits, label)
        return segmentation + 0.1 * (depth[:, 0] - target)[measured].abs().mean(), logits

    while True:
        started = time.perf_counter()
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            total, _ = loss(*batch)
            total.backward()
            optimizer.step()
            total.item()
        model.eval()
        counts = np.zeros((13, 13), int)
        with torch.no_grad():
            for batch in held_out:
                total, logits = loss(*batch)
                total.item()
                predicted, label = logits.argmax(1).numpy().ravel(), batch[1].numpy().ravel()
                seen = label != 255
                counts += np.bincount(13 * label[seen] + predicted[seen], minlength=169).reshape(13, 13)
        with tempfile.TemporaryFile() as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        yield time.perf_counter() - started

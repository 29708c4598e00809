"""From `Samples` to training tensors and back: augment each image, batch, encode and decode."""

import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import albumentations
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.data.samples import Samples
from lib.model import ModelConfig
from lib.options import check_options

SHARED_MEMORY = Path("/dev/shm")
PATIENCE_SECONDS = 300  # for a batch from a worker


class RawBatch(NamedTuple):
    """A batch as it is stored, small enough to move to a GPU quickly.

    Attributes:
        image: `(B, H, W, 3)` uint8.
        depth: `(B, H, W)` uint16 millimetres, 0 = missing.
        label: `(B, H, W)` uint8, 255 = ignore.
        measured: `(B, H, W)` bool; False where depth is missing or was filled in afterwards.
        position: `(B,)` int64 positions in the samples.
    """

    image: torch.Tensor
    depth: torch.Tensor
    label: torch.Tensor
    measured: torch.Tensor
    position: torch.Tensor


class Batch(NamedTuple):
    """A batch as the network and the losses take it.

    Attributes:
        inputs: `(B, C, H, W)` float32, C = 1, 3, 4 or 6.
        label: `(B, H, W)` int64, 255 = ignore.
        depth: `(B, 1, H, W)` float32 target, 0 at the nearest and 1 at the farthest end of the range.
        valid_depth: `(B, 1, H, W)` bool, where that target was measured.
    """

    inputs: torch.Tensor
    label: torch.Tensor
    depth: torch.Tensor
    valid_depth: torch.Tensor


def encode_depth(
    depth_mm: torch.Tensor, depth_encoding: str, depth_range_m: tuple[float, float]
) -> torch.Tensor:
    """Depth clipped to (nearest, farthest) as 0..1, in any shape; missing depth (0) stays 0.

    `linear` and `log` are 0 at the nearest end of the range, `inverse` at the farthest: there a network can't
    tell depth from missing depth.
    """
    check_options(depth_encoding=depth_encoding)
    depth_m = (depth_mm.float() / 1000).clip(*depth_range_m)
    scale = {"inverse": torch.reciprocal, "linear": lambda depth: depth, "log": torch.log}[depth_encoding]
    # of inverse depth the farthest end is the low one; on the CPU, or a GPU would wait
    low, high = scale(torch.tensor(depth_range_m)).aminmax(dim=0)
    return torch.where(depth_mm == 0, 0.0, (scale(depth_m) - low) / (high - low))


def decode_depth(linear: torch.Tensor, depth_range_m: tuple[float, float]) -> torch.Tensor:
    """Metres from depth as `encode_depth` makes it `linear`, in any shape."""
    nearest, farthest = depth_range_m
    return nearest + linear * (farthest - nearest)


def encode_inputs(image: torch.Tensor, depth_mm: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The network's input.

    Args:
        image: `(B, H, W, 3)` uint8 RGB.
        depth_mm: `(B, H, W)` millimetres, 0 = missing.
        config: of the network, which says what it takes.

    Returns:
        `(B, C, H, W)` float32: RGB, then depth, then x and y, which run 0..1 left to right and top to bottom.
    """
    channels = []
    if config.inputs != "depth":
        mean = torch.tensor(config.rgb_mean).to(image.device, non_blocking=True)
        std = torch.tensor(config.rgb_std).to(image.device, non_blocking=True)
        channels.append(((image / 255 - mean) / std).permute(0, 3, 1, 2))
    if config.inputs != "rgb":
        channels.append(encode_depth(depth_mm, config.depth_encoding, config.depth_range_m)[:, None])
    if config.inputs == "rgbd_xy":
        count, height, width = depth_mm.shape
        y, x = (torch.linspace(0, 1, length, device=image.device) for length in (height, width))
        channels.append(torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(count, 2, height, width))
    return torch.cat(channels, 1)


def encode_batch(raw: RawBatch, config: ModelConfig, device: torch.device) -> Batch:
    """Move a batch to the device, small as it is, and encode it there."""
    image, depth_mm, label, measured = (tensor.to(device, non_blocking=True) for tensor in raw[:4])
    depth_mm = depth_mm.float()  # torch knows few operations on uint16
    return Batch(
        encode_inputs(image, depth_mm, config),
        label.long(),
        encode_depth(depth_mm, "linear", config.depth_range_m)[:, None],
        ((depth_mm > 0) & measured)[:, None],
    )


def build_augmentation(augment: str, size: tuple[int, int]) -> albumentations.Compose | None:
    """`exp061`: flip, shift 5 %, scale 10 %, rotate 5 degrees; `crops`: random-resized crops and flip.

    `zooms`: scale 0.5 to 2, shift 25 % and flip. `_colour` also changes brightness, contrast, saturation and
    hue of the RGB image.

    Depth and label are `mask` targets, so they are never blended. The one `fill_mask` is 0, which
    is missing depth; labels are passed as label + 1, so that it comes back as 255.
    """
    check_options(augment=augment)
    if augment == "none":
        return None
    with warnings.catch_warnings(action="error"):  # albumentations ignores an unknown option with a warning
        if not augment.startswith("crops"):
            shift, scale, turn, share = (
                (0.05, (0.9, 1.1), 5, 0.5) if augment == "exp061" else (0.25, (0.5, 2), 0, 1)
            )
            geometry = albumentations.Affine(
                translate_percent={"x": (-shift, shift), "y": (-shift, shift)},
                scale=scale, keep_ratio=True, rotate=(-turn, turn), fill=0, fill_mask=0,
                mask_interpolation=cv2.INTER_NEAREST, p=share,
            )  # fmt: skip
        else:
            ratio = size[1] / size[0]
            geometry = albumentations.RandomResizedCrop(  # plain INTER_NEAREST would shift masks against RGB
                size,
                scale=(0.35, 1.0),
                ratio=(0.85 * ratio, 1.18 * ratio),
                mask_interpolation=cv2.INTER_NEAREST_EXACT,
            )
        transforms = [albumentations.HorizontalFlip(p=0.5), geometry]
        if augment.endswith("_colour"):
            transforms.append(
                albumentations.ColorJitter(
                    brightness=(0.6, 1.4),
                    contrast=(0.6, 1.4),
                    saturation=(0.6, 1.4),
                    hue=(-0.05, 0.05),
                    p=0.8,
                )
            )
        return albumentations.Compose(
            transforms,
            additional_targets={"depth": "mask", "measured": "mask"},
            save_applied_params=True,
        )


def _zoom(applied: list[tuple[str, dict]]) -> float:
    """By how much the applied transforms enlarge the picture."""
    for name, parameters in applied:
        if name == "Affine":
            return parameters["scale"]["x"]
        if name == "RandomResizedCrop":
            left, top, right, bottom = parameters["crop_coords"]
            height, width = parameters["shape"][:2]
            return math.sqrt(height * width / ((bottom - top) * (right - left)))
    return 1.0


def check_depth(config: ModelConfig, samples: Samples, trains: bool = False) -> None:
    """Raise a ValueError where a network would eat, or learn, the depth of samples that have none."""
    if samples.depth is None and (config.inputs != "rgb" or (trains and config.depth_head)):
        raise ValueError(
            f"inputs: the network takes {config.inputs} and has {'a' if config.depth_head else 'no'} depth "
            "head, but these data have no depth; use inputs rgb and depth_weight 0"
        )


class TrainingSet(Dataset):
    """Augmented samples by (epoch, position): the same for any number of workers, another every epoch.

    albumentations copies its generators into every worker, so that workers repeat one another and
    epochs repeat the last; here each item seeds them anew from (seed, epoch, position). Each transform
    gets a seed of its own: `Compose.set_random_seed` gives all the same, and then the draw that decides
    the flip also decides the zoom.
    """

    def __init__(self, samples: Samples, augment: str, seed: int) -> None:
        if samples.label is None:
            raise ValueError("train: these samples have no labels; train on split 'train'")
        self.samples, self.depth, self.seed = samples, samples.depth_or_missing, seed
        self.augmentation = build_augmentation(augment, samples.size)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, ...]:
        epoch, position = key
        arrays = {
            "image": self.samples.image[position],
            "depth": self.depth[position],
            "mask": self.samples.label[position] + np.uint8(1),  # 255 wraps to 0, which fills borders
        }
        if self.samples.measured is not None:
            arrays["measured"] = self.samples.measured[position].view(np.uint8)
        if self.augmentation is not None:
            transforms = self.augmentation.transforms
            seeds = np.random.SeedSequence((self.seed, epoch, position)).generate_state(len(transforms))
            for transform, seed in zip(transforms, seeds.tolist(), strict=True):
                transform.set_random_seed(seed)
            arrays = self.augmentation(**arrays)
            # enlarged by a zoom, things look as if they were nearer
            arrays["depth"] = cv2.multiply(arrays["depth"], 1 / _zoom(arrays["applied_transforms"]))
        depth = arrays["depth"]
        measured = arrays["measured"].view(bool) if "measured" in arrays else depth > 0
        return arrays["image"], depth, arrays["mask"] - np.uint8(1), measured, np.int64(position)


class EpochBatches(Sampler):
    """Shuffled batches of (epoch, position); call `start` before each pass.

    The last batch is kept, but a single left-over image joins the batch before, so that 9 images in batches
    of 4 are 4 and 5: DeepLabV3+ normalises its pooled features over the batch and cannot train on one image.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if min(count, batch_size) < 2:
            raise ValueError(
                f"batch_size: found {batch_size} with {count} training images; DeepLabV3+ trains on batches "
                "of 2 images or more, raise batch_size or limit"
            )
        self.count, self.batch_size, self.seed, self.epoch, self.skip = count, batch_size, seed, 0, 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch of the next pass, and how many of its batches to skip."""
        self.epoch = epoch
        self.skip = skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        ends = self.batch_size * np.arange(1, len(self))  # of all batches but the last
        for batch in np.split(order, ends)[self.skip :]:
            yield [(self.epoch, int(position)) for position in batch]

    def __len__(self) -> int:
        full, left_over = divmod(self.count, self.batch_size)
        return full + (left_over > 1)


def stack_items(items: list[tuple[np.ndarray, ...]]) -> RawBatch:
    """Stack the items of a `TrainingSet`."""
    return RawBatch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*items, strict=True)))


def training_loader(
    samples: Samples, augment: str, batch_size: int, num_workers: int, seed: int
) -> DataLoader:
    """Augmented `RawBatch`es of one epoch after another; see `EpochBatches` for which."""
    check_options(num_workers=num_workers)
    # shared memory holds two batches a worker, the one in use and the next; without room a worker waits
    needed = (
        min((2 * num_workers + 2) * (batch_size + 1), len(samples)) * 7 * math.prod(samples.size)
    )  # 7 bytes a pixel
    free = shutil.disk_usage(SHARED_MEMORY).free if num_workers and SHARED_MEMORY.exists() else needed
    if free < needed:
        raise ValueError(
            f"num_workers: {num_workers} need {-(-needed // 10**6)} MB of shared memory for batches, but "
            f"{SHARED_MEMORY} has only {free // 10**6} MB free; use num_workers 0, or start the container "
            "with `docker run --shm-size=1g`"
        )
    forks = num_workers > 0 and sys.platform == "linux"  # a Mac can fork, but its libraries break in the copy
    return _Loader(
        TrainingSet(samples, augment, seed),
        batch_sampler=EpochBatches(len(samples), batch_size, seed),
        collate_fn=stack_items,
        num_workers=num_workers,
        timeout=PATIENCE_SECONDS if num_workers else 0,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if forks else None,  # forked workers share the arrays
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each pass draws from the generator of weights and dropout
    )


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[RawBatch]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:  # nothing came in time, or a process was killed
            if not self.num_workers:
                raise
            raise RuntimeError(
                f"num_workers: {self.num_workers} processes delivered no batch ({error}); use num_workers 0"
            ) from error


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)


def plain_batch(samples: Samples) -> RawBatch:
    """Samples as they are, without augmentation; labels that are held back are all 255."""
    arrays = (
        samples.image,
        samples.depth_or_missing,
        samples.labels_or_ignored,
        samples.measured_depth,
        np.arange(len(samples)),
    )
    # copies, as torch warns of memory maps that are read-only
    return RawBatch(*(torch.from_numpy(np.array(array)) for array in arrays))

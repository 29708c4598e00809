"""Convert `Samples` to batches: augmentation, data loading, and encoding of inputs and targets."""

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
WORKER_TIMEOUT_SECONDS = 300  # timeout for a batch from a worker


class RawBatch(NamedTuple):
    """A batch before encoding, in small dtypes for a fast transfer to the GPU.

    Attributes:
        image: `(B, H, W, 3)` uint8 RGB.
        depth: `(B, H, W)` uint16 millimetres, 0 = missing.
        label: `(B, H, W)` uint8, 255 = ignore.
        measured: `(B, H, W)` bool; False where depth is missing or was hole-filled.
        position: `(B,)` int64 positions of the images in the samples.
    """

    image: torch.Tensor
    depth: torch.Tensor
    label: torch.Tensor
    measured: torch.Tensor
    position: torch.Tensor


class Batch(NamedTuple):
    """An encoded batch: the inputs of the network and the targets of the losses.

    Attributes:
        inputs: `(B, C, H, W)` float32, C = 1, 3, 4 or 6; see `encode_inputs`.
        label: `(B, H, W)` int64, 255 = ignore.
        depth: `(B, 1, H, W)` float32 depth target, from 0 (nearest) to 1 (farthest) over the depth range.
        valid_depth: `(B, 1, H, W)` bool, True where the target was measured.
    """

    inputs: torch.Tensor
    label: torch.Tensor
    depth: torch.Tensor
    valid_depth: torch.Tensor


def encode_depth(
    depth_mm: torch.Tensor, depth_encoding: str, depth_range_m: tuple[float, float]
) -> torch.Tensor:
    """Clip depth to a range and scale it to 0..1, in any shape; missing depth (0) stays 0.

    With `linear` and `log`, 0 is the near end of the range; with `inverse`, 0 is the far end. At that end,
    depth can't be distinguished from missing depth.

    Args:
        depth_mm: depth in millimetres, 0 = missing.
        depth_encoding: `inverse`, `linear` or `log`.
        depth_range_m: (nearest, farthest) in metres.
    """
    check_options(depth_encoding=depth_encoding)
    depth_m = (depth_mm.float() / 1000).clip(*depth_range_m)
    scale = {"inverse": torch.reciprocal, "linear": lambda depth: depth, "log": torch.log}[depth_encoding]
    # aminmax, because inverse depth is lowest at the far end; on the CPU, to avoid a GPU synchronisation
    low, high = scale(torch.tensor(depth_range_m)).aminmax(dim=0)
    return torch.where(depth_mm == 0, 0.0, (scale(depth_m) - low) / (high - low))


def decode_depth(linear: torch.Tensor, depth_range_m: tuple[float, float]) -> torch.Tensor:
    """Convert depth in the `linear` encoding of `encode_depth` to metres, in any shape."""
    nearest, farthest = depth_range_m
    return nearest + linear * (farthest - nearest)


def encode_inputs(image: torch.Tensor, depth_mm: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Build the network's input tensor.

    Args:
        image: `(B, H, W, 3)` uint8 RGB.
        depth_mm: `(B, H, W)` millimetres, 0 = missing.
        config: the network's config, which selects the channels and how they are scaled.

    Returns:
        `(B, C, H, W)` float32 with the selected channels in this order: normalised RGB, encoded depth, x and
        y. The coordinates run from 0 to 1, x from left to right and y from top to bottom.
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
    """Move a batch to the device in its small dtypes and encode it there."""
    image, depth_mm, label, measured = (tensor.to(device, non_blocking=True) for tensor in raw[:4])
    depth_mm = depth_mm.float()  # torch supports few operations on uint16
    return Batch(
        encode_inputs(image, depth_mm, config),
        label.long(),
        encode_depth(depth_mm, "linear", config.depth_range_m)[:, None],
        ((depth_mm > 0) & measured)[:, None],
    )


def build_augmentation(augment: str, size: tuple[int, int]) -> albumentations.Compose | None:
    """Build the augmentation of training images; None for `none`.

    Depth and labels are `mask` targets, so their values are never interpolated. All masks share a single
    `fill_mask` of 0, which means missing depth. Labels are therefore passed as label + 1 in uint8, so that
    filled pixels become 255 when 1 is subtracted again.

    Args:
        augment: one of these names:
            - `none`: no augmentation.
            - `exp061`: flip; in half of the images, shift by up to 5 %, scale by up to 10 % and rotate by up
              to 5 degrees.
            - `crops`: flip and random resized crops of at least 35 % of the area.
            - `zooms`: flip, scale by 0.5 to 2 and shift by up to 25 %.
            - `crops_colour`, `zooms_colour`: also change the brightness, contrast, saturation and hue of RGB.
        size: (height, width) of the images.
    """
    check_options(augment=augment)
    if augment == "none":
        return None
    geometry, _, colour = augment.partition("_")
    with warnings.catch_warnings(action="error"):  # albumentations only warns about unknown options
        transforms = [albumentations.HorizontalFlip(p=0.5), _build_geometry(geometry, size)]
        if colour:
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


def _build_geometry(name: str, size: tuple[int, int]) -> albumentations.DualTransform:
    """Build the geometric transform of `exp061`, `crops` or `zooms`."""
    if name == "exp061":
        return _build_affine(shift=0.05, scale=(0.9, 1.1), rotation=5, probability=0.5)
    if name == "zooms":
        return _build_affine(shift=0.25, scale=(0.5, 2), rotation=0, probability=1)
    ratio = size[1] / size[0]
    return albumentations.RandomResizedCrop(
        size,
        scale=(0.35, 1.0),
        ratio=(0.85 * ratio, 1.18 * ratio),
        mask_interpolation=cv2.INTER_NEAREST_EXACT,  # cv2.resize's INTER_NEAREST shifts masks against RGB
    )


def _build_affine(
    shift: float, scale: tuple[float, float], rotation: float, probability: float
) -> albumentations.Affine:
    return albumentations.Affine(
        translate_percent={"x": (-shift, shift), "y": (-shift, shift)},
        scale=scale,
        keep_ratio=True,
        rotate=(-rotation, rotation),
        fill=0,
        fill_mask=0,
        mask_interpolation=cv2.INTER_NEAREST,
        p=probability,
    )


def zoom_factor(applied_transforms: list[tuple[str, dict]]) -> float:
    """Return the factor by which the transforms scale the image, the geometric mean of both axes."""
    for name, parameters in applied_transforms:
        if name == "Affine":
            return parameters["scale"]["x"]
        if name == "RandomResizedCrop":
            left, top, right, bottom = parameters["crop_coords"]
            height, width = parameters["shape"][:2]
            return math.sqrt(height * width / ((bottom - top) * (right - left)))
    return 1.0


def check_depth(config: ModelConfig, samples: Samples, trains: bool = False) -> None:
    """Raise a ValueError if the samples have no depth, but the network needs it.

    It needs depth as an input or, with `trains`, as a target of its depth head.
    """
    if samples.depth is None and (config.inputs != "rgb" or (trains and config.depth_head)):
        raise ValueError(
            f"inputs: the network takes {config.inputs} and has {'a' if config.depth_head else 'no'} depth "
            "head, but these data have no depth; use inputs rgb and depth_weight 0"
        )


class TrainingSet(Dataset):
    """Augmented training samples, indexed by (epoch, position).

    An item consists of the fields of `RawBatch` for one image. Its augmentation changes with every epoch but
    does not depend on the number of workers.

    albumentations copies its random generators into every worker, so all workers would draw the same numbers,
    and every epoch would repeat the previous one. Each item therefore seeds the generators from (seed, epoch,
    position). Each transform has its own seed: `Compose.set_random_seed` would give all transforms the same
    seed, and the draw that decides the flip would also determine the zoom.
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
            "mask": self.samples.label[position] + np.uint8(1),  # 255 wraps to 0, the fill value
        }
        if self.samples.measured is not None:
            arrays["measured"] = self.samples.measured[position].view(np.uint8)
        if self.augmentation is not None:
            transforms = self.augmentation.transforms
            seeds = np.random.SeedSequence((self.seed, epoch, position)).generate_state(len(transforms))
            for transform, seed in zip(transforms, seeds.tolist(), strict=True):
                transform.set_random_seed(seed)
            arrays = self.augmentation(**arrays)
            # objects enlarged by a zoom look nearer
            arrays["depth"] = cv2.multiply(arrays["depth"], 1 / zoom_factor(arrays["applied_transforms"]))
        depth = arrays["depth"]
        measured = arrays["measured"].view(bool) if "measured" in arrays else depth > 0
        return arrays["image"], depth, arrays["mask"] - np.uint8(1), measured, np.int64(position)


class EpochBatches(Sampler):
    """Sampler of shuffled batches of (epoch, position); call `start` before each pass.

    An incomplete last batch is kept, but a single left-over image joins the previous batch: 9 images in
    batches of 4 become 4 and 5. DeepLabV3+ normalises its pooled features over the batch and therefore can't
    be trained on a single image.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if min(count, batch_size) < 2:
            raise ValueError(
                f"batch_size: found {batch_size} with {count} training images; DeepLabV3+ trains on batches "
                "of 2 images or more, raise batch_size or limit"
            )
        self.count, self.batch_size, self.seed, self.epoch, self.skip = count, batch_size, seed, 0, 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch of the next pass and the number of batches to skip at its start."""
        self.epoch = epoch
        self.skip = skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        ends = self.batch_size * np.arange(1, len(self))  # of all batches except the last
        for batch in np.split(order, ends)[self.skip :]:
            yield [(self.epoch, int(position)) for position in batch]

    def __len__(self) -> int:
        full, remainder = divmod(self.count, self.batch_size)
        return full + (remainder > 1)


def stack_items(items: list[tuple[np.ndarray, ...]]) -> RawBatch:
    """Collate the items of a `TrainingSet` into a batch."""
    return RawBatch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*items, strict=True)))


def training_loader(
    samples: Samples, augment: str, batch_size: int, num_workers: int, seed: int
) -> DataLoader:
    """Create a loader of augmented `RawBatch`es.

    Each pass over the loader is one epoch. Call `loader.batch_sampler.start` before each pass.

    Args:
        samples: the training samples.
        augment: see `build_augmentation`.
        batch_size: images per batch, at least 2.
        num_workers: number of worker processes; 0 loads in the main process.
        seed: seed of the order and the augmentation of the images.

    Raises:
        ValueError: if the samples have no labels, there are fewer than two images, an option is invalid, or
            shared memory is too small for the workers.
    """
    check_options(num_workers=num_workers)
    # shared memory contains two batches per worker, plus the current and the next one
    needed = (
        min((2 * num_workers + 2) * (batch_size + 1), len(samples)) * 7 * math.prod(samples.size)
    )  # 7 bytes per pixel
    free = shutil.disk_usage(SHARED_MEMORY).free if num_workers and SHARED_MEMORY.exists() else needed
    if free < needed:
        raise ValueError(
            f"num_workers: {num_workers} need {-(-needed // 10**6)} MB of shared memory for batches, but "
            f"{SHARED_MEMORY} has only {free // 10**6} MB free; use num_workers 0, or start the container "
            "with `docker run --shm-size=1g`"
        )
    use_fork = num_workers > 0 and sys.platform == "linux"  # on macOS, libraries break in forked processes
    return _Loader(
        TrainingSet(samples, augment, seed),
        batch_sampler=EpochBatches(len(samples), batch_size, seed),
        collate_fn=stack_items,
        num_workers=num_workers,
        timeout=WORKER_TIMEOUT_SECONDS if num_workers else 0,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if use_fork else None,  # forked workers share the arrays
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # otherwise each pass draws from the generator of weights and dropout
    )


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[RawBatch]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:  # timeout, or a worker was killed
            if not self.num_workers:
                raise
            raise RuntimeError(
                f"num_workers: {self.num_workers} processes delivered no batch ({error}); use num_workers 0"
            ) from error


def _init_worker(worker_id: int) -> None:
    cv2.setNumThreads(0)


def plain_batch(samples: Samples) -> RawBatch:
    """Convert samples to a `RawBatch` without augmentation; labels that are held back become 255."""
    arrays = (
        samples.image,
        samples.depth_or_missing,
        samples.labels_or_ignored,
        samples.measured_depth,
        np.arange(len(samples)),
    )
    # copy: torch warns about read-only memory maps
    return RawBatch(*(torch.from_numpy(np.array(array)) for array in arrays))

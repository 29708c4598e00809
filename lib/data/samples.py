"""RGB-D samples as arrays with one common index, and their resizing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np

from lib.classes import IGNORE_INDEX, NYUV2_13

DEPTH_RANGE_M = (0.71, 10.0)  # Exp061's clip of the depth


class DataError(ValueError):
    """Data that can't be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Samples:
    """RGB-D images as arrays with one common index.

    Attributes:
        names: `(N,)` file names without suffix.
        image: `(N, H, W, 3)` uint8 RGB.
        depth: `(N, H, W)` uint16 millimetres, 0 = missing; None where the data set has no depth.
        label: `(N, H, W)` uint8 class indices, 255 = ignore; None where labels are held back.
        measured: `(N, H, W)` bool, where the sensor measured; None where depth is not hole-filled.
        scene: `(N,)` the scene an image belongs to; None where that is unknown.
        classes: names of the classes, in the order of their indices.
        depth_range_m: (nearest, farthest) that a network made for these data clips depth to.
        loaded_with: the parameters of `load_samples` by the names they have in the notebooks.
    """

    names: np.ndarray
    image: np.ndarray
    depth: np.ndarray | None = None
    label: np.ndarray | None = None
    measured: np.ndarray | None = None
    scene: np.ndarray | None = None
    classes: tuple[str, ...] = NYUV2_13
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    loaded_with: dict | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[1:3]

    def __getitem__(self, index: slice | np.ndarray) -> "Samples":
        """The samples at a slice, or at an array of positions."""
        return self.map(lambda array: array[index])

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Samples":
        """The same change to every array that is there."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: change(array) for name, array in arrays.items() if isinstance(array, np.ndarray)}
        )

    @property
    def labels_or_ignored(self) -> np.ndarray:
        """The labels; 255 everywhere where they are held back."""
        return np.full(self.image.shape[:3], IGNORE_INDEX, np.uint8) if self.label is None else self.label

    @property
    def depth_or_missing(self) -> np.ndarray:
        """The depth; 0 everywhere where the data set has none."""
        return np.zeros(self.image.shape[:3], np.uint16) if self.depth is None else self.depth

    @property
    def measured_depth(self) -> np.ndarray:
        """`(N, H, W)` bool: where a sensor measured depth."""
        there = self.depth_or_missing > 0
        return there if self.measured is None else there & self.measured


@dataclass(frozen=True)
class Source:
    """The images of one split that are still where they come from.

    Attributes:
        names, scene, classes, depth_range_m: as in `Samples`.
        read: (positions, size) to a list of `Samples` in that order, more than one where sizes differ.
        usual_validation: what `auto` means, where the images allow it.
    """

    names: np.ndarray
    scene: np.ndarray | None
    classes: tuple[str, ...]
    read: Callable[[np.ndarray, tuple[int, int] | None], list[Samples]]
    usual_validation: str
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M

    def select(self, chosen: np.ndarray) -> "Source":
        """Only the images at these positions."""
        scene = None if self.scene is None else self.scene[chosen]
        return replace(
            self, names=self.names[chosen], scene=scene, read=lambda at, size: self.read(chosen[at], size)
        )


@dataclass(frozen=True)
class Pieces:
    """A split of a data set, read piece by piece each time that it is iterated over.

    Attributes:
        source: of the images.
        size: (height, width) to resize to, or None.
        batch_size: images of a piece, at most.
        validation: that chose them, never `auto`.
        data: where they come from, as it was given.
    """

    source: Source
    size: tuple[int, int] | None
    batch_size: int
    validation: str
    data: str

    def __iter__(self) -> Iterator[Samples]:
        for start in range(0, len(self), self.batch_size):
            yield from self[np.arange(start, min(start + self.batch_size, len(self)))]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.source.names)

    def __getitem__(self, positions: np.ndarray) -> list[Samples]:
        """The images at these positions, as `Samples` of one size each."""
        source, read, start = self.source, [], 0
        for samples in source.read(np.asarray(positions), self.size):
            at = positions[start : start + len(samples)]
            scene = None if source.scene is None else source.scene[at]
            read.append(
                replace(samples, scene=scene, classes=source.classes, depth_range_m=source.depth_range_m)
            )
            start += len(samples)
        return read


def resize_samples(samples: Samples, size: tuple[int, int]) -> Samples:
    """RGB by area (linear when enlarging); depth, label and measured by nearest neighbour."""
    if samples.size == tuple(size):
        return samples

    def resize(array: np.ndarray) -> np.ndarray:
        if array.ndim < 3:  # names and scenes
            return array
        resized = np.empty((len(array), *size, *array.shape[3:]), array.dtype)
        for position, one in enumerate(array):
            resized[position] = (resize_image if one.ndim == 3 else resize_nearest)(one, size)
        return resized

    return samples.map(resize)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W, 3)` image to (height, width)."""
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W)` array without inventing values."""
    # INTER_NEAREST would take each block's upper left pixel and so shift depth against RGB.
    numbers = array.view(np.uint8) if array.dtype == bool else array
    return cv2.resize(numbers, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).view(array.dtype)

"""Data set splits, RGB-D samples as arrays, and image resizing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from lib.classes import IGNORE_INDEX

DEPTH_RANGE_M = (0.71, 10.0)  # depth clipping range of Exp061


class DataError(ValueError):
    """Raised when data can't be used as it is. The message contains the file and the remedy."""


class MissingSplit(DataError):
    """Raised when a data set does not have the requested split."""


@dataclass(frozen=True)
class Samples:
    """RGB-D images as arrays with a common first axis.

    Attributes:
        names: `(N,)` file names without suffix.
        image: `(N, H, W, 3)` uint8 RGB.
        depth: `(N, H, W)` uint16 millimetres, 0 = missing; None if the data set has no depth.
        label: `(N, H, W)` uint8 class indices, 255 = ignore; None if labels are withheld.
        measured: `(N, H, W)` bool, true where the sensor measured depth; None if depth is not hole-filled.
        scene: `(N,)` scene of each image; None if unknown.
        classes: names of the classes, in the order of their indices.
        depth_range_m: (nearest, farthest) in metres to which a network for this data clips depth.
        loaded_with: the arguments of `load_samples` except `split`, under their names in the notebooks, and
            the selected validation method as `chosen_validation`; None if not loaded by that function.
    """

    names: np.ndarray
    image: np.ndarray
    depth: np.ndarray | None = None
    label: np.ndarray | None = None
    measured: np.ndarray | None = None
    scene: np.ndarray | None = None
    classes: tuple[str, ...] = field(kw_only=True)
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    loaded_with: dict | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[1:3]

    def __getitem__(self, index: slice | np.ndarray) -> "Samples":
        """Return the samples at a slice or an array of positions."""
        return self.map(lambda array: array[index])

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Samples":
        """Apply a function to every array that is not None."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **{name: change(array) for name, array in arrays.items()})

    @property
    def labels_or_ignored(self) -> np.ndarray:
        """The labels, or 255 everywhere if they are withheld."""
        return np.full(self.image.shape[:3], IGNORE_INDEX, np.uint8) if self.label is None else self.label

    @property
    def depth_or_missing(self) -> np.ndarray:
        """The depth, or 0 everywhere if the data set has none."""
        return np.zeros(self.image.shape[:3], np.uint16) if self.depth is None else self.depth

    @property
    def measured_depth(self) -> np.ndarray:
        """`(N, H, W)` bool, true where the sensor measured depth."""
        return (self.depth_or_missing > 0) & (True if self.measured is None else self.measured)


Read = Callable[[np.ndarray, tuple[int, int] | None], list[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Split:
    """One split of a data set, read in batches on each iteration or loaded as a whole.

    Attributes:
        names, classes, scene, depth_range_m, loaded_with: as in `Samples`.
        split: `train`, `valid` or `test`.
        label_values: value of each class in the data set's label files; None if equal to the class index.
        read: function of (positions, size) that reads images in the order of the positions. It returns a dict
            of the arrays of `Samples` by name for each series of consecutive images of equal size.
        size: (height, width) to resize to; None keeps the native size.
        batch_size: maximum number of images per batch.
        validation: how the validation images were chosen, never `auto`. Before they are chosen, the default
            method of the source.
        data: where the images come from, such as the `source` of `load_samples`.
    """

    names: np.ndarray
    classes: tuple[str, ...]
    read: Read
    scene: np.ndarray | None = None
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    size: tuple[int, int] | None = None
    batch_size: int = 8
    validation: str = "none"
    data: str = ""
    split: str = "test"
    label_values: tuple[int, ...] | None = None
    loaded_with: dict | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __iter__(self) -> Iterator[Samples]:
        for start in range(0, len(self), self.batch_size):
            yield from self[np.arange(start, min(start + self.batch_size, len(self)))]

    def __getitem__(self, positions: np.ndarray) -> list[Samples]:
        """Read the images at these positions, as one `Samples` per series of images of equal size."""
        metadata = {name: getattr(self, name) for name in ("classes", "depth_range_m", "loaded_with")}
        batches = self.read(np.asarray(positions), self.size)
        ends = np.cumsum([len(arrays["image"]) for arrays in batches])
        samples = []
        for indices, arrays in zip(np.split(positions, ends[:-1]), batches, strict=True):
            scene = None if self.scene is None else self.scene[indices]
            samples.append(Samples(self.names[indices], **arrays, scene=scene, **metadata))
        return samples

    def select(self, chosen: np.ndarray) -> "Split":
        """Return a split with only the images at these positions."""
        scene = None if self.scene is None else self.scene[chosen]
        return replace(
            self,
            names=self.names[chosen],
            scene=scene,
            read=lambda positions, size: self.read(chosen[positions], size),
        )

    def load(self) -> Samples:
        """Load all images as one `Samples`.

        Raises:
            DataError: if image sizes differ, or no pixel of a train or valid split is labelled.
        """
        first, *others = self[np.arange(len(self))]
        if others:
            raise DataError(
                f"{self.data}: {first.names[-1]} is {'x'.join(map(str, first.size))}, {others[0].names[0]} "
                f"is {'x'.join(map(str, others[0].size))}; images of different sizes can't be read at their "
                "native size into one array: give a size, or read them with iterate_samples"
            )
        is_labelled = first.label is None or any((label != IGNORE_INDEX).any() for label in first.label)
        if self.split != "test" and len(first) and not is_labelled:
            raise DataError(
                f"{self.data}: no pixel is labelled in the {len(first)} images of split {self.split!r} "
                f"(validation {self.validation}); check the labels, `ignore` in DATA/dataset.yaml and limit"
            )
        return first


def resize_samples(samples: Samples, size: tuple[int, int]) -> Samples:
    """Resize samples to (height, width).

    RGB is averaged by area, or interpolated bilinearly if either side grows. Depth, label and measured are
    resized by nearest neighbour.
    """
    if samples.size == tuple(size):
        return samples
    return samples.map(lambda array: resize_stack(array, size) if array.ndim >= 3 else array)


def resize_stack(stack: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize `(N, H, W, 3)` images or `(N, H, W)` values to (height, width), as in `resize_samples`."""
    if stack.shape[1:3] == tuple(size):
        return stack
    resized = np.empty((len(stack), *size, *stack.shape[3:]), stack.dtype)
    for index, array in enumerate(stack):
        resized[index] = (resize_image if array.ndim == 3 else resize_nearest)(array, size)
    return resized


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an `(H, W, 3)` uint8 image to (height, width), by area means or, to enlarge, bilinearly."""
    if size[0] <= image.shape[0] and size[1] <= image.shape[1]:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    # in float, because cv2 rounds the weights for uint8: 12 % of the values would be off by one
    enlarged = cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    return np.rint(enlarged).astype(np.uint8)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W)` array to (height, width) by nearest neighbour."""
    # cv2's choice between two equally near pixels depends on its version
    rows, columns = (
        (2 * np.arange(count) + 1) * length // (2 * count)  # input pixel at the centre of the output pixel
        for length, count in zip(array.shape, size, strict=True)
    )
    return array.take(rows, 0).take(columns, 1)


def choose_evenly(count: int, chosen: int) -> np.ndarray:
    """Return `chosen` evenly spaced positions from 0 to `count - 1`, or all positions if there are fewer."""
    return np.linspace(0, count - 1, min(chosen, count)).round().astype(int)

"""RGB-D samples as arrays with one common index, and their resizing."""

from dataclasses import dataclass

import cv2
import numpy as np


class DataError(ValueError):
    """Data that can't be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Samples:
    """RGB-D images as arrays with one common index.

    Attributes:
        names: `(N,)` file names without suffix.
        image: `(N, H, W, 3)` uint8 RGB.
        depth: `(N, H, W)` uint16 millimetres, 0 = missing.
        label: `(N, H, W)` uint8 class indices, 255 = ignore; None where labels are held back.
        measured: `(N, H, W)` bool, where the sensor measured; None where depth is not hole-filled.
    """

    names: np.ndarray
    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray | None = None
    measured: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[1:3]

    def __getitem__(self, index: slice | np.ndarray) -> "Samples":
        """The samples at a slice, or at an array of positions."""
        arrays = (self.names, self.image, self.depth, self.label, self.measured)
        return Samples(*(None if array is None else array[index] for array in arrays))


def resize_samples(samples: Samples, size: tuple[int, int]) -> Samples:
    """RGB by area (linear when enlarging); depth, label and measured by nearest neighbour."""
    if samples.size == tuple(size):
        return samples
    nearest = [
        None if stack is None else _stack([resize_nearest(array, size) for array in stack], stack, size)
        for stack in (samples.depth, samples.label, samples.measured)
    ]
    image = _stack([resize_image(image, size) for image in samples.image], samples.image, size)
    return Samples(samples.names, image, *nearest)


def _stack(arrays: list[np.ndarray], like: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack(arrays) if arrays else np.empty((0, *size, *like.shape[3:]), like.dtype)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W, 3)` image to (height, width)."""
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W)` array without inventing values."""
    # INTER_NEAREST would take each block's upper left pixel and so shift depth against RGB.
    resized = cv2.resize(array.view(np.uint8) if array.dtype == bool else array, size[::-1],
                         interpolation=cv2.INTER_NEAREST_EXACT)  # fmt: skip
    return resized.view(bool) if array.dtype == bool else resized

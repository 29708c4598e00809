"""Decode image, depth and label files to arrays, and reject files that can't be read unambiguously."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.data.samples import DataError

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"),
    "depth": (".png", ".tif", ".tiff", ".npy"),
    "label": (".png", ".tif", ".tiff", ".bmp"),
}
TRANSPOSED_ORIENTATIONS = range(5, 9)  # EXIF orientations that swap height and width
EXPECTED_LABEL = (
    "one channel of 8 or 16 bits with class values; if colours mean classes, list them under `colours` in "
    "dataset.yaml"
)
EXPECTED_DEPTH = "one channel of depth of 16 bits; export it again from the source"
INTEGER_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow modes


def upright_size(path: Path) -> tuple[int, int]:
    """Return the height and width of the upright image, read from the file header."""
    with _decoding(path), Image.open(path) as image:
        # of a TIFF, Pillow gives the size after rotation
        is_transposed = image.format != "TIFF" and image.getexif().get(0x0112) in TRANSPOSED_ORIENTATIONS
        return image.size if is_transposed else image.size[::-1]


def decode_image(path: Path) -> np.ndarray:
    """Decode an image to `(H, W, 3)` uint8 RGB as viewers display it: upright, with its palette applied.

    Raises:
        DataError: if the file has more than 8 bits per channel, several images or transparent pixels, or
            can't be read.
    """
    image, tile_info = _open(path)
    if image.mode[0] in "IF" or ";16" in tile_info:  # Pillow reduces 16-bit RGB to 8 bits
        raise _error(path, f"{image.mode} of 16 bits or more", "8 bits a channel; convert the file")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise _error(path, "transparent pixels", "an opaque image; put it on a background of your choice")
    with _decoding(path):
        return np.asarray(image.convert("RGB"))


def decode_label(path: Path, in_colours: bool = False) -> np.ndarray:
    """Decode a label file to its `(H, W)` integer values.

    A palette of greys gives the grey values, any other palette the indices.

    Args:
        path: the label file.
        in_colours: whether colours represent classes. Values are then int32 red * 65536 + green * 256 + blue.
    """
    if in_colours:
        return decode_image(path).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    return _decode_values(path, ("L", "P", *INTEGER_MODES), EXPECTED_LABEL)


def decode_depth(
    path: Path, bits: str = "plain", allow_8_bit: bool = True, missing: Sequence[float] = (0,)
) -> np.ndarray:
    """Decode a depth file to its `(H, W)` values, which may be floats in `.npy` and TIFF files.

    Args:
        path: the depth file.
        bits: `plain`, or `sun` to undo the bit rotation of SUN RGB-D.
        allow_8_bit: whether to accept 8-bit depth, which is useful only if its unit is known.
        missing: values that mean nothing was measured, which may be negative.
    """
    if path.suffix.lower() == ".npy":
        with _decoding(path):
            depth = np.load(path)
    else:
        depth = _decode_values(path, ("L", "F", *INTEGER_MODES), EXPECTED_DEPTH)
    if depth.ndim != 2 or depth.dtype.kind not in "iuf":
        raise _error(path, f"{depth.dtype} of shape {depth.shape}", "numbers of shape (height, width)")
    if depth.dtype.itemsize == 1 and not allow_8_bit:
        raise _error(
            path,
            "8 bits",
            "16 bits: 8-bit depth has lost its scale. Set depth_unit_mm if you know it, or export it again",
        )
    negative = depth[(depth < 0) & ~find_missing(depth, missing)]
    if negative.size:
        expected = "no negative depth; mark missing depth with 0, or list its value under `depth_missing`"
        raise _error(path, f"the value {negative.min():g}", expected)
    if bits == "plain":
        return depth
    if (depth.dtype.kind, depth.dtype.itemsize) != ("u", 2):
        raise _error(path, str(depth.dtype), "16-bit PNG, as depth_bits sun says")
    return depth >> 3 | depth << 13


def find_missing(depth: np.ndarray, missing: Sequence[float]) -> np.ndarray:
    """Return a mask of the values in `missing`, which are rounded like floating-point depth."""
    with np.errstate(over="ignore"):  # float16 overflows above 65504
        return np.isin(depth, np.array(missing, depth.dtype if depth.dtype.kind == "f" else float))


def depth_to_mm(depth: np.ndarray, unit_mm: float, missing: Sequence[float] = (0,)) -> np.ndarray:
    """Convert depth to uint16 millimetres, at most 65535.

    Values in `missing`, NaN and infinity become 0.
    """
    valid = np.isfinite(depth) & ~find_missing(depth, missing)
    depth_mm = np.rint(depth.astype(np.float64) * unit_mm)  # float16 overflows above 65504
    return np.where(valid, depth_mm, 0).clip(0, 65535).astype(np.uint16)


def _decode_values(path: Path, modes: tuple[str, ...], expected: str) -> np.ndarray:
    image, tile_info = _open(path)
    values = np.asarray(image)
    if "L;I" in tile_info:  # Pillow inverts it
        expected = "grey in which 0 is black (MinIsBlack); write the values to a new file"
        raise _error(path, "grey in which 0 is white (MinIsWhite)", expected)
    if image.mode == "1" or "L;" in tile_info:  # Pillow rescales 2 and 4 bits to 0..255
        raise _error(
            path, "grey of 1, 2 or 4 bits", f"{expected}; Image.open(path).convert('L') gives the greys"
        )
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        is_grey = (palette == palette[:, :1]).all()  # as written by image optimisers
        if is_grey and values.max(initial=0) < len(palette):
            return palette[:, 0][values]
    if image.mode not in modes:
        raise _error(path, f"mode {image.mode} of Pillow", expected)
    return values


def _open(path: Path) -> tuple[Image.Image, str]:
    """Return the decoded, upright image and Pillow's description of how the file stores its pixels.

    Pillow is used because OpenCV returns the readable half of a truncated JPEG.
    """
    # open the file first: given a path, Pillow maps single-channel TIFFs and then rotates them wrongly
    with _decoding(path), open(path, "rb") as file, Image.open(file) as image:
        tile_info = str(getattr(image, "tile", ""))
        count = getattr(image, "n_frames", 1)
        if count > 1 and image.format != "MPO":  # from phones: an image and its preview
            raise DataError(
                f"{path}: can't be decoded (it contains {count} images, expected one); save each image as a "
                "file of its own"
            )
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image, tile_info


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow and numpy raise a dozen types for damaged files
        reason = str(error).partition(" <_io")[0]  # Pillow appends the file object
        if isinstance(error, OSError) and error.errno:
            raise DataError(
                f"{path}: can't be read ({reason}); check that it exists, its permissions and the disk"
            ) from error
        remedy = "it is damaged or not an image; copy it again"
        if isinstance(error, Image.DecompressionBombError):
            remedy = "it has more pixels than are decoded; reduce its size"
        with suppress(OSError), open(path, "rb") as file:
            if file.read(8)[4:] == b"ftyp":
                remedy = "it is a HEIC or AVIF image despite its name; convert it to JPEG or PNG"
        raise DataError(f"{path}: can't be decoded ({reason}); {remedy}") from error


def _error(path: Path, found: str, expected: str) -> DataError:
    return DataError(f"{path}: found {found}, expected {expected}")

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from PIL import Image

from lib.data import DataError
from lib.data.decoding import decode_depth, decode_image, decode_label, depth_to_mm, upright_size

ORIENTATION = 0x0112
RGB = np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3
VALUES = np.array([[0, 1, 2, 255], [3, 3, 1, 0]], np.uint8)


def save(array, path, mode=None, **options):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def oriented(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def save_palette(indices, palette, path, **options):
    picture = Image.fromarray(indices)
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette(palette)
    picture.save(path, **options)
    return path


def png(bits, rows, path, palette=None):
    """Write what Pillow does not: grey of fewer than 8 bits, or a palette with fewer entries than indices."""
    width = len(rows[0])
    bytes_ = b""
    for row in rows:
        text = "".join(format(value, f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        bytes_ += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    head = struct.pack(">IIBBBBB", width, len(rows), bits, 0 if palette is None else 3, 0, 0, 0)
    entries = [] if palette is None else [(b"PLTE", bytes(palette))]
    chunks = [(b"IHDR", head), *entries, (b"IDAT", zlib.compress(bytes_)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_rgb_is_decoded_unchanged(tmp_path, suffix):
    path = save(RGB, tmp_path / f"a{suffix}", lossless=True)
    np.testing.assert_array_equal(decode_image(path), RGB)
    assert upright_size(path) == (4, 6)


READS_YCBCR = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow below 13 refuses YCbCr TIFFs of its own"
)


@pytest.mark.parametrize(
    "mode", ["L", "1", "RGBA", "LA", "P", "CMYK", pytest.param("YCbCr", marks=READS_YCBCR)]
)
def test_other_colour_modes_are_converted_to_rgb(tmp_path, mode):
    path = save(RGB, tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"), mode)
    np.testing.assert_array_equal(
        decode_image(path), np.asarray(Image.fromarray(RGB).convert(mode).convert("RGB"))
    )


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    """The tag gives the position of the first row and column."""
    square = np.zeros((16, 24, 3), np.uint8)
    square[:8, :8] = 255
    turned = {
        1: square,
        3: square[::-1, ::-1],
        6: np.rot90(square, -1),
        8: np.rot90(square),
        5: square.transpose(1, 0, 2),
    }
    for value, expected in turned.items():
        path = save(square, tmp_path / f"{value}{suffix}", exif=oriented(value))
        assert np.abs(decode_image(path).astype(int) - expected).max() < 40  # JPEG
        assert upright_size(path) == expected.shape[:2]
        if suffix == ".tif":
            path = save(square[..., 0], tmp_path / "label.tif", exif=oriented(value))
            np.testing.assert_array_equal(decode_label(path), expected[..., 0])


def with_alpha(array, alpha, path):
    return save(np.dstack([array, np.full(array.shape[:2], alpha, np.uint8)]), path)


REFUSED_IMAGES = {
    "16-bit grey": (
        lambda path: save(RGB[..., 0].astype(np.uint16), path),
        "found I;16 of 16 bits or more, expected 8 bits",
    ),
    "16-bit RGB": (
        lambda path: path.write_bytes(cv2.imencode(".png", RGB.astype(np.uint16))[1]),
        "found RGB of 16 bits",
    ),
    "see-through": (
        lambda path: with_alpha(RGB, 254, path),
        "found transparent pixels, expected an opaque image",
    ),
    "a colour that is": (lambda path: save(RGB, path, transparency=(0, 3, 6)), "found transparent pixels"),
    "in a palette": (
        lambda path: save_palette(VALUES % 4, [0, 0, 0, 9, 9, 9, 8, 0, 0, 7, 7, 7], path, transparency=1),
        "found transparent pixels",
    ),
    "two pictures": (
        lambda path: Image.fromarray(RGB).save(
            path, save_all=True, append_images=[Image.fromarray(RGB[::-1])]
        ),
        "can't be decoded (it contains 2 images, expected one)",
    ),
    "nothing": (lambda path: path.touch(), "can't be decoded ("),
}


@pytest.mark.parametrize("case", REFUSED_IMAGES)
def test_unsupported_images_are_rejected(tmp_path, case):
    write, message = REFUSED_IMAGES[case]
    write(tmp_path / "a.png")
    with pytest.raises(DataError) as error:
        decode_image(tmp_path / "a.png")
    assert str(error.value).startswith(f"{tmp_path / 'a.png'}: {message}")


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint16),
                                               (".tif", np.int32), (".bmp", np.uint8), (".tiff", np.uint8)])  # fmt: skip
def test_labels_are_decoded_unchanged(tmp_path, suffix, dtype):
    values = VALUES.astype(dtype) * (1 if dtype == np.uint8 else 100)
    np.testing.assert_array_equal(decode_label(save(values, tmp_path / f"a{suffix}")), values)


def test_grey_palettes_of_png_optimisers_give_grey_values(tmp_path):
    """Optimisers keep the grey values but renumber them in a palette, here 3, 255, 0, 1, 2."""
    greys = np.array([3, 255, 0, 1, 2], np.uint8)
    indices = np.argsort(np.append(greys, 9)[:5])[np.searchsorted(np.sort(greys), VALUES)].astype(np.uint8)
    for bits in (8, 4):
        path = save_palette(indices, greys.repeat(3).tolist(), tmp_path / "a.png", bits=bits)
        assert Image.open(path).mode == "P"
        np.testing.assert_array_equal(decode_label(path), VALUES)


def test_labels_with_a_coloured_palette_give_indices(tmp_path):
    """As in Pascal VOC, where entry 7 is grey."""
    legend = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128]
    indices = np.array([[0, 7, 7, 0]], np.uint8)
    np.testing.assert_array_equal(decode_label(save_palette(indices, legend, tmp_path / "a.png")), indices)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_below_8_bits_are_rejected(tmp_path, bits):
    """Pillow scales them to 0..255, so 1 in a 1-bit file would become 255 (unlabelled)."""
    path = png(bits, [[0, 1, 1, 0]], tmp_path / "a.png")
    with pytest.raises(DataError) as error:
        decode_label(path)
    assert str(error.value) == (
        f"{path}: found grey of 1, 2 or 4 bits, expected one channel of 8 or 16 bits with class values; if "
        "colours mean classes, list them under `colours` in dataset.yaml; Image.open(path).convert('L') gives the greys"
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_labels_in_unsupported_modes_are_rejected(tmp_path, mode):
    path = save(RGB, tmp_path / ("a.tif" if mode == "F" else "a.png"), mode)
    with pytest.raises(
        DataError, match=f"a.*: found mode {mode} of Pillow, expected one channel of 8 or 16 bits"
    ):
        decode_label(path)


DEPTH = np.array([[0, 500, 2000, 65535]], np.uint16)


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint16), (".tif", np.uint16), (".tiff", np.int32),
                                               (".tif", np.float32), (".npy", np.uint16), (".npy", np.float64),
                                               (".NPY", np.int64)])  # fmt: skip
def test_depth_is_decoded_unchanged(tmp_path, suffix, dtype):
    path, depth = tmp_path / f"a{suffix}", DEPTH.astype(dtype)
    if suffix.lower() == ".npy":
        with open(path, "wb") as file:
            np.save(file, depth)
    else:
        save(depth, path)
    np.testing.assert_array_equal(decode_depth(path), depth)


def test_big_endian_npy_decodes_like_png(tmp_path):
    np.save(tmp_path / "a.npy", DEPTH.astype(">u2"))
    np.testing.assert_array_equal(
        decode_depth(tmp_path / "a.npy", "sun"), decode_depth_of(DEPTH, tmp_path, "sun")
    )


def decode_depth_of(depth, folder, bits):
    return decode_depth(save(depth, folder / "b.png"), bits)


def test_sun_depth_bits_are_rotated_back(tmp_path):
    """As in the SUN RGB-D toolbox: bitor(bitshift(d, -3), bitshift(d, 16 - 3))."""
    stored = np.array([[0, 8, 16000, 1, 7]], np.uint16)
    assert decode_depth_of(stored, tmp_path, "sun").tolist() == [[0, 1, 2000, 8192, 57344]]


@pytest.mark.parametrize(
    ("depth", "unit_mm", "missing", "expected"),
    [
        (DEPTH, 1, (0,), [0, 500, 2000, 65535]),
        (DEPTH, 0.2, (0, 65535), [0, 100, 400, 0]),
        (DEPTH, 10, (0,), [0, 5000, 20000, 65535]),  # beyond any depth range
        (np.array([[np.nan, np.inf, 1.2344, 0.0]]), 1000, (0,), [0, 0, 1234, 0]),
        (np.array([[7.0, 2.0]]), 1000, (7,), [0, 2000]),
        (np.array([[65.535, 2.0]], np.float32), 1000, (0, 65.535), [0, 2000]),
        (np.array([[0.1, 2.0]], np.float16), 1000, (0.1, 65535), [0, 2000]),
        (np.array([[-1, 65535, 65]], np.int32), 1, (-1, 65.535), [0, 65535, 65]),
        (np.array([[65535, 65]], np.uint16), 1, (-1, 65.535), [65535, 65]),
        (np.array([[200, 0]], np.uint8), 20, (0,), [4000, 0]),
    ],
)
def test_depth_is_converted_to_millimetres(depth, unit_mm, missing, expected):
    depth_mm = depth_to_mm(depth, unit_mm, missing)
    assert depth_mm.dtype == np.uint16
    assert depth_mm[0].tolist() == expected


REFUSED_DEPTH = {
    "8 bits": (
        DEPTH.astype(np.uint8),
        "a.png",
        "found 8 bits, expected 16 bits: 8-bit depth has lost its scale",
    ),
    "RGB": (
        RGB,
        "a.png",
        "found mode RGB of Pillow, expected one channel of depth of 16 bits; export it again",
    ),
    "three axes": (
        DEPTH[None],
        "a.npy",
        "found uint16 of shape (1, 1, 4), expected numbers of shape (height, width)",
    ),
    "no numbers": (
        DEPTH > 0,
        "a.npy",
        "found bool of shape (1, 4), expected numbers of shape (height, width)",
    ),
    "objects": (np.array([{}]), "a.npy", "can't be decoded (Object arrays cannot be loaded"),
    "negative": (
        -DEPTH.astype(float),
        "a.npy",
        "found the value -65535, expected no negative depth; mark missing depth",
    ),
}


@pytest.mark.parametrize("case", REFUSED_DEPTH)
def test_unsupported_depth_is_rejected(tmp_path, case):
    depth, name, message = REFUSED_DEPTH[case]
    np.save(tmp_path / name, depth) if name.endswith("npy") else save(depth, tmp_path / name)
    with pytest.raises(DataError) as error:
        decode_depth(tmp_path / name, allow_8_bit=False)
    assert str(error.value).startswith(f"{tmp_path / name}: {message}")
    if case == "8 bits":
        np.testing.assert_array_equal(decode_depth(tmp_path / name), depth)  # accepted if the unit is stated


def test_negative_depth_that_means_missing_is_accepted(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-1.0, 2.5]], np.float32))
    assert decode_depth(tmp_path / "a.npy", missing=[-1]).tolist() == [[-1.0, 2.5]]
    with pytest.raises(DataError) as error:
        decode_depth(tmp_path / "a.npy", missing=[0, -2])
    assert str(error.value) == (
        f"{tmp_path / 'a.npy'}: found the value -1, expected no negative depth; mark missing depth with 0, or list its "
        "value under `depth_missing`"
    )


def test_grey_in_which_0_is_white_is_rejected(tmp_path):
    """Pillow inverts such labels; other readers return them as stored."""
    path = save(VALUES, tmp_path / "a.tif", tiffinfo={262: 0})
    with pytest.raises(
        DataError,
        match=r"a.tif: found grey in which 0 is white \(MinIsWhite\), expected grey in which 0 is black",
    ):
        decode_label(path)
    np.testing.assert_array_equal(decode_image(path)[..., 0], VALUES)


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_error_says_that_a_file_cannot_be_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.mkdir()
    with pytest.raises(DataError) as error:
        decode_depth(path)
    assert str(error.value) == (
        f"{path}: can't be read ([Errno 21] Is a directory: '{path}'); check that it exists, its permissions and the disk"
    )


def test_error_for_several_images_in_one_file_says_to_save_each(tmp_path):
    path = save(RGB, tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(RGB)])
    with pytest.raises(DataError) as error:
        decode_image(path)
    assert str(error.value) == (
        f"{path}: can't be decoded (it contains 2 images, expected one); save each image as a file of its own"
    )


def test_depth_with_a_palette_or_8_bits_in_sun_format_is_rejected(tmp_path):
    path = save_palette(VALUES % 4, [0, 0, 0, 90, 0, 0, 0, 90, 0, 7, 7, 7], tmp_path / "a.png")
    with pytest.raises(DataError, match="found mode P of Pillow, expected one channel of depth of 16 bits"):
        decode_depth(path)
    with pytest.raises(DataError, match="found uint8, expected 16-bit PNG, as depth_bits sun says"):
        decode_depth(save(VALUES, tmp_path / "b.png"), "sun")


def test_label_indices_beyond_the_palette_are_kept(tmp_path):
    """Some tools assign colours to 21 classes but none to 255."""
    for palette in ([0, 0, 0, 128, 0, 0], [0, 0, 0, 9, 9, 9]):
        path = png(8, [[0, 1, 255]], tmp_path / "a.png", palette)
        np.testing.assert_array_equal(decode_label(path), [[0, 1, 255]])


@pytest.mark.parametrize("kind", [b"ftypheic", b"ftypmif1", b"ftypavif"])
@pytest.mark.parametrize("decode", [decode_image, upright_size])
def test_error_recognises_heic_files_with_another_extension(tmp_path, kind, decode):
    """Phones write such files, and chat programs rename them."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\0\0\0\x18" + kind + b"\0" * 100)
    with pytest.raises(
        DataError,
        match="photo.jpg: can't be decoded .* it is a HEIC or AVIF image despite its name; conv",
    ):
        decode(path)
    path.write_bytes(b"no image at all")
    with pytest.raises(
        DataError, match="photo.jpg: can't be decoded .* it is damaged or not an image; copy it again"
    ):
        decode(path)


@pytest.mark.parametrize(
    ("dtype", "unit"), [(np.float16, 1000), (np.float32, 1000), (np.uint8, 1000), (np.uint16, 10)]
)
def test_depth_beyond_16_bits_is_clipped_instead_of_missing(dtype, unit):
    depth = (
        np.array([[0, 2, 66, 200]], dtype) if dtype != np.uint16 else np.array([[0, 200, 6600, 60000]], dtype)
    )
    found = depth_to_mm(depth, unit)
    assert found.tolist() == [[0, 2000, 65535, 65535]]
    assert depth_to_mm(np.array([[np.nan, np.inf, 1]], np.float16), 1000).tolist() == [[0, 0, 1000]]


def test_pickles_and_decompression_bombs_are_rejected(tmp_path):
    """Pickles in `.npy` files are not executed, and images that unpack to gigabytes are not decoded."""

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    np.save(tmp_path / "a.npy", np.array([[Harmful()]], object), allow_pickle=True)
    with pytest.raises(DataError, match="a.npy: can't be decoded"):
        decode_depth(tmp_path / "a.npy")
    assert not (tmp_path / "touched").exists()
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(
        DataError,
        match="b.png: can't be decoded .*decompression bomb.*; it has more pixels than are decoded; red",
    ):
        decode_image(tmp_path / "b.png")

import numpy as np
import pytest
from PIL import Image

from lib.data import DataError
from lib.data.images import open_images

CLASSES = ("wall", "floor")
ORIENTATION = 0x0112


@pytest.fixture
def picture():
    """An image `(40, 60, 3)` whose four quarters differ."""
    quarters = np.array([[[200, 20, 20], [20, 200, 20]], [[20, 20, 200], [200, 200, 20]]], np.uint8)
    return quarters.repeat(20, 0).repeat(30, 1)


def read(images, depths=None, depth_unit_mm=None):
    return list(open_images(str(images), depths and str(depths), depth_unit_mm, bool(depths), CLASSES))


def test_images_of_any_size_are_read_from_a_file_or_a_folder(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "b.PNG")
    Image.fromarray(picture[:10]).save(tmp_path / "a.bmp")
    (tmp_path / "notes.txt").write_text("no picture")
    small, large = read(tmp_path)
    assert [small.names.tolist(), large.names.tolist()] == [["a"], ["b"]]
    assert small.size == (10, 60)
    np.testing.assert_array_equal(large.image[0], picture)
    assert large.classes == CLASSES
    assert large.depth is None
    (alone,) = read(tmp_path / "b.PNG")
    np.testing.assert_array_equal(alone.image, large.image)


def test_exif_orientation_is_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held upright: the first row is the right side
    Image.fromarray(picture).save(tmp_path / "phone.jpg", exif=exif, quality=95, subsampling=0)
    (piece,) = read(tmp_path / "phone.jpg")
    assert piece.size == (60, 40)
    assert np.abs(piece.image[0].astype(int) - np.rot90(picture, -1)).max() < 16  # JPEG


def test_greyscale_palette_and_cmyk_become_rgb(tmp_path, picture):
    grey = Image.fromarray(picture).convert("L")
    palette = Image.fromarray(picture).quantize(4)
    grey.save(tmp_path / "grey.png")
    palette.save(tmp_path / "palette.png")
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "print.jpg", quality=95, subsampling=0)
    by_name = {piece.names[0]: piece.image[0].astype(int) for piece in read(tmp_path)}
    np.testing.assert_array_equal(by_name["grey"], np.asarray(grey)[..., None].repeat(3, -1))
    assert np.abs(by_name["palette"] - picture).max() < 3
    assert np.abs(by_name["print"] - picture).max() < 16


def spoil(path, picture):
    Image.fromarray(picture).save(path)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("cut.jpg", spoil, "can't be decoded"),
        ("cut.png", spoil, "can't be decoded"),
        ("phone.HEIC", lambda path, picture: path.write_bytes(b"heic"), "convert them to jpg"),
        ("text.jpg", lambda path, picture: path.write_text("no picture"), "can't be decoded"),
        (
            "deep.png",
            lambda path, picture: Image.fromarray(picture[..., 0].astype(np.uint16)).save(path),
            "8 bits",
        ),
    ],
)
def test_error_names_an_unreadable_image(tmp_path, picture, name, write, message):
    write(tmp_path / name, picture)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read(tmp_path)


@pytest.mark.parametrize(("stated", "suffix"), [(None, ".png"), (1, ".png"), (0.2, ".tif"), (1000, ".npy")])
def test_depth_is_converted_to_millimetres(tmp_path, picture, stated, suffix):
    unit = stated or 1
    depth_mm = np.linspace(800, 4000, 2400).reshape(40, 60).round(-3 if unit == 1000 else 0)
    depth_mm[0, 0] = 0
    stored = depth_mm / unit
    Image.fromarray(picture).save(tmp_path / "room.png")
    if suffix == ".npy":
        stored[0, 0] = np.nan  # also marks missing depth
        np.save(tmp_path / "depth.npy", stored.astype(np.float32))
    else:
        Image.fromarray(stored.astype(np.uint16)).save(tmp_path / f"depth{suffix}")
    (piece,) = read(tmp_path / "room.png", tmp_path / f"depth{suffix}", stated)
    assert piece.depth.dtype == np.uint16
    assert np.abs(piece.depth[0].astype(int) - depth_mm).max() <= unit
    assert piece.depth[0, 0, 0] == 0


def test_error_names_implausible_or_mismatched_depth(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "room.jpg")
    depth, folder = tmp_path / "depth" / "room.png", tmp_path / "depth"
    folder.mkdir()
    Image.fromarray(np.full((40, 60), 9060, np.uint16)).save(depth)
    with pytest.raises(DataError) as error:
        read(tmp_path, folder)
    assert str(error.value) == (
        f"depths: {folder} has the median 9060 in 1 files, expected 1250 to 5000 mm: give "
        "depth_unit_mm 0.25 for 4000 units a metre or 0.2 for 5000 units a metre or 0.1 for tenths of mm or 1 if these are mm"
    )
    assert read(tmp_path, folder, 1)[0].depth.max() == 9060  # a stated unit is not checked
    Image.fromarray(np.full((20, 30), 2000, np.uint16)).save(depth)
    with pytest.raises(
        DataError,
        match="room.png: 20x30, but its image room.jpg is 40x60; image, depth and label must have the same size",
    ):
        read(tmp_path, folder)
    Image.fromarray(picture).save(tmp_path / "other.jpg")
    with pytest.raises(
        DataError, match="1 files missing in .*, the first is that of image 'other'; expected other.png"
    ):
        read(tmp_path, folder)


def test_depth_of_65535_or_without_any_value_is_rejected(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "room.jpg")
    image, depth = tmp_path / "room.jpg", tmp_path / "depth.png"
    values = np.full((40, 60), 2000, np.uint16)
    values[:20] = 65535
    Image.fromarray(values).save(depth)
    with pytest.raises(DataError) as error:
        read(image, depth)
    assert str(error.value) == (
        f"depths: {depth} is 65535 in 50 % of the pixels, the largest 16-bit value. If it marks missing depth, "
        "write 0 there, otherwise give depth_unit_mm"
    )
    assert read(image, depth, 1)[0].depth.max() == 65535  # a stated unit is not checked
    values[:20] = 0
    Image.fromarray(values).save(depth)
    assert read(image, depth)[0].depth.max() == 2000
    Image.fromarray(np.zeros_like(values)).save(depth)
    with pytest.raises(DataError) as error:
        read(image, depth)
    assert str(error.value) == (
        f"depths: {depth} is missing everywhere in 1 files; export it again, or use a run trained with inputs rgb"
    )


@pytest.mark.parametrize("unit", [0, -1, 1e-9, 1e9])
def test_impossible_depth_unit_is_rejected(tmp_path, picture, unit):
    Image.fromarray(picture).save(tmp_path / "room.jpg")
    with pytest.raises(
        ValueError, match="^depth_unit_mm: found .*, expected a number from 1e-06 and below 1000000$"
    ):
        open_images(str(tmp_path), str(tmp_path), unit, True, CLASSES)


def test_depth_folder_is_described_by_its_full_path(tmp_path, picture, monkeypatch):
    for folder in ("image", "depth"):
        (tmp_path / folder).mkdir()
    Image.fromarray(picture).save(tmp_path / "image" / "room.jpg")
    Image.fromarray(np.full((40, 60), 2000, np.uint16)).save(tmp_path / "depth" / "room.png")
    monkeypatch.chdir(tmp_path)
    assert open_images("image", "depth", None, True, CLASSES).data == (
        f"{tmp_path / 'image'}, with depth of {tmp_path / 'depth'} in units of 1 mm"
    )


def test_depths_must_match_the_inputs_of_the_network(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "room.jpg")
    with pytest.raises(ValueError, match="depths: found None, but this network also takes depth"):
        open_images(str(tmp_path), None, 1.0, True, CLASSES)
    with pytest.raises(ValueError, match="depths: found '.*', but this network takes only RGB"):
        open_images(str(tmp_path), str(tmp_path), 1.0, False, CLASSES)


def test_missing_or_duplicate_images_are_rejected(tmp_path, picture):
    with pytest.raises(ValueError, match="images: found none in '.*nowhere', expected a file, or a folder"):
        read(tmp_path / "nowhere")
    Image.fromarray(picture).save(tmp_path / "room.jpg")
    Image.fromarray(picture).save(tmp_path / "room.png")
    with pytest.raises(DataError, match="room.png: a second file named 'room' beside room.jpg"):
        read(tmp_path)


def test_built_in_scenes_have_depth_and_the_given_classes():
    piece = next(iter(open_images("synthetic", None, 1.0, True, CLASSES)))
    assert len(piece) == 1
    assert piece.depth is not None
    assert piece.classes == CLASSES


@pytest.mark.parametrize("name", ["._room.jpg", ".hidden.png", "@eaDir"])
def test_hidden_and_system_files_are_ignored(tmp_path, picture, name):
    Image.fromarray(picture).save(tmp_path / "room.jpg")
    if name == "@eaDir":
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "room.jpg")
    else:
        (tmp_path / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    assert list(open_images(str(tmp_path), None, None, False, CLASSES).names) == ["room"]

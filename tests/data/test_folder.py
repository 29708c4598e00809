import cv2
import numpy as np
import pytest
from conftest import assert_equal_samples, write_folder
from PIL import Image
from sklearn.model_selection import train_test_split

from lib.data import folder as data_folder
from lib.data import load_samples
from lib.data.samples import DataError, Samples, resize_image, resize_nearest, resize_samples
from lib.data.splits import split_names


def test_folder_gives_back_what_was_written(folder, scenes):
    assert_equal_samples(load_samples(folder, "train", "official"), scenes)
    test = load_samples(folder, "test")
    assert test.label is None
    np.testing.assert_array_equal(test.depth, scenes.depth[:3])


def test_folder_reads_jpg_images(folder, scenes):
    for path in (folder / "train" / "image").glob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    samples = load_samples(folder, "train", "official")
    assert np.abs(samples.image.astype(int) - scenes.image).mean() < 12


def test_size_resizes_once_like_resize_samples(folder, scenes):
    assert_equal_samples(load_samples(folder, "train", "official", (48, 64)), resize_samples(scenes, (48, 64)))


def test_nearest_resizing_stays_aligned_with_rgb():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    by_area = resize_image(np.repeat(ramp[..., None], 3, 2), (20, 20))[..., 0].astype(float)
    nearest = resize_nearest(ramp.astype(np.uint16), (20, 20))
    assert nearest.dtype == np.uint16
    assert np.abs(nearest - by_area).max() < 1  # the plain nearest mode of OpenCV is 2 pixels off here
    assert np.abs(cv2.resize(ramp, (20, 20), interpolation=cv2.INTER_NEAREST) - by_area).max() >= 2
    assert set(np.unique(resize_nearest(np.array([[0, 9]], np.uint8).repeat(7, 0), (5, 3)))) == {0, 9}
    assert resize_nearest(np.eye(8, dtype=bool), (4, 4)).dtype == bool


def test_random_split_is_that_of_exp061():
    names = np.array([f"{i:06d}" for i in range(795)])
    train, valid = split_names(names, "random")
    expected_train, expected_valid = train_test_split(np.arange(795), test_size=0.2, random_state=42)
    np.testing.assert_array_equal(train, expected_train)
    np.testing.assert_array_equal(valid, expected_valid)
    assert (len(train), len(valid)) == (636, 159)


def test_blocks_split_keeps_runs_of_ids_whole():
    names = np.array([f"{i:04d}" for i in (0, 1, 2, 5, 6, 9, 20, 21, 30, 31, 32, 40)])
    train, valid = split_names(names, "blocks")
    assert list(names[valid]) == ["0030", "0031", "0032"]  # the fifth of six runs
    assert sorted([*train, *valid]) == list(range(12))
    unpadded = np.array(sorted(str(int(name)) for name in names))
    assert sorted(unpadded[split_names(unpadded, "blocks")[1]]) == ["30", "31", "32"]


def test_official_split_trains_on_everything(folder):
    assert len(load_samples(folder, "train", "official")) == 12
    valid = load_samples(folder, "valid", "official", (48, 64))
    assert len(valid) == 0
    assert valid.image.shape == (0, 48, 64, 3)


def test_parts_do_not_overlap_and_limit_comes_first(folder):
    for split in ("random", "blocks"):
        train, valid = (set(load_samples(folder, part, split, limit=10).names) for part in ("train", "valid"))
        assert not train & valid
        assert train | valid == set(load_samples(folder, "train", "official").names[:10])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valdi", "random"), "part: found 'valdi', expected one of train, valid, test"),
        (("train", "rnd"), "split: found 'rnd', expected one of random, blocks, scenes, official"),
        (("train", "random", (0, 64)), "size: found (0, 64), expected a height and a width of at least 1 pixel"),
        (("train", "random", None, 0), "limit: found 0, expected a number of images of at least 1, or None for all"),
        (
            ("train", "blocks", None, 4),
            "split: 'blocks' leaves 4 images to train and 0 to validate out of 4; raise limit, or use split "
            "'random' (2 images or more) or 'official'",
        ),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=r".") as error:
        load_samples(folder, *arguments)
    assert str(error.value) == message


def test_blocks_need_numbers(tmp_path, scenes):
    names = np.array([f"room_{i}" for i in range(12)])
    write_folder(tmp_path, Samples(names, scenes.image, scenes.depth, scenes.label))
    with pytest.raises(ValueError, match="split: 'blocks' needs numbers as file names, found 'room_0'"):
        load_samples(tmp_path, "train", "blocks")


def replace(array=None, data=None, remove=False):
    def damage(path):
        if remove:
            path.unlink()
        elif data is not None:
            path.write_bytes(data)
        else:
            Image.fromarray(array).save(path)

    return damage


SIZE = (96, 128)
IMAGE_REMEDY = "expected 8-bit RGB (3 channels); convert the file, for example with Pillow's image.convert('RGB')"
DEPTH_REMEDY = (
    "expected one channel of 16 bits in millimetres; 8-bit depth has lost its scale, export it again from the source"
)
LABEL_REMEDY = "expected one channel of 8 bits with class indices"
SCALE = (
    "median depth {}, expected millimetres of an indoor scene (100 to 20000). This looks like {}, and write 16-bit PNG"
)
PARTNER = (
    "1 of 12 files missing, the first is '000001'; every image needs its image, depth, label file under the same name"
)
BAD_FILES = {
    "missing partner": ("depth", replace(remove=True), PARTNER),
    "missing label": ("label", replace(remove=True), PARTNER),
    "no image for a depth": ("image", replace(remove=True), PARTNER),
    "grey image": ("image", replace(np.zeros(SIZE, np.uint8)), f"found 1 channel of uint8, {IMAGE_REMEDY}"),
    "alpha": ("image", replace(np.zeros((*SIZE, 4), np.uint8)), f"found 4 channels of uint8, {IMAGE_REMEDY}"),
    "8-bit depth": ("depth", replace(np.full(SIZE, 90, np.uint8)), f"found 1 channel of uint8, {DEPTH_REMEDY}"),
    "metres": ("depth", replace(np.full(SIZE, 3, np.uint16)), SCALE.format(3, "metres: multiply by 1000")),
    "tenths": (
        "depth",
        replace(np.full(SIZE, 30000, np.uint16)),
        SCALE.format(30000, "a finer unit: divide to get millimetres"),
    ),
    "label 20": (
        "label",
        replace(np.full(SIZE, 20, np.uint8)),
        "label values [20], expected 0..12 and 255 = ignore; map other label sets to the 13 classes first "
        "(bed = 0 .. window = 12)",
    ),
    "16-bit label": ("label", replace(np.full(SIZE, 2, np.uint16)), f"found 1 channel of uint16, {LABEL_REMEDY}"),
    "colour label": ("label", replace(np.zeros((*SIZE, 3), np.uint8)), f"found 3 channels of uint8, {LABEL_REMEDY}"),
    "other size": (
        "depth",
        replace(np.full((48, 64), 900, np.uint16)),
        "48x64, but its image 000001.png is 96x128; image, depth and label must have one size",
    ),
    "no image file": (
        "label",
        replace(data=b"nothing"),
        "can't be decoded (cannot identify image file '{path}'); it is damaged or no image, copy it again",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named(folder, case):
    kind, damage, message = BAD_FILES[case]
    path = folder / "train" / kind / "000001.png"
    damage(path)
    with pytest.raises(DataError) as error:
        load_samples(folder, "train", "official", (48, 64))
    named = path.parent if message == PARTNER else path
    assert str(error.value) == f"{named}: {message.format(path=path)}"


def test_a_file_that_disappears_while_reading(folder, monkeypatch):
    path, real = folder / "train" / "depth" / "000004.png", data_folder._list_files

    def list_then_lose(part):
        files = real(part)
        path.unlink()
        return files

    monkeypatch.setattr("lib.data._list_files", "_list_files", list_then_lose)
    with pytest.raises(DataError) as error:
        load_samples(folder, "train", "official")
    assert str(error.value) == (
        f"{path}: can't be decoded ([Errno 2] No such file or directory: '{path}'); it is damaged or no image, copy it again"
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image_is_an_error(folder, suffix):
    path = folder / "train" / "image" / "000001.png"
    whole = path.with_suffix(suffix)
    Image.open(path).save(whole)
    if suffix == ".jpg":
        path.unlink()
    whole.write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(DataError, match="can't be decoded"):
        load_samples(folder, "train", "official")


def test_missing_folders(tmp_path, folder):
    with pytest.raises(
        DataError, match=r"nowhere/train/image: no such folder; expected DATA/train/\{image,depth,label"
    ):
        load_samples(tmp_path / "nowhere", "train")
    for path in (folder / "train" / "image").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="train/image: holds no png or jpg file"):
        load_samples(folder, "train")


def test_two_files_of_one_name(folder, scenes):
    Image.fromarray(scenes.image[0]).save(folder / "train" / "image" / "000000.jpg")
    with pytest.raises(DataError, match="a second file named '000000' beside 000000.jpg; keep one"):
        load_samples(folder, "train", "official")


def test_native_sizes_must_agree(folder, scenes):
    larger = resize_samples(scenes[:1], (120, 160))
    write_folder(folder, Samples(np.array(["000099"]), larger.image, larger.depth, larger.label))
    with pytest.raises(DataError, match=r"000099.png: 120x160, but 000000.png is 96x128; .* give a size"):
        load_samples(folder, "train", "official")
    assert len(load_samples(folder, "train", "official", (48, 64))) == 13

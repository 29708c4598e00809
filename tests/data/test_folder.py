from dataclasses import replace as change

import numpy as np
import pytest
import yaml
from conftest import assert_equal_samples, write_folder
from PIL import Image

from lib.classes import NYUV2_13
from lib.data import DataError, iterate_samples, load_samples
from lib.data.samples import resize_samples


def test_folder_reader_returns_the_written_samples(folder, scenes):
    assert_equal_samples(load_samples(folder, "train", "none"), scenes)
    test = load_samples(folder, "test")
    assert test.label is None
    np.testing.assert_array_equal(test.depth, scenes.depth[:3])


def test_folder_reads_jpg_images(folder, scenes):
    for path in (folder / "train" / "image").glob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    samples = load_samples(folder, "train", "none")
    assert np.abs(samples.image.astype(int) - scenes.image).mean() < 12


def test_loading_at_a_size_equals_resize_samples(folder, scenes):
    assert_equal_samples(load_samples(folder, "train", "none", (48, 64)), resize_samples(scenes, (48, 64)))


def test_validation_none_trains_on_everything(folder):
    assert len(load_samples(folder, "train", "none")) == 12
    valid = load_samples(folder, "valid", "none", (48, 64))
    assert len(valid) == 0
    assert valid.image.shape == (0, 48, 64, 3)


def test_blocks_need_numeric_file_names(tmp_path, scenes):
    names = np.array([f"room_{i}" for i in range(12)])
    write_folder(tmp_path, change(scenes, names=names))
    with pytest.raises(
        ValueError,
        match="validation: 'blocks' needs file names that are consecutive numbers .*, found room_0, room_1, room_10",
    ):
        load_samples(tmp_path, "train", "blocks")
    assert len(load_samples(tmp_path, "valid", "auto")) == 3  # random: a fifth, rounded up
    assert load_samples(tmp_path, "train").scene is None


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
IMAGE_REMEDY = "expected 8 bits a channel; convert the file"
DEPTH_REMEDY = (
    "expected 16 bits: 8-bit depth has lost its scale. Set depth_unit_mm if you know it, or export it again"
)
LABEL_REMEDY = "expected one channel of 8 or 16 bits with class values; if colours mean classes, list them under `colours` in dataset.yaml"
PARTNER = "1 of 12 files missing, the first is '000001'; every image needs its image, depth, label file under the same name"
BAD_FILES = {
    "missing partner": ("depth", replace(remove=True), PARTNER),
    "missing label": ("label", replace(remove=True), PARTNER),
    "no image for a depth": ("image", replace(remove=True), PARTNER),
    "16-bit image": (
        "image",
        replace(np.zeros(SIZE, np.uint16)),
        f"found I;16 of 16 bits or more, {IMAGE_REMEDY}",
    ),
    "transparent": (
        "image",
        replace(np.full((*SIZE, 4), 200, np.uint8)),
        "found transparent pixels, expected an opaque image; put it on a background of your choice",
    ),
    "8-bit depth": ("depth", replace(np.full(SIZE, 90, np.uint8)), f"found 8 bits, {DEPTH_REMEDY}"),
    "label 20": (
        "label",
        replace(np.full(SIZE, 20, np.uint8)),
        "label values [20], expected 0..12 and 255 = unlabelled; list other classes under `classes`, and "
        "unlabelled values under `ignore`, in {root}/dataset.yaml. Shares of the pixels in 12 files: 20: 8.33 %",
    ),
    "label of 16 bits": (
        "label",
        replace(np.full(SIZE, 300, np.uint16)),
        "label values [300], expected 0..12 and 255 = unlabelled; list other classes under `classes`, and "
        "unlabelled values under `ignore`, in {root}/dataset.yaml. Shares of the pixels in 12 files: 300: 8.33 %",
    ),
    "label after the last": (
        "label",
        replace(np.full(SIZE, 13, np.uint8)),
        "label values [13], expected 0..12 and 255 = unlabelled; if 0 means unlabelled, write `first_label: 1` into "
        "{root}/dataset.yaml. Shares of the pixels in 12 files: 13: 8.33 %",
    ),
    "colour label": (
        "label",
        replace(np.zeros((*SIZE, 3), np.uint8)),
        f"found mode RGB of Pillow, {LABEL_REMEDY}",
    ),
    "other size": (
        "depth",
        replace(np.full((48, 64), 900, np.uint16)),
        "48x64, but its image 000001.png is 96x128; image, depth and label must have the same size",
    ),
    "no image file": (
        "label",
        replace(data=b"nothing"),
        "can't be decoded (cannot identify image file); it is damaged or not an image; copy it again",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_error_names_a_bad_file(folder, case):
    kind, damage, message = BAD_FILES[case]
    path = folder / "train" / kind / "000001.png"
    damage(path)
    with pytest.raises(DataError) as error:
        load_samples(folder, "train", "none", (48, 64))
    named = path.parent if message == PARTNER else path
    assert str(error.value) == f"{named}: {message.format(path=path, root=folder)}"


def test_error_names_a_file_deleted_while_reading(folder):
    path, pieces = folder / "train" / "depth" / "000004.png", iterate_samples(folder, "train", "none")
    path.unlink()
    with pytest.raises(DataError) as error:
        list(pieces)
    assert str(error.value) == (
        f"{path}: can't be read ([Errno 2] No such file or directory: '{path}'); check that it exists, its permissions and the disk"
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
        load_samples(folder, "train", "none")


def test_missing_or_empty_folders_are_rejected(tmp_path, folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected DATA/train/\{image,depth,label"):
        load_samples(tmp_path / "nowhere", "train")
    for path in (folder / "train" / "image").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="train/image: found nothing, expected files of: .jpg, .jpeg, .png,"):
        load_samples(folder, "train")


def test_two_files_with_the_same_name_are_rejected(folder, scenes):
    Image.fromarray(scenes.image[0]).save(folder / "train" / "image" / "000000.jpg")
    with pytest.raises(DataError, match="a second file named '000000' beside 000000.jpg; keep one"):
        load_samples(folder, "train", "none")


def test_loading_at_native_size_needs_equal_image_sizes(folder, scenes):
    write_folder(folder, change(resize_samples(scenes[:1], (120, 160)), names=np.array(["000099"])))
    with pytest.raises(DataError) as error:
        load_samples(folder, "train", "none")
    assert str(error.value) == (
        f"{folder}: 000016 is 96x128, 000099 is 120x160; images of different sizes can't be read at their native size "
        "into one array: give a size, or read them with iterate_samples"
    )
    assert len(load_samples(folder, "train", "none", (48, 64))) == 13


def test_runs_of_consecutive_ids_become_scenes(folder, scenes):
    """Scenes come from the whole folder before it is split, so they are the same in the validation split."""
    whole = load_samples(folder, "train", "none")
    assert [(whole.scene == name).sum() for name in np.unique(whole.scene)] == [
        2
    ] * 6  # two views of each room
    by_name = dict(zip(whole.names, whole.scene, strict=True))
    valid = load_samples(folder, "valid", "random")
    assert list(valid.scene) == [by_name[name] for name in valid.names]


@pytest.mark.parametrize("count", [2, 3, 40, 255])
def test_classes_are_read_from_dataset_yaml(folder, scenes, count):
    names = [f"class {index}" for index in range(count)]
    (folder / "dataset.yaml").write_text(f"classes: {names}\n")
    write_folder(
        folder,
        change(scenes, label=np.where(scenes.label == 255, 255, scenes.label % count).astype(np.uint8)),
    )
    train, test = load_samples(folder, "train", "none"), load_samples(folder, "test")
    assert train.classes == test.classes == tuple(names)
    assert set(np.unique(train.label)) == {*range(min(13, count)), 255}
    assert next(iter(iterate_samples(folder, "train"))).classes == tuple(names)


def test_default_classes_are_those_of_nyuv2(folder):
    assert load_samples(folder, "train").classes == NYUV2_13
    for nothing in ("{}", "", "# classes: [a, b]\n"):
        (folder / "dataset.yaml").write_text(nothing)
        assert load_samples(folder, "train").classes == NYUV2_13


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_class_names_are_read_in_utf_8_and_utf_16(folder, encoding):
    names = ["Küche", "壁", *NYUV2_13[2:]]
    (folder / "dataset.yaml").write_bytes(f"classes: {names}".encode(encoding))
    assert load_samples(folder, "train").classes == tuple(names)


def test_labels_outside_the_declared_classes_are_rejected(folder):
    (folder / "dataset.yaml").write_text("classes: [a, b, c]")
    with pytest.raises(
        DataError, match=r"label/000000.png: label values \[3, .*\], expected 0..2 and 255 = unlabelled; list"
    ):
        load_samples(folder, "train", "none")


LIST = "expected a list of 2 to 255 names in the order of their indices, such as [bed, books, ceiling], or {value: name}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, b", "is not valid YAML"),
        (b"classes: [bed, k\xfcche]", "is not valid YAML"),
        ("[a, b]", "found ['a', 'b'], expected keys of: classes"),
        ("class: [a, b]", "found class, expected keys of: classes"),
        ("classes: bed", f"classes is 'bed', {LIST}"),
        ("classes: [bed]", f"classes is ['bed'], {LIST}"),
        ("classes: [yes, no]", f"classes is [True, False], {LIST}"),
        ("classes: [bed, 7]", f"classes is ['bed', 7], {LIST}"),
        ("classes:", f"classes is None, {LIST}"),
        (f"classes: {[f'c{index}' for index in range(256)]}", LIST),
        (
            "classes: [bed, sofa, bed, sofa, tv]",
            "classes names bed, sofa twice; every class needs its own name",
        ),
    ],
)
def test_invalid_dataset_yaml_is_rejected(folder, text, message):
    (folder / "dataset.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value).startswith(f"{folder / 'dataset.yaml'}: ")
    assert message in str(error.value)


def test_file_names_distinguish_kinds_in_one_folder(tmp_path, scenes):
    """In the test split, which has no labels, RGB images are not mistaken for labels in a wrong format."""
    kinds = {"image": "{name}_rgb.jpg", "depth": "{name}_depth.png", "label": "{name}_label.png"}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"folders": kinds}))
    for split, written in (("train", ("image", "depth", "label")), ("test", ("image", "depth"))):
        (tmp_path / split).mkdir()
        for at, name in enumerate(scenes.names[:4].tolist()):
            for kind in written:
                path = tmp_path / split / kinds[kind].format(name=f"{split}{name}")
                Image.fromarray(getattr(scenes, kind)[at]).save(path)
    assert list(load_samples(tmp_path, "train", "none").names) == [
        f"train{name}" for name in scenes.names[:4]
    ]
    test = load_samples(tmp_path, "test")
    assert test.label is None
    np.testing.assert_array_equal(test.depth, scenes.depth[:4])

import re

import numpy as np
import pytest

from lib.classes import NYUV2_13
from lib.data import DataError
from lib.data.description import read_description


def describe(root, text):
    (root / "dataset.yaml").write_text(text)
    return read_description(root)


def test_without_a_file_all_is_default(tmp_path):
    description = read_description(tmp_path)
    assert (description.class_names, list(description.by_value), description.unlabelled) == (
        NYUV2_13,
        list(range(13)),
        [255],
    )
    assert (description.depth_unit_mm, description.depth_missing, description.depth_bits) == (
        1,
        [0],
        "plain",
    )
    assert (description.depth_range_m, description.scene, description.stated) == (
        [0.71, 10.0],
        None,
        set(),
    )
    assert dict(description.folders) == {"image": "image", "depth": "depth", "label": "label"}
    assert dict(description.splits) == {"train": "train", "test": "test"}
    assert describe(tmp_path, "{}") == description


def test_every_key(tmp_path):
    description = describe(
        tmp_path,
        """
        classes: {7: sofa, 1000: bed, 0: wall}
        ignore: [255, 65535]
        depth_unit_mm: 0.2
        depth_missing: [0, 65535]
        depth_bits: sun
        depth_range_m: [1, 5]
        folders: {image: "color/{name}_rgb.png", label: labels, depth: null}
        splits: {train: train.txt, valid: lists/valid.txt, test: null}
        scene: ^([^/]+)/
        """,
    )
    assert description.class_names == ("wall", "sofa", "bed")  # by value
    assert list(description.by_value) == [0, 7, 1000]
    assert (description.ignore, description.depth_missing) == ([255, 65535], [0, 65535])
    assert (description.depth_unit_mm, description.depth_bits, description.depth_range_m) == (
        0.2,
        "sun",
        [1.0, 5.0],
    )
    assert dict(description.folders) == {"image": "color/{name}_rgb.png", "label": "labels"}
    assert dict(description.splits) == {"train": "train.txt", "valid": "lists/valid.txt"}
    assert description.scene == "^([^/]+)/"
    assert description.stated == {
        "classes", "ignore", "depth_unit_mm", "depth_missing", "depth_bits", "depth_range_m", "folders", "splits", "scene",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "values", "indices"),
    [
        ("classes: [a, b]", [0, 1, 255], [0, 1, 255]),
        ("classes: [a, b]\nfirst_label: 1", [1, 2, 0, 255], [0, 1, 255, 255]),
        ("classes: [a, b]\nfirst_label: 1\nignore: [9]", [1, 2, 9], [0, 1, 255]),
        ("classes: {3: b, 300: a}\nignore: [65535]", [3, 300, 65535], [0, 1, 255]),
        ("classes: [a, b]\nignore: []", [0, 1], [0, 1]),
    ],
)
def test_values_of_labels(tmp_path, text, values, indices):
    description = describe(tmp_path, text)
    label = np.array([values], np.uint16)
    assert description.to_indices(tmp_path / "a.png", label).tolist() == [indices]
    assert description.to_indices(tmp_path / "a.png", label).dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "value", "message"),
    [
        ("classes: [a, b]", 2, "label values [2], expected 0..1 and 255 = unlabelled; where 0 means unlabelled, write "
         "`first_label: 1` into {yaml}"),
        ("classes: [a, b]\nfirst_label: 0", 2, "label values [2], expected 0..1 and 255 = unlabelled; {name}"),
        ("classes: [a, b]\nignore: []", 255, "label values [255], expected 0..1 and nothing = unlabelled; {name}"),
        ("classes: {3: b, 300: a}", 4, "label values [4], expected 3..300 with gaps and 255 = unlabelled; {name}"),
        ("classes: [a, b]", 70000, "label values [70000], expected 0..1 and 255 = unlabelled; {name}"),
    ],
)  # fmt: skip
def test_a_value_that_is_nothing(tmp_path, text, value, message):
    description, yaml = describe(tmp_path, text), tmp_path / "dataset.yaml"
    name = f"name other classes under `classes`, and what means unlabelled under `ignore`, in {yaml}"
    with pytest.raises(DataError) as error:
        description.to_indices(tmp_path / "a.png", np.array([[value, min(description.by_value)]], np.int32))
    share = f". Shares of the pixels in 1 files: {value}: 50.00%"
    assert str(error.value) == f"{tmp_path / 'a.png'}: " + message.format(yaml=yaml, name=name) + share


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first_label: -1", "first_label is -1, expected the label value of the first class, a whole number from 0 to 65535"),
        ("first_label: true", "first_label is True, expected the label value"),
        ("first_label: 65530", "first_label is 65530, expected label values up to 65535"),
        ("classes: {0: a, 1: b}\nfirst_label: 1", "first_label is 1, expected none where classes maps values to names"),
        ("classes: {0: a, 70000: b}", "classes is {0: 'a', 70000: 'b'}, expected a list of 2 to 255 names"),
        ("classes: {a: 0, b: 1}", "classes is {'a': 0, 'b': 1}, expected a list of 2 to 255 names"),
        ("classes: {0: a, 1: a}", "classes names a twice; every class needs a name of its own"),
        ("ignore: 255", "ignore is 255, expected a list of label values, whole numbers from 0 to 65535, such as [0, 255], or others"),
        ("ignore: [3]", "ignore is [3], expected no value of a class, but 3 is 'chair'"),
        ("depth_unit_mm: 1e-1", "depth_unit_mm is '1e-1', expected millimetres of one unit, a number such as 0.2 or 10"),
        ("depth_unit_mm: 0", "depth_unit_mm is 0, expected millimetres"),
        ("depth_unit_mm: .nan", "depth_unit_mm is nan, expected millimetres"),
        ("depth_missing: 0", "depth_missing is 0, expected a list of depth values, such as [0, 65535]"),
        ("depth_bits: nyu", "depth_bits is 'nyu', expected plain, or sun"),
        ("depth_range_m: [5, 1]", "depth_range_m is [5, 1], expected [nearest, farthest] in metres, above 0 and up to 65.535"),
        ("depth_range_m: [1, 80]", "depth_range_m is [1, 80], expected [nearest, farthest]"),
        ("folders: {depth: depth}", "folders is {'depth': 'depth'}, expected the folder of image and, where there are, of"),
        ("folders: {image: rgb, mask: m}", "folders is {'image': 'rgb', 'mask': 'm'}, expected the folder of image"),
        ("folders: {image: 3}", "folders is {'image': 3}, expected the folder of image"),
        ("splits: {training: t}", "splits is {'training': 't'}, expected folders or lists of names of train, valid or test"),
        ("splits: {}", "splits is {}, expected folders or lists"),
        ("parts: {train: t, valid: v}", "parts: is called splits now"),
        ("classes: [a, b]\nparts: {train: t}", "parts: is called splits now"),
        ("scene: 7", "scene is 7, expected a regular expression, the name of a .csv file, or null"),
        ("depth_unit: 2", "found depth_unit, expected keys of: classes, colours, first_label, ignore, depth_unit_mm, depth_missing, "
         "depth_bits, depth_range_m, folders, splits, scene"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_reported(tmp_path, text, message):
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path / 'dataset.yaml'))}: {re.escape(message)}"
    ):
        describe(tmp_path, text)

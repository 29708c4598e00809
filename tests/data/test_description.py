import re
from pathlib import Path

import numpy as np
import pytest

import lib
from lib.classes import NYUV2_13
from lib.data import DataError
from lib.data.description import KEYS, read_description


def describe(root, text):
    (root / "dataset.yaml").write_text(text)
    return read_description(root)


def test_defaults_apply_without_dataset_yaml(tmp_path):
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


def test_all_keys_of_dataset_yaml_are_read(tmp_path):
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
    assert description.class_names == ("wall", "sofa", "bed")  # sorted by value
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
        ("classes: [a, b]\nignore: others", [0, 1, 2, 255, 65535], [0, 1, 255, 255, 255]),
    ],
)
def test_label_values_are_mapped_to_class_indices(tmp_path, text, values, indices):
    description = describe(tmp_path, text)
    label = np.array([values], np.uint16)
    assert description.to_indices(tmp_path / "a.png", label).tolist() == [indices]
    assert description.to_indices(tmp_path / "a.png", label).dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "value", "message"),
    [
        ("classes: [a, b]", 2, "label values [2], expected 0..1 and 255 = unlabelled; if 0 means unlabelled, write "
         "`first_label: 1` into {yaml}"),
        ("classes: [a, b]\nfirst_label: 0", 2, "label values [2], expected 0..1 and 255 = unlabelled; {name}"),
        ("classes: [a, b]\nignore: []", 255, "label values [255], expected 0..1 and nothing = unlabelled; {name}"),
        ("classes: {3: b, 300: a}", 4, "label values [4], expected 3..300 with gaps and 255 = unlabelled; {name}"),
        ("classes: [a, b]", 70000, "label values [70000], expected 0..1 and 255 = unlabelled; {name}"),
    ],
)  # fmt: skip
def test_unknown_label_value_is_rejected(tmp_path, text, value, message):
    description, yaml = describe(tmp_path, text), tmp_path / "dataset.yaml"
    name = f"list other classes under `classes`, and unlabelled values under `ignore`, in {yaml}"
    with pytest.raises(DataError) as error:
        description.to_indices(tmp_path / "a.png", np.array([[value, min(description.by_value)]], np.int32))
    share = f". Shares of the pixels in 1 files: {value}: 50.00 %"
    assert str(error.value) == f"{tmp_path / 'a.png'}: " + message.format(yaml=yaml, name=name) + share


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first_label: -1", "first_label is -1, expected the label value of the first class, a whole number from 0 to 65535"),
        ("first_label: true", "first_label is True, expected the label value"),
        ("first_label: 65530", "first_label is 65530, expected label values up to 65535"),
        ("classes: {0: a, 1: b}\nfirst_label: 1", "first_label is 1, expected none if classes maps values to names"),
        ("classes: {0: a, 70000: b}", "classes is {0: 'a', 70000: 'b'}, expected a list of 2 to 255 names"),
        ("classes: {a: 0, b: 1}", "classes is {'a': 0, 'b': 1}, expected a list of 2 to 255 names"),
        ("classes: {0: a, 1: a}", "classes names a twice; every class needs its own name"),
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
        ("folders: {image: /data/rgb}", "folders is {'image': '/data/rgb'}, expected the folder of image and, where there are, of "
         "depth and label, as relative paths with no placeholders but {name}, {scene} and {split}"),
        ("folders: {image: 'rgb/{Name}.png'}", "folders is {'image': 'rgb/{Name}.png'}, expected the folder of image"),
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
def test_invalid_entries_of_dataset_yaml_are_rejected(tmp_path, text, message):
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path / 'dataset.yaml'))}: {re.escape(message)}"
    ):
        describe(tmp_path, text)


NEARLY = [
    "dataset.yml",
    "data.yaml",
    "Dataset.yaml",
    "dataset.yaml.txt",
    "train/dataset.yaml",
    "DATA.YML",
    "test/data.yaml",
]


@pytest.mark.parametrize("name", NEARLY)
def test_file_names_similar_to_dataset_yaml_are_rejected(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("classes: [a, b]")
    with pytest.raises(DataError) as error:
        read_description(tmp_path)
    assert str(error.value).startswith(
        f"{path}: is not read under this name, expected {tmp_path / 'dataset.yaml'}; "
    )


def test_yaml_files_of_other_tools_are_ignored(tmp_path):
    """With a dataset.yaml, other files may have any name; without one, no similar name."""
    for name in ("readme.yaml", "data.yaml.orig", "my_dataset.yaml", "metadata.yml"):
        (tmp_path / name).write_text("nc: 2")
    assert read_description(tmp_path).class_names == NYUV2_13
    (tmp_path / "data.yaml").write_text("nc: 2")
    assert describe(tmp_path, "classes: [a, b]").class_names == ("a", "b")


COLOURS = "colours: {background: [0, 0, 0], cat: [128, 0, 0], dog: [0, 128, 0]}"


@pytest.mark.parametrize(
    ("text", "classes", "unlabelled"),
    [
        (COLOURS, ("background", "cat", "dog"), []),
        (f"{COLOURS}\nclasses: [dog, cat]", ("dog", "cat"), [0]),
        (COLOURS.replace("background", "ignore"), ("cat", "dog"), [0]),
        ("colours: labelmap.txt", ("background", "cat", "big dog"), []),
    ],
)
def test_colours_are_mapped_to_class_indices(tmp_path, text, classes, unlabelled):
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\nbig dog:0,128,0:head,tail:runs\n"
    )
    description = describe(tmp_path, text)
    assert (description.class_names, description.unlabelled) == (classes, unlabelled)
    label = np.array([[0x800000, 0x8000, 0]], np.int32)
    names = [*classes, *["ignored"] * (256 - len(classes))]
    found = [names[index] for index in description.to_indices(tmp_path / "a.png", label)[0]]
    assert found[0] == "cat"
    assert found[1].endswith("dog")
    assert found[2] == ("background" if "background" in classes else "ignored")
    with pytest.raises(DataError) as error:
        description.to_indices(tmp_path / "a.png", np.array([[0x010203, 0]], np.int32))
    assert str(error.value) == (
        f"{tmp_path / 'a.png'}: label values [[1, 2, 3]], expected those of `colours`; list them under `colours` in "
        f"{tmp_path / 'dataset.yaml'}, as classes or as `ignore`. Shares of the pixels in 1 files: [1, 2, 3]: 50.00 %"
    )
    others = describe(tmp_path, f"{text}\nignore: others")
    assert others.to_indices(tmp_path / "a.png", np.array([[0x010203]], np.int32)).tolist() == [[255]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{COLOURS}\nclasses: [cat, cow]", "colours has no colour of class 'cow', expected 2 to 255 classes, each with"),
        (f"{COLOURS}\nclasses: [cat, background]", "colours has a colour of 'dog', expected 2 to 255 classes"),
        ("colours: {cat: [0, 0, 0], dog: [0, 0, 0]}", "colours has two names of one colour, expected"),
        ("colours: {cat: [0, 0, 0], ignore: [1, 1, 1]}", "colours has 1 classes, expected 2 to 255 classes"),
        ("colours: {cat: [0, 0], dog: [1, 1, 1]}", "colours is {'cat': [0, 0], 'dog': [1, 1, 1]}, expected a colour [red,"),
        ("colours: {cat: '#ff0000', dog: [1, 1, 1]}", "colours is {'cat': '#ff0000', 'dog': [1, 1, 1]}, expected a colour"),
        ("colours: {cat: [0, 0, 256], dog: [1, 1, 1]}", "colours is {'cat': [0, 0, 256], 'dog': [1, 1, 1]}, expected"),
        (f"{COLOURS}\nclasses: {{0: cat, 1: dog}}", "colours is {'background': [0, 0, 0], 'cat': [128, 0, 0], 'dog': [0, 128,"),
    ],
)  # fmt: skip
def test_invalid_colours_are_rejected(tmp_path, text, message):
    with pytest.raises(DataError, match=f"dataset.yaml: {re.escape(message)}"):
        describe(tmp_path, text)


@pytest.mark.parametrize("content", ["cat\n", "cat:red::\n", None])
def test_invalid_or_missing_label_map_is_rejected(tmp_path, content):
    if content is not None:
        (tmp_path / "labelmap.txt").write_text(content)
    with pytest.raises(
        DataError, match="labelmap.txt: can't be read as colours .* expected lines such as `bed:128,0,0::`"
    ):
        describe(tmp_path, "colours: labelmap.txt")


def test_name_listed_twice_in_a_label_map_is_rejected(tmp_path):
    (tmp_path / "labelmap.txt").write_text("bed:128,0,0::\nwall:0,128,0::\nbed:0,0,128::\n")
    with pytest.raises(DataError) as error:
        describe(tmp_path, "colours: labelmap.txt")
    assert str(error.value) == (
        f"{tmp_path / 'labelmap.txt'}: can't be read as colours ('bed' is listed twice), expected lines such as "
        "`bed:128,0,0::`, one for each name"
    )


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("classes: {1: bed, 3: wall, 3: floor}", "3", 1),
        ("classes: {1: bed, 3: wall, 0x3: floor}", "3", 1),
        ("depth_unit_mm: 1\nignore: [255]\ndepth_unit_mm: 2", "'depth_unit_mm'", 1),
        ("scene: null\nfolders: {image: a}\nfolders: {image: b}", "'folders'", 2),
        ("classes: [a, b]\ncolours: {a: [0, 0, 0], b: [1, 1, 1], a: [2, 2, 2]}", "'a'", 2),
    ],
)
def test_key_given_twice_is_rejected(tmp_path, text, key, line):
    with pytest.raises(DataError) as error:
        describe(tmp_path, text)
    assert str(error.value).startswith(
        f"{tmp_path / 'dataset.yaml'}: is not valid YAML ({key} is given twice, expected once; keep one"
    )
    assert f"line {line}, " in str(error.value)


def test_one_key_in_two_mappings_is_accepted(tmp_path):
    """A merge key (`<<`) gives defaults, which keys of the mapping may replace."""
    text = "folders: &layout {image: a, label: a}\nsplits: {train: a}\ncolours: {a: &one [1, 1, 1], b: [0, 0, 0]}"
    assert describe(tmp_path, text).class_names == ("a", "b")
    merged = "classes: {<<: {0: a, 1: b}, 1: c}"
    assert describe(tmp_path, merged).class_names == ("a", "c")


@pytest.mark.parametrize("entry", ["first_label: 1", "ignore: [0]", "ignore: [0, 255]"])
def test_label_values_beside_colours_are_rejected(tmp_path, entry):
    key, value = entry.split(": ")
    with pytest.raises(DataError) as error:
        describe(tmp_path, f"{COLOURS}\n{entry}")
    assert str(error.value) == (
        f"{tmp_path / 'dataset.yaml'}: {key} is {value}, expected none beside colours; use the name ignore in colours for "
        f"a colour that means unlabelled, and leave {key} out"
    )


@pytest.mark.parametrize("entry", ["first_label: 0", "ignore: [255]", "ignore: []", "ignore: others"])
def test_defaults_beside_colours_are_accepted(tmp_path, entry):
    assert describe(tmp_path, f"{COLOURS}\n{entry}").class_names == ("background", "cat", "dog")


def test_null_keys_are_not_stated(tmp_path):
    description = describe(tmp_path, "colours: null\nscene: null\nfirst_label: 0")
    assert description.stated == {"first_label"}
    assert (description.colours, description.scene) == (None, None)


def test_code_in_yaml_is_not_executed(tmp_path):
    with pytest.raises(DataError, match="dataset.yaml: is not valid YAML"):
        describe(tmp_path, f"classes: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert not (tmp_path / "made").exists()


def test_readme_example_of_dataset_yaml_has_all_keys(tmp_path):
    readme = (Path(lib.__file__).parent / "data" / "README.md").read_text()
    block = re.search(r"```yaml\n(classes: .*?)```", readme, re.DOTALL)[1]
    description = describe(tmp_path, block)
    assert description.stated == set(KEYS) - {"scene"}  # null
    assert description.class_names == ("bed", "books", "ceiling")


def test_ignore_others_covers_values_outside_16_bits(tmp_path):
    description = describe(tmp_path, "classes: [a, b]\nignore: others")
    label = np.array([[-1, 0, 1, 70000, -70000]], np.int32)
    assert description.to_indices(tmp_path / "a.png", label).tolist() == [[255, 0, 1, 255, 255]]
    strict = describe(tmp_path, "classes: [a, b]")
    with pytest.raises(DataError, match=r"label values \[-70000, -1, 70000\]"):
        strict.to_indices(tmp_path / "a.png", label)

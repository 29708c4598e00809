"""The layouts of lib/data/README.md: the built-in synthetic scenes, written as people have their data on disk."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_equal_samples, write_folder
from PIL import Image

import lib
from lib.data import DataError, iterate_samples, load_samples

README = (Path(lib.__file__).parent / "data" / "README.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(# .*?)```", README, re.DOTALL)


def write_example(root, number):
    """Its dataset.yaml, of at most ten lines."""
    text = EXAMPLES[number]
    assert len(text.splitlines()) <= 10
    (root / "dataset.yaml").write_text(text)


def save(root, pattern, names, arrays):
    for name, array in zip(names, arrays, strict=True):
        path = root / pattern.format(name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def test_sibling_folders_with_lists(tmp_path, scenes):
    """Names with folders, files with endings of their own, lines with folders and extensions, scenes by folder."""
    write_example(tmp_path, 0)
    names = [f"{scene}/frame.{number}" for number, scene in enumerate(scenes.scene)]
    save(tmp_path, "color/{name}_rgb.png", names, scenes.image)
    save(tmp_path, "depth/{name}.png", names, scenes.depth)
    save(tmp_path, "label/{name}.png", names[:9], scenes.label[:9])
    Path(tmp_path, "train.txt").write_text(
        "".join(f"color/{name}_rgb.png\r\n" for name in reversed(names[:9]))
    )
    Path(tmp_path, "test.txt").write_text(
        "\ufeff" + "\n".join([names[9], f"./{names[10]}.png", f"depth/{names[11]}"])
    )
    train, test = load_samples(tmp_path, "train", "none"), load_samples(tmp_path, "test")
    order = np.argsort(names[:9])
    assert_equal_samples(replace(train, names=scenes.names[:9][order]), scenes[:9][order])
    assert list(train.names) == sorted(names[:9])
    assert list(train.scene) == sorted(scenes.scene[:9])
    assert sorted(test.names) == sorted(names[9:])
    assert test.label is None
    assert load_samples(tmp_path, "valid").loaded_with["chosen_validation"] == "scenes"


def test_0_is_unlabelled_and_classes_begin_with_1(tmp_path, scenes):
    write_example(tmp_path, 1)
    scenes = replace(
        scenes,
        label=np.where(scenes.label < 3, scenes.label, 255).astype(np.uint8),
        classes=("bed", "books", "ceiling"),
    )
    write_folder(tmp_path, replace(scenes, label=scenes.label + np.uint8(1)))  # 255 becomes 0
    assert_equal_samples(load_samples(tmp_path, "train", "none"), scenes)


def test_5000_units_a_metre_and_65535_where_nothing_was_measured(tmp_path, scenes):
    write_example(tmp_path, 2)
    stored = np.where(scenes.depth == 0, 65535, np.minimum(5 * scenes.depth.astype(int), 65000)).astype(
        np.uint16
    )
    write_folder(tmp_path, replace(scenes, depth=stored))
    samples = load_samples(tmp_path, "train", "none")
    assert_equal_samples(samples, replace(scenes, depth=scenes.depth.clip(0, 13000)))
    assert samples.depth_range_m == (0.4, 8.0)


def test_a_valid_split_of_its_own(tmp_path, scenes):
    write_example(tmp_path, 3)
    for split, samples in (("training", scenes[:7]), ("validation", scenes[7:])):
        write_folder(tmp_path, samples, split)
    train, valid = (load_samples(tmp_path, split) for split in ("train", "valid"))
    assert_equal_samples(train, scenes[:7])
    assert_equal_samples(valid, scenes[7:])
    assert (
        valid.loaded_with["chosen_validation"]
        == iterate_samples(tmp_path, "train").validation
        == "predefined"
    )
    assert list(load_samples(tmp_path, "valid", "predefined", limit=2).names) == list(scenes.names[7:9])
    assert set(load_samples(tmp_path, "valid", "random").names) < set(scenes.names[:7])  # as it is asked for
    with pytest.raises(DataError) as error:
        load_samples(tmp_path, "test")
    assert str(error.value) == (
        f"{tmp_path}: has no split 'test', expected one of: train, valid; name it in {tmp_path / 'dataset.yaml'}"
    )


def test_predefined_without_a_valid_split(folder):
    for source in (folder, "synthetic"):
        with pytest.raises(ValueError) as error:
            load_samples(source, "valid", "predefined")
        assert str(error.value) == (
            "validation: 'predefined' needs a data set with its own valid split; name it in DATA/dataset.yaml, such as "
            "`splits: {train: train, valid: valid, test: test}`, or use validation 'auto'"
        )


def test_a_table_of_scenes(folder, scenes):
    (folder / "dataset.yaml").write_text("scene: rooms.csv")
    lines = [f"{name},{scene}" for name, scene in zip(scenes.names, scenes.scene, strict=True)]
    (folder / "rooms.csv").write_text("\n".join(["name,scene", *lines]))
    samples = load_samples(folder, "train", "none")
    assert list(samples.scene) == list(scenes.scene)
    assert load_samples(folder, "train").loaded_with["chosen_validation"] == "scenes"
    (folder / "rooms.csv").write_text("\n".join(["name,scene", *lines[1:]]))
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value) == (
        f"{folder / 'rooms.csv'}: gives 1 of 12 images no scene, the first is '000000'; every image needs one"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene: '([a-z'", "{yaml}: scene is '([a-z', expected a regular expression (unterminated character set at position 1)"),
        ("scene: '[0-9]+'", "{yaml}: scene is '[0-9]+' with 0 groups, expected one, such as '^([^/]+)/'"),
        ("scene: '(x)'", "{yaml}: gives 12 of 12 images no scene, the first is '000000'; every image needs one"),
        ("scene: none.csv", "{root}/none.csv: can't be read ([Errno 2] No such file or directory: '{root}/none.csv'); expected "
         "a table with the columns name,scene"),
        ("splits: {train: train.txt}", "{root}/train.txt/image: no such folder; expected DATA/train/{{image,depth,label}} and "
         "DATA/test/{{image,depth}}, or what DATA/dataset.yaml says. Check the parameter data"),
        ("splits: {train: dataset.yaml}\nfolders: {image: train/image}", "{yaml}: 2 of 2 lines name no image, the first is 'splits: "
         "{{train: dataset.yaml}}'; expected a name a line, such as '000000', of images in {root}/train/image"),
        ("folders: {image: 'image/{name}.jpg', label: label}", "{root}/train/image: found nothing, expected files of: "
         "{{name}}.jpg"),
        ("folders: {image: image, label: labels}", "{root}/train/labels: no such folder; expected DATA/train/{{image,depth,label}} "
         "and DATA/test/{{image,depth}}, or what DATA/dataset.yaml says. Check the parameter data"),
    ],
)  # fmt: skip
def test_descriptions_that_do_not_fit_the_folder(folder, text, message):
    (folder / "dataset.yaml").write_text(text)
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value) == message.format(root=folder, yaml=folder / "dataset.yaml")


def test_lists_that_can_not_be_meant(folder, scenes):
    (folder / "dataset.yaml").write_text(
        "splits: {train: a.txt, test: b.txt}\nfolders: {image: train/image, label: train/label}"
    )
    for content, message in (
        (
            "000000\nx\n",
            "1 of 2 lines name no image, the first is 'x'; expected a name a line, such as '000000', of images in",
        ),
        ("", "is empty; expected a name a line, such as '000000'"),
        ("000000\n000000.png", "names '000000' twice; every image once"),
    ):
        (folder / "a.txt").write_text(content)
        with pytest.raises(DataError, match=f"{folder}/a.txt: {message}"):
            load_samples(folder, "train", "none")
    (folder / "a.txt").write_text("000000\n000001")
    (folder / "b.txt").write_text("000001")
    with pytest.raises(DataError) as error:
        load_samples(folder, "test")
    assert str(error.value) == (
        f"{folder / 'b.txt'}: shares 1 images with {folder / 'a.txt'}, the first is '000001'; what is trained on can't "
        "validate or test: give split 'test' other images, or leave it out of `splits`"
    )


def test_files_of_another_kind_are_named(folder):
    for path in (folder / "train" / "depth").iterdir():
        path.rename(path.with_suffix(".exr"))
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value) == (
        f"{folder / 'train' / 'depth'}: found 12 .exr files, expected files of: .png, .tif, .tiff, .npy"
    )


def test_without_a_depth_folder_there_is_none(folder, scenes):
    (folder / "train" / "depth").rename(folder / "depths")
    assert load_samples(folder, "train", "none", (48, 64)).depth is None
    assert next(iter(iterate_samples(folder, "valid"))).depth is None
    assert load_samples(folder, "test").depth is not None

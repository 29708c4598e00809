"""The layouts in lib/data/README.md: the built-in synthetic scenes in common folder structures."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_equal_samples, write_folder
from PIL import Image

import lib
from lib.data import DataError, MissingSplit, iterate_samples, load_samples

README = (Path(lib.__file__).parent / "data" / "README.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(# .*?)```", README, re.DOTALL)


def write_example(root, number):
    """Write the dataset.yaml of an example, which has at most ten lines."""
    text = EXAMPLES[number]
    assert len(text.splitlines()) <= 10
    (root / "dataset.yaml").write_text(text)


def save(root, pattern, names, arrays):
    for name, array in zip(names, arrays, strict=True):
        path = root / pattern.format(name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def test_sibling_folders_with_file_lists_are_read(tmp_path, scenes):
    """Names contain scene folders. Files have suffixes, and list entries have folders and extensions."""
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


def test_first_label_1_reads_0_as_unlabelled(tmp_path, scenes):
    write_example(tmp_path, 1)
    scenes = replace(
        scenes,
        label=np.where(scenes.label < 3, scenes.label, 255).astype(np.uint8),
        classes=("bed", "books", "ceiling"),
    )
    write_folder(tmp_path, replace(scenes, label=scenes.label + np.uint8(1)))  # 255 becomes 0
    assert_equal_samples(load_samples(tmp_path, "train", "none"), scenes)


def test_depth_of_5000_units_a_metre_with_65535_as_missing(tmp_path, scenes):
    write_example(tmp_path, 2)
    stored = np.where(scenes.depth == 0, 65535, np.minimum(5 * scenes.depth.astype(int), 65000)).astype(
        np.uint16
    )
    write_folder(tmp_path, replace(scenes, depth=stored))
    samples = load_samples(tmp_path, "train", "none")
    assert_equal_samples(samples, replace(scenes, depth=scenes.depth.clip(0, 13000)))
    assert samples.depth_range_m == (0.4, 8.0)


def test_predefined_valid_split_is_used(tmp_path, scenes):
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
    assert set(load_samples(tmp_path, "valid", "random").names) < set(scenes.names[:7])  # if requested
    with pytest.raises(DataError) as error:
        load_samples(tmp_path, "test")
    assert str(error.value) == (
        f"{tmp_path}: has no split 'test', expected one of: train, valid; name it in {tmp_path / 'dataset.yaml'}"
    )


def test_validation_predefined_needs_a_valid_split(folder):
    for source in (folder, "synthetic"):
        with pytest.raises(ValueError) as error:
            load_samples(source, "valid", "predefined")
        assert str(error.value) == (
            "validation: 'predefined' needs a data set with its own valid split; name it in DATA/dataset.yaml, such as "
            "`splits: {train: train, valid: valid, test: test}`, or use validation 'auto'"
        )


def test_scenes_are_read_from_a_table(folder, scenes):
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
        f"{folder / 'rooms.csv'}: 1 of 12 images have no scene, the first is '000000'; every image needs one"
    )


def test_scenes_may_be_called_none_or_na(folder, scenes):
    (folder / "dataset.yaml").write_text("scene: rooms.csv")
    expected = ["None", "NA", "nan"] * 4
    lines = [f"{name},{scene}" for name, scene in zip(scenes.names, expected, strict=True)]
    (folder / "rooms.csv").write_text("\n".join(["name,scene", *lines, lines[0]]))  # one line twice
    assert list(load_samples(folder, "train", "none").scene) == expected


def test_two_scenes_of_one_image_are_rejected(folder, scenes):
    (folder / "dataset.yaml").write_text("scene: rooms.csv")
    lines = [f"{name},{scene}" for name, scene in zip(scenes.names, scenes.scene, strict=True)]
    (folder / "rooms.csv").write_text("\n".join(["name,scene", *lines, "000000,cellar"]))
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value) == (
        f"{folder / 'rooms.csv'}: gives '000000' two scenes, expected one; keep one line for each image"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene: '^([a-z]*)'", "{yaml}: 12 of 12 images have no scene, the first is '000000'; every image needs one"),
        ("scene: '([a-z'", "{yaml}: scene is '([a-z', expected a regular expression (unterminated character set at position 1)"),
        ("scene: '[0-9]+'", "{yaml}: scene is '[0-9]+' with 0 groups, expected one, such as '^([^/]+)/'"),
        ("scene: '(x)'", "{yaml}: 12 of 12 images have no scene, the first is '000000'; every image needs one"),
        ("scene: none.csv", "{root}/none.csv: can't be read ([Errno 2] No such file or directory: '{root}/none.csv'); expected "
         "a table with the columns name,scene"),
        ("splits: {train: train.txt}", "{root}/train.txt: no such file or folder, expected that of split 'train' in {yaml}; "
         "correct it there"),
        ("folders: {image: image}", "{yaml}: folders has no label, but split 'train' needs labels; add their folder, such as "
         "`label: label`"),
        ("splits: {train: dataset.yaml}\nfolders: {image: train/image}", "{yaml}: 2 of 2 lines name no image, the first is 'splits: "
         "{{train: dataset.yaml}}'; expected a name a line, such as '000000', of images in {root}/train/image"),
        ("folders: {image: 'image/{name}.jpg', label: label}", "{root}/train/image: found nothing, expected files of: "
         "{{name}}.jpg"),
        ("folders: {image: image, label: labels}", "{root}/train/labels: no such folder; expected DATA/train/{{image,depth,label}} "
         "and DATA/test/{{image,depth}}, or what DATA/dataset.yaml says. Check the parameter data"),
    ],
)  # fmt: skip
def test_dataset_yaml_that_does_not_match_the_folder_is_rejected(folder, text, message):
    (folder / "dataset.yaml").write_text(text)
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value) == message.format(root=folder, yaml=folder / "dataset.yaml")


def test_invalid_file_lists_are_rejected(folder, scenes):
    (folder / "dataset.yaml").write_text(
        "splits: {train: a.txt, test: b.txt}\nfolders: {image: train/image, label: train/label}"
    )
    for content, message in (
        (
            "000000\nx\n",
            "1 of 2 lines name no image, the first is 'x'; expected a name a line, such as '000000', of images in",
        ),
        ("", "is empty; expected a name a line, such as '000000'"),
        ("000000\n000000.png", "names '000000' twice; list every image once"),
    ):
        (folder / "a.txt").write_text(content)
        with pytest.raises(DataError, match=f"{folder}/a.txt: {message}"):
            load_samples(folder, "train", "none")
    (folder / "a.txt").write_text("000000\n000001")
    (folder / "b.txt").write_text("000001")
    with pytest.raises(DataError) as error:
        load_samples(folder, "test")
    assert str(error.value) == (
        f"{folder / 'b.txt'}: shares 1 images with {folder / 'a.txt'}, the first is '000001'; training images can't "
        "validate or test: give split 'test' other images, or leave it out of `splits`"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_list_that_is_not_utf_8_is_rejected(folder, encoding):
    (folder / "a.txt").write_bytes("Büro\n000000".encode(encoding))
    (folder / "dataset.yaml").write_text(
        "splits: {train: a.txt}\nfolders: {image: train/image, label: train/label}"
    )
    with pytest.raises(
        DataError, match=r"a.txt: is not UTF-8 \('utf-8' codec .*\), expected .*; save it as UTF-8"
    ):
        load_samples(folder, "train")


def test_folder_that_cannot_be_listed_is_rejected(folder, monkeypatch):
    (folder / "test" / "image" / "kitchen").mkdir()
    assert len(load_samples(folder, "test")) == 3
    list_folder = os.scandir

    def refuse(path):
        if str(path).endswith("kitchen"):
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError) as error:
        load_samples(folder, "test")
    assert str(error.value) == (
        f"{folder / 'test' / 'image' / 'kitchen'}: can't be listed (Permission denied), expected a readable folder; check "
        "its permissions and the disk"
    )


@pytest.mark.parametrize("suffix", [".heic", ".HEIF"])
def test_heic_images_are_rejected(folder, suffix):
    path = folder / "test" / "image" / f"t5{suffix}"
    path.touch()
    with pytest.raises(DataError) as error:
        load_samples(folder, "test")
    assert (
        str(error.value) == f"{path}: images of this kind can't be read; convert them to jpg, or remove them"
    )
    path.rename(path.with_suffix(".json"))
    assert len(load_samples(folder, "test")) == 3


def test_suffixes_of_patterns_match_in_upper_and_lower_case(folder):
    (folder / "dataset.yaml").write_text("folders: {image: 'image/{name}.PNG', label: 'label/{name}.png'}")
    path = folder / "train" / "image" / "000001.png"
    path.rename(path.with_suffix(".PNG"))
    assert len(load_samples(folder, "train", "none")) == 12


def test_error_names_unsupported_file_types(folder):
    for path in (folder / "train" / "depth").iterdir():
        path.rename(path.with_suffix(".exr"))
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    assert str(error.value) == (
        f"{folder / 'train' / 'depth'}: found 12 .exr files, expected files of: .png, .tif, .tiff, .npy"
    )


def test_depth_is_none_without_a_depth_folder(folder, scenes):
    (folder / "train" / "depth").rename(folder / "depths")
    assert load_samples(folder, "train", "none", (48, 64)).depth is None
    assert next(iter(iterate_samples(folder, "valid"))).depth is None
    assert load_samples(folder, "test").depth is not None


# the same files in two splits


def link_split(folder):
    (folder / "valid").symlink_to(folder / "train")


def link_files(folder, link=Path.symlink_to):
    for kind in ("image", "depth", "label"):
        (folder / "valid" / kind).mkdir(parents=True)
        for path in list((folder / "train" / kind).iterdir())[:3]:
            link(folder / "valid" / kind / f"x{path.name}", path)


@pytest.mark.parametrize(
    ("text", "prepare"),
    [
        ("splits: {train: train, valid: train, test: test}", None),
        ("splits: {train: train, valid: ./train}", None),
        ("splits: {train: train, valid: valid}", link_split),
        ("splits: {train: train, valid: valid}", link_files),
        ("splits: {train: train, valid: valid}", partial(link_files, link=Path.hardlink_to)),
        ("splits: {train: ., valid: .}\nfolders: {image: train/image, label: train/label}", None),
        ("splits: {train: train, valid: v.txt}\nfolders: {image: image, label: label}", lambda folder: (
            [(folder / kind).symlink_to(folder / "train" / kind) for kind in ("image", "label")],
            (folder / "v.txt").write_text("000000\n"))),
    ],
)  # fmt: skip
def test_valid_split_that_shares_files_with_train_is_rejected(folder, text, prepare):
    if prepare:
        prepare(folder)
    (folder / "dataset.yaml").write_text(text)
    assert len(load_samples(folder, "train")) == 12
    with pytest.raises(DataError, match=r"shares \d+ images with .*; training images can't validate or test"):
        load_samples(folder, "valid")


def test_test_split_that_shares_files_with_train_is_rejected(folder):
    (folder / "dataset.yaml").write_text("splits: {train: train, test: train}")
    with pytest.raises(
        DataError, match="train: shares 12 images with .*train, the first is '000000'; training images"
    ):
        load_samples(folder, "test")


def test_image_in_both_valid_and_test_is_rejected(folder):
    for split, lines in (("train", "000000"), ("valid", "000001\n000016"), ("test", "000016\n000015")):
        (folder / f"{split}.txt").write_text(lines)
    folders = "folders: {image: train/image, depth: train/depth, label: train/label}"
    (folder / "dataset.yaml").write_text(
        f"splits: {{train: train.txt, valid: valid.txt, test: test.txt}}\n{folders}"
    )
    for split, other in (("valid", "test"), ("test", "valid")):
        with pytest.raises(DataError) as error:
            load_samples(folder, split)
        assert str(error.value) == (
            f"{folder / split}.txt: shares 1 images with {folder / other}.txt, the first is '000016'; no image can do both: "
            f"give split {split!r} other images, or leave it out of `splits`"
        )
    (folder / "test.txt").write_text("000015")
    assert [len(load_samples(folder, split)) for split in ("valid", "test")] == [2, 1]


@pytest.mark.parametrize("name", ["tets.txt", "tset"])
def test_declared_split_that_does_not_exist_is_rejected(folder, name):
    (folder / "dataset.yaml").write_text(f"splits: {{train: train, test: {name}}}")
    with pytest.raises(DataError) as error:
        load_samples(folder, "test")
    assert type(error.value) is DataError
    assert str(error.value) == (
        f"{folder / name}: no such file or folder, expected that of split 'test' in {folder / 'dataset.yaml'}; correct it "
        "there, or write `test: null` if there is none"
    )
    for text in ("splits: {train: train, test: null}", "splits: {train: train}", "classes: null", ""):
        shutil.rmtree(folder / "test", ignore_errors=True)
        (folder / "dataset.yaml").write_text("" if "classes" in text else text)
        with pytest.raises(MissingSplit):
            load_samples(folder, "test")


def test_declared_split_of_kind_folders_that_does_not_exist_is_rejected(folder):
    (folder / "dataset.yaml").write_text(
        "splits: {train: image, test: tets}\nfolders: {image: 'train/{split}', label: train/label}"
    )
    assert len(load_samples(folder, "train", "none")) == 12
    with pytest.raises(DataError, match="train/tets: no such folder") as error:
        load_samples(folder, "test")
    assert type(error.value) is DataError


def test_splits_may_share_copied_images_and_file_names(folder):
    """explore.ipynb finds copies. Equal names in two folders do not imply equal images."""
    assert len(load_samples(folder, "test")) == 3  # exact copies of training images
    shutil.copytree(folder / "train", folder / "valid")
    (folder / "dataset.yaml").write_text("splits: {train: train, valid: valid}")
    assert len(load_samples(folder, "valid")) == 12


# hidden folders and links


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints", "@eaDir", ".thumbnails", "$RECYCLE.BIN", "__MACOSX"]
)
def test_hidden_files_and_folders_are_ignored(folder, hidden):
    for kind in ("image", "depth", "label"):
        place = folder / "train" / kind
        (place / hidden).mkdir()
        for path in list(place.glob("*.png"))[:3]:
            shutil.copy(path, place / hidden / f"{path.stem}-checkpoint.png")
        (place / "._000000.png").write_bytes(b"\0\5\26\7")
    assert len(load_samples(folder, "train", "none")) == 12


def test_linked_folders_are_read_exactly_once(folder):
    for kind in ("image", "depth", "label"):
        (folder / "train" / kind / "again").symlink_to(folder / "train" / kind)
    assert len(load_samples(folder, "train", "none")) == 12
    for kind in ("image", "depth", "label"):
        (folder / "train" / kind / "again").unlink()
        moved = folder / "elsewhere" / kind
        moved.parent.mkdir(exist_ok=True)
        (folder / "train" / kind).rename(moved)
        (folder / "train" / kind).mkdir()
        (folder / "train" / kind / "linked").symlink_to(moved)  # the only path to the files
    assert len(load_samples(folder, "train", "none")) == 12


# names and folders


@pytest.mark.parametrize("kind", ["image", "depth", "label"])
def test_composed_and_decomposed_unicode_names_match(folder, kind):
    """macOS decomposes file names."""
    for other in ("image", "depth", "label"):
        form = "NFD" if other == kind else "NFC"
        for path in list((folder / "train" / other).iterdir()):
            path.rename(path.with_name(unicodedata.normalize(form, f"Büro-한글-{path.name}")))
    names = load_samples(folder, "train", "none").names
    assert list(names) == [unicodedata.normalize("NFC", name) for name in names]
    assert len(names) == 12
    lines = "\n".join(unicodedata.normalize("NFD", name) for name in names[:4])
    (folder / "a.txt").write_text(lines)
    table = "".join(f"{unicodedata.normalize('NFD', name)},s{at % 2}\n" for at, name in enumerate(names))
    (folder / "s.csv").write_text("name,scene\n" + table)
    (folder / "dataset.yaml").write_text(
        "splits: {train: a.txt}\nfolders: {image: train/image, depth: train/depth, label: train/label}\nscene: s.csv"
    )
    assert list(load_samples(folder, "train", "none").scene) == ["s0", "s1", "s0", "s1"]


def test_layout_with_kind_folders_inside_scene_folders(tmp_path, scenes):
    """As in ScanNet, where frame numbers restart in each scene."""
    for at in range(12):
        for kind, stack in (("color", scenes.image), ("depth", scenes.depth), ("label-filt", scenes.label)):
            path = tmp_path / "scans" / f"scene{at // 3:04d}_00" / kind / f"{20 * (at % 3)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stack[at]).save(path)
    (tmp_path / "dataset.yaml").write_text(
        "splits: {train: scans}\n"
        "folders: {image: '{scene}/color/{name}', depth: '{scene}/depth/{name}.png', label: '{scene}/label-filt'}"
    )
    train = load_samples(tmp_path, "train", "none")
    assert list(train.names[:4]) == ["scene0000_00/0", "scene0000_00/20", "scene0000_00/40", "scene0001_00/0"]
    assert list(train.scene) == [f"scene{at // 3:04d}_00" for at in range(12)]
    np.testing.assert_array_equal(train.depth, scenes.depth)
    valid = iterate_samples(tmp_path, "valid")
    assert valid.validation == "scenes"
    assert set(np.bincount(np.unique(valid.scene, return_inverse=True)[1])) == {3}  # whole scenes
    (tmp_path / "t.txt").write_text("scene0002_00/20\nscans/scene0003_00/color/0.png\n")
    (tmp_path / "dataset.yaml").write_text(
        "splits: {train: t.txt}\nfolders: {image: 'scans/{scene}/color/{name}', label: 'scans/{scene}/label-filt/{name}'}"
    )
    assert list(load_samples(tmp_path, "train", "none").names) == ["scene0002_00/20", "scene0003_00/0"]


def test_layout_with_split_folders_inside_kind_folders(tmp_path, scenes):
    """As in ADE20K."""
    for split, chosen in (("training", slice(0, 8)), ("validation", slice(8, 12))):
        for kind, stack in (("images", scenes.image), ("annotations", scenes.label)):
            (tmp_path / kind / split).mkdir(parents=True)
            for name, array in zip(scenes.names[chosen], stack[chosen], strict=True):
                Image.fromarray(array).save(tmp_path / kind / split / f"{name}.png")
    (tmp_path / "dataset.yaml").write_text(
        "splits: {train: training, valid: validation}\nfolders: {image: 'images/{split}', label: 'annotations/{split}'}"
    )
    train, valid = (load_samples(tmp_path, split) for split in ("train", "valid"))
    assert (list(train.names), list(valid.names)) == (list(scenes.names[:8]), list(scenes.names[8:]))
    np.testing.assert_array_equal(valid.label, scenes.label[8:])


def test_error_for_coco_annotations_gives_code_to_make_masks(folder, scenes):
    shutil.rmtree(folder / "train" / "label")
    annotations = folder / "annotations.json"
    polygon = [8.0, 8.0, 40.0, 8.0, 40.0, 40.0, 8.0, 40.0]
    content = {
        "images": [{"id": 1, "file_name": "000000.png", "height": 96, "width": 128}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [polygon], "iscrowd": 0, "area": 1}
        ],
        "categories": [{"id": 3, "name": "chair"}],
    }
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        load_samples(folder, "train")
    message, *lines = str(error.value).splitlines()
    assert message.startswith(f"{folder / 'train' / 'label'}: no such folder; ")
    assert f"{annotations} may hold COCO annotations, not masks" in message
    compile("\n".join(lines), "lines", "exec")
    pytest.importorskip("pycocotools")
    (folder / "label").mkdir()
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, check=True)
    mask = np.asarray(Image.open(folder / "label" / "000000.png"))
    assert mask[20, 20] == 3
    assert mask[60, 60] == 0

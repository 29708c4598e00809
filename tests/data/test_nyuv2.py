import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from conftest import assert_equal_samples, write_folder
from PIL import Image

from lib.classes import NYUV2_13, NYUV2_40
from lib.data import DataError, iterate_samples, load_samples, nyuv2
from lib.data.cache import cache_root

SHARED = Path(__file__).parents[3] / "shared" / "nyuv2"
COUNT = 40
RAW_IDS = [157, 85, 4, 5, 11, 3, 2, 64, 83, 19, 172, 21, 59]  # bed .. window


@pytest.fixture(scope="module")
def frames():
    """Synthetic scenes with the first ids of NYUv2. Every fifth row of depth is not measured."""
    scenes = load_samples("synthetic", "train", "none", limit=COUNT)
    measured = np.ones(scenes.depth.shape, bool)
    measured[:, ::5] = False
    names = np.array([f"{i:06d}" for i in range(COUNT)])
    return replace(scenes, names=names, depth=scenes.depth.clip(600), measured=measured)


def write_mat(path, frames):
    """Write samples in the MATLAB format of NYUv2."""
    raw = np.append(RAW_IDS, np.zeros(243, int))[frames.label].astype(np.uint16)  # 255 -> 0
    depth_m = frames.depth.astype(np.float32) / 1000
    with h5py.File(path, "w") as file:
        file["images"] = frames.image.transpose(0, 3, 2, 1)
        file["depths"] = depth_m.transpose(0, 2, 1)
        file["rawDepths"] = np.where(frames.measured, depth_m, 0).transpose(0, 2, 1)
        file["labels"] = raw.transpose(0, 2, 1)
        texts = [
            file.create_dataset(f"#refs#/{i}", data=[[ord(c)] for c in f"kitchen_{i // 4:04d}"])
            for i in range(len(frames))
        ]
        file["scenes"] = np.array([[text.ref for text in texts]], dtype=h5py.ref_dtype)
    return path


@pytest.fixture
def mat(tmp_path, frames, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_mat(tmp_path / "nyu_depth_v2_labeled.mat", frames)


def official(frames, split):
    table = pd.read_csv(nyuv2.TABLES / "nyuv2_split.csv")
    return frames[table.id[(table.split == split) & (table.id < COUNT)].to_numpy()]


@pytest.mark.parametrize("size", [None, (48, 64)])
def test_mat_reader_equals_the_folder_reader(tmp_path, mat, frames, size):
    write_folder(tmp_path, official(frames, "train"))
    write_folder(tmp_path, official(frames, "test"), "test")
    for split, validation in (("train", "random"), ("valid", "random"), ("train", "none"), ("test", "none")):
        from_mat, from_folder = (load_samples(source, split, validation, size) for source in (mat, tmp_path))
        assert_equal_samples(from_mat, from_folder)
        assert from_mat.measured.mean() == pytest.approx(0.8, abs=0.05)
        assert from_folder.measured is None


def test_measured_marks_pixels_with_raw_depth(mat, frames):
    np.testing.assert_array_equal(load_samples(mat, "test").measured, official(frames, "test").measured)


def test_scene_names_come_from_the_file_and_scenes_stay_whole(mat):
    splits = {split: load_samples(mat, split, "scenes") for split in ("train", "valid")}
    for samples in splits.values():
        assert list(samples.scene) == [f"kitchen_{int(name) // 4:04d}" for name in samples.names]
    assert not set(splits["train"].scene) & set(splits["valid"].scene)
    everything = set(load_samples(mat, "train", "none").scene)
    assert len(set(splits["valid"].scene)) == int(np.ceil(0.2 * len(everything)))
    assert list(load_samples(mat, "valid").names) == list(splits["valid"].names)  # auto


def test_validation_scenes_is_rejected_for_folders_without_scenes(tmp_path, frames):
    write_folder(tmp_path, replace(frames[:5], names=np.array(list("abcde"))))
    with pytest.raises(
        ValueError, match="validation: 'scenes' needs data with known scenes; use 'blocks' or 'random'"
    ):
        load_samples(tmp_path, "train", "scenes")


def test_iterate_samples_equals_load_samples(mat):
    whole = load_samples(mat, "train", "none", (24, 32))
    pieces = list(iterate_samples(mat, "train", "none", (24, 32), batch_size=5))
    assert sum(map(len, pieces)) == len(whole)
    np.testing.assert_array_equal(np.concatenate([piece.measured for piece in pieces]), whole.measured)
    np.testing.assert_array_equal(np.concatenate([piece.label for piece in pieces]), whole.label)


def test_labels_of_40_classes_agree_with_those_of_13(mat):
    """Each class set has its own cache, so neither reads the labels of the other."""
    thirteen, forty = (load_samples(mat, "train", "none", classes=name) for name in ("nyuv2_13", "nyuv2_40"))
    assert (thirteen.classes, forty.classes) == (NYUV2_13, NYUV2_40)
    np.testing.assert_array_equal(thirteen.label, load_samples(mat, "train", "none").label)
    np.testing.assert_array_equal(thirteen.label == 255, forty.label == 255)
    same = ("bed", "books", "ceiling", "chair", "floor", "picture", "sofa", "table", "wall", "window")
    for name in same:
        np.testing.assert_array_equal(
            thirteen.label == NYUV2_13.index(name), forty.label == NYUV2_40.index(name), err_msg=name
        )
    assert (forty.label[thirteen.label == NYUV2_13.index("tv")] == NYUV2_40.index("television")).all()
    with pytest.raises(ValueError, match="classes: found 'nyuv2_14', expected one of nyuv2_13, nyuv2_40"):
        load_samples(mat, "train", classes="nyuv2_14")


def test_second_load_is_mapped_from_the_cache(mat, frames, monkeypatch):
    first = load_samples(mat, "train", "none", (48, 64))
    monkeypatch.setattr(nyuv2, "_read_block", None)  # nothing is read again
    again = load_samples(mat, "train", "none", (48, 64))
    assert_equal_samples(first, again)
    assert isinstance(again.image, np.memmap)
    assert not isinstance(load_samples(mat, "train", "random", (48, 64)).image, np.memmap)
    assert {path.name for path in mat.parent.iterdir()} == {mat.name, "cache"}  # no other file


@pytest.mark.parametrize("change", ["file", "array cut short", "array missing"])
def test_outdated_or_damaged_cache_is_rebuilt(mat, frames, change):
    before = load_samples(mat, "test", size=(48, 64)).image.copy()
    (cache,) = cache_root().glob("*/")
    if change == "file":
        write_mat(mat, frames[::-1])
    if change == "array cut short":
        (cache / "image.npy").write_bytes((cache / "image.npy").read_bytes()[:-50])
    if change == "array missing":
        (cache / "label.npy").unlink()
    after = load_samples(mat, "test", size=(48, 64))
    assert np.array_equal(after.image, before) == (change != "file")
    assert len(after.label) == len(after.image)
    assert len(list(cache_root().glob("*/"))) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.pop("rawDepths"), "rawDepths missing; expected the labelled data set"),
        (
            lambda file: file["labels"].__setitem__((3, 0, 0), 895),
            "label 895 in frames 0 on, expected raw ids 0..894",
        ),
        (
            lambda file: file["depths"].__setitem__(slice(None), 3000),
            "median depth 3000 in frames 0 on, expected metres",
        ),
        (
            lambda file: file["depths"].__setitem__((3, 0, 0), np.nan),
            "median depth nan in frames 0 on, expected metres",
        ),
    ],
)
def test_error_names_invalid_content_of_the_mat_file(mat, damage, message):
    with h5py.File(mat, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=message) as error:
        load_samples(mat, "train", "none", (48, 64))
    assert str(error.value).startswith(f"{mat}: ")
    assert not list(cache_root().glob("*/"))


def test_mat_file_with_transposed_labels_is_rejected(mat):
    with h5py.File(mat, "a") as file:
        labels = file.pop("labels")[:]
        file["labels"] = labels.transpose(0, 2, 1)
    with pytest.raises(
        DataError, match=r"images is uint8 \(40, 3, 128, 96\), expected uint8 \(40, 3, 96, 128\)"
    ):
        load_samples(mat, "train")


def test_truncated_and_missing_mat_files_are_rejected(mat):
    mat.write_bytes(mat.read_bytes()[:100_000])
    with pytest.raises(
        DataError, match=r"can't be opened as HDF5 .* Repeat the download if it was incomplete"
    ):
        load_samples(mat, "train")
    with pytest.raises(DataError, match=r"gone.mat: no such file; check the parameter data"):
        load_samples(mat.parent / "gone.mat", "train")


def test_matlab_5_file_is_rejected(tmp_path):
    path = tmp_path / "splits.mat"
    scipy.io.savemat(path, {"trainNdxs": [1, 2]})
    with pytest.raises(DataError) as error:
        load_samples(path, "train")
    assert str(error.value).startswith(f"{path}: can't be opened as HDF5 (")
    assert str(error.value).endswith(
        "); expected nyu_depth_v2_labeled.mat (2.8 GB, MATLAB version 7.3; splits.mat has version 5). "
        "Repeat the download if it was incomplete"
    )


def test_mat_file_with_too_few_scenes_is_rejected(mat):
    with h5py.File(mat, "a") as file:
        scenes = file.pop("scenes")[:]
        file["scenes"] = scenes[:, :-1]
    with pytest.raises(DataError) as error:
        load_samples(mat, "train")
    assert str(error.value) == (
        f"{mat}: has scenes for 39 images, expected 40, one for each label; use the file as published"
    )


def test_raw_ids_are_mapped_to_the_13_classes():
    table = pd.read_csv(nyuv2.TABLES / "nyuv2_classes.csv").set_index("raw")
    assert len(table) == 895
    mapped = nyuv2.class_table("nyuv2_13")
    assert mapped[0] == 255
    by_name = {name: NYUV2_13[mapped[raw]] for raw, name in table.name.items() if raw}
    same = ("bed", "ceiling", "chair", "floor", "picture", "sofa", "table", "wall", "window")
    assert {name: by_name[name] for name in same} == {name: name for name in same}
    assert by_name["television"] == "tv"
    assert by_name["books"] == "books"
    assert by_name["cabinet"] == "furniture"
    assert [NYUV2_13[index] for index in mapped[RAW_IDS]] == list(NYUV2_13)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the NYUv2 that lies beside the project")
def test_tables_match_the_published_mappings_and_splits():
    scipy_io = pytest.importorskip("scipy.io")
    to_40 = np.append(0, scipy_io.loadmat(SHARED / "classMapping40.mat")["mapClass"].ravel())
    to_13 = np.append(0, scipy_io.loadmat(SHARED / "class13Mapping.mat")["classMapping13"][0][0][0][0])
    np.testing.assert_array_equal(
        nyuv2.class_table("nyuv2_13"), np.where(to_13[to_40] == 0, 255, to_13[to_40] - 1)
    )
    table = pd.read_csv(nyuv2.TABLES / "nyuv2_split.csv")
    splits = scipy_io.loadmat(SHARED / "splits.mat")
    for split in ("train", "test"):
        np.testing.assert_array_equal(
            table.id[table.split == split] + 1, np.sort(splits[f"{split}Ndxs"].ravel())
        )
        names = sorted(path.stem for path in (SHARED / split / "image").iterdir())
        assert [f"{index:06d}" for index in table.id[table.split == split]] == names


@pytest.mark.skipif(not SHARED.exists(), reason="needs the NYUv2 that lies beside the project")
def test_class_shares_of_real_labels_match_published_values():
    counts = np.zeros(256, int)
    for path in (SHARED / "train" / "label").iterdir():
        counts += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=256)
    share = 100 * counts[:13] / counts[:13].sum()
    published = [4.3, 0.65, 1.8, 4.1, 11.9, 17.7, 15.6, 2.4, 2.9, 3.7, 0.67, 28.6, 5.8]
    np.testing.assert_allclose(share, published, atol=0.06)
    assert 100 * counts[255] / counts.sum() == pytest.approx(17.6, abs=0.05)


def test_locked_mat_file_is_read(mat):
    """Reading needs no lock, so it works if another program holds one, or on a disk without locks."""
    code = f"import fcntl; f = open({str(mat)!r}, 'r+b'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert len(load_samples(mat, "train", "none", (12, 16)))
    holder.communicate("\n")

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import assert_equal_samples, write_folder
from PIL import Image

from lib.classes import CLASS_NAMES
from lib.data import load_samples, nyuv2
from lib.data.samples import DataError, Samples
from lib.data.scenes import make_scenes

SHARED = Path(__file__).parents[3] / "shared" / "nyuv2"
COUNT = 40
RAW_IDS = [157, 85, 4, 5, 11, 3, 2, 64, 83, 19, 172, 21, 59]  # bed .. window


@pytest.fixture(scope="module")
def frames():
    """Scenes under the ids of the first frames of the data set, every fifth row of depth not measured."""
    scenes = make_scenes(np.array([f"{3 * (i // 2) + i % 2:06d}" for i in range(COUNT)]))
    measured = np.ones(scenes.depth.shape, bool)
    measured[:, ::5] = False
    names = np.array([f"{i:06d}" for i in range(COUNT)])
    return Samples(names, scenes.image, scenes.depth.clip(600), scenes.label, measured)


def write_mat(path, frames):
    """Write samples as MATLAB wrote the data set."""
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
def mat(tmp_path, frames):
    return write_mat(tmp_path / "nyu_depth_v2_labeled.mat", frames)


def official(frames, part):
    table = pd.read_csv(nyuv2.TABLES / "nyuv2_split.csv")
    return frames[table.id[(table.part == part) & (table.id < COUNT)].to_numpy()]


@pytest.mark.parametrize("size", [None, (48, 64)])
def test_equal_to_the_folder_reader(tmp_path, mat, frames, size):
    write_folder(tmp_path, official(frames, "train"))
    write_folder(tmp_path, official(frames, "test"), "test")
    for part, split in (("train", "random"), ("valid", "random"), ("train", "official"), ("test", "official")):
        from_mat, from_folder = (load_samples(source, part, split, size) for source in (mat, tmp_path))
        assert_equal_samples(from_mat, from_folder)
        assert from_mat.measured.mean() == pytest.approx(0.8, abs=0.05)
        assert from_folder.measured is None


def test_measured_is_where_raw_depth_is(mat, frames):
    np.testing.assert_array_equal(load_samples(mat, "test").measured, official(frames, "test").measured)


def test_scenes_split_keeps_scenes_whole(mat, frames):
    _, scenes = nyuv2.frame_names(mat, "train")
    names = {part: load_samples(mat, part, "scenes").names for part in ("train", "valid")}
    by_name = dict(zip(nyuv2.frame_names(mat, "train")[0], scenes, strict=True))
    rooms = {part: {by_name[name] for name in found} for part, found in names.items()}
    assert not rooms["train"] & rooms["valid"]
    assert len(rooms["valid"]) == int(np.ceil(0.2 * len(set(scenes))))


def test_folders_have_no_scenes(tmp_path, frames):
    write_folder(tmp_path, frames[:5])
    with pytest.raises(
        ValueError, match="split: 'scenes' needs the .mat file, folders do not name their scenes; use 'blocks'"
    ):
        load_samples(tmp_path, "train", "scenes")


def test_cache_is_used_and_mapped(mat, frames, monkeypatch):
    first = load_samples(mat, "train", "official", (48, 64))
    monkeypatch.setattr(nyuv2, "_read_block", None)  # nothing is read again
    again = load_samples(mat, "train", "official", (48, 64))
    assert_equal_samples(first, again)
    assert isinstance(again.image, np.memmap)
    assert not isinstance(load_samples(mat, "train", "random", (48, 64)).image, np.memmap)
    assert {path.name for path in mat.parent.iterdir()} == {mat.name, "nyu_depth_v2_labeled.48x64.cache"}


@pytest.mark.parametrize("change", ["file", "key", "array cut short", "array missing"])
def test_cache_that_does_not_match_is_made_again(mat, frames, change):
    before = load_samples(mat, "test", size=(48, 64)).image.copy()
    cache = mat.parent / "nyu_depth_v2_labeled.48x64.cache"
    if change == "file":
        write_mat(
            mat,
            Samples(
                frames.names, frames.image[::-1], *(a[::-1] for a in (frames.depth, frames.label, frames.measured))
            ),
        )
    if change == "key":
        (cache / "key.json").write_text("{")
    if change == "array cut short":
        (cache / "image.npy").write_bytes((cache / "image.npy").read_bytes()[:-50])
    if change == "array missing":
        (cache / "label.npy").unlink()
    after = load_samples(mat, "test", size=(48, 64))
    assert np.array_equal(after.image, before) == (change != "file")
    assert len(after.label) == len(after.image)


def test_read_only_folder_gets_its_cache_elsewhere(mat, tmp_path, monkeypatch):
    monkeypatch.setattr(nyuv2.os, "access", lambda *arguments: False)
    monkeypatch.setattr(nyuv2.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    load_samples(mat, "test", size=(24, 32))
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["nyu_depth_v2_labeled.24x32.cache"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.pop("rawDepths"), "rawDepths missing; expected the labelled data set"),
        (lambda file: file["labels"].__setitem__((3, 0, 0), 895), "label 895 in frames 0 on, expected raw ids 0..894"),
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
def test_wrong_content_is_named(mat, damage, message):
    with h5py.File(mat, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=message) as error:
        load_samples(mat, "train", "official", (48, 64))
    assert str(error.value).startswith(f"{mat}: ")
    assert not list(mat.parent.glob("*unfinished*"))


def test_wrong_layout_is_named(mat):
    with h5py.File(mat, "a") as file:
        labels = file.pop("labels")[:]
        file["labels"] = labels.transpose(0, 2, 1)
    with pytest.raises(DataError, match=r"images is uint8 \(40, 3, 128, 96\), expected uint8 \(40, 3, 96, 128\)"):
        load_samples(mat, "train")


def test_truncated_and_missing_files(mat):
    mat.write_bytes(mat.read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"can't be opened as HDF5 .* A download that was cut short has to be repeated"):
        load_samples(mat, "train")
    with pytest.raises(DataError, match=r"gone.mat: no such file; check the parameter data"):
        load_samples(mat.parent / "gone.mat", "train")


def test_class_table():
    table = pd.read_csv(nyuv2.TABLES / "nyuv2_classes.csv").set_index("raw")
    assert len(table) == 895
    mapped = nyuv2._class_table()
    assert mapped[0] == 255
    by_name = {name: CLASS_NAMES[mapped[raw]] for raw, name in table.name.items() if raw}
    same = ("bed", "ceiling", "chair", "floor", "picture", "sofa", "table", "wall", "window")
    assert {name: by_name[name] for name in same} == {name: name for name in same}
    assert by_name["television"] == "tv"
    assert by_name["books"] == "books"
    assert by_name["cabinet"] == "furniture"
    assert [CLASS_NAMES[index] for index in mapped[RAW_IDS]] == list(CLASS_NAMES)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the NYUv2 that lies beside the project")
def test_tables_are_those_published():
    scipy_io = pytest.importorskip("scipy.io")
    to_40 = np.append(0, scipy_io.loadmat(SHARED / "classMapping40.mat")["mapClass"].ravel())
    to_13 = np.append(0, scipy_io.loadmat(SHARED / "class13Mapping.mat")["classMapping13"][0][0][0][0])
    np.testing.assert_array_equal(nyuv2._class_table(), np.where(to_13[to_40] == 0, 255, to_13[to_40] - 1))
    table = pd.read_csv(nyuv2.TABLES / "nyuv2_split.csv")
    splits = scipy_io.loadmat(SHARED / "splits.mat")
    for part in ("train", "test"):
        np.testing.assert_array_equal(table.id[table.part == part] + 1, np.sort(splits[f"{part}Ndxs"].ravel()))
        names = sorted(path.stem for path in (SHARED / part / "image").iterdir())
        assert [f"{index:06d}" for index in table.id[table.part == part]] == names


@pytest.mark.skipif(not SHARED.exists(), reason="needs the NYUv2 that lies beside the project")
def test_class_shares_of_the_real_training_labels():
    counts = np.zeros(256, int)
    for path in (SHARED / "train" / "label").iterdir():
        counts += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=256)
    share = 100 * counts[:13] / counts[:13].sum()
    published = [4.3, 0.65, 1.8, 4.1, 11.9, 17.7, 15.6, 2.4, 2.9, 3.7, 0.67, 28.6, 5.8]
    np.testing.assert_allclose(share, published, atol=0.06)
    assert 100 * counts[255] / counts.sum() == pytest.approx(17.6, abs=0.05)

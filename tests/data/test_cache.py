import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image

from lib.data import DataError, load_samples
from lib.data.cache import cache_root, map_arrays, select_rows
from lib.data.samples import resize_samples

LAYOUT = {"image": (np.uint8, (4, 2, 3)), "depth": (np.uint16, (4, 2, 3))}
KEY = {"kind": "train", "size": [2, 3], "version": 1}
ROWS = np.array([2, 0, 3, 1])
ARRAYS = {name: np.arange(24).reshape(shape).astype(dtype) for name, (dtype, shape) in LAYOUT.items()}


def blocks():
    for rows in np.split(ROWS, 2):
        yield rows, {name: array[rows] for name, array in ARRAYS.items()}


def newer_blocks():
    for rows, block in blocks():
        yield rows, {name: array + 1 for name, array in block.items()}


def never():
    raise AssertionError("made again")


@pytest.fixture(autouse=True)
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rgbd-notebooks"


def test_arrays_are_created_once_and_then_mapped(root, tmp_path):
    first, again = (map_arrays(tmp_path, KEY, LAYOUT, make) for make in (blocks, never))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(first[name], array)
        np.testing.assert_array_equal(again[name], array)
    assert isinstance(select_rows(again, np.array([1, 2]))["image"], np.memmap)  # contiguous rows
    chosen = select_rows(again, np.array([3, 0]))["depth"]
    np.testing.assert_array_equal(chosen, ARRAYS["depth"][[3, 0]])
    assert not isinstance(chosen, np.memmap)


def made(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_new_version_replaces_the_cache_but_new_size_does_not(root, tmp_path):
    first = map_arrays(tmp_path, KEY, LAYOUT, blocks)
    second = map_arrays(tmp_path, KEY | {"version": 2}, LAYOUT, newer_blocks)
    (folder,) = made(root)
    np.testing.assert_array_equal(first["image"], ARRAYS["image"])  # still mapped
    np.testing.assert_array_equal(second["image"], ARRAYS["image"] + 1)
    os.utime(root / folder / "image.npy", (0, 0))
    map_arrays(tmp_path, KEY | {"size": [4, 6]}, LAYOUT, blocks)
    map_arrays(tmp_path / "other", KEY, LAYOUT, blocks)
    assert len(made(root)) == 3
    assert (root / folder / "image.npy").stat().st_mtime == 0  # not written again


def test_equivalent_paths_share_one_cache(root, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    map_arrays(tmp_path / "data", KEY, LAYOUT, blocks)
    monkeypatch.chdir(tmp_path)
    for spelt in (tmp_path / "link", Path("data"), Path("link/../data"), tmp_path / "data"):
        map_arrays(spelt, KEY, LAYOUT, never)
    assert len(made(root)) == 1


def test_incomplete_cache_is_rebuilt(root, tmp_path):
    map_arrays(tmp_path, KEY, LAYOUT, blocks)
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    for damage in (lambda: (folder / "key.json").unlink(), lambda: os.truncate(folder / "image.npy", 130)):
        damage()
        np.testing.assert_array_equal(map_arrays(tmp_path, KEY, LAYOUT, blocks)["image"], ARRAYS["image"])
    map_arrays(tmp_path, KEY, LAYOUT, never)


def test_second_reader_waits_until_the_cache_is_created(root, tmp_path):
    found = []
    waiting = threading.Thread(target=lambda: found.append(map_arrays(tmp_path, KEY, LAYOUT, never)))

    def meanwhile():
        waiting.start()
        yield from blocks()
        assert not found

    map_arrays(tmp_path, KEY, LAYOUT, meanwhile)
    waiting.join()
    np.testing.assert_array_equal(found[0]["depth"], ARRAYS["depth"])


def test_concurrent_processes_read_the_same_arrays(folder, scenes):
    """Their process ids are equal, as can happen in two containers."""
    many = resize_samples(scenes, (12, 16))[np.arange(12).repeat(11)]
    names = np.array([f"{number:06d}" for number in range(132)])
    write_folder(
        folder / "many", type(scenes)(names, many.image, many.depth, many.label, classes=scenes.classes)
    )
    code = """
import os, sys, lib
os.getpid = lambda: 7
from lib.data import load_samples
print(int(load_samples(sys.argv[1], "train", "none", (6, 8)).image.astype(int).sum()))
"""
    command = [sys.executable, "-c", code, str(folder / "many")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate()[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert first == second != ""


def test_error_reports_a_full_disk(root, tmp_path):
    def fail():
        raise OSError(28, "No space left on device")
        yield

    with pytest.raises(DataError) as error:
        map_arrays(tmp_path, KEY, LAYOUT, fail)
    assert (
        f"the cache of {tmp_path} could not be made ([Errno 28] No space left on device); it needs 0.0 GB"
        in str(error.value)
    )
    assert not made(root)


def test_cache_folder_falls_back_to_home_or_temporary_folder(root, monkeypatch, tmp_path):
    assert cache_root() == root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()  # not a folder, so not writable
    assert cache_root().is_relative_to(tempfile.gettempdir())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "rgbd-notebooks"


def test_folder_is_decoded_again_only_after_a_change(folder, scenes, root, monkeypatch):
    monkeypatch.setattr("lib.data.folder.CACHED_FROM", 5)
    whole = load_samples(folder, "train", "none", (48, 64))
    np.testing.assert_array_equal(whole.image, resize_samples(scenes, (48, 64)).image)
    with monkeypatch.context() as patched:
        patched.setattr("lib.data.folder.decode_image", None)
        again, train = (
            load_samples(folder, "train", validation, (48, 64)) for validation in ("none", "random")
        )
        assert isinstance(again.image, np.memmap)
        by_name = dict(zip(whole.names, whole.label, strict=True))
        np.testing.assert_array_equal(train.label, [by_name[name] for name in train.names])
    (folder / "dataset.yaml").write_text("depth_range_m: [1, 5]\ndepth_unit_mm: 2")
    doubled = load_samples(folder, "train", "none", (48, 64))
    np.testing.assert_array_equal(doubled.depth, 2 * whole.depth)
    assert doubled.depth_range_m == (1.0, 5.0)
    path = folder / "train" / "depth" / "000001.png"
    path.write_bytes((folder / "train" / "depth" / "000000.png").read_bytes())
    changed = load_samples(folder, "train", "none", (48, 64))
    np.testing.assert_array_equal(changed.depth[1], changed.depth[0])
    assert len(made(root)) == 1


def test_changed_label_map_is_read_again(folder, scenes, monkeypatch):
    monkeypatch.setattr("lib.data.folder.CACHED_FROM", 5)
    (folder / "dataset.yaml").write_text("colours: labelmap.txt\nfolders: {image: image, label: label}")
    colours = np.array([[0, 0, 0], [128, 0, 0]], np.uint8)
    for path, label in zip(sorted((folder / "train" / "label").iterdir()), scenes.label, strict=True):
        Image.fromarray(colours[label % 2]).save(path)
    (folder / "labelmap.txt").write_text("bed:0,0,0::\nwall:128,0,0::\n")
    first = load_samples(folder, "train", "none", (48, 64))
    (folder / "labelmap.txt").write_text("wall:128,0,0::\nbed:0,0,0::\n")
    swapped = load_samples(folder, "train", "none", (48, 64))
    assert (first.classes, swapped.classes) == (("bed", "wall"), ("wall", "bed"))
    np.testing.assert_array_equal(swapped.label, 1 - first.label)


@pytest.mark.parametrize("name", ["n" * 240, "é" * 120])
def test_long_folder_names_are_cached(root, tmp_path, name):
    (tmp_path / name).mkdir()
    for make in (blocks, never):
        map_arrays(tmp_path / name, KEY, LAYOUT, make)


def test_reading_a_folder_imports_no_notebook_libraries(folder):
    code = """
import sys
from lib.data import load_samples
assert len(load_samples(sys.argv[1], "train", "none", (24, 32))) == 12
print([name for name in ("IPython", "matplotlib", "ipywidgets") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this platform can't reserve space")
def test_full_disk_is_detected_before_writing(root, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(DataError, match="the cache of .* could not be made .* it needs 0.0 GB there"):
        map_arrays(tmp_path, KEY, LAYOUT, never)
    assert not made(root)

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder

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


def never():
    raise AssertionError("made again")


@pytest.fixture(autouse=True)
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rgbd-notebooks"


def test_what_was_made_is_mapped_from_then_on(root, tmp_path):
    first, again = (map_arrays(tmp_path, KEY, LAYOUT, make) for make in (blocks, never))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(first[name], array)
        np.testing.assert_array_equal(again[name], array)
    assert isinstance(select_rows(again, np.array([1, 2]))["image"], np.memmap)  # runs on
    chosen = select_rows(again, np.array([3, 0]))["depth"]
    np.testing.assert_array_equal(chosen, ARRAYS["depth"][[3, 0]])
    assert not isinstance(chosen, np.memmap)


def test_another_state_of_the_source_replaces_it_and_another_size_does_not(root, tmp_path):
    first = map_arrays(tmp_path, KEY, LAYOUT, blocks)
    map_arrays(tmp_path, KEY | {"version": 2}, LAYOUT, blocks)
    assert len(list(root.iterdir())) == 1
    np.testing.assert_array_equal(first["image"], ARRAYS["image"])  # mapped still
    map_arrays(tmp_path, KEY | {"size": [4, 6]}, LAYOUT, blocks)
    map_arrays(tmp_path / "other", KEY, LAYOUT, blocks)
    assert len(list(root.iterdir())) == 3


def test_two_at_once_end_with_one(root, tmp_path):
    """The second begins and ends while the first is half done; neither knows a process by its id."""
    inner = []

    def meanwhile():
        yield from blocks()
        inner.append(map_arrays(tmp_path, KEY, LAYOUT, blocks))

    outer = map_arrays(tmp_path, KEY, LAYOUT, meanwhile)
    for arrays in (outer, inner[0], map_arrays(tmp_path, KEY, LAYOUT, never)):
        np.testing.assert_array_equal(arrays["depth"], ARRAYS["depth"])
    assert len(list(root.iterdir())) == 1


def test_processes_at_once_read_the_same(folder, scenes):
    """With equal process ids, as two containers can have."""
    many = resize_samples(scenes, (12, 16))[np.arange(12).repeat(11)]
    names = np.array([f"{number:06d}" for number in range(132)])
    write_folder(folder / "many", type(scenes)(names, many.image, many.depth, many.label))
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


def test_what_was_abandoned_is_cleared_away(root, tmp_path):
    map_arrays(tmp_path, KEY, LAYOUT, blocks)
    (made,) = root.iterdir()
    old, fresh = (made.with_name(f"{made.name}.{name}.unfinished") for name in ("a", "b"))
    for path in (old, fresh):
        path.mkdir()
    os.utime(old, (time.time() - 10**6,) * 2)
    map_arrays(tmp_path, KEY | {"version": 2}, LAYOUT, blocks)
    assert not old.exists()
    assert fresh.exists()


def test_a_full_disk_is_named(root, tmp_path):
    def fail():
        raise OSError(28, "No space left on device")
        yield

    with pytest.raises(DataError) as error:
        map_arrays(tmp_path, KEY, LAYOUT, fail)
    assert (
        f"the cache of {tmp_path} could not be made ([Errno 28] No space left on device); it needs 0.0 GB"
        in str(error.value)
    )
    assert not list(root.iterdir())


def test_where_it_is(root, monkeypatch, tmp_path):
    assert cache_root() == root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()  # not to be written
    assert cache_root().is_relative_to(tempfile.gettempdir())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "rgbd-notebooks"


def test_a_folder_is_read_once(folder, scenes, root, monkeypatch):
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
    assert len(list(root.iterdir())) == 1

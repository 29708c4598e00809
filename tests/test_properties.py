"""Property tests: any input either works or raises one clear error of the project."""

import io
import json
import math
import typing

import h5py
import numpy as np
import pytest
import yaml
from conftest import write_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from lib.classes import NYUV2_13
from lib.data import iterate_samples, load_samples
from lib.data.samples import DataError
from lib.data.validation import FOLDS, group_neighbouring_ids, split_names
from lib.files import read_json, write_json
from lib.notebooks.parameters import check_parameters
from lib.training import check_options

FEW = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KINDS = st.sampled_from(["image", "depth", "label"])


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory, scenes):
    root = tmp_path_factory.mktemp("data")
    write_folder(root, scenes[:3])
    return root


def loads_or_says_why(path, root) -> bool:
    """Whether the samples load. An error must be one line, begin with the split's path and name the file."""
    try:
        samples = load_samples(root, "train", "none", (24, 32))
    except DataError as error:
        assert str(error).startswith(str(root / "train"))
        assert path.name in str(error)
        assert "\n" not in str(error)
        return False
    assert samples.label.max() == 255
    assert samples.image.shape == (3, 24, 32, 3)
    return True


@FEW
@given(
    kind=KINDS,
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
)
@example(kind="image", cut=1.0, flips=[])
@example(kind="depth", cut=1.0, flips=[])
@example(kind="label", cut=1.0, flips=[])
def test_damaged_files_load_or_raise_a_clear_error(small_folder, kind, cut, flips):
    path = small_folder / "train" / kind / "000001.png"
    whole = path.read_bytes()
    damaged = bytearray(whole[: max(1, int(cut * len(whole)))])
    for where, value in flips:
        damaged[int(where * len(damaged))] = value
    path.write_bytes(damaged)
    try:
        assert loads_or_says_why(path, small_folder) or damaged != whole  # an undamaged file must load
    finally:
        path.write_bytes(whole)


@FEW
@given(
    kind=KINDS,
    mode=st.sampled_from(["L", "RGB", "RGBA", "I;16", "1", "LA", "P"]),
    shape=st.just((96, 128)) | st.tuples(st.integers(1, 100), st.integers(1, 130)),
    value=st.integers(0, 65534),  # 65535 everywhere is an error of the whole split; see test_sanity
)
@example(kind="image", mode="RGB", shape=(96, 128), value=0)
@example(kind="depth", mode="I;16", shape=(96, 128), value=900)
@example(kind="label", mode="L", shape=(96, 128), value=12)
@example(kind="label", mode="P", shape=(96, 128), value=12)
def test_only_valid_image_modes_and_sizes_load(small_folder, kind, mode, shape, value):
    path = small_folder / "train" / kind / "000001.png"
    whole = path.read_bytes()
    if mode == "I;16":
        picture = Image.fromarray(np.full(shape, value, np.uint16))
    else:
        picture = Image.new(mode, shape[::-1], value % 256 if mode in ("L", "1", "P") else 0)
    if mode == "P":
        picture.putpalette(bytes(range(256)) * 3)  # not grey, so a label file has the indices
    good = {
        "image": mode in ("L", "RGB", "1", "P"),  # other modes have transparency or 16 bits
        "depth": mode == "I;16" and value < 65535,
        "label": (mode in ("L", "P") and (value % 256 < 13 or value % 256 == 255))
        or (mode == "I;16" and value in (*range(13), 255)),
    }
    try:
        picture.save(path)
        loads = loads_or_says_why(path, small_folder)
        assert loads == (good[kind] and shape == (96, 128))
    finally:
        path.write_bytes(whole)


@FEW
@given(
    broken=st.sampled_from(["images", "depths", "rawDepths", "labels"]),
    dtype=st.sampled_from(["uint8", "uint16", "float32", "float64"]),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    value=st.integers(0, 1000),
)
@example(broken="labels", dtype="uint16", shape=[4, 8, 6], value=894)
@example(broken="depths", dtype="float32", shape=[4, 8, 6], value=3)
@example(broken="images", dtype="uint8", shape=[4, 3, 8, 6], value=255)
def test_only_valid_mat_layouts_load(tmp_path_factory, broken, dtype, shape, value):
    path = tmp_path_factory.mktemp("mat") / "labeled.mat"
    good = {"images": ("uint8", (4, 3, 8, 6)), "labels": ("uint16", (4, 8, 6))}
    good |= dict.fromkeys(("depths", "rawDepths"), ("float32", (4, 8, 6)))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, (right_type, right_shape) in (good | {broken: (dtype, tuple(shape))}).items():
            file[name] = np.full(right_shape, value if name == broken else 2).astype(right_type)
        text = file.create_dataset("text", data=[[107]])
        file["scenes"] = np.array([[text.ref] * 4], dtype=h5py.ref_dtype)
    path.write_bytes(buffer.getvalue())
    values = {"labels": value <= 894, "depths": 1 <= value < 20, "images": True, "rawDepths": True}
    right = good[broken] == (dtype, tuple(shape)) and values[broken]
    try:
        assert len(load_samples(path, "train", "none")) == 2  # of the frames 0..3, 2 and 3 are for training
        assert right
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        assert not right


ANY_VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
DECLARED = {"epochs": int, "rate": float, "resume": bool, "name": str, "limit": typing.Optional[int]}  # noqa: UP045


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=6)


@FEW
@given(
    classes=st.lists(NAMES, max_size=20) | st.lists(ANY_VALUE, max_size=5) | ANY_VALUE,
    key=st.sampled_from(["classes", "class", 3]),
)
@example(classes=list(NYUV2_13), key="classes")
@example(classes=["no", "yes", "1"], key="classes")
def test_dataset_yaml_accepts_only_valid_class_lists(small_folder, classes, key):
    path = small_folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({key: classes}, allow_unicode=True), "utf-8")
    strings = isinstance(classes, list) and all(isinstance(name, str) and name for name in classes)
    right = key == "classes" and strings and 2 <= len(classes) == len(set(classes))
    try:
        opened = iterate_samples(small_folder, "train")
        assert opened.classes == tuple(classes)
        assert right
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        assert not right
    finally:
        path.unlink()


@given(ids=st.sets(st.integers(0, 400), min_size=1, max_size=60), step=st.integers(1, 9), order=st.randoms())
def test_folds_partition_images_without_splitting_runs(ids, step, order):
    """Runs of ids depend neither on a common step nor on the order."""
    names = [str(number) for number in sorted(ids)]
    runs = group_neighbouring_ids(np.array(names))
    stepped = group_neighbouring_ids(np.array([str(step * number) for number in sorted(ids)]))
    if runs is None:
        assert stepped is None
        return
    np.testing.assert_array_equal(runs, stepped)
    assert (np.diff(runs) >= 0).all()
    positions = order.sample(range(len(names)), len(names))
    np.testing.assert_array_equal(group_neighbouring_ids(np.array(names)[positions]), runs[positions])
    valid = [split_names(np.array(names), "blocks", fold=fold)[1] for fold in range(FOLDS)]
    fold_count = min(FOLDS, runs.max() + 1)  # further folds repeat these
    assert sorted(np.concatenate(valid[:fold_count])) == list(range(len(names)))
    for fold in valid:
        assert not set(runs[fold]) & set(np.delete(runs, fold))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@FEW
@given(content=st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_json_round_trip_turns_nan_and_infinity_into_null(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(content, path)
    assert read_json(path) == json.loads(json.dumps(content), parse_constant=lambda name: None)


@FEW
@given(injected=st.dictionaries(st.sampled_from([*DECLARED, "epoch", "other"]), ANY_VALUE))
def test_check_parameters_reports_every_wrong_parameter(monkeypatch, injected):
    shell = InteractiveShell()
    defaults = {"epochs": 1, "rate": 0.1, "resume": False, "name": "a", "limit": None}
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in injected.items())
    shell.user_ns |= defaults | injected | {"__annotations__": DECLARED, "In": ["", cell]}
    monkeypatch.setattr("lib.notebooks.parameters.get_ipython", lambda: shell)
    wrong = {
        name
        for name, value in injected.items()
        if name not in DECLARED or not fits(value, DECLARED[name]) or not is_allowed(name, value)
    }
    try:
        assert check_parameters() == defaults | injected
        assert not wrong
    except ValueError as error:
        assert {line.split(":")[0] for line in str(error).splitlines() if ": " in line} >= wrong
        assert wrong


def is_allowed(name, value):
    """Of the declared parameters, only epochs and limit have a range."""
    return name not in ("epochs", "limit") or value is None or value >= 1


def fits(value, declared):
    if declared is float:
        return type(value) in (int, float)
    return type(value) in (typing.get_args(declared) or (declared,))


@example(epochs=30, learning_rate=0.0001, weight_decay=0.0001, soft_iou_weight=0.5, seed=42)
@given(
    epochs=st.integers(),
    learning_rate=st.floats(),
    weight_decay=st.floats(),
    soft_iou_weight=st.floats(),
    seed=st.integers(),
)
def test_check_options_accepts_only_numbers_in_range(**numbers):
    right = numbers["epochs"] >= 1 and 0 < numbers["learning_rate"] < 1
    right = right and all(
        0 <= numbers[name] < math.inf for name in ("weight_decay", "soft_iou_weight", "seed")
    )
    try:
        check_options(**numbers)
        assert right
    except ValueError as error:
        assert str(error).split(":")[0] in numbers
        assert not right

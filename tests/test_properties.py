"""Whatever comes in, it works or there is one clear error of the project's own."""

import io
import math
import typing

import h5py
import numpy as np
import pytest
from conftest import write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from lib.data import load_samples
from lib.data.samples import DataError
from lib.notebook import check_parameters
from lib.training import check_options

FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = st.sampled_from(["image", "depth", "label"])


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory, scenes):
    root = tmp_path_factory.mktemp("data")
    write_folder(root, scenes[:3])
    return root


def loads_or_says_why(path, root):
    """Load, put the file back, and check that an error names the file first and the remedy last."""
    try:
        samples = load_samples(root, "train", "official", (24, 32))
        assert samples.label.max() == 255
        assert samples.image.shape == (3, 24, 32, 3)
    except DataError as error:
        assert str(error).startswith(str(root / "train"))
        assert path.name in str(error)
        assert "\n" not in str(error)


@FEW
@given(kind=KINDS, cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4))
def test_damaged_files(small_folder, kind, cut, flips):
    path = small_folder / "train" / kind / "000001.png"
    whole = path.read_bytes()
    damaged = bytearray(whole[: max(1, int(cut * len(whole)))])
    for where, value in flips:
        damaged[int(where * len(damaged))] = value
    path.write_bytes(damaged)
    try:
        loads_or_says_why(path, small_folder)
    finally:
        path.write_bytes(whole)


@FEW
@given(
    kind=KINDS,
    mode=st.sampled_from(["L", "RGB", "RGBA", "I;16", "1", "LA", "P"]),
    shape=st.tuples(st.integers(1, 100), st.integers(1, 130)) | st.just((96, 128)),
    value=st.integers(0, 65535),
)
def test_files_of_any_kind(small_folder, kind, mode, shape, value):
    path = small_folder / "train" / kind / "000001.png"
    whole = path.read_bytes()
    if mode == "I;16":
        picture = Image.fromarray(np.full(shape, value, np.uint16))
    else:
        picture = Image.new(mode, shape[::-1], value % 256 if mode in ("L", "P", "1") else 0)
    try:
        picture.save(path)
        loads_or_says_why(path, small_folder)
    finally:
        path.write_bytes(whole)


@FEW
@given(
    broken=st.sampled_from(["images", "depths", "rawDepths", "labels"]),
    dtype=st.sampled_from(["uint8", "uint16", "float32", "float64"]),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    value=st.integers(0, 1000),
)
def test_mat_files_of_any_layout(tmp_path_factory, broken, dtype, shape, value):
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
    try:
        assert len(load_samples(path, "train", "official")) == 2  # of the frames 0..3, 2 and 3 train
    except DataError as error:
        assert str(error).startswith(f"{path}: ")


ANY_VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
DECLARED = {"epochs": int, "rate": float, "resume": bool, "name": str, "limit": typing.Optional[int]}  # noqa: UP045


@FEW
@given(injected=st.dictionaries(st.sampled_from([*DECLARED, "epoch", "other"]), ANY_VALUE))
def test_any_injected_parameters(monkeypatch, injected):
    shell = InteractiveShell()
    defaults = {"epochs": 1, "rate": 0.1, "resume": False, "name": "a", "limit": None}
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in injected.items())
    shell.user_ns |= defaults | injected | {"__annotations__": DECLARED, "In": ["", cell]}
    monkeypatch.setattr("lib.notebook.get_ipython", lambda: shell)
    wrong = {name for name, value in injected.items() if name not in DECLARED or not fits(value, DECLARED[name])}
    try:
        assert check_parameters() == defaults | injected
        assert not wrong
    except ValueError as error:
        assert {line.split(":")[0] for line in str(error).splitlines() if ": " in line} >= wrong
        assert wrong


def fits(value, declared):
    if declared is float:
        return type(value) in (int, float)
    return type(value) in (typing.get_args(declared) or (declared,))


@given(
    epochs=st.integers(),
    learning_rate=st.floats(),
    weight_decay=st.floats(),
    soft_iou_weight=st.floats(),
    seed=st.integers(),
)
def test_any_numbers(**numbers):
    right = numbers["epochs"] >= 1 and 0 < numbers["learning_rate"] < 1
    right = right and all(0 <= numbers[name] < math.inf for name in ("weight_decay", "soft_iou_weight", "seed"))
    try:
        check_options(**numbers)
        assert right
    except ValueError as error:
        assert str(error).split(":")[0] in numbers
        assert not right

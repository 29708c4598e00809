import os
import tempfile

# Notebooks under nbval see the environment but not pytest's settings: no test may touch a user's runs.
os.environ["RUNS_DIR"] = tempfile.mkdtemp(prefix="runs-of-tests-")

import numpy as np
import pytest
from PIL import Image

import lib  # noqa: F401  (before torch)
from lib.data import Samples, load_samples


@pytest.fixture(scope="session")
def scenes() -> Samples:
    """A dozen embedded scenes at their native size."""
    return load_samples("synthetic", "train", "official", limit=12)


def write_folder(root, samples: Samples, part: str = "train", labels: bool = True) -> None:
    """Write samples in the folder layout."""
    for kind in ("image", "depth", "label")[: 3 if labels else 2]:
        (root / part / kind).mkdir(parents=True, exist_ok=True)
    for position, name in enumerate(samples.names):
        Image.fromarray(samples.image[position]).save(root / part / "image" / f"{name}.png")
        Image.fromarray(samples.depth[position]).save(root / part / "depth" / f"{name}.png")
        if labels:
            Image.fromarray(samples.label[position]).save(root / part / "label" / f"{name}.png")


@pytest.fixture
def folder(tmp_path, scenes):
    """The scenes as a folder of PNGs, with a test part without labels."""
    write_folder(tmp_path, scenes)
    write_folder(tmp_path, scenes[:3], "test", labels=False)
    return tmp_path


def assert_equal_samples(first: Samples, second: Samples) -> None:
    assert list(first.names) == list(second.names)
    for kind in ("image", "depth", "label"):
        np.testing.assert_array_equal(getattr(first, kind), getattr(second, kind))

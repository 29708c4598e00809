import os
import tempfile

# Notebooks under nbval see the environment but not pytest's settings: no test may touch a user's runs.
os.environ["RUNS_DIR"] = tempfile.mkdtemp(prefix="runs-of-tests-")

import numpy as np
import pytest
from PIL import Image

import lib  # noqa: F401  (before torch)
from lib.classes import CLASS_NAMES
from lib.data import load_samples
from lib.data.samples import Samples
from lib.metrics import all_scores
from lib.runs import start_run, write_evaluation, write_history, write_scores


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


def history(count):
    return [
        {"epoch": epoch, "train_loss": 2 / epoch, "valid_loss": 3 / epoch, "valid_miou": 0.1, "valid_pixel_acc": 0.5}
        for epoch in range(1, count + 1)
    ]


def counts():
    each = np.zeros((2, 13, 13), np.int64)
    each[:, np.arange(12), np.arange(12)] = 6
    each[:, 0, 1] = 2  # bed taken for books; window never occurs
    return each


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A function that makes the folder of a trained and, if wanted, evaluated run."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))

    def make(name, evaluated=True, names=("a", "b"), matrices=None, data="synthetic", **parameters):
        run = start_run(name, {"seed": 0, "run_name": name} | parameters)
        (run / "best.pt").touch()
        os.utime(run / "best.pt", (len(list(tmp_path.iterdir())),) * 2)
        write_history(run, history(3))
        write_scores(run, history(3)[2], np.array(["a", "b"]), counts())
        if evaluated:
            matrices = counts() if matrices is None else matrices
            classes = {name: {"support": 0.1, "IoU": 0.5} for name in CLASS_NAMES}
            scores = {"data": data, "images": 2, "label_size": [4, 6], "working_size": [2, 3], "tta": "flip"}
            scores |= {"plain": all_scores(matrices), "augmented": all_scores(matrices), "classes": classes}
            write_evaluation(run, "test", np.array(names), matrices, scores)
        return run

    return make

import os
import shutil
import tempfile

# Tests must not touch the user's runs and cache. Notebooks under nbval don't see pytest's settings, only the
# environment. Each pytest-xdist worker imports this file, so each has its own folders and cores.
os.environ["RUNS_DIR"] = tempfile.mkdtemp(prefix="runs-of-tests-")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (otherwise a busy machine starves a sweep)
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
)

import numpy as np
import pytest
from PIL import Image

import lib  # noqa: F401  (before torch)
from lib.classes import NYUV2_13
from lib.data import Samples, load_samples
from lib.evaluation import Evaluation
from lib.runs import open_run, write_history, write_scores
from lib.runs.scoring import write_evaluation

READ_A_RUN = ("evaluate", "error_analysis", "predict")  # notebooks that need a run


def pytest_unconfigure():
    """Delete the temporary folders, which may hold gigabytes of checkpoints."""
    for variable in ("RUNS_DIR", "XDG_CACHE_HOME"):
        shutil.rmtree(os.environ[variable], ignore_errors=True)


def pytest_collection_modifyitems(items):
    if os.environ.get("SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long: set the environment variable SLOW=1"))


def pytest_collection_finish(session):
    """Train a small run if a notebook needs one, since train.ipynb may run on another worker."""
    if session.config.option.collectonly:
        return
    if any(item.path.suffix == ".ipynb" and item.path.stem in READ_A_RUN for item in session.items):
        from small_run import small_samples, train

        data = {"data": "synthetic", "validation": "auto", "limit": 80, "classes": None, "fold": 4}
        train("demo", small_samples(), **data)


@pytest.fixture(autouse=True, scope="module")
def runs_of_tests(tmp_path_factory):
    """Keep runs of tests apart from those of the notebooks, which use the latest run in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(scope="session")
def scenes() -> Samples:
    """A dozen built-in synthetic scenes at their native size."""
    return load_samples("synthetic", "train", "none", limit=12)


def write_folder(root, samples: Samples, split: str = "train", labels: bool = True) -> None:
    """Write samples in the folder layout."""
    arrays = {"image": samples.image, "depth": samples.depth} | ({"label": samples.label} if labels else {})
    for kind, stack in arrays.items():
        (root / split / kind).mkdir(parents=True, exist_ok=True)
        for name, array in zip(samples.names, stack, strict=True):
            path = root / split / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)  # a name may contain folders
            Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path, scenes):
    """The scenes as a folder of PNGs, with a test split without labels."""
    write_folder(tmp_path, scenes)
    write_folder(tmp_path, scenes[:3], "test", labels=False)
    return tmp_path


def assert_equal_samples(first: Samples, second: Samples) -> None:
    """Assert equal names, classes and pixels. The source and what a folder can't store may differ."""
    assert list(first.names) == list(second.names)
    assert first.classes == second.classes
    for kind in ("image", "depth", "label"):
        np.testing.assert_array_equal(getattr(first, kind), getattr(second, kind))


def history(count):
    return [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "valid_loss": 3 / epoch,
            "valid_miou": 0.1,
            "valid_pixel_acc": 0.5,
            "seconds": 20.0,
        }
        for epoch in range(1, count + 1)
    ]


def counts():
    each = np.zeros((2, 13, 13), np.int64)
    each[:, np.arange(12), np.arange(12)] = 6
    each[:, 0, 1] = 2  # bed confused with books; window never occurs
    return each


def evaluation(counts, names=("a", "b"), scene=None, classes=NYUV2_13) -> Evaluation:
    """An `Evaluation` with these counts, perfect boundaries and depth sums of four pixels."""
    boundary = np.ones((len(counts), len(classes), 3), np.int64)
    scene = None if scene is None else np.array(scene)
    return Evaluation(
        np.array(names), scene, tuple(classes), counts, None, boundary, np.array([4.0, 1, 1, 3]), None
    )


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Function that creates the folder of a run that was trained and, by default, evaluated."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))

    def make(
        name,
        evaluated=True,
        names=("a", "b"),
        matrices=None,
        data="synthetic",
        scene=None,
        classes=NYUV2_13,
        **parameters,
    ):
        with open_run({"seed": 0, "run_name": name} | parameters) as run:
            (run / "best.pt").touch()
            os.utime(run / "best.pt", (len(list(tmp_path.iterdir())),) * 2)
            write_history(run, history(3))
            write_scores(run, history(3)[2], evaluation(counts()))
            if evaluated:
                tested = evaluation(counts() if matrices is None else matrices, names, scene, classes)
                facts = {
                    "data": data,
                    "images": len(names),
                    "labelled": True,
                    "tta": "flip",
                    "working_size": [2, 3],
                }
                write_evaluation(run, "test", facts, {"plain": tested, "augmented": tested})
        return run

    return make

"""Every path parameter expands `~`. The tests of `runs` and RUNS_DIR are with their modules."""

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

from lib.classes import NYUV2_13
from lib.data import load_samples
from lib.data.images import open_images
from lib.files import CheckpointError
from lib.model import build_model, load_model, save_model, weights_digest
from lib.notebooks.predict import predict_images
from lib.notebooks.sweep import FinishedRuns, plan_runs
from lib.runs import find_run
from lib.runs.results import read_runs
from lib.runs.scoring import find_or_create_run, iterate_split, score_run


@pytest.fixture
def home(tmp_path, monkeypatch, scenes):
    """A home folder with images. The working directory is another folder and must stay empty."""
    write_folder(tmp_path / "home", scenes[:3])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "home" / "runs"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


def test_home_is_expanded_in_data_images_and_depths(home):
    assert len(load_samples("~", "train", "none")) == 3
    (first, *_) = open_images("~/train/image", "~/train/depth", 1.0, True, NYUV2_13)
    assert first.depth.any()
    assert plan_runs(None, {"data": "~/train"}, {}, [1]).popitem()[1]["data"] == str(home / "train")


def test_home_is_expanded_in_checkpoints_masks_and_weights(home):
    config = {
        "classes": ("wall", "floor"),
        "encoder": "tu-test_efficientnet",
        "inputs": "rgb",
        "size": (32, 32),
    }
    save_model(build_model(architecture="fpn", **config), home / "best.pt")
    model = load_model("~/best.pt")
    assert model.config.classes == ("wall", "floor")
    assert find_run("~") == home  # the notebooks' parameter `run`
    predict_images(model, open_images("~/train/image", None, 1.0, False, model.config.classes), "~/masks")
    assert len(list((home / "masks").glob("*.png"))) == 3
    torch.save({"a": torch.zeros(1)}, home / "weights.pth")
    with pytest.raises(CheckpointError, match="such as"):  # it is read, but is for another encoder
        build_model(classes=NYUV2_13, encoder="resnet18", encoder_weights="~/weights.pth")
    assert weights_digest("~/weights.pth") == weights_digest(str(home / "weights.pth")) is not None


def test_home_is_expanded_in_predictions_and_results(home, scenes):
    parameters = {"data": "~", "validation": "none", "limit": None, "classes": None, "fold": 4}
    parameters |= {"run_name": "external", "recipe": "external", "seed": 0, "predictions": "~/train/label"}
    for path, label in zip(sorted((home / "train" / "label").iterdir()), scenes.label, strict=False):
        Image.fromarray(np.where(label == 255, 0, label)).save(path)
    (home / "dataset.yaml").write_text("first_label: 0")  # otherwise 0 between all other classes is an error
    run = find_or_create_run("latest", parameters["predictions"], parameters)
    assert score_run(run, "train", iterate_split(parameters, "train"))["plain"]["pixel_accuracy"] == 1
    assert [scored.name for scored in read_runs("~/runs/external", "train")] == ["external"]
    assert [scored.name for scored in read_runs("all", "train", "~")] == ["external"]
    assert FinishedRuns({}, "train", "~/results").folder == home / "results"

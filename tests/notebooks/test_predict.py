import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from figures import draw
from lib.data.images import open_images
from lib.evaluation import evaluate, predict
from lib.model import build_model
from lib.notebooks.plots import write_names
from lib.notebooks.predict import plot_images, predict_images
from lib.runs.scoring import read_masks

CLASSES = ("wall", "floor", "a desk of which the name is long")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_network()


def build_network():
    return build_model(
        architecture="fpn", encoder="tu-test_efficientnet", classes=CLASSES, inputs="rgb", size=(32, 32)
    ).eval()


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures of two sizes."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("a", (40, 60)), ("b", (64, 48)), ("c", (40, 60))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def open_all(pictures):
    return open_images(str(pictures), None, 1.0, False, CLASSES)


def test_shares_and_confidence_are_those_of_the_predictions(model, pictures):
    table = predict_images(model, open_all(pictures))
    assert table.index.tolist() == ["a", "b", "c"]
    assert table.columns.tolist() == ["confidence", *CLASSES]
    for name, labels in zip(table.index, evaluate(model, open_all(pictures)).predicted, strict=True):
        np.testing.assert_allclose(
            table.loc[name, list(CLASSES)], np.bincount(labels.ravel(), minlength=3) / labels.size
        )
    assert table.confidence.between(1 / 3, 1).all()


def test_masks_are_the_predictions_and_are_not_made_twice(model, pictures, tmp_path, monkeypatch):
    masks = tmp_path / "masks"
    table = predict_images(model, open_all(pictures), str(masks))
    expected = evaluate(model, open_all(pictures)).predicted
    for mask, labels in zip(read_masks(masks, "abc"), expected, strict=True):
        np.testing.assert_array_equal(mask, labels)
    assert json.loads((masks / "predict.json").read_text())["classes"] == list(CLASSES)
    (masks / "b.png").unlink()
    predicted = []
    monkeypatch.setattr(
        "lib.notebooks.predict.predict",
        lambda model, pieces, **options: (
            predicted.append(batch.samples.names[0]) or batch for batch in predict(model, pieces, **options)
        ),
    )
    again = predict_images(model, open_all(pictures), str(masks))
    assert predicted == ["b"]
    assert again.equals(table)


def test_masks_stay_where_the_way_is_cut_short(model, pictures, tmp_path):
    (pictures / "c.png").write_text("no picture")
    with pytest.raises(ValueError, match="c.png: can't be decoded"):
        predict_images(model, open_all(pictures), str(tmp_path / "masks"))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "b.png", "predict.json"]


def test_a_folder_of_something_else_is_refused_and_left_alone(model, pictures, tmp_path):
    masks = tmp_path / "masks"
    predict_images(model, open_all(pictures), str(masks))
    with pytest.raises(ValueError, match="save_to: .*masks has network"):
        predict_images(build_network(), open_all(pictures), str(masks))
    elsewhere = shutil.copytree(pictures, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="save_to: .*masks has pictures .*elsewhere"):
        predict_images(model, open_all(elsewhere), str(masks))
    before = (pictures / "a.png").read_bytes()
    with pytest.raises(ValueError, match="save_to: .*pictures has network None"):
        predict_images(model, open_all(pictures), str(pictures))
    assert (pictures / "a.png").read_bytes() == before


def test_pictures_of_any_sizes_are_drawn(model, pictures):
    predicted = list(predict(model, open_all(pictures), confidence=True))
    texts = draw(plot_images(predicted))
    assert {"a", "b", "c", "picture", "classes"} <= set(texts)


def test_names_stand_on_their_regions():
    label = np.zeros((60, 80), np.uint8)
    label[10:30, 5:25] = 1  # a square, ...
    label[40:50, 50:78] = 1  # ... a bar, ...
    label[0, 79] = 2  # ... and a speck
    axes = Figure().subplots()
    write_names(axes, label, CLASSES)
    names = [(text.get_text(), *text.get_position()) for text in axes.texts]
    assert [name for name, *_ in names] == ["wall", "floor", "floor"]
    for name, column, row in names:
        assert CLASSES[label[row, column]] == name
    assert abs(names[1][1] - 14.5) <= 1
    assert abs(names[1][2] - 19.5) <= 1

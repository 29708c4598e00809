import json
import os
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
from lib.notebooks.plots import label_regions
from lib.notebooks.predict import describe_images, plot_images, predict_images
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
    """A folder of three images of two sizes."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("a", (40, 60)), ("b", (64, 48)), ("c", (40, 60))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def open_all(pictures):
    return open_images(str(pictures), None, 1.0, False, CLASSES)


def confidences(model, pieces):
    """Mean confidence of each image."""
    return [batch.confidence.mean() for batch in predict(model, pieces, confidence=True)]


def test_class_shares_and_confidence_match_the_predictions(model, pictures):
    table = predict_images(model, open_all(pictures))
    assert table.index.tolist() == ["a", "b", "c"]
    assert table.columns.tolist() == [("", "confidence"), *(("share", name) for name in CLASSES)]
    for name, labels in zip(table.index, evaluate(model, open_all(pictures)).predicted, strict=True):
        np.testing.assert_allclose(
            table.loc[name, "share"], np.bincount(labels.ravel(), minlength=3) / labels.size
        )
    np.testing.assert_allclose(table["", "confidence"], confidences(model, open_all(pictures)))


def test_saved_masks_match_the_predictions_and_are_reused(model, pictures, tmp_path, monkeypatch):
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
        lambda model, image, **options: predicted.append(image.names[0]) or predict(model, image, **options),
    )
    again = predict_images(model, open_all(pictures), str(masks))
    assert predicted == ["b"]
    assert again.equals(table)


def test_replaced_image_is_predicted_again(model, pictures, tmp_path):
    """Even with the same name, size and modification time: only the pixels count."""
    masks, path = tmp_path / "masks", pictures / "b.png"
    before = predict_images(model, open_all(pictures), str(masks))
    times = path.stat()
    Image.fromarray(np.full((64, 48, 3), 200, np.uint8)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = predict_images(model, open_all(pictures), str(masks))
    expected = evaluate(model, open_all(pictures)).predicted[1]
    np.testing.assert_array_equal(read_masks(masks, "b")[0], expected)
    assert not after.loc["b"].equals(before.loc["b"])
    assert after.loc[["a", "c"]].equals(before.loc[["a", "c"]])
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(path)  # another size
    predict_images(model, open_all(pictures), str(masks))
    assert read_masks(masks, "b")[0].shape == (20, 30)


def test_black_image_of_another_shape_is_predicted_again(model, pictures, tmp_path):
    masks, path = tmp_path / "masks", pictures / "b.png"
    for shape in ((24, 32), (32, 24)):
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(path)
        predict_images(model, open_all(pictures), str(masks))
        assert read_masks(masks, "b")[0].shape == shape


@pytest.mark.parametrize("size", [0, 5, 60, -30])
def test_cut_mask_is_predicted_again(model, pictures, tmp_path, size):
    masks = tmp_path / "masks"
    table = predict_images(model, open_all(pictures), str(masks))
    whole = (masks / "b.png").read_bytes()
    (masks / "b.png").write_bytes(whole[:size])
    assert predict_images(model, open_all(pictures), str(masks)).equals(table)
    assert (masks / "b.png").read_bytes() == whole


def test_edited_mask_is_reported_and_kept(model, pictures, tmp_path):
    masks = tmp_path / "masks"
    predict_images(model, open_all(pictures), str(masks))
    edited = np.zeros((64, 48), np.uint8)
    Image.fromarray(edited).save(masks / "b.png")
    with pytest.raises(
        ValueError, match="save_to: .*b.png was not written by predict.ipynb, or was edited since"
    ):
        predict_images(model, open_all(pictures), str(masks))
    np.testing.assert_array_equal(np.asarray(Image.open(masks / "b.png")), edited)
    Image.fromarray(edited).save(masks / "b.png", "JPEG")  # a picture, although no PNG
    with pytest.raises(ValueError, match="save_to: .*b.png was not written by predict.ipynb"):
        predict_images(model, open_all(pictures), str(masks))


@pytest.mark.parametrize("name", ["confidence", "share", ""])
def test_class_names_never_clash_with_column_names(pictures, name):
    classes = (name or "all 3", "floor", "x")
    torch.manual_seed(0)
    network = build_model(
        architecture="fpn", encoder="tu-test_efficientnet", classes=classes, inputs="rgb", size=(32, 32)
    ).eval()
    images = open_images(str(pictures), None, 1.0, False, classes)
    table = predict_images(network, images)
    assert table["share"].columns.tolist() == list(classes)
    np.testing.assert_allclose(table["share"].sum(axis=1), 1)
    np.testing.assert_allclose(table["", "confidence"], confidences(network, images))


def test_masks_before_an_unreadable_image_are_kept(model, pictures, tmp_path):
    (pictures / "c.png").write_text("no picture")
    with pytest.raises(ValueError, match="c.png: can't be decoded"):
        predict_images(model, open_all(pictures), str(tmp_path / "masks"))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "b.png", "predict.json"]


def test_save_to_rejects_a_folder_with_other_contents(model, pictures, tmp_path):
    masks = tmp_path / "masks"
    predict_images(model, open_all(pictures), str(masks))
    with pytest.raises(ValueError, match="save_to: .*masks has network"):
        predict_images(build_network(), open_all(pictures), str(masks))
    elsewhere = shutil.copytree(pictures, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="save_to: .*masks has images .*elsewhere"):
        predict_images(model, open_all(elsewhere), str(masks))
    before = (pictures / "a.png").read_bytes()
    with pytest.raises(ValueError) as error:
        predict_images(model, open_all(pictures), str(pictures))
    assert str(error.value) == (
        f"save_to: {pictures} is not empty and was not written by predict.ipynb; give another folder"
    )
    assert (pictures / "a.png").read_bytes() == before


@pytest.mark.parametrize("text", ["", '{"network": ', "[1]"])
def test_error_for_a_damaged_record_of_masks_says_what_it_is(model, pictures, tmp_path, text):
    masks = tmp_path / "masks"
    predict_images(model, open_all(pictures), str(masks))
    (masks / "predict.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"save_to: .*predict.json can't be read \(.*\), .* give another folder"
    ):
        predict_images(model, open_all(pictures), str(masks))


def test_save_to_accepts_a_folder_with_hidden_files_alone(model, pictures, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / ".DS_Store").write_bytes(b"Mac OS X")
    predict_images(model, open_all(pictures), str(tmp_path / "masks"))
    assert len(read_masks(tmp_path / "masks", "abc")) == 3


def test_images_of_different_sizes_are_drawn(model, pictures):
    predicted = list(predict(model, open_all(pictures), confidence=True))
    texts = draw(plot_images(predicted))
    assert {"a", "b", "c", "RGB", "prediction", "confidence"} <= set(texts)


def test_summary_gives_the_mask_folder_and_the_time_per_image(model, pictures, tmp_path):
    masks = str(tmp_path / "masks")
    table = predict_images(model, open_all(pictures), masks)
    text = describe_images(table, masks)
    assert f"An image took {table.attrs['milliseconds']:.0f} ms. The masks are in `{masks}`." in text
    assert table.attrs["milliseconds"] > 0
    again = describe_images(predict_images(model, open_all(pictures), masks), masks)
    assert "An image took" not in again  # nothing was predicted
    assert "No masks were written" in describe_images(table, None)


def test_class_names_are_drawn_on_their_regions():
    label = np.zeros((60, 80), np.uint8)
    label[10:30, 5:25] = 1  # a square, ...
    label[40:50, 50:78] = 1  # ... a bar, ...
    label[0, 79] = 2  # ... and a speck
    axes = Figure().subplots()
    label_regions(axes, label, CLASSES)
    names = [(text.get_text(), *text.get_position()) for text in axes.texts]
    assert [name for name, *_ in names] == ["wall", "floor", "floor"]
    for name, column, row in names:
        assert CLASSES[label[row, column]] == name
    assert abs(names[1][1] - 14.5) <= 1
    assert abs(names[1][2] - 19.5) <= 1

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from lib.classes import CLASS_NAMES
from lib.plots import (
    CLASS_COLOURS,
    colour_labels,
    plot_class_comparison,
    plot_class_iou,
    plot_curves,
    plot_differences,
    plot_history,
    plot_predictions,
    plot_recipes,
)
from lib.significance import paired_bootstrap


def draw(figure):
    figure.canvas.draw()
    assert not plt.get_fignums()  # nothing that a notebook would show a second time
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_history_marks_the_best_epoch():
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3, 2, 1.0], "valid_loss": [3, 2, 2.5]})
    history["valid_miou"], history["valid_pixel_acc"] = [0.1, 0.4, 0.3], 0.5
    figure = plot_history(history, 10)
    assert "Best validation mIoU: 0.400 at epoch 2" in draw(figure)
    assert figure.axes[0].get_xlim()[1] > 10
    draw(plot_history(history.assign(valid_miou=np.nan, valid_loss=np.nan), 3))


def test_bars_show_values_and_absent_classes():
    iou = np.linspace(0, 0.96, 13)
    iou[3] = np.nan
    texts = draw(plot_class_iou(iou, "trial"))
    assert {"trial: window is learned best, bed least", "0.96", "none\nseen", "0.00", *CLASS_NAMES} <= set(texts)


def test_predictions(scenes):
    prediction = np.where(scenes.label == 255, 0, scenes.label)[:3]
    texts = draw(plot_predictions(scenes.image[:3], scenes.depth[:3], scenes.label[:3], prediction))
    assert {"RGB", "depth (m)", "truth", "prediction", "unlabelled", "wall"} <= set(texts)


def test_a_class_has_one_colour():
    assert len(set(CLASS_COLOURS)) == len(CLASS_NAMES)
    coloured = colour_labels(np.array([[0, 12, 255]], np.uint8))
    np.testing.assert_allclose(coloured[0], [to_rgb(CLASS_COLOURS[0]), to_rgb(CLASS_COLOURS[12]), (1, 1, 1)])


def test_errors_are_shown_in_their_colour_and_rows_are_named(scenes):
    wrong = np.where(scenes.label == 11, 0, scenes.label)[:2]
    figure = plot_predictions(scenes.image[:2], scenes.depth[:2], scenes.label[:2], wrong, ["one", "two"], errors=True)
    assert {"errors", "one", "two"} <= set(draw(figure))
    shown = figure.axes[4].images[0].get_array()
    np.testing.assert_allclose(
        shown[scenes.label[0] == 11], np.tile(to_rgb(CLASS_COLOURS[0]), ((scenes.label[0] == 11).sum(), 1))
    )


@pytest.mark.parametrize("entries", [1, 2, 8])
def test_comparison_of_few_and_many(entries):
    table = pd.DataFrame(
        np.random.default_rng(0).random((13, entries)), CLASS_NAMES, [f"run{i}" for i in range(entries)]
    )
    texts = draw(plot_class_comparison(table, "who is better", ("run0",)))
    assert {"who is better", *CLASS_NAMES, f"run0: mean {table.run0.mean():.3f}"} <= set(texts)


def test_differences_mark_what_is_more_than_chance():
    better = np.random.default_rng(0).integers(1, 50, (40, 13, 13))
    better[:, range(13), range(13)] += 300
    worse = np.roll(better, 1, axis=2) + better  # same truth after halving: every other hit goes astray
    better = 2 * better
    result = paired_bootstrap(worse, better, resamples=200)
    assert {"mIoU", *CLASS_NAMES, "new"} <= set(draw(plot_differences({"new": result}, "old")))


def test_curves():
    history = pd.DataFrame({"epoch": [1, 2], "valid_miou": [0.1, 0.2]})
    assert {"a", "b"} <= set(draw(plot_curves({"a": history, "b": history}, "curves")))


def test_recipes_show_each_run_and_the_mean():
    scores = pd.DataFrame({"a": [0.1, 0.2], "b": [0.4, np.nan]}, index=pd.Index([1, 2], name="seed"))
    figure = plot_recipes(scores)
    first, second, mean = figure.axes[0].lines
    assert (first.get_xdata() == [0.1, 0.4]).all()
    assert second.get_xdata()[0] == 0.2
    assert mean.get_xdata() == pytest.approx([0.15, 0.4])
    assert figure.get_suptitle() == "b has the highest mean"
    assert plot_recipes(pd.DataFrame()).get_suptitle() == "No run is done"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from lib.data import CLASS_NAMES
from lib.plots import CLASS_COLOURS, colour_labels, plot_class_iou, plot_history, plot_predictions


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

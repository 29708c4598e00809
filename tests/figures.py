"""Shared by tests of figures: class sets, and a check that all texts lie inside the figure."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.text import Text

from lib.classes import NYUV2_13, NYUV2_40

SETS = (2, 13, 40, 60)


def class_names(count):
    """NYUv2's 13 or 40 classes; for other counts, names that are too long and invalid as formulas."""
    known = {13: NYUV2_13, 40: NYUV2_40}
    return known.get(count) or tuple(
        f"{index:02d} $_$ a name of a class as nobody would write it by hand" for index in range(count)
    )


def relabel(samples, count):
    """The same samples with `count` classes, nearly all of which occur."""
    label = samples.label.astype(int)
    column = np.arange(label.shape[2]) * -(-count // 13) // label.shape[2]
    label = np.where(label == 255, 255, (label + 13 * column) % count)
    return replace(samples, label=label.astype(np.uint8), classes=class_names(count))


def draw(figure):
    """Draw a figure, assert that all its texts and legends lie inside it, and return the texts."""
    FigureCanvasAgg(figure).draw()  # the canvas of a bare figure draws nothing
    assert not plt.get_fignums()  # a notebook would show an open figure a second time
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    beyond = [
        label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _labels_beyond(axis)
    ]
    for artist in {*texts, *figure.findobj(Legend)} - {*beyond}:
        box = artist.get_window_extent()
        assert box.x0 >= -1, artist
        assert box.y0 >= -1, artist
        assert box.x1 <= figure.bbox.x1 + 1, artist
        assert box.y1 <= figure.bbox.y1 + 1, artist
    return [text.get_text() for text in texts]


def _labels_beyond(axis):
    """Yield the labels of ticks outside the axis limits, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
        if not low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)

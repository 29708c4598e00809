import io
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.legend import Legend
from PIL import Image

from figures import SETS, class_names, draw, relabel
from lib.classes import NYUV2_13, NYUV2_40
from lib.notebooks.browse import plot_predictions
from lib.notebooks.plots import (
    CLASS_COLOURS,
    DIMMED,
    FADED,
    VALID_COLOUR,
    WRONG_COLOUR,
    choose_depth_scale,
    class_colours,
    colour_changes,
    colour_depth,
    colour_errors,
    colour_labels,
    fade,
    outline,
    percent,
    plot_class_iou,
    plot_curves,
    plot_grid,
    plot_history,
    plot_matrix,
    run_colours,
    shorten,
    small_png,
)

WALL = NYUV2_13.index("wall")
# Colour blindness as simulated by Machado et al. 2009, severity 1, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
LINEAR_TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def to_lab(colours, matrix):
    """CIELAB of `(N, 3)` sRGB colours in 0..1, after applying a matrix to linear RGB."""
    colours = np.asarray(colours, float)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.transpose(matrix), 0, 1) @ np.transpose(LINEAR_TO_XYZ) / (0.95047, 1, 1.08883)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root.T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


def ciede2000(first, second):
    """CIEDE2000 difference of two CIELAB colours (Sharma, Wu and Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1 + 0.5 * (1 - np.sqrt(chroma**7 / (chroma**7 + 25**7)))
    c1, c2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1 * stretch)) % 360, np.degrees(np.arctan2(b2, a2 * stretch)) % 360
    turn = 0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    hue = h1 + h2 if c1 * c2 == 0 else (h1 + turn / 2) % 360
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    weights = ((-0.17, 1, 30), (0.24, 2, 0), (0.32, 3, -6), (-0.20, 4, 63))
    t = 1 + sum(weight * np.cos(np.radians(times * hue - shift)) for weight, times, shift in weights)
    d_light = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    d_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    d_hue = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2) / (1 + 0.015 * chroma * t)
    turned = (
        2
        * np.sqrt(chroma**7 / (chroma**7 + 25**7))
        * np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    )
    return np.sqrt(d_light**2 + d_chroma**2 + d_hue**2 - turned * d_chroma * d_hue)


@pytest.mark.parametrize(
    ("first", "second", "difference"),  # from the table in the paper
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.5, 0), (61, -5, 29), 22.8977),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_helper_matches_published_values(first, second, difference):
    assert ciede2000(first, second) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("sight", SIGHT)
def test_class_colours_differ_in_normal_and_colour_blind_vision(sight):
    places = to_lab([to_rgb(colour) for colour in CLASS_COLOURS.values()], SIGHT[sight])
    assert min(ciede2000(*pair) for pair in combinations(places, 2)) >= 12
    faded = to_lab(np.linspace(FADED / 255, 1, 5)[:, None].repeat(3, 1), SIGHT[sight])
    assert min(ciede2000(place, grey) for place in places for grey in faded) >= 12


def test_class_keeps_its_colour_in_every_class_set():
    assert tuple(CLASS_COLOURS) == NYUV2_13
    assert class_colours(NYUV2_40)["bed"] == class_colours(("sky", "bed"))["bed"] == CLASS_COLOURS["bed"]
    for classes in (NYUV2_40, class_names(60)):
        colours = class_colours(classes)
        assert colours == class_colours(classes)
        places = to_lab([to_rgb(colours[name]) for name in classes], np.eye(3))
        assert min(ciede2000(*pair) for pair in combinations(places, 2)) > 7


def rgb(colour):
    """A colour as three numbers in 0..255."""
    return np.round(255 * np.array(to_rgb(colour)))


def test_unlabelled_pixels_are_hatched():
    label = np.array([[0, 12], [255, 255]], np.uint8).repeat(20, 0).repeat(60, 1)
    coloured = colour_labels(label, NYUV2_13)
    expected = [rgb(CLASS_COLOURS["bed"]), rgb(CLASS_COLOURS["window"])]
    np.testing.assert_array_equal(coloured[0, [0, -1]], expected)
    greys = np.unique(coloured[20:])
    assert len(greys) == 2
    assert np.mean(coloured[20:] == greys[0]) == pytest.approx(0.5, abs=0.05)


def test_wrong_pixels_have_one_colour_over_the_dimmed_image(scenes):
    label = scenes.label[0]
    wrong = np.where(label == WALL, 0, label)
    wrong[label == 255] = 0  # unlabelled pixels can't be wrong
    shown = colour_errors(scenes.image[0], label, wrong)
    assert (shown[label == WALL] == rgb(WRONG_COLOUR)).all()
    np.testing.assert_array_equal(shown[label != WALL], fade(scenes.image[0], DIMMED)[label != WALL])
    assert rgb(WRONG_COLOUR).tolist() not in [rgb(colour).tolist() for colour in CLASS_COLOURS.values()]


def test_colour_changes_marks_fixed_and_broken_pixels():
    label = np.array([[0, 0, 0, 0, 255]], np.uint8)
    a = np.array([[0, 1, 0, 1, 1]], np.uint8)
    b = np.array([[0, 0, 1, 2, 0]], np.uint8)
    shown = colour_changes(np.zeros((1, 5, 3), np.uint8), label, a, b)
    grey = [DIMMED] * 3
    expected = [grey, rgb(VALID_COLOUR).tolist(), rgb(WRONG_COLOUR).tolist(), grey, grey]
    assert shown[0].tolist() == expected


def test_outline_surrounds_the_chosen_pixels_without_covering_them():
    chosen = np.zeros((30, 40), bool)
    chosen[10:15, 10:20] = True
    shown = outline(np.full((30, 40, 3), 100, np.uint8), chosen)
    assert (shown[chosen] == 100).all()
    assert shown[12, [7, 8, 9, 20, 21, 22], 0].tolist() == [100, 255, 0, 0, 255, 100]


def test_depth_is_coloured_by_one_scale_and_missing_depth_is_white(scenes):
    depth_scale = choose_depth_scale([scenes])
    depth = np.array([[0, 2000, 2000]], np.uint16)
    shown = colour_depth(depth, depth_scale)
    assert shown[0, 0].tolist() == [255] * 3
    np.testing.assert_allclose(shown[0, 1], 255 * np.array(depth_scale.to_rgba(2.0)[:3]), atol=1)
    assert choose_depth_scale([replace(scenes, depth=None)]) is None


@pytest.mark.parametrize(
    ("share", "digits", "words"), [(0.3661, 1, "36.6 %"), (1, 0, "100 %"), (0, 2, "0.00 %")]
)
def test_percent_formats_a_share_with_given_digits(share, digits, words):
    assert percent(share, digits) == words


def test_shorten_removes_the_middle_of_long_names():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk"
    assert len(shorten("abcdefghijk", 7)) == 7


@pytest.mark.parametrize(
    ("columns", "width", "shown"), [(3, 128, 256), (4, 128, 256), (4, 640, 214), (3, 640, 320)]
)
def test_images_are_scaled_by_whole_factors_to_200_pixels_or_more(columns, width, shown):
    rows = [{str(column): np.zeros((10, width, 3), np.uint8) for column in range(columns)}]
    figure = plot_grid(rows)
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width == pytest.approx(shown)


def test_a_saved_figure_shows_each_pixel_in_its_exact_colour(scenes):
    """Also with another class set."""
    for classes in (NYUV2_13, class_names(60)):
        coloured = colour_labels(np.arange(96 * 128).reshape(96, 128) // 7 % len(classes), classes)
        figure = plot_grid([{"a": coloured, "b": coloured}], ["caption"])
        saved = np.asarray(Image.open(io.BytesIO(small_png(figure))))
        box = figure.axes[1].get_window_extent()
        left, top = round(box.x0), round(figure.bbox.height - box.y1)
        shown = saved[top : top + 192 : 2, left : left + 256 : 2]
        np.testing.assert_array_equal(shown[1:-1, 1:-1], coloured[1:-1, 1:-1])  # within the frame


def test_small_png_is_under_60_percent_of_a_plain_png(scenes):
    figure = plot_predictions(scenes[:2], scenes.label[:2] % 13)
    plain = io.BytesIO()
    figure.savefig(plain, format="png")
    assert len(small_png(figure)) < 0.6 * len(plain.getvalue())


@pytest.mark.parametrize("count", SETS)
def test_text_fits_in_prediction_figures_for_any_class_set(scenes, count):
    samples = relabel(scenes, count)[:3]
    wrong = np.where(samples.label == 0, 1, samples.label % count)
    captions = ["one", "two", "the longest name of an image that somebody ever gave, 57 % correct"]
    texts = draw(plot_predictions(samples, wrong, captions))
    assert {"RGB", "ground truth", "prediction", "wrong pixels", "one", "two", "unlabelled"} <= set(texts)
    assert shorten(samples.classes[1]) in texts


def test_predictions_are_drawn_at_any_size_and_without_ground_truth(scenes):
    small = scenes[:1].map(lambda array: array if array.ndim == 1 else array[:, :48, ::2])
    pieces = [small, scenes[4:6]]
    figure = plot_predictions(pieces, [piece.label[at] % 13 for piece in pieces for at in range(len(piece))])
    shapes = [axes.images[0].get_array().shape[:2] for axes in figure.axes[:12:4]]
    assert shapes == [(192, 256), (192, 256), (192, 256)]
    draw(figure)
    texts = draw(plot_predictions(replace(small, depth=None, label=None), small.label % 13))
    assert {"RGB", "prediction"} <= set(texts)
    assert not {"ground truth", "wrong pixels", "unlabelled"} & set(texts)


def test_history_marks_the_best_epoch_and_shows_loss_terms_in_use():
    history = pd.DataFrame({"epoch": [1, 2, 3], "valid_miou": [0.1, 0.4, 0.3], "valid_pixel_acc": 0.5})
    terms = {"cross_entropy": 1, "soft_iou": 0.5, "lovasz": 0.0, "depth_l1": 0.1}
    for number, name in enumerate(("loss", *terms)):
        history[f"train_{name}"], history[f"valid_{name}"] = [3 + number, 2, 1.0], [3 + number, 2, 2.5]
    figure = plot_history(history, 10, terms)
    texts = draw(figure)
    assert "Best validation mIoU: 0.400 at epoch 2" in texts
    assert len(figure.findobj(Legend)) == 1
    assert {line.get_color() for line in figure.axes[1].lines} == {VALID_COLOUR}
    assert "mIoU (solid), accuracy (dashed)" in texts
    assert [line.get_linestyle() for line in figure.axes[1].lines] == ["--", "-"]
    assert "Loss: cross-entropy + 0.5 (1 - soft IoU) + 0.1 (depth L1)" in texts
    assert [axes.get_title(loc="left") for axes in figure.axes[2:]] == [
        "cross-entropy",
        "1 - soft IoU",
        "depth L1",
    ]
    assert list(figure.axes[3].lines[0].get_ydata()) == [5, 2, 1]
    for axes in figure.axes:
        assert axes.get_xlim()[1] > 10
        assert (axes.get_xticks() % 1 == 0).all()
    draw(plot_history(history.assign(valid_miou=np.nan, valid_loss=np.nan), 3, terms))


@pytest.mark.parametrize("count", SETS)
def test_iou_bars_show_values_and_absent_classes(count):
    table = pd.DataFrame({"IoU": np.linspace(0, 0.96, count)}, class_names(count))
    table.iloc[0] = np.nan
    texts = draw(plot_class_iou(table, "IoU by class of trial", 0.5))
    assert {"IoU by class of trial", "0.96", "none seen", "mIoU 0.500"} <= set(texts)
    assert {shorten(name) for name in class_names(count)} <= set(texts)


@pytest.mark.parametrize("count", SETS)
def test_iou_bars_with_intervals_show_the_chance_level(count):
    """For a class in half of the pixels, guessed as often: intersection 1/4, union 3/4."""
    table = pd.DataFrame(
        {"IoU": 0.4, "low": 0.3, "high": 0.5, "images": 12.0, "support": 0.5}, class_names(count)
    )
    figure = plot_class_iou(table, "a title " * 20, 0.4)
    assert f"{shorten(class_names(count)[0], 20)} (12)" in draw(figure)
    (chance,) = (line for line in figure.axes[0].lines if line.get_label() == "chance level")
    np.testing.assert_allclose(chance.get_xdata(), 0.25 / 0.75)


def test_cut_intervals_are_labelled():
    table = pd.DataFrame(
        {"IoU": 0.5, "low": [0.1, 0, 0.2], "high": [1, 0.4, 0.9], "images": 9, "support": 0.1}, list("abc")
    )
    assert {"interval cut at 0", "interval cut at 1"} <= set(draw(plot_class_iou(table, "", 0.4)))
    whole = plot_class_iou(table.assign(low=0.1, high=0.9), "", 0.4)
    assert not any("cut" in text for text in draw(whole))


def test_classes_with_equal_iou_keep_their_order():
    figure = plot_class_iou(pd.DataFrame({"IoU": [0.5, 0.7, 0.5]}, ["bed", "books", "sofa"]), "", 0.5)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "sofa",
        "bed",
        "books",
    ]  # from the bottom


def test_curves_are_drawn_for_recipes_with_and_without_histories():
    history = pd.DataFrame({"epoch": [1, 2], "valid_miou": [0.1, 0.2]})
    later = history + 1
    colours = run_colours(["a", "b", "pooled"])
    figure = plot_curves({"a": [history, later], "b": [history], "pooled": []}, "curves", colours)
    assert {"a", "b"} <= set(draw(figure))
    lines = [(line.get_color(), line.get_xydata().tolist()) for line in figure.axes[0].lines]
    expected = (("a", history), ("a", later), ("b", history))
    assert lines == [(colours[name], curve.to_numpy().tolist()) for name, curve in expected]


def test_dollar_signs_in_names_are_not_read_as_math():
    names = ["a$_$b", "$x$"]  # matplotlib can't draw the first as math
    shares = pd.DataFrame(np.eye(2), index=pd.Index(names), columns=pd.Index(names))
    assert {*names, "of 3$_$4.png"} <= set(draw(plot_matrix(shares, "of 3$_$4.png")))

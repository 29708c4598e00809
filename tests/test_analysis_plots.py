import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from test_plots import draw

from lib.browser import browse_samples, choices
from lib.classes import CLASS_NAMES
from lib.errors import (
    CONFIDENCE_BINS,
    STRATA,
    ErrorCounts,
    plot_calibration,
    plot_confusion,
    plot_image_scores,
    plot_strata,
    plot_worst,
)
from lib.explore import (
    count_data,
    find_leakage,
    plot_batch,
    plot_class_shares,
    plot_depth,
    plot_leakage,
    plot_meetings,
    plot_missing,
    plot_places,
)
from lib.notebook import small_png
from lib.plots import CLASS_COLOURS, LAYERS, blend_labels, plot_sample, plot_samples

WALL = CLASS_NAMES.index("wall")


@pytest.fixture(scope="module")
def errors():
    """Counts of a network that is right in 3 of 4 pixels, and sure of all of them."""
    random = np.random.default_rng(0)
    confusion = random.integers(1, 20, (6, 13, 13))
    confusion[:, range(13), range(13)] *= 30
    confusion[:, WALL, 0] += 400
    strata = {name: confusion[: len(bins)] for name, bins in STRATA.items()}
    strata = {name: np.resize(counts, (len(STRATA[name]), 13, 13)) for name, counts in strata.items()}
    calibration = np.zeros((13, CONFIDENCE_BINS, 3))
    calibration[:, -1] = 100, 98, 75
    return ErrorCounts(confusion, confusion, strata, calibration)


def test_figures_of_the_data_say_what_they_show(scenes):
    counts = count_data(scenes)
    assert any(text.startswith("wall has ") for text in draw(plot_class_shares(counts)))
    assert any(text.startswith("Nine in ten pixels: ") for text in draw(plot_depth(counts)))
    assert f"{(scenes.depth == 0).mean():.1%} of the pixels have no depth" in draw(plot_missing(counts))
    assert any("meet most often" in text for text in draw(plot_meetings(counts)))
    assert any("floor lowest" in text for text in draw(plot_places(counts)))
    leakage = find_leakage(scenes.names, scenes.image)
    assert {"random", "blocks", "Closest pairs of random"} <= set(draw(plot_leakage(leakage, scenes.image)))


def test_samples_carry_the_names_of_their_regions(scenes):
    texts = draw(plot_samples(scenes[:2]))
    assert {"RGB", "depth (m)", "labels", scenes.names[0], "wall"} <= set(texts)


def test_layers_of_a_sample(scenes):
    for layer in LAYERS:
        assert f"{scenes.names[3]}: {layer}" in draw(plot_sample(scenes, 3, layer))
    texts = draw(plot_sample(scenes, 3, only="wall"))
    assert f"{scenes.names[3]}: labels, only wall" in texts
    assert "wall" in texts
    assert not {"floor", "furniture", "unlabelled"} & set(texts)


def test_opacity_mixes_colour_and_picture():
    image, label = np.full((1, 2, 3), 100, np.uint8), np.array([[WALL, 255]])
    mixed = blend_labels(image, label, 0.25)
    np.testing.assert_allclose(mixed[0, 0], 0.25 * np.array(to_rgb(CLASS_COLOURS[WALL])) + 0.75 * 100 / 255)
    np.testing.assert_allclose(mixed[0, 1], 100 / 255)


def test_batch(scenes):
    texts = draw(plot_batch(scenes.image[:2], scenes.image[:2], scenes.label[:2], "crops"))
    assert {"crops", "stored", "as it trains", "labels"} <= set(texts)


def test_figures_of_the_errors_say_what_they_show(errors):
    assert any(text.startswith("Of ") and "is found" in text for text in draw(plot_confusion(errors.confusion)))
    texts = draw(plot_strata(errors))
    assert {"share of the pixels", "mIoU", *STRATA} <= set(texts)
    assert "0.230 more sure than right; ECE 0.230" in draw(plot_calibration(errors.calibration))
    assert "Every class is in every image" in draw(plot_image_scores(errors.confusion))
    few = errors.confusion.copy()
    few[:3, WALL] = 0
    assert "Images with wall are harder than the others" in draw(plot_image_scores(few))


def test_worst_images_pale_where_the_network_doubted(scenes):
    predicted = np.where(scenes.label == WALL, 0, scenes.label)[:2]
    confidence = np.full(predicted.shape, 0.95)
    confidence[1] = 0.5
    figure = plot_worst(scenes[:2], predicted, confidence, ["one", "two"])
    assert {"one", "two", "truth", "prediction"} <= set(draw(figure))
    sure, doubtful = (figure.axes[position].images[0].get_array() for position in (3, 7))
    wrong = np.argwhere(scenes.label[0] == WALL)[0]
    np.testing.assert_allclose(sure[tuple(wrong)], to_rgb(CLASS_COLOURS[0]))
    wrong = np.argwhere(scenes.label[1] == WALL)[0]
    np.testing.assert_allclose(doubtful[tuple(wrong)], 0.35 * np.array(to_rgb(CLASS_COLOURS[0])) + 0.65 * 0.93)


def test_small_pictures_keep_rare_colours(scenes):
    figure = plot_class_shares(count_data(scenes))
    small = small_png(figure)
    large = io.BytesIO()
    figure.savefig(large, format="png", bbox_inches="tight")
    assert len(small) < 0.6 * len(large.getvalue())
    pixels = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in CLASS_COLOURS:
        assert np.abs(pixels - 255 * np.array(to_rgb(colour))).max(1).min() < 12, colour


def test_nobody_gets_widgets_where_nobody_can_move_them(scenes):
    assert f"{scenes.names[0]}: labels" in draw(browse_samples(scenes))


def test_browsing(scenes):
    index, layer, opacity, only, picture = browse_samples(scenes, interactive=True).children
    seen = {picture.value}
    for control, value in ((layer, "depth"), (opacity, 0.2), (index, 5), (layer, "labels"), (only, "wall")):
        control.value = value
        assert picture.value not in seen, value
        seen.add(picture.value)
    rare = min(range(13), key=lambda number: (scenes.label == number).any((1, 2)).sum())
    only.value = CLASS_NAMES[rare]
    assert list(index.options) == choices(scenes, CLASS_NAMES[rare])
    assert len(index.options) < len(scenes)
    only.value = "all"
    assert len(index.options) == len(scenes)

import base64
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from figures import SETS, draw, relabel
from lib.data import iterate_samples
from lib.evaluation import Predicted
from lib.metrics import confusion_counts
from lib.notebooks.browse import (
    ALL,
    CONFUSED,
    browse_results,
    browse_samples,
    image_scores,
    plot_views,
    rank_confusions,
    view_sample,
)
from lib.notebooks.plots import CHANGES_TITLE, FADED, choose_depth_scale, shorten

BED = 0


def decode(panel):
    return np.asarray(Image.open(io.BytesIO(panel["bytes"])).convert("RGB"))


def values_of(browser, name):
    """The values of `name` in the pixel readout, as an `(H, W)` array."""
    image = browser.panels.image
    (value,) = (value for value in image["values"] if value["name"] == name)
    width, height = image["size"]
    return np.frombuffer(value["bytes"], value["kind"]).reshape(height, width)


@pytest.fixture
def results(scenes):
    """Predictions with walls as beds in image 7 and in 20 rows of image 2, and windows as beds in image 5."""
    masks = np.where(scenes.label == 255, 0, scenes.label)
    wall, window = scenes.classes.index("wall"), scenes.classes.index("window")
    wrong = np.zeros(masks.shape, bool)
    wrong[7], wrong[2, :20] = True, True
    masks[wrong & (scenes.label == wall)] = BED
    masks[5][scenes.label[5] == window] = BED

    def look(samples):
        return Predicted(
            samples, masks[np.isin(scenes.names, samples.names)], np.full((1, 96, 128), 0.75, np.float32)
        )

    split = iterate_samples("synthetic", "train", "none", limit=12)
    return split, {"run": confusion_counts(masks, scenes.label, 13)}, {"run": look}, masks


def test_non_interactive_browsers_return_a_figure(scenes, results):
    figure = browse_samples(scenes)
    assert isinstance(figure, Figure)
    assert {"RGB", "labels", f"{scenes.names[0]} · 1 of 12 · all images, by file name"} <= set(draw(figure))
    texts = draw(browse_results(*results[:3]))
    assert {"ground truth", "prediction", "wrong pixels"} <= set(texts)
    assert any(text.startswith(f"{scenes.names[7]} · 1 of 12") for text in texts)


def test_each_action_draws_exactly_once(scenes):
    browser = browse_samples(scenes, interactive=True)
    drawn = []
    browser.panels.observe(lambda change: drawn.append(change["new"]), "image")
    most = max(
        scenes.classes, key=lambda name: (scenes.label == scenes.classes.index(name)).any((1, 2)).sum()
    )
    actions = [
        lambda: browser.step(1),
        lambda: setattr(browser.slider, "value", 12),
        lambda: setattr(browser.only, "value", most),
        lambda: setattr(browser.order, "value", "pixels of the class"),
        lambda: setattr(browser.name, "value", scenes.names[browser.images[-1]]),
        lambda: browser.choose(ALL),
    ]
    for number, act in enumerate(actions, start=1):
        act()
        assert len(drawn) == number
    browser.step(-1)
    assert len(drawn) == 6  # already at the first image


def test_steps_stop_at_the_first_and_last_image(scenes):
    browser = browse_samples(scenes, interactive=True)
    browser.step(-1)
    assert browser.slider.value == 1
    browser.slider.value = 12
    browser.step(1)
    assert browser.slider.value == 12
    browser.panels._handle_custom_msg({"step": -1}, [])  # what an arrow key sends
    assert browser.slider.value == 11


def test_choosing_a_class_shows_only_its_images(scenes):
    browser = browse_samples(scenes, interactive=True)
    pixels = {name: (scenes.label == index).sum((1, 2)) for index, name in enumerate(scenes.classes)}
    assert set(browser.only.options) == {ALL, *(name for name, found in pixels.items() if found.any())}
    rare = min(browser.only.options[1:], key=lambda name: (pixels[name] > 0).sum())
    browser.choose(rare)
    assert browser.images == np.flatnonzero(pixels[rare]).tolist()
    assert f"1 of {len(browser.images)} · {rare}" in browser.message.value
    browser.order.value = "pixels of the class"
    assert browser.images[0] == pixels[rare].argmax()
    with pytest.raises(ValueError, match="only: found 'unicorn', expected one of all images, "):
        browser.choose("unicorn")


def test_name_search_finds_an_image_or_reports_an_unknown_name(scenes):
    browser = browse_samples(scenes, interactive=True)
    assert (browser.name.value, browser.name.placeholder) == ("", "name of an image")
    browser.name.value = str(scenes.names[11])
    assert (browser.slider.value, browser.name.value) == (12, "")
    browser.name.value = "nowhere"
    assert browser.message.value == "no image is called nowhere here"
    assert browser.slider.value == 12


def test_name_search_prefers_the_exact_name_to_a_beginning(scenes):
    names = np.array([*"23456789", "10", "11", "1", "12"])
    browser = browse_samples(replace(scenes, names=names), interactive=True)
    for text, found in (("1", "1"), ("11", "11"), ("9", "9")):
        browser.name.value = text
        assert browser.message.value.startswith(f"{found} · ")
    browser = browse_samples(replace(scenes, names=np.char.add("room ", names)), interactive=True)
    browser.name.value = "room 1"
    assert browser.message.value.startswith("room 1 · ")
    browser.name.value = "roo"
    assert browser.message.value.startswith("room 2 · 1 of 12")


def test_pixel_readout_covers_labels_predictions_confidence_and_depth(results, scenes):
    browser = browse_results(*results[:3], interactive=True)
    assert browser.images[0] == 7
    np.testing.assert_array_equal(values_of(browser, "ground truth"), scenes.label[7])
    np.testing.assert_array_equal(values_of(browser, "prediction"), results[3][7])
    np.testing.assert_array_equal(values_of(browser, "depth"), scenes.depth[7])
    assert (values_of(browser, "confidence, prediction") == 0.75).all()
    assert browser.panels.image["classes"] == scenes.classes
    truth = decode(
        next(panel for panel in browser.panels.image["panels"] if panel["title"] == "ground truth")
    )
    np.testing.assert_array_equal(truth, view_sample(scenes[[7]], {}, None).panels["labels"])


def test_results_are_sorted_from_the_worst_image(results):
    browser = browse_results(*results[:3], interactive=True)
    wrong = (results[1]["run"].sum((1, 2)) - np.trace(results[1]["run"], axis1=1, axis2=2))[browser.images]
    assert (np.diff(wrong) <= 0).all()
    browser.choose("wall" + CONFUSED + "bed")
    assert browser.images == [7, 2]
    browser.order.value = "IoU"
    browser.choose("bed")
    counts = results[1]["run"]
    iou = counts[:, BED, BED] / (counts[:, BED].sum(1) + counts[:, :, BED].sum(1) - counts[:, BED, BED]).clip(
        1
    )
    assert (np.diff(iou[browser.images]) >= 0).all()


def test_image_score_covers_only_classes_in_its_ground_truth():
    counts = np.zeros((3, 3, 3), int)
    counts[0, 0, :2] = 6, 2  # class 1 is predicted, but not in the ground truth
    counts[0, 2, 2] = 4
    counts[1, 0, 1] = 5
    np.testing.assert_array_equal(image_scores(counts), [(6 / 8 + 1) / 2, 0, np.nan])


def test_all_images_are_sorted_by_their_miou(results):
    """Image 4 has few wrong pixels, but they are those of a whole class; image 6 has more in two classes."""
    split, _, predictors, _ = results
    counts = np.zeros((12, 13, 13), int)
    counts[:, 0, 0] = counts[:, 1, 1] = 1000
    counts[4, 1] = 0
    counts[4, 1, 0] = 10
    counts[6, 0, :2], counts[6, 1, :2] = (750, 250), (250, 750)
    counts[9] = 0  # unlabelled
    browser = browse_results(split, {"run": counts}, predictors, interactive=True)
    browser.order.value = "IoU"
    assert browser.images == [4, 6, 0, 1, 2, 3, 5, 7, 8, 10, 11]


def test_choosing_a_class_includes_images_that_only_predict_it(results, scenes):
    """Some images without a bed have pixels that are predicted as bed."""
    split, counts, predictors, masks = results
    there = [
        at
        for at in range(12)
        if ((scenes.label[at] == BED) | (masks[at] == BED))[scenes.label[at] != 255].any()
    ]
    browser = browse_results(split, counts, predictors, interactive=True).choose("bed")
    assert sorted(browser.images) == there
    assert not all((scenes.label[at] == BED).any() for at in there)


def test_images_can_be_sorted_by_additional_keys(results):
    keys = {"confidence": np.arange(12)[::-1]}
    browser = browse_results(*results[:3], keys, interactive=True)
    browser.order.value = "confidence"
    assert browser.images == list(range(12))[::-1]


def test_two_runs_start_with_the_largest_gain_of_b(results, scenes):
    split, counts, predictors, _ = results
    truth = np.where(scenes.label == 255, 0, scenes.label)
    counts |= {"perfect": confusion_counts(truth, scenes.label, 13)}
    predictors |= {"perfect": lambda samples: Predicted(samples, truth[np.isin(scenes.names, samples.names)])}
    browser = browse_results(split, counts, predictors, interactive=True)
    assert browser.images[0] == 7
    assert browser.panels.image["shown"] == ("A: run", "B: perfect", CHANGES_TITLE)
    assert {"confidence, A: run", "A: run", "B: perfect"} <= {
        value["name"] for value in browser.panels.image["values"]
    }
    browser.order.value = "loss of B"
    assert browser.images[-1] == 7


def test_gain_of_b_for_a_confusion_is_its_difference_in_pixels(results):
    split, counts, predictors, _ = results
    wall = split.classes.index("wall")
    fixed = counts["run"].copy()
    fixed[2, wall, BED] = 0  # B keeps the confusion in image 7, where it has more pixels
    browser = browse_results(
        split, counts | {"b": fixed}, predictors | {"b": predictors["run"]}, interactive=True
    )
    assert browser.choose("wall" + CONFUSED + "bed").images == [2, 7]
    browser.order.value = "loss of B"
    assert browser.images == [7, 2]


def test_next_image_is_drawn_in_advance(results):
    browser = browse_results(*results[:3], interactive=True)
    assert list(browser.pending) == [(7, ALL), (browser.images[1], ALL)]
    ahead = browser.pending[browser.images[1], ALL]
    browser.step(1)
    assert browser.panels.image is ahead.result()[1]


def test_browsers_share_one_thread(scenes):
    browse_samples(scenes, interactive=True)
    before = threading.active_count()
    browse_samples(scenes, interactive=True).step(1)
    assert threading.active_count() == before


def test_depth_is_read_out_only_if_there_is_depth(scenes):
    for depth in (scenes.depth, None):
        browser = browse_samples(replace(scenes, depth=depth), interactive=True)
        names = [value["name"] for value in browser.panels.image["values"]]
        assert names == (["labels"] if depth is None else ["labels", "depth"])


def test_static_image_is_updated_until_the_page_is_ready(scenes):
    browser = browse_samples(scenes, interactive=True)
    first = browser.picture.value
    browser.step(1)
    second = browser.picture.value
    assert first != second
    browser.panels._handle_custom_msg({"ready": True}, [])
    browser.step(1)
    assert (browser.picture.value, browser.picture.layout.display) == (second, "none")


def test_saved_notebook_contains_the_static_image(scenes):
    browser = browse_samples(scenes, interactive=True)
    saved = browser._repr_mimebundle_()
    assert base64.b64decode(saved["image/png"]) == browser.picture.value
    assert "application/vnd.jupyter.widget-view+json" in saved


def test_pixels_outside_the_chosen_class_are_faded(scenes):
    view = view_sample(scenes[[3]], {}, choose_depth_scale([scenes]), "wall")
    wall = scenes.label[3] == scenes.classes.index("wall")
    inside = view.panels["labels"][wall]
    assert len(np.unique(inside, axis=0)) == 1
    assert (np.ptp(view.panels["labels"][~wall], axis=1) == 0).all()
    faded = view.panels["labels"][~wall][:, 0]
    assert (faded[faded > 0] >= FADED).all()  # 0 is the outline
    assert (view.panels["RGB"][wall] == scenes.image[3][wall]).all()


def test_a_confusion_is_outlined_in_all_panels(results, scenes):
    _, _, predictors, masks = results
    view = view_sample(scenes[[7]], {"run": predictors["run"](scenes[[7]])}, None, "wall" + CONFUSED + "bed")
    confused = (scenes.label[7] == scenes.classes.index("wall")) & (masks[7] == BED)
    plain = view_sample(scenes[[7]], {"run": predictors["run"](scenes[[7]])}, None)
    for title, panel in view.panels.items():
        np.testing.assert_array_equal(panel[confused], plain.panels[title][confused], err_msg=title)
        assert (panel[~confused] == 0).all(1).any(), title


@pytest.mark.parametrize("count", SETS)
def test_text_fits_in_views_for_any_class_set(scenes, count):
    samples = relabel(scenes, count)
    mask = samples.label[[0]] % count
    name = "the long name of a run that a sweep has made"
    texts = draw(
        plot_views([view_sample(samples[[0]], {name: Predicted(samples[[0]], mask)}, None)], ["caption"])
    )
    assert {shorten(samples.classes[index]) for index in np.unique(samples.label[0]) if index != 255} <= set(
        texts
    )
    two = {letter: Predicted(samples[[0]], mask) for letter in (name, "b")}
    without_depth = replace(samples[[0]], depth=None)
    draw(plot_views([view_sample(without_depth, two, None, samples.classes[-1])], ["caption"]))


def test_confusions_are_ranked_by_the_gain_in_miou():
    """The gain is that of moving the pixels to the diagonal. Class c is in no ground truth."""
    counts = np.zeros((2, 4, 4), int)
    counts[0] = [[50, 6, 4, 0], [3, 900, 0, 5], [0, 0, 0, 0], [2, 0, 0, 8]]
    counts[1, 0, 1] = 3
    table = rank_confusions(counts, tuple("abcd"))

    def miou(pooled):
        hits = np.diagonal(pooled)
        union = pooled.sum(0) + pooled.sum(1) - hits
        return np.mean(hits[[0, 1, 3]] / union[[0, 1, 3]])

    pooled = counts.sum(0)
    assert len(table) == 5
    for words, row in table.iterrows():
        truth, predicted = ("abcd".index(letter) for letter in words.split(CONFUSED))
        mended = pooled.copy()
        mended[truth, truth] += mended[truth, predicted]
        mended[truth, predicted] = 0
        assert row.cost == pytest.approx(miou(mended) - miou(pooled), abs=1e-12), words
        assert (row.pixels, row.share) == (pooled[truth, predicted], pooled[truth, predicted] / 23)
    assert table.cost.is_monotonic_decreasing
    # 5 pixels predicted as the small class d cost more than 9 predicted as the large class b
    assert table.index[0] == "b confused with d"
    assert table.images["a confused with b"] == 2

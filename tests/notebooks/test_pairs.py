from dataclasses import replace

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image
from scored_runs import names_of, scored_folder, scored_run, some_counts

from figures import draw
from lib.metrics import confusion_counts
from lib.notebooks.pairs import (
    browse_pair,
    choose_pair,
    plot_pair,
)
from lib.notebooks.plots import CHANGES_TITLE, colour_changes
from lib.runs.results import EXAMPLE, group_recipes, read_results, read_runs, write_results
from lib.runs.scoring import iterate_split, masks_folder


def test_default_pair_is_the_first_and_the_last_recipe():
    recipes = group_recipes(
        [scored_run(name, learning_rate=rate) for name, rate in zip("abc", (1, 2, 3), strict=True)]
    )
    assert list(choose_pair(recipes)) == ["a, seed 0", "c, seed 0"]
    assert list(choose_pair(recipes, "b")) == ["a, seed 0", "b, seed 0"]
    recipes["b"] = [scored_run("b", learning_rate=2, seed=seed) for seed in (9, 10)]
    recipes["a"] = [scored_run("a", learning_rate=1, seed=seed) for seed in (1, 10)]
    pair = choose_pair(recipes, "b")
    assert list(pair) == ["a, seed 10", "b, seed 10"]  # the seed that both have
    assert choose_pair({"a": recipes["a"]}) == {}
    with pytest.raises(ValueError, match="compare_with: found 'd', expected one of b, c"):
        choose_pair(recipes, "d")


def test_long_names_fit_inside_the_pair_figure():
    long = [f"{number}, {'a long name of an image ' * 3}" for number in names_of()]
    runs = [scored_run(name, some_counts(rate), names=long, scene=None, learning_rate=rate)
            for name, rate in (("a " * 40, 0.6), ("b " * 40, 0.7))]  # fmt: skip
    texts = draw(plot_pair(choose_pair(group_recipes(runs))))
    assert "B higher on 24 of 24 images, lower on 0\n(no test: images of a scene are alike)" in texts


@pytest.fixture
def pair(tmp_path, scenes):
    """Two runs on the scenes: A is wrong only in the first image, B only in the second."""
    write_folder(tmp_path / "data", scenes, "test")
    label, found = np.where(scenes.label == 255, 0, scenes.label), {}
    for name, wrong in (("a", 0), ("b", 1)):
        masks = label.copy()
        masks[wrong] = (masks[wrong] + 1) % 13
        counts = confusion_counts(masks, scenes.label, 13)
        run = scored_folder(tmp_path, name, counts, names=scenes.names.tolist(), scene=None, classes=scenes.classes,
                            split="test", data=str(tmp_path / "data"), learning_rate=float(wrong))  # fmt: skip
        masks_folder(run, "test").mkdir()
        for image, mask in zip(scenes.names, masks, strict=True):
            Image.fromarray(mask).save(masks_folder(run, "test") / f"{image}.png")
        found[name] = run
    recipes = group_recipes(read_runs(",".join(map(str, found.values())), "test"))
    return choose_pair(recipes)


def moved(pair, data):
    """The same pair with the data of A in another folder."""
    (a, first), (b, second) = pair.items()
    return {a: replace(first, data=str(data)), b: second}


def panels_of(browser):
    """The panels that are drawn for the first image."""
    view, _ = next(iter(browser.pending.values())).result()
    return view.panels


def test_browse_pair_shows_what_b_fixes_and_breaks(pair, scenes):
    figure = browse_pair(pair)
    texts = draw(figure)
    assert {"RGB", "A: a, seed 0", "B: b, seed 0", CHANGES_TITLE} <= set(texts)
    assert any(text.startswith(f"{scenes.names[0]} · 1 of 12") for text in texts)
    a, b = (run.read_masks(scenes.names[:1].tolist())[0] for run in pair.values())
    expected = colour_changes(scenes.image[0], scenes.label[0], a, b)
    np.testing.assert_array_equal(panels_of(browse_pair(pair, interactive=True))[CHANGES_TITLE], expected)


def test_browse_pair_starts_with_the_largest_gain_of_b(pair, scenes):
    browser = browse_pair(pair, interactive=True)
    assert browser.names[browser.images[0]] == scenes.names[0]
    assert browser.names[browser.images[-1]] == scenes.names[1]
    assert browser.panels.image["shown"] == ("A: a, seed 0", "B: b, seed 0", CHANGES_TITLE)


def test_missing_predictions_or_data_are_reported(pair):
    elsewhere = moved(pair, "/no/such/place")
    assert browse_pair(elsewhere).data.startswith("No images: /no/such/place: ")
    b = pair["b, seed 0"]
    gone = masks_folder(b.folder, "test") / f"{b.names[0]}.png"
    gone.unlink()
    assert browse_pair(pair).data == (f"No images: the predictions of these runs were not kept (`{gone}`).")


def test_image_missing_from_the_data_is_reported_by_name(pair, scenes, tmp_path):
    """A data set of the same name may contain other images."""
    write_folder(tmp_path / "fewer", scenes[2:], "test")
    elsewhere = moved(pair, tmp_path / "fewer")
    assert browse_pair(elsewhere).data == f"No images: {tmp_path / 'fewer'} has no {scenes.names[0]}."


def test_browse_pair_shows_the_predictions_kept_in_a_study(pair, scenes, tmp_path):
    """A study keeps the predictions of a few images, without run folders."""
    names = scenes.names[:2].tolist()
    kept = [
        replace(run, masks=dict(zip(names, run.read_masks(names), strict=True)), group=name)
        for name, run in zip("ab", pair.values(), strict=True)
    ]
    write_results(tmp_path / "study", kept)
    study = choose_pair(group_recipes(read_results(tmp_path / "study")))
    study = moved(study, tmp_path / "data")
    browser = browse_pair(study, interactive=True)
    assert len(browser.names) == 2
    shown = panels_of(browse_pair(pair, interactive=True))
    for title in ("RGB", "ground truth", "A: a, seed 0", "B: b, seed 0", CHANGES_TITLE):
        np.testing.assert_array_equal(panels_of(browser)[title], shown[title])
    write_results(tmp_path / "none", [replace(run, masks=None) for run in kept])
    without = choose_pair(group_recipes(read_results(tmp_path / "none")))
    assert browse_pair(without).data == (
        f"No images: the predictions of these runs were not kept (`{names[0]}.png`)."
    )


def test_committed_example_keeps_predictions_that_match_its_counts():
    recipes = group_recipes(read_runs(str(EXAMPLE), "test"), "baseline")
    pair = choose_pair(recipes, "tenth_learning_rate")
    assert CHANGES_TITLE in draw(browse_pair(pair))
    for run in pair.values():
        assert len(run.masks) == 3
        at = np.flatnonzero(np.isin(run.names, list(run.masks)))
        label = iterate_split(run.parameters, "test", run.data)[at][0].label
        counts = confusion_counts(np.stack(run.read_masks(run.names[at].tolist())), label, 13)
        np.testing.assert_array_equal(counts, run.counts[at])

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import write_folder
from PIL import Image
from slim_runs import names_of, slim_run, some_counts
from test_plots import draw

from lib.metrics import confusion_counts
from lib.notebooks.error_analysis import (
    CLASS,
    DISTANCE,
    SEGMENT,
    boundary_distance,
    compare_right,
    count_right,
    plot_right,
)
from lib.notebooks.pairs import choose_images, choose_pair, image_scores, plot_pair, plot_pair_images
from lib.notebooks.plots import FADED, colour_where
from lib.runs.results import EXAMPLE, group_recipes, read_runs
from lib.runs.scoring import iterate_part, masks_folder, read_masks


def test_the_score_of_an_image_is_over_the_classes_in_its_truth():
    counts = np.zeros((3, 3, 3), int)
    counts[0, 0, :2] = 6, 2  # class 1 is named, but not in the truth
    counts[0, 2, 2] = 4
    counts[1, 0, 1] = 5
    np.testing.assert_array_equal(image_scores(counts), [(6 / 8 + 1) / 2, 0, np.nan])


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ([0.1, np.nan, 0.3, -0.2, 0.2, -0.1], [2, 4, 3]),
        ([0.1, 0.2, 0.3], [2, 1]),
        ([-0.1, -0.2], [1]),
        ([0, np.nan], []),
    ],
)
def test_shown_are_the_largest_gains_and_the_largest_loss(gains, chosen):
    assert choose_images(np.array(gains)).tolist() == chosen


def test_of_several_recipes_the_last_is_held_against_the_first(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        slim_run(tmp_path, name, learning_rate=rate)
    recipes = group_recipes(read_runs(",".join(str(tmp_path / name) for name in "abc"), "valid"))
    assert list(choose_pair(recipes)) == ["a", "c"]
    assert list(choose_pair(recipes, "b")) == ["a", "b"]
    assert choose_pair({"a": recipes["a"]}) == {}
    with pytest.raises(ValueError, match="other: found 'd', expected one of b, c"):
        choose_pair(recipes, "d")


def test_all_is_inside_the_figure(tmp_path):
    for name, rate in (("a " * 40, 0.6), ("b " * 40, 0.7)):
        long = [f"{number}, {'a long name of an image ' * 3}" for number in names_of()]
        slim_run(tmp_path, name, some_counts(rate), names=long, scene=None, learning_rate=rate)
    recipes = group_recipes(read_runs(str(tmp_path), "valid"))
    texts = draw(plot_pair(choose_pair(recipes)))
    assert "B higher on 24 of 24 images, lower on 0" in texts


@pytest.fixture
def pair(tmp_path, scenes):
    """Two runs of the scenes: A names all right but for the first image, B but for the second."""
    write_folder(tmp_path / "data", scenes, "test")
    label, found = np.where(scenes.label == 255, 0, scenes.label), {}
    for name, wrong in (("a", 0), ("b", 1)):
        masks = label.copy()
        masks[wrong] = (masks[wrong] + 1) % 13
        counts = confusion_counts(masks, scenes.label, 13)
        run = slim_run(tmp_path, name, counts, names=scenes.names.tolist(), scene=None, classes=scenes.classes,
                       part="test", data=str(tmp_path / "data"), learning_rate=float(wrong))  # fmt: skip
        masks_folder(run, "test").mkdir()
        for image, mask in zip(scenes.names, masks, strict=True):
            Image.fromarray(mask).save(masks_folder(run, "test") / f"{image}.png")
        found[name] = run
    recipes = group_recipes(read_runs(",".join(map(str, found.values())), "test"))
    return choose_pair(recipes)


def test_what_b_fixes_and_breaks(pair, scenes):
    figure = plot_pair_images(pair, "test")
    texts = draw(figure)
    assert {"RGB", "truth", "A", "B", "B fixes", "B breaks", f"{scenes.names[0]}: +1.00"} <= set(texts)
    fixes, breaks = (figure.axes[column].images[0].get_array() for column in (4, 5))  # of the first row, the gain
    labelled = scenes.label[0] != 255
    expected = colour_where(labelled, scenes.image[0], scenes.label[0], scenes.classes)
    np.testing.assert_array_equal(fixes, expected)
    assert breaks.min() >= FADED[0]
    assert (np.ptp(breaks, axis=2) == 0).all()


def test_without_predictions_or_data_a_sentence_says_so(pair):
    first, second = pair.values()
    elsewhere = {"a": replace(first, data="/no/such/place"), "b": second}
    assert plot_pair_images(elsewhere, "test").startswith("No pictures, because the images can't be read: /no/such/pla")
    gone = masks_folder(second.folder, "test") / f"{first.names[0]}.png"
    gone.unlink()
    assert plot_pair_images(pair, "test").startswith(f"No pictures: `{gone}` was not kept; ")


def test_the_committed_example_keeps_the_predictions_that_are_shown():
    pair = choose_pair(group_recipes(read_runs(f"{EXAMPLE / 'baseline'}, {EXAMPLE / 'tenth_learning_rate'}", "test")))
    assert "B breaks" in draw(plot_pair_images(pair, "test"))
    for run in pair.values():
        kept = sorted(path.stem for path in masks_folder(run.folder, "test").iterdir())
        at = np.flatnonzero(np.isin(run.names, kept))
        label = iterate_part(run.folder, "test")[at][0].label
        counts = confusion_counts(np.stack(read_masks(masks_folder(run.folder, "test"), kept)), label, 13)
        np.testing.assert_array_equal(counts, run.counts[at])


def test_right_pixels_are_counted_by_class_outline_and_size(pair, scenes):
    first = replace(pair["a"], scene=np.arange(12) // 2)
    table = count_right(first, "test")
    pooled = first.counts.reshape(6, 2, 13, 13).sum(1)
    by_class = table[CLASS]
    np.testing.assert_array_equal(by_class.xs("right", axis=1, level=1), np.diagonal(pooled, axis1=1, axis2=2))
    np.testing.assert_array_equal(by_class.xs("pixels", axis=1, level=1), pooled.sum(2))
    for stratum in (DISTANCE, SEGMENT):
        np.testing.assert_array_equal(table[stratum].T.groupby(level=1).sum().T, by_class.T.groupby(level=1).sum().T)
    near = sum(((boundary_distance(label) < 0.01) & (label != 255)).sum() for label in scenes.label[:2])
    assert table[DISTANCE, "0-1", "pixels"].iloc[0] == near
    masks_folder(first.folder, "test").rename(first.folder / "gone")
    with pytest.raises(FileNotFoundError):
        count_right(first, "test")


def right_table(shares, seeds=3, scenes=12):
    """Of 1,000 pixels in each of two bins, such shares are right; seeds and scenes differ a little."""
    rng, rows = np.random.default_rng(0), {}
    for recipe, by_bin in shares.items():
        for seed, scene in np.ndindex(seeds, scenes):
            bed, books = (1000 * (np.array(by_bin) + rng.normal(0, 0.01, 2))).astype(int)
            rows[recipe, seed, f"{scene:02d}"] = [1000, bed, 1000, books]
    columns = pd.MultiIndex.from_product(([CLASS], ("bed", "books"), ("pixels", "right")))
    index = pd.MultiIndex.from_tuples(rows, names=("recipe", "seed", "scene"))
    table = pd.DataFrame(rows.values(), index, columns)
    others = [table.rename(columns={CLASS: name, "bed": "0-1", "books": "over 1"}) for name in (DISTANCE, SEGMENT)]
    return pd.concat((table, *others), axis=1)


def test_shares_that_are_right_are_held_against_a_baseline():
    table = right_table({"base": (0.5, 0.5), "other": (0.5, 0.6), "same": (0.5, 0.5)})
    results = compare_right(table.sample(frac=1, random_state=1), "base")
    assert list(results) == ["other", "same"]
    result = results["other"][CLASS]
    right = table[CLASS].xs("right", axis=1, level=1).groupby(level=0).mean() / 1000
    np.testing.assert_allclose(result.class_difference[:2], right.loc["other"] - right.loc["base"], atol=1e-12)
    assert np.isnan(result.class_difference[2])
    assert result.class_p_value[1] < 0.001 < 0.05 < result.class_p_value[0]
    assert result.scene_count == 12
    figure = plot_right(table, results)
    clear = [line for line in figure.axes[0].lines if line.get_markerfacecolor() not in ("white", "none")]
    assert [len(line.get_xdata()) for line in clear if line.get_marker() == "o"] == [1, 0]  # books of `other` alone
    texts = set(draw(figure))
    assert {"by class", "by size of the segment\n(% of the image)", "books (50 %)", "over 1 (50 %)"} <= texts
    assert {"other", "same"} <= texts

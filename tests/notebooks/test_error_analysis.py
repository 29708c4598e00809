import ast
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import write_folder

from figures import SETS, class_names, draw, relabel
from lib.classes import NYUV2_13
from lib.data import iterate_samples
from lib.evaluation import evaluate
from lib.metrics import DEPTH, DISTANCE, REGION, mean_iou, pixel_strata, region_shares, strata_edges
from lib.model import ModelConfig, Prediction
from lib.notebooks.error_analysis import (
    CONFIDENCE_BINS,
    ErrorCounts,
    calibration_error,
    count_errors,
    describe_errors,
    name_bins,
    plot_calibration,
    plot_confusion,
    plot_strata,
    score_strata,
    show_confusions,
)

BED, FLOOR, OBJECTS, WALL = (NYUV2_13.index(name) for name in ("bed", "floor", "objects", "wall"))


class Guess(torch.nn.Module):
    """Predicts floor with 60 % confidence in the left half and wall with 95 % in the right half."""

    def __init__(self, classes=NYUV2_13):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = ModelConfig(classes=classes)

    def forward(self, inputs):
        count, _, height, width = inputs.shape
        classes = len(self.config.classes)
        named, other = (WALL, FLOOR) if classes == 13 else (1, 0)
        probability = torch.full((count, classes, height, width), 0.05 / (classes - 1))
        probability[:, named] = 0.95
        left = torch.full((classes,), 0.4 / (classes - 1))
        left[other] = 0.6
        probability[..., : width // 2] = left[:, None, None]
        return Prediction(probability.log(), None)


def made_up(images=24, count=13):
    """Counts of a network that is correct in most pixels and overconfident."""
    confusion = np.random.default_rng(0).integers(1, 20, (images, count, count))
    confusion[:, range(count), range(count)] *= 3 * count
    edges = strata_edges(10.0)
    strata = {name: np.resize(confusion, (len(between) + 1, count, count)) for name, between in edges.items()}
    calibration = np.zeros((CONFIDENCE_BINS, 3))
    calibration[-1] = 100, 98, 75
    names = np.array([f"{index:06d}" for index in range(images)])
    confidence, depth_error = np.full(images, 0.9), np.full(images, np.nan)
    return ErrorCounts(
        class_names(count), names, confusion, strata, calibration, confidence, depth_error, edges
    )


def test_regions_of_one_class_are_measured_separately():
    label = np.full((10, 10), WALL, np.uint8)
    label[0, :3] = label[9, :] = OBJECTS
    shares = region_shares(label)
    assert (shares[0, 0], shares[9, 5], shares[5, 5]) == (0.03, 0.10, 0.87)
    edges = strata_edges(10.0)
    bins = pixel_strata(label, np.full((10, 10), 2500, np.uint16), edges)
    assert name_bins(REGION, edges[REGION])[bins[REGION][0, 0]] == "3-10"
    assert name_bins(DISTANCE, edges[DISTANCE])[bins[DISTANCE][5, 5]] == "over 16"
    assert name_bins(DEPTH, edges[DEPTH])[bins[DEPTH][5, 5]] == "2-3"
    assert set(bins) == set(edges)


def test_depth_bins_follow_the_depth_range(scenes):
    assert name_bins(DEPTH, strata_edges(10.0)[DEPTH]) == [
        "missing",
        "0-1",
        "1-2",
        "2-3",
        "3-4",
        "4-6",
        "over 6",
    ]
    near = Guess()
    near.config = replace(near.config, depth_range_m=(0.1, 2.0))
    samples = replace(scenes[:1], depth=np.full_like(scenes.depth[:1], 500))
    errors = count_errors(near, samples)
    shown = ["missing", "0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.2", "over 1.2"]
    assert name_bins(DEPTH, errors.edges[DEPTH]) == shown
    assert errors.strata[DEPTH].any((1, 2)).tolist() == [name == "0.4-0.6" for name in shown]
    assert "0.4-0.6" in draw(plot_strata(errors))


def test_error_counts_match_evaluate(scenes):
    errors, evaluation = count_errors(Guess(), scenes, 5), evaluate(Guess(), scenes, 5)
    np.testing.assert_array_equal(errors.confusion, evaluation.counts)
    assert errors.names.tolist() == scenes.names.tolist()
    for name, counts in errors.strata.items():
        np.testing.assert_array_equal(counts.sum(0), evaluation.counts.sum(0), err_msg=name)
    predicted = evaluation.counts.sum((0, 1))
    right = np.diagonal(evaluation.counts.sum(0))
    floor, wall = errors.calibration[errors.calibration[:, 0] > 0]  # 0.6 and 0.95
    assert [floor[0], wall[0]] == predicted[[FLOOR, WALL]].tolist()
    assert [floor[2], wall[2]] == right[[FLOOR, WALL]].tolist()
    right = np.mean((scenes.label == WALL)[..., 64:][scenes.label[..., 64:] != 255])
    assert calibration_error(errors.calibration[-1:]) == pytest.approx(abs(0.95 - right), abs=1e-5)
    text = describe_errors(errors, "guess", "train")
    assert f"mIoU of **{mean_iou(evaluation.counts):.3f}**" in text
    assert "nan" not in text


def test_count_errors_accepts_images_of_different_sizes(scenes):
    small = scenes[:4].map(lambda array: array if array.ndim == 1 else array[:, ::2, ::2])

    class Pieces(list):
        def __len__(self):
            return 6

    errors = count_errors(Guess(), Pieces([small, scenes[4:6]]), 3)
    expected = np.concatenate([evaluate(Guess(), split).counts for split in (small, scenes[4:6])])
    np.testing.assert_array_equal(errors.confusion, expected)


@pytest.mark.parametrize("count", [3, 40])
def test_count_errors_works_with_other_class_sets(tmp_path, scenes, count):
    samples = relabel(scenes, count)
    write_folder(tmp_path, samples)
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"classes": list(samples.classes)}))
    pieces = iterate_samples(tmp_path, "train", "none", batch_size=5)
    errors = count_errors(Guess(samples.classes), pieces)
    assert errors.classes == samples.classes
    assert errors.confusion.shape == (12, count, count)
    assert errors.confusion.sum() == (samples.label != 255).sum()
    with pytest.raises(ValueError, match="classes: the network has 13"):
        count_errors(Guess(), pieces)


def test_count_errors_needs_labels_and_images(scenes):
    with pytest.raises(ValueError, match="split: these images have no labels"):
        count_errors(Guess(), replace(scenes, label=None))
    held_back = np.full_like(scenes.label, 255)
    with pytest.raises(ValueError, match="split: these images have no labels"):
        count_errors(Guess(), replace(scenes, label=held_back))
    held_back[3, 0, 0] = WALL  # one labelled pixel is enough
    assert count_errors(Guess(), replace(scenes, label=held_back)).confusion.sum() == 1
    with pytest.raises(ValueError, match="split: found no image"):
        count_errors(Guess(), scenes[:0])


def test_calibration_error_averages_over_pixels():
    calibration = np.zeros((CONFIDENCE_BINS, 3))
    calibration[7] = 100, 50, 50  # confidence 0.5, half are correct
    calibration[14] = 100, 100, 80  # confidence 1, 80 % are correct
    assert calibration_error(calibration) == pytest.approx(0.1)
    assert np.isnan(calibration_error(np.zeros((CONFIDENCE_BINS, 3))))


def test_summary_states_the_main_findings():
    confusion = np.zeros((2, 13, 13), int)
    confusion[0, BED, BED], confusion[0, BED, WALL], confusion[1, OBJECTS, WALL] = 6, 2, 6
    text = describe_errors(replace(made_up(2), confusion=confusion), "trial", "valid")
    assert "On 2 validation images **trial** has an mIoU of **0.375**" in text
    assert "The lowest recall is that of objects: 0 %." in text
    assert "The worst image is 000001: 0 % of its pixels are correct." in text
    assert "overconfident by 23.0 points (ECE 0.230)" in text
    assert text.splitlines()[-1].startswith(
        "- The most costly confusion is **objects confused with wall** (0.500 of mIoU)"
    )


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ((DISTANCE, 1), "within 2 % of the image width of a boundary: try a higher resolution"),
        ((REGION, 0), "in regions below 1 % of the image: try a higher resolution"),
        ("rare", "objects is rare: try `-p class_weights median`"),
        ("both", "in both directions: look at the labels of these two"),
        ("else", "in large regions of a common class: try more `epochs`"),
    ],
)
def test_advice_depends_on_the_most_costly_confusion(where, words):
    confusion = np.zeros((1, 13, 13), int)
    confusion[0, range(13), range(13)] = 1000
    confusion[0, OBJECTS, WALL] = 400
    confusion[0, OBJECTS, OBJECTS] = 100 if where == "rare" else 5000
    confusion[0, WALL, OBJECTS] = 250 if where == "both" else 0
    errors = replace(made_up(1), confusion=confusion)
    strata = {name: np.zeros_like(counts) for name, counts in errors.strata.items()}
    for name, counts in strata.items():
        counts[where[1] if name == where[0] else -1] = confusion[0]
    assert words in describe_errors(replace(errors, strata=strata), "trial", "valid").splitlines()[-1]


def test_confusion_table_includes_the_code_that_opens_each_row():
    errors = made_up()
    names = ('12" screen', *errors.classes[1:])  # a quotation mark in a class name
    shown = show_confusions(replace(errors, classes=names), 3)
    assert len(shown.data) == 3
    called = [ast.parse(code).body[0].value.args[0].value for code in shown.data.open]
    assert called == shown.data.index.tolist()
    assert " %" in shown.to_html()


def test_confusion_table_escapes_html_in_class_names():
    errors = made_up(count=3)
    html = show_confusions(replace(errors, classes=("<img src=x>", "b&c", "wall"))).to_html()
    assert "<img" not in html
    assert "&lt;img src=x> confused with b&amp;c" in html
    assert 'browser.choose("wall confused with b&amp;c")' in html


def test_each_image_gets_a_confidence_and_a_depth_error(scenes):
    """Confidence is 0.6 in the left half and 0.95 in the right. Predicted depth is 10 % too large."""

    class Far(Guess):
        def forward(self, inputs):
            metres = torch.from_numpy(1.1 * scenes.depth[:2, ::1] / 1000.0).float()
            return Prediction(super().forward(inputs).logits, ((metres - 0.71) / (10 - 0.71))[:, None])

    far = Far()
    far.config = replace(far.config, size=scenes.size)
    errors = count_errors(far, scenes[:2], 2)
    np.testing.assert_allclose(errors.confidence, (0.6 + 0.95) / 2, atol=1e-5)
    np.testing.assert_allclose(errors.depth_error, 0.1, atol=0.01)
    assert np.isnan(count_errors(Guess(), scenes[:2]).depth_error).all()


def test_bin_miou_ignores_classes_without_ground_truth():
    counts = np.zeros((2, 13, 13), int)
    counts[0, WALL, WALL], counts[0, WALL, BED] = 9, 1
    table = score_strata(counts)
    assert table.iloc[0].tolist() == [1.0, 0.9, 0.9]
    assert table.iloc[1].isna().tolist() == [False, True, True]


@pytest.mark.parametrize("count", SETS)
def test_text_fits_in_figures_for_any_class_set(count):
    errors = made_up(count=count)
    errors.confusion[:12, 1] = 0  # absent from half the images
    texts = draw(plot_confusion(errors))
    assert any(text.isdigit() for text in texts) == (count <= 20)
    assert {"share of the pixels", "mIoU", "pixel accuracy"} <= set(draw(plot_strata(errors)))
    assert "The network is overconfident by 23.0 points (ECE 0.230)" in draw(plot_calibration(errors))


def test_data_without_depth_gets_no_results_by_depth(scenes):
    blind = Guess()
    blind.config = replace(blind.config, inputs="rgb", depth_head=False)
    errors = count_errors(blind, replace(scenes, depth=None))
    assert not any("depth" in text for text in draw(plot_strata(errors)))
    assert "depth" not in describe_errors(errors, "blind", "valid")

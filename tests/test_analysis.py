import csv

import numpy as np
import pytest
import torch

from lib.classes import CLASS_NAMES
from lib.data import load_samples
from lib.data.nyuv2 import TABLES
from lib.data.samples import Samples
from lib.data.splits import split_names
from lib.errors import (
    CLASSES,
    CONFIDENCE_BINS,
    DISTANCE,
    REGION,
    SEGMENT,
    STRATA,
    boundary_distance,
    calibration_error,
    count_errors,
    describe_confusions,
    describe_errors,
    describe_sure_errors,
    pixel_strata,
    score_strata,
    segment_shares,
    top_confusions,
    with_and_without,
)
from lib.evaluation import evaluate_native
from lib.explore import (
    class_shares,
    count_data,
    depth_quantiles,
    describe_data,
    describe_leakage,
    find_leakage,
    has_neighbour,
)
from lib.metrics import mean_iou
from lib.model import Prediction

BED, FLOOR, OBJECTS, WALL = (CLASS_NAMES.index(name) for name in ("bed", "floor", "objects", "wall"))


def small_samples(label, depth=2000, measured=None):
    label = np.asarray(label, np.uint8)[None]
    depth = np.broadcast_to(np.uint16(depth), label.shape)
    return Samples(np.array(["000007"]), np.zeros((*label.shape, 3), np.uint8), depth, label, measured)


def test_counts_of_a_small_room():
    label = np.full((24, 32), WALL)
    label[12:] = FLOOR
    label[:, 0] = 255
    depth = np.full((24, 32), 1250, np.uint16)
    depth[0] = 0
    counts = count_data(small_samples(label, depth))
    assert counts.pixels[0, [WALL, FLOOR, CLASSES]].tolist() == [12 * 31, 12 * 31, 24]
    assert counts.pixels.sum() == counts.depth.sum() == label.size
    assert counts.depth[WALL, 0] == 31
    assert counts.depth[FLOOR, 13] == 12 * 31  # 1.2 to 1.3 m
    assert counts.meetings[WALL, FLOOR] == counts.meetings[FLOOR, WALL] == 31  # reach 1, down only
    assert counts.meetings.sum() == 62
    np.testing.assert_array_equal(counts.places[FLOOR], label == FLOOR)
    np.testing.assert_array_equal(counts.missing, depth == 0)
    assert class_shares(counts).pixels[["floor", "wall"]].tolist() == [0.5, 0.5]
    assert class_shares(counts)["without depth"]["wall"] == pytest.approx(1 / 12)
    assert np.isnan(class_shares(counts)["without depth"]["tv"])


def test_filled_holes_count_as_missing():
    measured = np.ones((1, 24, 32), bool)
    measured[0, :6] = False
    counts = count_data(small_samples(np.full((24, 32), WALL), measured=measured))
    assert counts.depth[WALL, 0] == 6 * 32
    assert counts.missing.mean() == 0.25


def test_depth_beyond_the_scale_stays_in_the_last_step():
    counts = count_data(small_samples(np.full((4, 4), WALL), 65_000))
    assert counts.depth[WALL, -1] == 16


def test_quantiles_of_depth():
    histogram = np.zeros(101, int)
    histogram[0], histogram[11:21] = 1000, 5  # missing depth changes nothing; the rest is even from 1 to 2 m
    np.testing.assert_allclose(depth_quantiles(histogram, (0.1, 0.5, 0.9)), (1.1, 1.5, 1.9))


def test_most_validation_frames_of_split_random_have_a_neighbour_in_training():
    with open(TABLES / "nyuv2_split.csv") as file:
        ids = [row["id"] for row in csv.DictReader(file) if row["part"] == "train"]
    names = np.array(sorted(f"{int(number):06d}" for number in ids))
    found = {}
    for split in ("random", "blocks"):
        train, valid = (names[chosen].astype(int) for chosen in split_names(names, split))
        found[split] = int(has_neighbour(valid, train).sum()), len(valid)
    assert found == {"random": (145, 159), "blocks": (0, 197)}


def test_leakage_finds_copies(scenes):
    copies = Samples(*(np.concatenate([array, array]) for array in (scenes.names, scenes.image, scenes.depth)))
    names = np.array([f"{3 * index:06d}" for index in range(24)])  # no neighbours, so every image is a block
    leakage = find_leakage(names, copies.image)
    for leak in leakage.values():
        assert leak.neighbours == 0
        assert len(leak.valid) + leak.train_count == 24
        twin_trains = ~np.isin((leak.valid + 12) % 24, leak.valid)
        np.testing.assert_array_equal(leak.match[twin_trains], (leak.valid[twin_trains] + 12) % 24)
        np.testing.assert_allclose(leak.similarity[twin_trains], 1, atol=1e-5)
        assert twin_trains.any()
        assert (leak.similarity <= 1 + 1e-5).all()


def test_leakage_in_words(scenes):
    room_by_room = describe_leakage(find_leakage(scenes.names, scenes.image))
    assert "validate in split `random`" in room_by_room
    assert "validate in split `blocks`, 0 (0%) have a neighbouring id" in room_by_room
    unnumbered = find_leakage(np.array([f"room {index}" for index in range(12)]), scenes.image)
    assert set(unnumbered) == {"random"}
    assert "neighbouring" not in describe_leakage(unnumbered)
    assert describe_leakage(find_leakage(scenes.names[:1], scenes.image[:1])) == "Too few images to split."


def test_findings_of_the_data_come_from_the_counts(scenes):
    counts = count_data(scenes)
    labelled = scenes.label[scenes.label != 255]
    text = describe_data(counts, {})
    assert f"{np.mean(scenes.label == 255):.1%} have no label" in text
    assert f"wall {np.mean(labelled == WALL):.2%}" in text
    assert f"{np.mean(scenes.depth == 0):.1%} of the pixels have none" in text


def test_boundary_runs_in_the_middle_of_a_sliver():
    label = np.full((10, 100), WALL, np.uint8)
    label[:, 50:] = FLOOR
    distance = 100 * boundary_distance(label)
    np.testing.assert_allclose(distance[5, [49, 50, 44, 55]], [0.5, 0.5, 5.5, 5.5], atol=0.3)
    label[:, 47:53] = 255
    np.testing.assert_allclose(100 * boundary_distance(label), distance, atol=0.3)
    assert (boundary_distance(np.full((4, 4), WALL, np.uint8)) == 1).all()
    assert (boundary_distance(np.full((4, 4), 255, np.uint8)) == 1).all()


def test_segments_of_one_class_are_measured_apart():
    label = np.full((10, 10), WALL, np.uint8)
    label[0, :3] = label[9, :] = OBJECTS
    shares = segment_shares(label)
    assert (shares[0, 0], shares[9, 5], shares[5, 5]) == (0.03, 0.10, 0.87)
    bins = pixel_strata(label, np.full((10, 10), 2500, np.uint16))
    assert STRATA[SEGMENT][bins[SEGMENT][0, 0]] == "3-10"
    assert STRATA[REGION][bins[REGION][9, 5]] == "bottom centre"
    assert STRATA[DISTANCE][bins[DISTANCE][5, 5]] == "over 16"
    assert set(bins) == set(STRATA)


class Guess(torch.nn.Module):
    """Names everything wall with 95 % but the left half, which it names floor with 60 %."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        count, _, height, width = inputs.shape
        probability = torch.full((count, CLASSES, height, width), 0.05 / 12)
        probability[:, WALL] = 0.95
        left = torch.full((CLASSES,), 0.4 / 12)
        left[FLOOR] = 0.6
        probability[..., : width // 2] = left[:, None, None]
        return Prediction(probability.log(), None)


def test_one_pass_counts_what_evaluation_counts(scenes):
    errors = count_errors(Guess(), scenes, scenes.size, "rgbd", "inverse", 5)
    evaluation = evaluate_native(Guess(), scenes, scenes.size, "rgbd", "inverse", 5)
    np.testing.assert_array_equal(errors.confusion, evaluation.counts)
    for name, counts in errors.strata.items():
        np.testing.assert_array_equal(counts.sum(0), evaluation.counts.sum(0), err_msg=name)
    np.testing.assert_array_equal(errors.calibration[..., 0].sum(1), evaluation.counts.sum((0, 1)))
    np.testing.assert_array_equal(errors.calibration[..., 2].sum(1), np.diagonal(evaluation.counts.sum(0)))
    assert errors.sure[..., FLOOR].sum() == 0
    np.testing.assert_array_equal(errors.sure[..., WALL], errors.confusion[..., WALL])
    right = np.mean((scenes.label == WALL)[..., 64:][scenes.label[..., 64:] != 255])
    assert calibration_error(errors.calibration[WALL]) == pytest.approx(abs(0.95 - right), abs=1e-5)
    text = describe_errors(errors, scenes.names, "guess", "train")
    assert f"mIoU {mean_iou(evaluation.counts):.3f}" in text
    assert "nan" not in text
    assert "% of the errors" in describe_sure_errors(errors)


def test_errors_need_labels_and_images(scenes):
    options = (scenes.size, "rgbd", "inverse", 5)
    with pytest.raises(ValueError, match="part: these images have no labels"):
        count_errors(Guess(), Samples(scenes.names, scenes.image, scenes.depth), *options)
    with pytest.raises(ValueError, match="part: found no image"):
        count_errors(Guess(), scenes[:0], *options)


def test_perfect_confidence_has_no_error():
    calibration = np.zeros((1, CONFIDENCE_BINS, 3))
    calibration[0, 7] = 100, 50, 50  # says 0.5, is right in half
    calibration[0, 14] = 100, 100, 80  # says 1, is right in 80 %
    assert calibration_error(calibration) == pytest.approx(0.1)
    assert np.isnan(calibration_error(np.zeros((CONFIDENCE_BINS, 3))))


def test_confusions_are_ranked_by_pixels():
    confusion = np.zeros((2, CLASSES, CLASSES), int)
    confusion[0, BED, BED], confusion[0, BED, WALL], confusion[1, OBJECTS, WALL] = 6, 2, 6
    table = top_confusions(confusion, 2)
    assert table.to_numpy().tolist() == [["objects", "wall", 1.0, 0.75], ["bed", "wall", 0.25, 0.25]]
    assert describe_confusions(confusion, 1) == "- objects taken for wall: 100% of its pixels, 75% of the errors"
    held = with_and_without(confusion)
    assert held.loc["bed"].tolist() == [0.75, 0.0]
    assert np.isnan(held.loc["tv", "with"])


def test_a_stray_class_is_no_class_of_a_bin():
    counts = np.zeros((2, CLASSES, CLASSES), int)
    counts[0, WALL, WALL], counts[0, WALL, BED] = 9, 1
    table = score_strata(counts)
    assert table.iloc[0].tolist() == [1.0, 0.9, 0.9]
    assert table.iloc[1].isna().tolist() == [False, True, True]


def test_embedded_rooms_have_their_other_view_beside_them():
    names = load_samples("synthetic", "train", "official", (6, 8), 40).names
    ids = names.astype(int)
    assert has_neighbour(ids, ids).all()
    train, valid = split_names(names, "blocks")
    assert not has_neighbour(ids[valid], ids[train]).any()

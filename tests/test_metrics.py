import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from lib.metrics import (
    DEPTH,
    DISTANCE,
    all_scores,
    averaged_classes,
    boundary_counts,
    boundary_distance,
    boundary_iou,
    chance_miou,
    class_accuracy,
    confusion_counts,
    depth_scores,
    depth_sums,
    fill_unlabelled,
    frequency_weighted_iou,
    image_accuracy,
    iou,
    mean_iou,
    pixel_accuracy,
    strata_counts,
    strata_edges,
    truth_iou,
)


@pytest.fixture
def random_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 13, (5, 20, 30)).astype(np.uint8)
    prediction = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 13, labels.shape)).astype(
        np.uint8
    )
    labels[rng.random(labels.shape) < 0.2] = 255
    return prediction, labels


def test_counts_and_main_scores_equal_scikit_learn(random_labels):
    prediction, labels = random_labels
    counts = confusion_counts(prediction, labels, 13)
    assert counts.shape == (5, 13, 13)
    assert counts.dtype == np.int64
    for image in range(5):
        seen = labels[image] != 255
        expected = confusion_matrix(labels[image][seen], prediction[image][seen], labels=range(13))
        np.testing.assert_array_equal(counts[image], expected)
    seen = labels != 255
    np.testing.assert_allclose(iou(counts), jaccard_score(labels[seen], prediction[seen], average=None))
    assert mean_iou(counts) == pytest.approx(jaccard_score(labels[seen], prediction[seen], average="macro"))
    assert pixel_accuracy(counts) == pytest.approx(accuracy_score(labels[seen], prediction[seen]))


def test_tensors_and_arrays_agree(random_labels):
    prediction, labels = random_labels
    counts = confusion_counts(torch.from_numpy(prediction), torch.from_numpy(labels), 13)
    assert isinstance(counts, torch.Tensor)
    np.testing.assert_array_equal(counts.numpy(), confusion_counts(prediction, labels, 13))
    assert mean_iou(counts) == mean_iou(counts.numpy())


def test_counts_and_scores_equal_a_hand_calculation():
    counts = confusion_counts(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 255]]), 3)
    np.testing.assert_array_equal(counts[0], [[1, 0, 0], [1, 1, 0], [0, 0, 0]])  # rows = ground truth
    np.testing.assert_allclose(iou(counts), [0.5, 0.5, np.nan])
    assert mean_iou(counts) == 0.5
    assert averaged_classes(counts) == 2
    assert pixel_accuracy(counts) == pytest.approx(2 / 3)


def test_iou_is_pooled_over_images_not_averaged():
    counts = np.array([[[1, 1], [0, 0]], [[90, 0], [0, 9]]])
    assert iou(counts)[0] == pytest.approx(91 / 92)
    assert mean_iou(counts) == mean_iou(counts.sum(0)) == pytest.approx((91 / 92 + 9 / 10) / 2)
    assert mean_iou(counts[None]) == mean_iou(counts)


def test_perfect_scores_are_1_and_ignored_pixels_have_no_effect(random_labels):
    prediction, labels = random_labels
    perfect = confusion_counts(np.where(labels == 255, 0, labels), labels, 13)
    assert mean_iou(perfect) == pixel_accuracy(perfect) == 1
    other = np.where(labels == 255, 7, prediction)
    np.testing.assert_array_equal(
        confusion_counts(other, labels, 13), confusion_counts(prediction, labels, 13)
    )


def test_scores_without_labelled_pixels_are_refused():
    counts = confusion_counts(np.zeros((2, 3, 3), int), np.full((2, 3, 3), 255), 4)
    assert not counts.any()
    assert np.isnan(iou(counts)).all()
    for score in (mean_iou, pixel_accuracy):
        with pytest.raises(ValueError, match="counts: all zero; without a labelled pixel there is no score"):
            score(counts)


@pytest.mark.parametrize(
    ("prediction", "labels", "message"),
    [
        (
            np.zeros((1, 2, 2), int),
            np.full((1, 2, 2), 20),
            "labels: found the value 20, expected 0..12 or 255 = ignore",
        ),
        (np.full((1, 2, 2), 13), np.zeros((1, 2, 2), int), "prediction: found the value 13, expected 0..12"),
        (np.full((1, 2, 2), -1), np.zeros((1, 2, 2), int), "prediction: found the value -1, expected 0..12"),
        (
            np.zeros((1, 2, 3), int),
            np.zeros((1, 2, 2), int),
            r"prediction: found shape \(1, 2, 3\) with labels",
        ),
    ],
)
def test_invalid_labels_and_predictions_are_refused(prediction, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_counts(prediction, labels, 13)


def test_counts_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"counts: found shape \(3, 4\), expected"):
        iou(np.zeros((3, 4)))


def test_further_scores_equal_scikit_learn(random_labels):
    prediction, labels = random_labels
    counts, seen = confusion_counts(prediction, labels, 13), labels != 255
    scores = all_scores(counts)
    assert scores["mean_class_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels[seen], prediction[seen])
    )
    assert frequency_weighted_iou(counts) == pytest.approx(
        jaccard_score(labels[seen], prediction[seen], average="weighted")
    )
    assert image_accuracy(counts)[2] == pytest.approx(
        accuracy_score(labels[2][seen[2]], prediction[2][seen[2]])
    )
    assert np.isnan(class_accuracy(np.zeros((1, 3, 3)))).all()


def test_boundary_counts_equal_a_hand_calculation():
    labels = np.zeros((1, 40, 40), np.uint8)
    labels[:, :, 20:] = 1
    shifted = np.roll(labels, 2, axis=2)
    shifted[:, :, :2] = 0
    counts = boundary_counts(shifted, labels, 3, width=3 / np.hypot(40, 40))
    # bands of 3 columns on each side of the boundary: 17..19 | 20..22 ground truth, 19..21 | 22..24 predicted
    np.testing.assert_array_equal(counts[0], [[40, 120, 120], [40, 120, 120], [0, 0, 0]])
    np.testing.assert_allclose(boundary_iou(counts), [40 / 200, 40 / 200, np.nan])
    perfect = boundary_counts(labels, labels, 3)
    np.testing.assert_allclose(boundary_iou(perfect), [1, 1, np.nan])


def rooms_with_slivers(images=3):
    """Complete label maps of 4 classes, and the same with an unlabelled sliver along every boundary."""
    rng = np.random.default_rng(0)
    whole = np.zeros((images, 96, 128), np.uint8)
    for image in whole:
        for index in (1, 2, 3, 1, 2):
            top, left = rng.integers(5, 50, 2)
            image[top : top + rng.integers(15, 40), left : left + rng.integers(15, 60)] = index
    kernel = np.ones((5, 5), np.uint8)
    outline = np.stack([cv2.erode(image, kernel) != cv2.dilate(image, kernel) for image in whole])
    return whole, np.where(outline, 255, whole).astype(np.uint8)


def test_boundary_iou_ranks_predictions_despite_slivers():
    whole, labels = rooms_with_slivers()

    def score(prediction):
        return np.nanmean(boundary_iou(boundary_counts(prediction, labels, 4, width=0.03)))

    constant = boundary_counts(np.zeros_like(whole), labels, 4, width=0.03)
    assert constant[..., 1].any(1).all()
    assert not constant[..., [0, 2]].any()  # no predicted boundary, so no hits
    assert score(whole) > 0.9
    perfect = np.stack([fill_unlabelled(label) for label in labels])
    assert score(perfect) == 1
    shifted = [score(np.roll(perfect, shift, axis=2)) for shift in (2, 4, 8)]
    assert 0.9 > shifted[0] > shifted[1] > shifted[2] > 0


def test_boundary_in_an_unlabelled_area_counts_only_labelled_pixels():
    labels = np.zeros((1, 40, 40), np.uint8)
    labels[:, :10] = 255
    prediction = np.zeros_like(labels)
    prediction[:, :5] = 1
    reach_3, reach_6 = (
        boundary_counts(prediction, labels, 2, width / np.hypot(40, 40))[0] for width in (3, 6)
    )
    assert not reach_3.any()  # rows 5 to 7 of class 0 are unlabelled
    np.testing.assert_array_equal(reach_6, [[0, 0, 40], [0, 0, 0]])  # row 10


def test_unlabelled_pixels_are_filled_with_the_nearest_label():
    label = np.full((3, 9), 255, np.uint8)
    label[:, 0], label[:, 8] = 4, 7
    filled = fill_unlabelled(label)
    assert (filled[:, :4] == 4).all()
    assert (filled[:, 5:] == 7).all()
    for untouched in (filled, np.full((3, 9), 255, np.uint8)):
        np.testing.assert_array_equal(fill_unlabelled(untouched), untouched)


def test_miou_averages_only_ground_truth_classes():
    counts = np.array([[8, 0, 2], [0, 5, 5], [0, 0, 0]])
    assert mean_iou(counts) == pytest.approx((8 / 10 + 5 / 10) / 2)
    assert averaged_classes(counts) == np.isfinite(truth_iou(counts)).sum() == 2
    assert all_scores(counts)["miou"] == mean_iou(counts)
    with pytest.raises(ValueError, match="counts: all zero; without a labelled pixel there is no score"):
        mean_iou(0 * counts)
    assert chance_miou(counts) == pytest.approx(1 / 3)  # two classes, each half of the pixels: (1/4) / (3/4)


def test_depth_scores_equal_a_hand_calculation():
    valid = np.array([True, True, False])
    sums = depth_sums(np.array([2.0, 3.0, 9.0]), np.array([2.0, 2.0, 1.0]), valid)
    scores = depth_scores(sums)
    assert scores == {"abs_rel": 0.25, "rmse_m": pytest.approx(np.sqrt(0.5)), "delta_1.25": 0.5}
    assert np.isnan(depth_scores(np.zeros(4))["rmse_m"])


def test_boundary_runs_in_the_middle_of_a_sliver():
    label = np.full((10, 100), 11, np.uint8)
    label[:, 50:] = 4
    distance = 100 * boundary_distance(label)
    np.testing.assert_allclose(distance[5, [49, 50, 44, 55]], [0.5, 0.5, 5.5, 5.5], atol=0.3)
    label[:, 47:53] = 255
    np.testing.assert_allclose(100 * boundary_distance(label), distance, atol=0.3)
    assert (boundary_distance(np.full((4, 4), 11, np.uint8)) == 1).all()
    assert (boundary_distance(np.full((4, 4), 255, np.uint8)) == 1).all()


def test_strata_counts_equal_a_hand_calculation():
    label = np.zeros((10, 100), np.uint8)
    label[:, 50:] = 1
    label[0] = 255
    prediction = np.zeros_like(label)
    depth = np.full(label.shape, 2500, np.uint16)
    depth[5:] = 0
    counts = strata_counts(prediction, label, depth, 2, strata_edges(10.0))
    assert counts[DEPTH][0].tolist() == [[250, 0], [250, 0]]  # missing, five rows
    assert counts[DEPTH][3].tolist() == [[200, 0], [200, 0]]  # 2 to 3 m, four rows
    assert counts[DISTANCE][0].tolist() == [[9, 0], [9, 0]]  # one column on each side is within 1 %
    for by_bin in counts.values():
        assert by_bin.sum(0).tolist() == [[450, 0], [450, 0]]

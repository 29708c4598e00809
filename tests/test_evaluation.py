import numpy as np
import pytest
import torch

from lib.data.samples import Samples, resize_samples
from lib.evaluation import evaluate, evaluate_native, predict_batches, predict_labels
from lib.metrics import confusion_counts
from lib.model import build_model
from lib.training import total_loss


def loss(prediction, batch):
    return total_loss(*prediction, *batch[1:], 0.5, "batch", 0.1)


def test_batch_size_does_not_change_the_counts(scenes):
    model = build_model()
    results = [evaluate(model, scenes, "rgbd", "inverse", size, "fp32", loss) for size in (1, 5, 12)]
    assert all(torch.equal(result.counts, results[0].counts) for result in results)
    assert results[0].counts.shape == (12, 13, 13)
    labelled = (scenes.label != 255).sum((1, 2))
    np.testing.assert_array_equal(results[0].counts.sum((1, 2)), labelled)


def test_loss_is_the_plain_mean_over_batches(scenes):
    model = build_model()
    expected = [loss(*pair).total for pair in predict_batches(model, scenes, "rgbd", "inverse", 8, "fp32")]
    assert len(expected) == 2
    result = evaluate(model, scenes, "rgbd", "inverse", 8, "fp32", loss)
    torch.testing.assert_close(torch.tensor(result.losses[0]), torch.stack(expected).mean(), check_dtype=False)


def test_caller_is_not_left_in_inference_mode(scenes):
    batches = predict_batches(build_model(), scenes, "rgbd", "inverse", 4, "fp32")
    next(batches)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_predicted_labels_are_those_counted(scenes):
    model = build_model(3)
    predicted = predict_labels(model, scenes, "rgb", "inverse", 5)
    assert predicted.dtype == np.uint8
    counts = evaluate(model, scenes, "rgb", "inverse", 5, "fp32", loss).counts
    np.testing.assert_array_equal(confusion_counts(predicted, scenes.label, 13), counts)


def test_held_back_labels_can_be_predicted(scenes):
    held_back = Samples(scenes.names[:2], scenes.image[:2], scenes.depth[:2])
    assert predict_labels(build_model(), held_back, "rgbd", "log", 2).shape == (2, 96, 128)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model()


def native(model, samples, **options):
    return evaluate_native(
        model, samples, **{"size": (48, 64), "inputs": "rgbd", "depth_encoding": "inverse", "batch_size": 5} | options
    )


@pytest.mark.parametrize("tta", ["none", "flip", "scales"])
def test_native_batch_size_changes_nothing(model, scenes, tta):
    one, eight = (native(model, scenes[:9], batch_size=size, tta=tta) for size in (1, 8))
    np.testing.assert_array_equal(one.counts, eight.counts)
    np.testing.assert_array_equal(one.predicted, eight.predicted)
    np.testing.assert_allclose(one.depth, eight.depth, rtol=1e-5)


def test_native_scores_are_at_the_labels_size(model, scenes):
    large = resize_samples(scenes[:3], (192, 256))
    result = native(model, large)
    assert result.predicted.shape == (3, 192, 256)
    np.testing.assert_array_equal(result.counts.sum((1, 2)), (large.label != 255).sum((1, 2)))
    np.testing.assert_array_equal(result.counts, confusion_counts(result.predicted, large.label, 13))


def test_native_at_the_working_size_is_plain_evaluation(model, scenes):
    result = native(model, scenes, size=scenes.size)
    np.testing.assert_array_equal(result.counts, evaluate(model, scenes, "rgbd", "inverse", 5, "fp32", loss).counts)


def test_flip_is_undone(scenes):
    """A model that is told where it looks: averaging over mirrored views keeps left on the left."""

    class Sides(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            red = inputs[:, :1]
            return torch.cat((red, -red), 1), red

    left = scenes.image[:1].copy()
    left[..., :64, :], left[..., 64:, :] = 255, 0
    samples = Samples(scenes.names[:1], left, scenes.depth[:1], scenes.label[:1])
    for tta in ("none", "flip", "scales"):
        predicted = native(Sides(), samples, size=(96, 128), tta=tta).predicted[0]
        assert (predicted[:, :60] == 0).all()
        assert (predicted[:, 68:] == 1).all()


def test_zoomed_views_are_nearer(scenes):
    """A model that decides by depth alone sees 4 m as 4 m / zoom, as it was trained to."""
    seen = []

    class Depth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            seen.append((inputs.shape[-1], float(inputs[:, 3].median())))
            return torch.zeros(len(inputs), 13, *inputs.shape[2:]), None

    flat = Samples(scenes.names[:1], scenes.image[:1], np.full((1, 96, 128), 4000, np.uint16), scenes.label[:1])
    native(Depth(), flat, size=(96, 128), depth_encoding="linear", tta="scales")
    metres = {width: 0.71 + depth * (10 - 0.71) for width, depth in seen}
    assert {width: round(depth, 2) for width, depth in metres.items()} == {128: 4.0, 102: 5.0, 160: 3.2}


def test_empty_parts_and_batches_of_nothing(model, scenes):
    with pytest.raises(ValueError, match="part: found no image to evaluate; nothing validates in split official"):
        native(model, scenes[:0])
    with pytest.raises(ValueError, match="batch_size: found 0, expected 1 or more"):
        native(model, scenes, batch_size=0)


def test_held_back_labels_are_predicted_without_counts(model, scenes):
    result = native(model, Samples(scenes.names, scenes.image, scenes.depth))
    assert not result.counts.any()
    assert not result.boundary.any()
    assert result.predicted.shape == scenes.depth.shape


def test_unknown_tta(model, scenes):
    with pytest.raises(ValueError, match="tta: found 'rotate', expected one of none, flip, scales"):
        native(model, scenes, tta="rotate")

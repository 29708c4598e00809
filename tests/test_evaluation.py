import numpy as np
import torch

from lib.data import Samples
from lib.evaluation import evaluate, predict_batches, predict_labels
from lib.losses import total_loss
from lib.metrics import confusion_counts
from lib.model import build_model


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

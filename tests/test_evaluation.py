from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import ENCODER

from lib import evaluation
from lib.batches import encode_batch, plain_batch
from lib.classes import NYUV2_13
from lib.data import iterate_samples
from lib.data.samples import Samples, resize_samples
from lib.evaluation import Predicted, count_predictions, evaluate, predict
from lib.metrics import boundary_counts, confusion_counts, depth_sums
from lib.model import ModelConfig, Prediction, build_model
from lib.training import Losses, Objective

CPU = torch.device("cpu")
LOSS = Objective(soft_iou_weight=0.5, soft_iou_pooling="batch", depth_weight=0.1)


def make(**config):
    torch.manual_seed(0)
    return build_model(encoder=ENCODER, **{"classes": NYUV2_13} | config).eval()


@pytest.fixture(scope="module")
def model():
    """A network whose working size is half the size of the scenes."""
    return make(size=(48, 64))


class Stub(torch.nn.Module):
    """A network that returns a function of its inputs."""

    def __init__(self, answer, **config):
        super().__init__()
        self.config = ModelConfig(**{"size": (96, 128), "classes": NYUV2_13} | config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answer = answer

    def forward(self, inputs):
        return self.answer(inputs)


def logits_of(labels, count):
    return 9.0 * torch.nn.functional.one_hot(labels, count).movedim(-1, 1)


@pytest.mark.parametrize("tta", ["none", "flip", "scales"])
def test_results_do_not_depend_on_batch_size(model, scenes, tta):
    one, eight = (evaluate(model, scenes[:9], size, tta) for size in (1, 8))
    np.testing.assert_array_equal(one.counts, eight.counts)
    np.testing.assert_array_equal(one.predicted, eight.predicted)
    assert one.counts.shape == (9, 13, 13)
    np.testing.assert_array_equal(one.counts.sum((1, 2)), (scenes.label[:9] != 255).sum((1, 2)))


def test_huge_images_do_not_shrink_later_batches(model, scenes, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_BATCH_PIXELS", 4 * 96 * 128)
    huge = resize_samples(scenes[:2], (192, 256))
    batches = predict(model, [huge, scenes[2:9]], batch_size=8)
    assert [len(batch.samples) for batch in batches] == [1, 1, 4, 3]


def test_evaluation_keeps_names_scenes_and_classes(model, scenes):
    result = evaluate(model, scenes)
    assert list(result.names) == list(scenes.names)
    assert list(result.scene) == list(scenes.scene)
    assert result.classes == scenes.classes
    assert evaluate(model, replace(scenes, scene=None)[:2]).scene is None
    assert (result.losses, result.boundary, result.depth) == (None, None, None)


def test_counts_match_the_returned_predictions(model, scenes):
    large = resize_samples(scenes[:3], (192, 256))
    result = evaluate(model, large, 2)
    assert result.predicted.shape == (3, 192, 256)
    assert result.predicted.dtype == np.uint8
    np.testing.assert_array_equal(result.counts, confusion_counts(result.predicted, large.label, 13))


def test_predictions_at_working_size_equal_the_network_argmax(scenes):
    model = make(size=scenes.size)
    inputs = encode_batch(plain_batch(scenes), model.config, CPU).inputs
    with torch.inference_mode():
        expected = model(inputs).logits.argmax(1)
    np.testing.assert_array_equal(evaluate(model, scenes, 12).predicted, expected)


def test_logits_are_upsampled_before_the_argmax(scenes):
    """At half size, one column has a high score for class 1. After upsampling, class 1 wins four columns."""

    def answer(inputs):
        scores = torch.zeros(len(inputs), 13, *inputs.shape[2:])
        scores[:, 0], scores[:, 1, :, 10] = 1.0, 8.0
        return Prediction(scores, None)

    predicted = evaluate(Stub(answer, size=(48, 64)), scenes[:1]).predicted[0]
    (columns,) = np.nonzero((predicted == 1).all(0))
    assert list(columns) == [
        19,
        20,
        21,
        22,
    ]  # a quarter of 8 still beats 1; nearest-neighbour upsampling would give only 20 and 21


def test_evaluation_ignores_the_depth_range_of_the_data(model, scenes):
    """The network takes metres, so the depth range of another data set has no effect."""
    one, other = (
        evaluate(model, replace(scenes[:3], depth_range_m=limits)) for limits in ((0.71, 10.0), (1.0, 2.0))
    )
    np.testing.assert_array_equal(one.counts, other.counts)


def test_mixed_size_evaluation_equals_separate_evaluations(model, scenes):
    pieces = [scenes[:5], resize_samples(scenes[5:8], (60, 100)), resize_samples(scenes[8:], (192, 256))]
    together, alone = evaluate(model, pieces, 4), [evaluate(model, piece, 3) for piece in pieces]
    np.testing.assert_array_equal(together.counts, np.concatenate([result.counts for result in alone]))
    assert list(together.names) == list(scenes.names)
    assert isinstance(together.predicted, list)
    for mask, expected in zip(
        together.predicted, [mask for result in alone for mask in result.predicted], strict=True
    ):
        np.testing.assert_array_equal(mask, expected)


def test_iterated_and_loaded_samples_give_the_same_results(model, scenes):
    result = evaluate(model, iterate_samples("synthetic", "train", "none", limit=12, batch_size=5))
    expected = evaluate(model, scenes)
    np.testing.assert_array_equal(result.counts, expected.counts)
    np.testing.assert_array_equal(result.predicted, expected.predicted)
    assert list(result.scene) == list(expected.scene)


def test_loss_is_the_unweighted_mean_over_batches(model, scenes):
    small, expected = resize_samples(scenes, model.config.size), []
    for batch in (small[:8], small[8:]):
        encoded = encode_batch(plain_batch(batch), model.config, CPU)
        with torch.inference_mode():
            expected.append(torch.stack(LOSS(model(encoded.inputs), encoded)))
    result = evaluate(model, scenes, 8, loss=LOSS)  # native size; the loss is computed at the working size
    torch.testing.assert_close(torch.tensor(result.losses), torch.stack(expected).mean(0), check_dtype=False)
    terms = Losses(*result.losses)
    assert terms.total == pytest.approx(terms.cross_entropy + 0.5 * terms.soft_iou + 0.1 * terms.depth_l1)
    assert evaluate(model, scenes, 8, "scales", loss=LOSS).losses == result.losses  # TTA has no effect


def test_caller_is_not_left_in_inference_mode(model, scenes):
    model.train()
    batches = predict(model, scenes, 4)
    next(batches)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not model.training


def test_confidence_is_the_probability_of_the_predicted_class(model, scenes):
    for tta in ("none", "flip"):
        plain, sure = (list(predict(model, scenes[:4], 3, tta, confidence=asked)) for asked in (False, True))
        assert [batch.confidence for batch in plain] == [None, None]
        for first, second in zip(plain, sure, strict=True):
            np.testing.assert_array_equal(first.labels, second.labels)
            assert second.confidence.shape == second.labels.shape
            assert second.confidence.min() >= 1 / 13
            assert second.confidence.max() <= 1

    def answer(inputs):  # probability of class 1: 0.5 where the image is dark, 0.75 where it is bright
        logits = torch.full((len(inputs), 2, *inputs.shape[2:]), 0.0)
        logits[:, 1] = torch.where(inputs[:, 0] < 0, 0.0, np.log(3))
        return Prediction(logits, None)

    image = np.zeros((1, 96, 128, 3), np.uint8)
    image[:, :, 64:] = 255
    samples = Samples(np.array(["a"]), image, classes=("a", "b"))
    stub = Stub(answer, classes=("a", "b"), inputs="rgb")
    (batch,) = predict(stub, samples, confidence=True)
    np.testing.assert_allclose(
        batch.confidence[0, :, [10, 100]], np.repeat([[0.5], [0.75]], 96, 1), rtol=1e-6
    )
    (batch,) = predict(stub, samples, tta="flip", confidence=True)
    np.testing.assert_allclose(
        batch.confidence[0, :, [10, 100]], np.repeat([[0.5], [0.75]], 96, 1), rtol=1e-6
    )


def test_predicted_depth_is_in_metres_at_native_size(scenes):
    half = Stub(
        lambda inputs: Prediction(torch.zeros(len(inputs), 13, 48, 64), torch.full((len(inputs), 1, 48, 64), 0.5)),
        size=(48, 64), depth_range_m=(1.0, 5.0),
    )  # fmt: skip
    (batch,) = predict(half, scenes[:2])
    assert batch.depth_m.shape == (2, 96, 128)
    assert (batch.depth_m == 3).all()
    (batch,) = predict(make(depth_head=False), scenes[:2])
    assert batch.depth_m is None


def test_flipped_views_are_flipped_back(scenes):
    """The network predicts class a where the image is bright. With mirrored views, left must stay left."""
    sides = Stub(
        lambda inputs: Prediction(torch.cat((inputs[:, :1], -inputs[:, :1]), 1), None), classes=("a", "b")
    )
    image = np.zeros((1, 96, 128, 3), np.uint8)
    image[:, :, :64] = 255
    samples = Samples(np.array(["a"]), image, scenes.depth[:1], classes=("a", "b"))
    for tta in ("none", "flip", "scales"):
        predicted = evaluate(sides, samples, tta=tta).predicted[0]
        assert (predicted[:, :60] == 0).all()
        assert (predicted[:, 68:] == 1).all()


def test_zoomed_views_have_their_depth_divided_by_the_zoom(scenes):
    """A network with depth as its only input sees 4 m as 4 m / zoom, as in training."""
    seen = []

    def look(inputs):
        seen.append((inputs.shape[-1], float(inputs[:, 0].median())))
        return Prediction(torch.zeros(len(inputs), 13, *inputs.shape[2:]), None)

    flat = replace(scenes[:1], depth=np.full((1, 96, 128), 4000, np.uint16))
    evaluate(Stub(look, inputs="depth", depth_encoding="linear"), flat, tta="scales")
    metres = {width: 0.71 + depth * (10 - 0.71) for width, depth in seen}
    assert {width: round(depth, 2) for width, depth in metres.items()} == {128: 4.0, 102: 5.0, 160: 3.2}


def test_rgb_network_evaluates_samples_without_depth(scenes):
    bare = Samples(scenes.names, scenes.image, label=scenes.label, classes=scenes.classes)
    result = evaluate(make(inputs="rgb"), bare, tta="scales")
    np.testing.assert_array_equal(result.counts, evaluate(make(inputs="rgb"), scenes, tta="scales").counts)


def test_unlabelled_samples_get_predictions_but_no_counts(model, scenes):
    held_back = Samples(scenes.names, scenes.image, scenes.depth, classes=scenes.classes)
    result = count_predictions(predict(model, held_back), thorough=True, keep=True)
    assert not result.counts.any()
    assert not result.boundary.any()
    np.testing.assert_array_equal(result.predicted, evaluate(model, scenes).predicted)


def test_thorough_counts_equal_the_metrics_functions(model, scenes):
    batches = list(predict(model, scenes, 5))
    result = count_predictions(batches, thorough=True, keep=True)
    np.testing.assert_array_equal(result.boundary, boundary_counts(result.predicted, scenes.label, 13))
    depth_m = np.concatenate([batch.depth_m for batch in batches])
    np.testing.assert_allclose(result.depth, depth_sums(depth_m, scenes.depth / 1000, scenes.depth > 0))
    assert result.depth[0] == (scenes.depth > 0).sum()
    flat = count_predictions([batch._replace(depth_m=None) for batch in batches], thorough=True)
    assert not flat.depth.any()


def test_external_predictions_are_counted_like_a_networks(scenes):
    """Counting needs samples and predicted labels, but no network."""
    perfect = np.where(scenes.label == 255, 0, scenes.label)
    result = count_predictions([Predicted(scenes[:7], perfect[:7]), Predicted(scenes[7:], perfect[7:])])
    np.testing.assert_array_equal(result.counts, confusion_counts(perfect, scenes.label, 13))
    assert np.trace(result.counts.sum(0)) == (scenes.label != 255).sum()


def test_samples_of_other_classes_are_refused(model, scenes):
    renamed = replace(scenes, classes=(*NYUV2_13[:2], "roof", *NYUV2_13[3:]))
    with pytest.raises(ValueError) as error:
        evaluate(model, renamed)
    assert str(error.value) == (
        "classes: the network has 'ceiling' as class 2, the data has 'roof' as class 2; use what has the same classes"
    )
    with pytest.raises(ValueError, match="classes: the network has 'ceiling' as class 2"):
        evaluate(model, [scenes[:2], renamed])


def test_evaluation_supports_40_classes(scenes):
    classes = tuple(f"class {index}" for index in range(40))
    stub = Stub(
        lambda inputs: Prediction(logits_of(torch.full((len(inputs), 96, 128), 39), 40), None),
        classes=classes,
    )
    result = evaluate(stub, replace(scenes[:2], classes=classes))
    assert result.counts.shape == (2, 40, 40)
    assert result.counts[..., 39].sum() == result.counts.sum() > 0


def test_empty_splits_and_invalid_options_are_refused(model, scenes):
    for nothing in (scenes[:0], []):
        with pytest.raises(
            ValueError,
            match="split: found no image to evaluate; with validation none there are no validation images, use split test",
        ):
            evaluate(model, nothing)
    with pytest.raises(ValueError, match="batch_size: found 0, expected a whole number of 1 or more"):
        evaluate(model, scenes, batch_size=0)
    with pytest.raises(ValueError, match="tta: found 'rotate', expected one of none, flip, scales"):
        evaluate(model, scenes, tta="rotate")


def test_views_are_resized_once_per_zoom(model, scenes, monkeypatch):
    """A GPU waits for resizing on the CPU, so each batch is resized for three zooms, not for six views."""
    sizes = []
    monkeypatch.setattr(
        evaluation,
        "resize_samples",
        lambda samples, size: sizes.append(size) or resize_samples(samples, size),
    )
    list(predict(model, scenes[:4], 2, "scales"))
    assert sizes == [(48, 64), (38, 51), (60, 80)] * 2

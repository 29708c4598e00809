import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from small_run import ENCODER, PARAMETERS, small_samples

from lib.batches import Batch, training_loader
from lib.losses import lovasz_loss, masked_l1, segmentation_loss, soft_iou_loss
from lib.model import Prediction, build_model
from lib.runs import open_run, read_history
from lib.training import Losses, Objective, Optimisation, build_network, build_objective, fit


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(2, 4, 6, 7, generator=generator)).requires_grad_()


@pytest.fixture
def labels():
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 3, (2, 6, 7), generator=generator)  # class 3 never occurs
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return labels


def batch_of(labels):
    depth = torch.linspace(0, 1, labels.numel()).view(labels.shape)[:, None]
    return Batch(torch.zeros(len(labels), 4, *labels.shape[1:]), labels, depth, depth > 0.3)


def loss_of(logits, labels, depth=None, soft_iou_weight=0.0, depth_weight=0.1, **options):
    objective = Objective(soft_iou_weight, "batch", depth_weight, **options)
    return objective(Prediction(logits, depth), batch_of(labels))


def test_total_is_the_weighted_sum_of_unweighted_terms(logits, labels):
    depth = torch.full((2, 1, 6, 7), 0.25)
    losses = loss_of(logits, labels, depth, 0.5, 0.1, lovasz_weight=0.25)
    batch = batch_of(labels)
    expected = Losses(
        total=None,
        cross_entropy=F.cross_entropy(logits, labels, ignore_index=255),
        soft_iou=soft_iou_loss(logits, labels),
        lovasz=lovasz_loss(logits, labels),
        depth_l1=masked_l1(depth, batch.depth, batch.valid_depth),
    )
    for name in Losses._fields[1:]:
        torch.testing.assert_close(getattr(losses, name), getattr(expected, name))
        assert getattr(losses, name) > 0.05
    weighted = (
        expected.cross_entropy + 0.5 * expected.soft_iou + 0.25 * expected.lovasz + 0.1 * expected.depth_l1
    )
    torch.testing.assert_close(losses.total, weighted)


def test_zero_weights_leave_the_loss_unchanged(logits, labels):
    losses = loss_of(logits, labels)
    assert losses.total == losses.cross_entropy
    assert losses.lovasz == losses.depth_l1 == 0
    assert losses.soft_iou > 0  # always computed with the cross-entropy, for the curves
    (gradient,) = torch.autograd.grad(losses.total, logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels, ignore_index=255), logits)
    torch.testing.assert_close(gradient, expected)


def test_class_weights_affect_only_cross_entropy(logits, labels):
    weights = torch.tensor([0.5, 2.0, 3.0, 1.0])
    plain, weighted = (
        loss_of(logits, labels, None, 0.5),
        loss_of(logits, labels, None, 0.5, class_weights=weights),
    )
    torch.testing.assert_close(
        weighted.cross_entropy, F.cross_entropy(logits, labels, weights, ignore_index=255)
    )
    assert weighted.cross_entropy != plain.cross_entropy
    assert weighted.soft_iou == plain.soft_iou


def test_lovasz_loss_and_gradient_match_smp(logits, labels):
    theirs = smp.losses.LovaszLoss("multiclass", ignore_index=255)(logits, labels)
    ours = lovasz_loss(logits, labels)
    assert ours == theirs > 0.1
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_lovasz_of_a_perfect_prediction_is_0(labels):
    logits = 50.0 * F.one_hot(labels.clip(max=3), 4).permute(0, 3, 1, 2)
    assert lovasz_loss(logits, labels) < 1e-6


def test_unlabelled_batch_has_zero_loss_and_gradient(logits):
    labels = torch.full((2, 6, 7), 255)
    losses = loss_of(logits, labels, None, 0.5, class_weights=torch.arange(4.0), lovasz_weight=1.0)
    assert torch.stack(losses).tolist() == [0] * 5
    (gradient,) = torch.autograd.grad(losses.total, logits)
    assert not gradient.any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("pooling", ["batch", "image", "exp061"])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 3.0, 1.0])])
def test_total_without_depth_equals_segmentation_loss(logits, labels, pooling, weights):
    objective = Objective(0.7, pooling, 0.1, weights)
    losses = objective(Prediction(logits, None), batch_of(labels))
    assert losses.total == segmentation_loss(logits, labels, 0.7, pooling, weights)
    assert objective.weights == {"cross_entropy": 1, "soft_iou": 0.7, "lovasz": 0.0, "depth_l1": 0.1}


def test_objective_is_built_from_parameters_and_training_labels():
    samples = small_samples()
    objective = build_objective(PARAMETERS, samples)
    assert (objective.soft_iou_weight, objective.soft_iou_pooling) == (0.5, "batch")
    assert (objective.depth_weight, objective.lovasz_weight) == (0.1, 0.0)
    assert objective.class_weights is None
    median = PARAMETERS | {"class_weights": "median"}
    first, rest = (build_objective(median, split).class_weights for split in (samples[:4], samples[4:]))
    assert first.shape == (13,)
    assert (first != rest).any()
    with pytest.raises(ValueError, match="class_weights: found 'mean', expected one of none, median"):
        build_objective(PARAMETERS | {"class_weights": "mean"}, samples)
    with pytest.raises(
        ValueError, match="soft_iou_pooling: found 'mean', expected one of batch, image, exp061"
    ):
        Objective(soft_iou_pooling="mean")


def test_history_records_each_loss_term():
    samples = small_samples()[:8]
    parameters = PARAMETERS | {"run_name": "terms"}
    objective = Objective(0.5, "batch", 0.1, lovasz_weight=0.25)
    optimisation = Optimisation(epochs=2, learning_rate=1e-3, weight_decay=0.0)

    def build():
        return build_network(parameters, samples.classes, samples.depth_range_m)

    with open_run(parameters) as run:
        loader = training_loader(samples[:6], "none", 3, 0, 0)
        list(fit(build, loader, samples[6:], run, objective, optimisation, "fp32", "cpu"))
    history = read_history(run)
    for split in ("train", "valid"):
        names = [f"{split}_{term}" for term in ("cross_entropy", "soft_iou", "lovasz", "depth_l1")]
        terms = history[names]
        assert (terms > 0).all(axis=None)
        pd.testing.assert_series_equal(
            (terms * [1, 0.5, 0.25, 0.1]).sum(axis=1), history[f"{split}_loss"], check_names=False, rtol=1e-5
        )
    assert np.all(np.diff(history.train_cross_entropy) < 0)


def test_encoder_lr_scale_scales_the_encoder_step():
    model = build_model(encoder=ENCODER, classes=("a", "b"))
    start = [weights.detach().clone() for weights in model.parameters()]
    optimizer = Optimisation(1, 0.01, 0.0, encoder_lr_scale=0.1).build_optimizer(model)
    for weights in model.parameters():
        weights.grad = torch.ones_like(weights)
    optimizer.step()  # AdamW's first step is the learning rate times the sign of the gradient
    moved = {
        id(weights): (before - weights.detach()).mean().item()
        for before, weights in zip(start, model.parameters(), strict=True)
    }
    encoder = {id(weights) for weights in model.net.encoder.parameters()}
    assert 0 < len(encoder) < len(moved)
    for key, step in moved.items():
        assert step == pytest.approx(0.001 if key in encoder else 0.01, rel=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_encoder_lr_scale_holds_throughout_the_schedule(schedule):
    optimisation = Optimisation(10, 0.01, 0.0, schedule, encoder_lr_scale=0.1)
    optimizer = optimisation.build_optimizer(build_model(encoder=ENCODER, classes=("a", "b")))
    scheduler = optimisation.build_schedule(optimizer, steps=1)
    highest = []
    for _ in range(3):
        encoder, others = (group["lr"] for group in optimizer.param_groups)
        assert encoder == pytest.approx(0.1 * others)
        highest.append(others)
        optimizer.step()
        scheduler.step()
    assert max(highest) == pytest.approx(0.01, rel=0.05)

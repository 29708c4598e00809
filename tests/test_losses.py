import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.losses import masked_l1, median_frequency_weights, segmentation_loss, soft_iou_loss

POOLINGS = ("batch", "image", "exp061")


def naive_soft_iou(logits, labels, pooling):
    """The soft IoU loss by its definition, one image and one class at a time."""
    softmax = logits.softmax(1)
    images, classes = logits.shape[:2]
    intersection, union, count = (torch.zeros(images, classes, dtype=logits.dtype) for _ in range(3))
    for image in range(images):
        labelled = labels[image] != 255
        for index in range(classes):
            p = softmax[image, index][labelled]
            y = (labels[image][labelled] == index).to(p.dtype)
            intersection[image, index] = (p * y).sum()
            union[image, index] = (p + y - p * y).sum()
            count[image, index] = y.sum()
    if pooling == "batch":
        present = count.sum(0) > 0
        return 1 - (intersection.sum(0) / union.sum(0))[present].mean()
    if pooling == "image":
        return 1 - (intersection / union)[count > 0].mean()
    return 1 - (intersection / (union + 1e-6))[:, count.sum(0) > 0].mean()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 7, 9, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 9, 11), generator=generator)  # 5 and 6 never occur
    labels[0][labels[0] == 1] = 2  # 1 is absent from one image
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("pooling", POOLINGS)
def test_soft_iou_loss_and_gradient_equal_the_definition(batch, pooling):
    logits, labels = batch
    ours, naive = soft_iou_loss(logits, labels, pooling), naive_soft_iou(logits, labels, pooling)
    assert ours.item() == pytest.approx(naive.item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, naive)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_segmentation_loss_is_cross_entropy_plus_weighted_soft_iou(batch, pooling):
    logits, labels = batch
    ours = segmentation_loss(logits, labels, 0.7, pooling)
    parts = F.cross_entropy(logits, labels, ignore_index=255) + 0.7 * naive_soft_iou(logits, labels, pooling)
    assert ours.item() == pytest.approx(parts.item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, parts)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert torch.equal(segmentation_loss(logits, labels, 0, pooling), segmentation_loss(logits, labels, 0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_segmentation_loss_gradient_equals_the_numerical_gradient(batch, pooling):
    logits, labels = (tensor[:, ..., :3, :3].detach() for tensor in batch)
    assert torch.autograd.gradcheck(
        lambda z: segmentation_loss(z, labels, 0.5, pooling), logits.requires_grad_()
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_ignored_pixels_do_not_affect_loss_or_gradient(batch, pooling):
    logits, labels = batch
    changed = (
        torch.where((labels == 255)[:, None], 50 * torch.randn_like(logits), logits).detach().requires_grad_()
    )
    losses = [segmentation_loss(z, labels, 0.5, pooling) for z in (logits, changed)]
    assert losses[0] == losses[1]
    first, second = (
        torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (logits, changed), strict=True)
    )
    assert torch.equal(first, second)
    assert not first.movedim(1, -1)[labels == 255].any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_unlabelled_batch_has_zero_loss_and_gradient(batch, pooling):
    logits, labels = batch
    loss = segmentation_loss(logits, torch.full_like(labels, 255), 0.5, pooling)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("pooling", ["batch", "image"])
def test_unlabelled_image_adds_no_loss_and_no_gradient(batch, pooling):
    logits, labels = batch
    labels = torch.cat((labels[:1], torch.full_like(labels[:1], 255)))
    loss = segmentation_loss(logits[:2], labels, 0.5, pooling)
    assert loss.item() == pytest.approx(
        segmentation_loss(logits[:1], labels[:1], 0.5, pooling).item(), abs=1e-12
    )
    assert not torch.autograd.grad(loss, logits)[0][1].any()


def test_unlabelled_image_adds_a_constant_in_exp061_pooling(batch):
    logits, labels = batch
    labels = torch.cat((labels[:1], torch.full_like(labels[:1], 255)))
    loss = soft_iou_loss(logits[:2], labels, "exp061")
    assert loss.item() == pytest.approx(
        (1 + soft_iou_loss(logits[:1], labels[:1], "exp061").item()) / 2, abs=1e-12
    )
    assert not torch.autograd.grad(loss, logits)[0][1].any()


def test_perfect_prediction_has_zero_soft_iou_loss_except_in_exp061(batch):
    _, labels = batch
    logits = 200.0 * F.one_hot(labels.clip(max=6), 7).movedim(-1, 1).double()
    assert soft_iou_loss(logits, labels, "batch") == soft_iou_loss(logits, labels, "image") == 0
    present = torch.stack([torch.stack([(image == index).any() for index in range(5)]) for image in labels])
    floor = float((~present).double().mean())  # pairs whose class is absent from the image
    assert floor > 0
    assert soft_iou_loss(logits, labels, "exp061").item() == pytest.approx(floor, abs=1e-6)


def test_losses_equal_a_hand_calculation():
    logits = torch.zeros(1, 2, 1, 2)  # both classes have probability 0.5 in both pixels
    labels = torch.tensor([[[0, 1]]])
    for pooling in ("batch", "image"):  # I = 0.5, U = 1 + 1 - 0.5 for either class
        assert soft_iou_loss(logits, labels, pooling).item() == pytest.approx(1 - 0.5 / 1.5)
    assert segmentation_loss(logits, labels, 0).item() == pytest.approx(np.log(2))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_loss_decreases_as_predictions_improve(batch, pooling):
    logits, labels = batch
    towards = F.one_hot(labels.clip(max=6), 7).movedim(-1, 1)
    losses = [segmentation_loss(logits + step * towards, labels, 0.5, pooling).item() for step in range(5)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_precision_logits_are_summed_in_wider_precision(dtype, pooling):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(1, 5, 480, 640, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 5, (1, 480, 640), generator=generator)
    loss = segmentation_loss(logits, labels, 0.5, pooling)
    exact = segmentation_loss(logits.detach().double(), labels, 0.5, pooling)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)  # sums above 65504 overflow in fp16
    (1000 * loss).backward()
    assert logits.grad.dtype == dtype
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_loss_does_not_depend_on_memory_layout(batch, pooling):
    logits, labels = batch
    loss = segmentation_loss(logits, labels, 0.5, pooling)
    expected = torch.autograd.grad(loss, logits)[0]
    apart = torch.zeros(3, 7, 9, 22, dtype=torch.float64)[..., ::2].copy_(logits.detach())
    layouts = [
        logits.detach().contiguous(memory_format=torch.channels_last),
        apart,
        logits.detach().mT.contiguous().mT,
    ]
    for layout in layouts:
        assert not layout.is_contiguous()
        layout.requires_grad_()
        other = segmentation_loss(layout, labels, 0.5, pooling)
        assert other.item() == pytest.approx(loss.item(), abs=1e-14)
        torch.testing.assert_close(torch.autograd.grad(other, layout)[0], expected, rtol=0, atol=1e-14)


def test_loss_does_not_depend_on_chunk_size(batch, monkeypatch):
    logits, labels = batch
    whole = segmentation_loss(logits, labels, 0.5)
    expected = torch.autograd.grad(whole, logits)[0]
    for chunk in (1, 4 * logits[:, :, :1].numel()):
        monkeypatch.setattr("lib.losses.CPU_CHUNK", chunk)
        loss = segmentation_loss(logits, labels, 0.5)
        assert loss.item() == pytest.approx(whole.item(), abs=1e-14)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, rtol=0, atol=1e-14)


def test_uint8_labels_give_the_same_loss(batch):
    logits, labels = batch
    assert torch.equal(segmentation_loss(logits, labels.byte(), 0.5), segmentation_loss(logits, labels, 0.5))


def test_invalid_pooling_shapes_and_labels_are_refused(batch):
    logits, labels = batch
    with pytest.raises(
        ValueError, match="soft_iou_pooling: found 'mean', expected one of batch, image, exp061"
    ):
        soft_iou_loss(logits, labels, "mean")
    with pytest.raises(
        ValueError, match=r"labels: found shape \(2, 9, 11\) with logits \(3, 7, 9, 11\), expected"
    ):
        segmentation_loss(logits, labels[:2], 0.5)
    with pytest.raises(ValueError, match="labels: found the value 20, expected 0..6 or 255 = ignore"):
        segmentation_loss(logits, torch.where(labels == 3, 20, labels), 0.5)


def test_masked_l1_equals_a_hand_calculation():
    prediction = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    target = torch.tensor([0.0, 5.0, float("nan")])
    loss = masked_l1(prediction, target, torch.tensor([True, True, False]))
    assert loss == 2
    loss.backward()
    assert prediction.grad.tolist() == [0.5, -0.5, 0]
    assert masked_l1(prediction, target, torch.zeros(3, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match="expected one shape"):
        masked_l1(prediction, target[:2], torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("soft_iou_weight", [0, 0.7])
def test_class_weighted_loss_and_gradient_match_torch(batch, soft_iou_weight):
    logits, labels = batch
    weights = torch.tensor([0.5, 3, 1, 0, 2, 7, 1], dtype=torch.float64)  # class 5 never occurs
    criterion = torch.nn.CrossEntropyLoss(weights, ignore_index=255)
    expected = criterion(logits, labels)
    if soft_iou_weight:
        expected = expected + soft_iou_weight * naive_soft_iou(logits, labels, "batch")
    ours = segmentation_loss(logits, labels, soft_iou_weight, class_weights=weights)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("labelled", [False, True])
def test_batch_of_zero_weight_has_zero_loss_and_gradient(batch, labelled):
    logits, labels = batch
    labels = torch.full_like(labels, 1 if labelled else 255)
    loss = segmentation_loss(logits, labels, 0, class_weights=torch.tensor([1.0, 0, 1, 1, 1, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert not gradient.any()


def test_median_frequency_weights_equal_a_hand_calculation():
    labels = np.full((3, 2, 4), 255, np.uint8)
    labels[0] = [[0, 0, 0, 0], [0, 0, 1, 1]]
    labels[1] = [[0, 0, 0, 1], [255, 255, 255, 255]]
    labels[2, 0, :2] = 3
    # share of the labelled pixels in the images that contain the class: 9/12 of class 0, 3/12 of 1, 2/2 of 3;
    # their median is 3/4; class 2 never occurs
    weights = median_frequency_weights(labels, 4)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1, 3, 1, 0.75]


def test_median_frequency_weights_balance_class_shares():
    rng = np.random.default_rng(1)
    labels = rng.choice(4, (5, 20, 20), p=(0.7, 0.2, 0.08, 0.02)).astype(
        np.uint8
    )  # every class in every image
    shares = np.bincount(labels.ravel()) / labels.size
    weighted = median_frequency_weights(labels, 4).numpy() * shares
    np.testing.assert_allclose(weighted, np.median(shares), rtol=1e-6)


def test_losses_are_correct_for_2_to_60_classes():
    """With C equally frequent and equally likely classes in P pixels, the cross-entropy is ln C.

    Each class has I = P/C^2 and U = 2P/C - I.
    """
    for count in (2, 3, 40, 60):
        labels = torch.arange(count).repeat(2)[None, None]
        logits = torch.zeros(1, count, *labels.shape[1:])
        assert segmentation_loss(logits, labels, 0).item() == pytest.approx(np.log(count), rel=1e-5)
        assert soft_iou_loss(logits, labels).item() == pytest.approx(
            1 - (1 / count**2) / (2 / count - 1 / count**2), rel=1e-5
        )

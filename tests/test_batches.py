import time
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from lib import batches
from lib.batches import (
    EpochBatches,
    TrainingSet,
    build_augmentation,
    check_depth,
    decode_depth,
    encode_batch,
    encode_depth,
    encode_inputs,
    plain_batch,
    stack_items,
    training_loader,
)
from lib.classes import NYUV2_13
from lib.data import Samples
from lib.data.samples import DEPTH_RANGE_M
from lib.model import ModelConfig

INPUT_CHANNELS = {"rgb": 3, "depth": 1, "rgbd": 4, "rgbd_xy": 6}


def millimetres(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("encoding", "two_metres"),
    [
        ("inverse", (1 / 2 - 1 / 10) / (1 / 0.71 - 1 / 10)),
        ("linear", (2 - 0.71) / (10 - 0.71)),
        ("log", (np.log(2) - np.log(0.71)) / (np.log(10) - np.log(0.71))),
    ],
)
def test_depth_encodings_equal_a_hand_calculation(encoding, two_metres):
    near, far = (1, 0) if encoding == "inverse" else (0, 1)
    encoded = encode_depth(millimetres(0, 300, 710, 2000, 10_000, 12_000), encoding, DEPTH_RANGE_M)
    torch.testing.assert_close(
        encoded, torch.tensor([0, near, near, two_metres, far, far], dtype=torch.float32)
    )


@pytest.mark.parametrize("depth_range_m", [(0.71, 10.0), (0.2, 3.0), (5, 80)])
def test_linear_depth_is_decoded_to_metres(depth_range_m):
    nearest, farthest = depth_range_m
    depth_mm = torch.linspace(1000 * nearest, 1000 * farthest, 50)
    decoded = decode_depth(encode_depth(depth_mm, "linear", depth_range_m), depth_range_m)
    torch.testing.assert_close(decoded, depth_mm / 1000)
    beyond = encode_depth(millimetres(1, 10**6), "linear", depth_range_m)
    torch.testing.assert_close(
        decode_depth(beyond, depth_range_m), torch.tensor([float(nearest), float(farthest)])
    )


def test_encoded_inputs_equal_a_hand_calculation():
    image = torch.full((1, 2, 3, 3), 255, dtype=torch.uint8)
    encoded = encode_inputs(
        image, torch.full((1, 2, 3), 2000.0), ModelConfig(classes=NYUV2_13, inputs="rgbd_xy")
    )
    assert encoded.shape == (1, 6, 2, 3)
    np.testing.assert_allclose(
        encoded[0, :3, 0, 0], (1 - np.array([0.525, 0.443, 0.4])) / [0.281, 0.281, 0.293], 1e-5
    )
    np.testing.assert_allclose(encoded[0, 3], (1 / 2 - 1 / 10) / (1 / 0.71 - 1 / 10), 1e-6)
    np.testing.assert_allclose(encoded[0, 4], [[0, 0.5, 1], [0, 0.5, 1]])  # left to right
    np.testing.assert_allclose(encoded[0, 5], [[0, 0, 0], [1, 1, 1]])  # top to bottom


def test_all_inputs_are_subsets_of_the_rgbd_xy_channels():
    image, depth_mm = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8), 3000 * torch.rand(2, 4, 5)
    encoded = {
        inputs: encode_inputs(
            image,
            depth_mm,
            ModelConfig(classes=NYUV2_13, inputs=inputs, depth_encoding="log", depth_range_m=(0.5, 4)),
        )
        for inputs in INPUT_CHANNELS
    }
    assert {inputs: tensor.shape[1] for inputs, tensor in encoded.items()} == INPUT_CHANNELS
    for inputs, channels in (("rgb", slice(3)), ("depth", slice(3, 4)), ("rgbd", slice(4))):
        assert torch.equal(encoded[inputs], encoded["rgbd_xy"][:, channels])
    assert torch.equal(encoded["depth"][:, 0], encode_depth(depth_mm, "log", (0.5, 4)))


def test_unknown_choices_are_refused():
    with pytest.raises(
        ValueError, match="depth_encoding: found 'reverse', expected one of inverse, linear, log"
    ):
        encode_depth(millimetres(1), "reverse", DEPTH_RANGE_M)
    with pytest.raises(
        ValueError, match="depth_encoding: found 'reverse', expected one of inverse, linear, log"
    ):
        ModelConfig(classes=NYUV2_13, depth_encoding="reverse")
    with pytest.raises(ValueError, match="inputs: found 'rgba', expected one of rgb, depth, rgbd, rgbd_xy"):
        ModelConfig(classes=NYUV2_13, inputs="rgba")
    with pytest.raises(ValueError, match="augment: found 'flip', expected one of none, exp061, crops"):
        build_augmentation("flip", (96, 128))


def test_only_measured_depth_is_a_target(scenes):
    measured = np.zeros(scenes.depth.shape, bool)
    measured[:, ::2] = True
    config = ModelConfig(classes=NYUV2_13, depth_range_m=(0.5, 5.0))
    filled, without = replace(scenes, measured=measured), replace(scenes, depth=None)
    for samples, where in (
        (scenes, scenes.depth > 0),
        (filled, (scenes.depth > 0) & measured),
        (without, False),
    ):
        raw = plain_batch(samples)
        batch = encode_batch(raw, config, torch.device("cpu"))
        np.testing.assert_array_equal(batch.valid_depth[:, 0], np.broadcast_to(where, scenes.depth.shape))
        assert batch.depth.shape == batch.valid_depth.shape == (12, 1, 96, 128)
        torch.testing.assert_close(batch.depth[:, 0], encode_depth(raw.depth.float(), "linear", (0.5, 5.0)))


def marked_samples():
    """Samples in which class k has red 20 * k and depth 1000 + 100 * k mm, to reveal misalignment."""
    label = np.kron(np.arange(12).reshape(3, 4), np.ones((32, 32), int)).astype(np.uint8)[None]
    image = np.repeat((20 * label)[..., None], 3, -1)
    return Samples(np.array(["0"]), image, (1000 + 100 * label.astype(np.uint16)), label, classes=NYUV2_13)


@pytest.mark.parametrize("augment", ["exp061", "crops", "zooms"])
def test_image_depth_and_label_stay_aligned(augment):
    training = TrainingSet(marked_samples(), augment, seed=3)
    scales = set()
    for epoch in range(60):
        image, depth, label, measured, _ = training[epoch, 0]
        inside = label != 255
        # interpolation blends RGB along edges; less than half of the edge pixels may differ
        assert (np.abs(image[..., 0].astype(int) - 20 * label.astype(int))[inside] > 10).mean() < 0.05
        ratio = depth[inside] / (1000 + 100 * label[inside].astype(float))
        assert np.ptp(ratio) < 0.002  # one zoom for the whole image, and depth is never interpolated
        scales.add(round(float(ratio.mean()), 3))
        assert (depth[~inside] == 0).all()
        assert not measured[~inside].any()
        assert measured[inside].all()
    assert len(scales) > 10


def test_augmentation_borders_have_no_label_and_no_depth():
    training = TrainingSet(marked_samples(), "exp061", seed=0)
    items = [training[epoch, 0] for epoch in range(40)]
    bordered = [item for item in items if (item[2] == 255).any()]
    assert len(bordered) > 10
    for image, depth, label, _, _ in bordered:
        assert (depth[label == 255] == 0).all()
        assert (image[label == 255] < 120).all()


@pytest.mark.parametrize("augment", ["exp061", "crops", "zooms"])
def test_zoom_divides_depth_by_its_factor(augment):
    """The apparent enlargement of a disc of known size must equal the factor by which it is nearer."""
    row, column = np.mgrid[:240, :320]
    disc = (np.hypot(row - 120, column - 160) < 40).astype(np.uint8)[None]
    depth = np.full((1, 240, 320), 4000, np.uint16)
    training = TrainingSet(
        Samples(np.array(["0"]), np.zeros((1, 240, 320, 3), np.uint8), depth, disc, classes=NYUV2_13),
        augment,
        seed=1,
    )
    checked = 0
    for epoch in range(40):
        _, depth_mm, label, _, _ = training[epoch, 0]
        touches = any((edge == 1).any() for edge in (label[0], label[-1], label[:, 0], label[:, -1]))
        if (label == 1).any() and not touches:
            larger = np.sqrt((label == 1).sum() / disc.sum())
            assert np.median(depth_mm[depth_mm > 0]) == pytest.approx(4000 / larger, rel=0.02)
            checked += abs(larger - 1) > 0.02
    assert checked > 5


@pytest.mark.parametrize("augment", ["exp061", "crops", "zooms"])
def test_masks_are_not_shifted_relative_to_rgb(monkeypatch, augment):
    """RGB and depth contain the same ramps to the right and down, which must agree after any transform."""
    monkeypatch.setattr("lib.batches.zoom_factor", lambda applied: 1.0)  # don't rescale depth
    down, right = np.mgrid[:192, :256].astype(np.uint8)
    image, unlabelled = np.stack((right, down, down), -1)[None], np.zeros((1, 192, 256), np.uint8)
    for channel, ramp in ((0, right), (1, down)):
        training = TrainingSet(
            Samples(
                np.array(["0"]), image, 1000 + 10 * ramp[None].astype(np.uint16), unlabelled, classes=NYUV2_13
            ),
            augment,
            2,
        )
        offsets = []
        for epoch in range(60):
            transformed, depth, label, _, _ = training[epoch, 0]
            inside = cv2.erode((label == 0).astype(np.uint8), np.ones((9, 9), np.uint8)) == 1
            offsets.append(
                ((depth[inside].astype(float) - 1000) / 10 - transformed[..., channel][inside]).mean()
            )
        assert abs(np.mean(offsets)) < 0.15  # source pixels; with INTER_NEAREST, crops would have 0.35


def applied_transforms(samples, augment, epochs):
    """The transforms, by name with their parameters, that the first image of each epoch undergoes."""
    training = TrainingSet(samples, augment, seed=0)
    real, applied = training.augmentation, []

    class Recorder:
        transforms = real.transforms

        def __call__(self, **arrays):
            result = real(**arrays)
            applied.append(dict(result["applied_transforms"]))
            return result

    training.augmentation = Recorder()
    for epoch in range(epochs):
        training[epoch, 0]
    return applied


def test_flip_and_geometry_are_drawn_independently(scenes):
    names = [tuple(transforms) for transforms in applied_transforms(scenes, "exp061", 400)]
    combinations = [(), ("HorizontalFlip",), ("Affine",), ("HorizontalFlip", "Affine")]
    assert all(60 < names.count(combination) < 140 for combination in combinations)


def test_crop_size_is_independent_of_flip(scenes):
    areas = {True: [], False: []}
    for transforms in applied_transforms(scenes, "crops", 300):
        left, top, right, bottom = transforms["RandomResizedCrop"]["crop_coords"]
        areas["HorizontalFlip" in transforms].append((right - left) * (bottom - top) / (96 * 128))
    assert np.mean(areas[True]) == pytest.approx(np.mean(areas[False]), abs=0.06)


def test_augment_none_leaves_the_samples_unchanged(scenes):
    image, depth, label, _, position = TrainingSet(scenes, "none", seed=0)[5, 3]
    np.testing.assert_array_equal(image, scenes.image[3])
    np.testing.assert_array_equal(depth, scenes.depth[3])
    np.testing.assert_array_equal(label, scenes.label[3])
    assert position == 3


def test_colour_augmentation_changes_only_rgb(scenes):
    plain, coloured = TrainingSet(scenes, "crops", seed=0), TrainingSet(scenes, "crops_colour", seed=0)
    changed = 0
    for epoch in range(10):
        first, second = plain[epoch, 2], coloured[epoch, 2]
        changed += (first[0] != second[0]).any()
        for kept, other in zip(first[1:], second[1:], strict=True):
            np.testing.assert_array_equal(kept, other)
    assert 5 <= changed <= 10


@pytest.mark.parametrize("augment", ["exp061", "crops", "crops_colour", "zooms_colour"])
def test_batches_do_not_depend_on_the_number_of_workers(scenes, augment):
    streams = []
    for workers in (0, 1, 2):
        loader = training_loader(scenes, augment, 5, workers, seed=7)
        stream = []
        for epoch in (1, 2):
            loader.batch_sampler.epoch = epoch
            stream.append([torch.cat([tensor.flatten().float() for tensor in batch]) for batch in loader])
        assert not torch.equal(stream[0][0], stream[1][0])  # epochs differ
        streams.append(torch.cat(stream[0] + stream[1]))
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])


def test_augmentation_differs_within_a_batch_and_between_seeds(scenes):
    same = scenes[np.zeros(4, int)]
    items = [TrainingSet(same, "crops", seed=0)[1, position][0] for position in range(4)]
    assert len({item.tobytes() for item in items}) == 4
    assert items[0].tobytes() != TrainingSet(same, "crops", seed=1)[1, 0][0].tobytes()


@pytest.mark.parametrize(
    ("count", "sizes"), [(16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2]), (7, [7]), (9, [9]), (2, [2])]
)
def test_epoch_has_every_image_once_and_no_batch_of_one(count, sizes):
    batches = EpochBatches(count, 8, seed=0)
    drawn = list(batches)
    assert [len(batch) for batch in drawn] == sizes
    assert len(batches) == len(sizes)
    assert sorted(position for batch in drawn for _, position in batch) == list(range(count))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (8, 1)])
def test_batches_of_one_are_refused(count, batch_size):
    with pytest.raises(ValueError, match=f"batch_size: found {batch_size} with {count} training images"):
        EpochBatches(count, batch_size, seed=0)


def test_unlabelled_samples_are_refused_only_for_training(scenes):
    held_back = Samples(scenes.names, scenes.image, scenes.depth, classes=scenes.classes)
    with pytest.raises(ValueError, match="train: these samples have no labels"):
        TrainingSet(held_back, "none", seed=0)
    batch = plain_batch(held_back)
    assert batch.label.shape == (12, 96, 128)
    assert (batch.label == 255).all()


def test_plain_batch_copies_the_samples(scenes):
    """Memory-mapped arrays are read-only, and nothing may write into the samples."""
    image = scenes.image.copy()
    image.flags.writeable = False
    batch = plain_batch(replace(scenes, image=image)[2:5])
    np.testing.assert_array_equal(batch.image, image[2:5])
    batch.image[:] = 0
    np.testing.assert_array_equal(image, scenes.image)


def test_training_set_accepts_samples_without_depth(scenes):
    image, depth, label, measured, _ = TrainingSet(replace(scenes, depth=None), "exp061", seed=0)[0, 1]
    assert image.shape == (96, 128, 3)
    assert not depth.any()
    assert not measured.any()
    assert set(np.unique(label)) > {255}


def test_negative_workers_are_refused(scenes):
    with pytest.raises(ValueError, match="num_workers: found -1, expected a whole number of 0 or more"):
        training_loader(scenes, "none", 4, -1, seed=0)


def test_too_little_shared_memory_is_refused(scenes, monkeypatch):
    """2 batches per worker, the current and the next, of at most 3 images, 3 + 2 + 1 + 1 bytes per pixel."""
    needed = (2 * 1 + 2) * 3 * 7 * 96 * 128
    free = [needed, needed - 1]
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: SimpleNamespace(free=free.pop(0)))
    training_loader(scenes, "none", 2, 0, seed=0)  # the main process needs no shared memory
    training_loader(scenes, "none", 2, 1, seed=0)
    with pytest.raises(ValueError) as error:
        training_loader(scenes, "none", 2, 1, seed=0)
    assert str(error.value) == (
        "num_workers: 1 need 2 MB of shared memory for batches, but /dev/shm has only 1 MB free; use num_workers 0, or start "
        "the container with `docker run --shm-size=1g`"
    )


def test_worker_timeout_error_suggests_num_workers_0(scenes, monkeypatch):
    monkeypatch.setattr(batches, "WORKER_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda self, key: time.sleep(3))
    with pytest.raises(RuntimeError) as error:
        next(iter(training_loader(scenes, "none", 4, 1, seed=0)))
    assert str(error.value) == (
        "num_workers: 1 processes delivered no batch (DataLoader timed out after 0.5 seconds); use num_workers 0"
    )


def test_stack_items_keeps_dtypes(scenes):
    raw = stack_items([TrainingSet(scenes, "none", seed=0)[0, position] for position in range(3)])
    assert [tensor.dtype for tensor in raw] == [
        torch.uint8,
        torch.uint16,
        torch.uint8,
        torch.bool,
        torch.int64,
    ]


def test_missing_depth_is_refused_as_input_and_as_target(scenes):
    bare = replace(scenes, depth=None)
    check_depth(ModelConfig(classes=NYUV2_13, inputs="rgbd"), scenes, trains=True)
    check_depth(ModelConfig(classes=NYUV2_13, inputs="rgb", depth_head=False), bare, trains=True)
    # without training: the depth head was trained on other data
    check_depth(ModelConfig(classes=NYUV2_13, inputs="rgb"), bare)
    for config, trains, head in (
        ({"inputs": "rgb"}, True, "a"),
        ({"inputs": "rgbd", "depth_head": False}, False, "no"),
    ):
        with pytest.raises(ValueError) as error:
            check_depth(ModelConfig(**{"classes": NYUV2_13} | config), bare, trains)
        assert str(error.value) == (
            f"inputs: the network takes {config['inputs']} and has {head} depth head, but these data have no depth; use "
            "inputs rgb and depth_weight 0"
        )


@pytest.mark.parametrize(("platform", "context"), [("linux", "fork"), ("darwin", None), ("win32", None)])
def test_workers_are_forked_only_on_linux(scenes, monkeypatch, platform, context):
    monkeypatch.setattr("sys.platform", platform)
    loader = training_loader(scenes, "none", 4, 1, 0)
    method = loader.multiprocessing_context and loader.multiprocessing_context.get_start_method()
    assert method == context

import numpy as np
import pytest
from conftest import assert_equal_samples

from lib.classes import IGNORE_INDEX, NYUV2_13
from lib.data import load_samples
from lib.data.synthetic import open_synthetic, render_scene


@pytest.fixture(scope="module")
def many():
    return load_samples("synthetic", "train", "none", limit=150)


def test_same_seed_and_index_give_the_same_pixels(scenes):
    assert_equal_samples(load_samples("synthetic", "train", "none", limit=12), scenes)
    (third,) = open_synthetic("train").read(np.array([2]), None)
    np.testing.assert_array_equal(third["image"][0], scenes.image[2])
    (other,) = open_synthetic("train", seed=1).read(np.arange(12), None)
    assert (other["image"] != scenes.image).mean() > 0.9


def test_all_classes_occur_with_long_tailed_frequencies(many):
    share = np.bincount(many.label.ravel(), minlength=256)[: len(NYUV2_13)]
    share = share / share.sum()
    assert (share > 0.001).all()
    assert share[NYUV2_13.index("wall")] == share.max()
    assert share.max() > 20 * share.min()
    assert set(np.unique(many.label)) == {*range(len(NYUV2_13)), IGNORE_INDEX}
    assert 0.08 < (many.label == IGNORE_INDEX).mean() < 0.25


def test_border_is_unlabelled(many):
    for edge in (many.label[:, :2], many.label[:, -2:], many.label[:, :, :2], many.label[:, :, -2:]):
        assert (edge == IGNORE_INDEX).all()


def test_depth_is_in_millimetres_and_has_holes(many):
    seen = many.depth[many.depth > 0]
    assert seen.min() >= 400
    assert seen.max() <= 10_000
    assert 1000 < np.median(seen) < 4000
    assert 0.01 < (many.depth == 0).mean() < 0.15


def test_depth_is_exact_up_to_the_sensors_noise():
    """Neighbouring pixels on a wall lie in a plane. The noise is that of a Kinect."""
    _, depth, label = render_scene(0, 0, (96, 128))
    inverse = np.where(depth > 0, 1000.0 / depth.clip(1), np.nan)  # planes are linear in inverse depth
    bend = np.abs(inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2])
    wall = label[:, 1:-1] == NYUV2_13.index("wall")
    assert np.nanmedian(bend[wall]) < 4 * 0.08 / 43.5


def test_rooms_have_two_views_and_blocks_keep_them_together():
    train, valid = (load_samples("synthetic", split, "blocks", limit=40) for split in ("train", "valid"))
    assert not set(train.scene) & set(valid.scene)
    assert list(np.unique(valid.scene, return_counts=True)[1]) == [2] * 4
    assert list(load_samples("synthetic", "valid", limit=40).names) == list(valid.names)  # auto
    leaky = [set(load_samples("synthetic", split, "random", limit=40).scene) for split in ("train", "valid")]
    assert leaky[0] & leaky[1]


def test_train_and_test_split_share_no_rooms():
    train, test = (open_synthetic(split) for split in ("train", "test"))
    assert (len(train.names), len(test.names)) == (400, 100)
    assert not set(train.names) & set(test.names)
    assert not set(train.scene) & set(test.scene)


def test_scenes_render_at_any_size():
    image, depth, label = render_scene(3, 5, (60, 100))
    assert image.shape == (60, 100, 3)
    assert depth.shape == label.shape == (60, 100)
    assert (image.dtype, depth.dtype, label.dtype) == (np.uint8, np.uint16, np.uint8)

import numpy as np
import pytest
from conftest import assert_equal_samples

from lib.classes import CLASS_NAMES, IGNORE_INDEX
from lib.data import load_samples
from lib.data.scenes import make_scenes, render_scene, scene_names


@pytest.fixture(scope="module")
def many():
    return make_scenes(scene_names("train")[:200])


def test_same_seed_and_index_give_the_same_pixels(scenes):
    assert_equal_samples(make_scenes(scene_names("train")[:12]), scenes)
    third = make_scenes(scene_names("train")[2:3])
    np.testing.assert_array_equal(third.image[0], scenes.image[2])
    other = make_scenes(scene_names("train")[:12], seed=1)
    assert (other.image != scenes.image).mean() > 0.9


def test_all_classes_occur_and_the_tail_is_long(many):
    share = np.bincount(many.label.ravel(), minlength=256)[: len(CLASS_NAMES)]
    share = share / share.sum()
    assert (share > 0.001).all()
    assert share[CLASS_NAMES.index("wall")] == share.max()
    assert share.max() > 20 * share.min()
    assert set(np.unique(many.label)) == {*range(len(CLASS_NAMES)), IGNORE_INDEX}
    assert 0.08 < (many.label == IGNORE_INDEX).mean() < 0.25


def test_border_is_unlabelled(many):
    for edge in (many.label[:, :2], many.label[:, -2:], many.label[:, :, :2], many.label[:, :, -2:]):
        assert (edge == IGNORE_INDEX).all()


def test_depth_is_millimetres_with_holes(many):
    seen = many.depth[many.depth > 0]
    assert seen.min() >= 400
    assert seen.max() <= 10_000
    assert 1000 < np.median(seen) < 4000
    assert 0.01 < (many.depth == 0).mean() < 0.15


def test_depth_is_exact_up_to_the_sensors_noise():
    """Of one pixel the neighbours on a floor or wall lie in a plane; the noise is that of a Kinect."""
    _, depth, label = render_scene(0, 0, (96, 128))
    inverse = np.where(depth > 0, 1000.0 / depth.clip(1), np.nan)  # planes are linear in inverse depth
    bend = np.abs(inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2])
    wall = label[:, 1:-1] == CLASS_NAMES.index("wall")
    assert np.nanmedian(bend[wall]) < 4 * 0.08 / 43.5


def test_rooms_have_two_views_and_blocks_keep_them_together():
    train, valid = (load_samples("synthetic", part, "blocks", limit=40).names for part in ("train", "valid"))
    room = lambda names: {int(name) // 3 for name in names}  # noqa: E731
    assert not room(train) & room(valid)
    assert len(room(valid)) * 2 == len(valid)
    leaky = [set(load_samples("synthetic", part, "random", limit=40).names) for part in ("train", "valid")]
    assert room(leaky[0]) & room(leaky[1])


def test_test_part_is_other_rooms():
    assert not set(scene_names("train")) & set(scene_names("test"))


def test_any_size():
    image, depth, label = render_scene(3, 5, (60, 100))
    assert image.shape == (60, 100, 3)
    assert depth.shape == label.shape == (60, 100)
    assert (image.dtype, depth.dtype, label.dtype) == (np.uint8, np.uint16, np.uint8)

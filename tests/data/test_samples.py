from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import assert_equal_samples, write_folder

from lib.classes import NYUV2_13
from lib.data import Samples, iterate_samples, load_samples
from lib.data.samples import Split, resize_image, resize_nearest, resize_samples


def join(pieces):
    """Join the batches of a split."""
    pieces = list(pieces)
    stacks = {
        name: np.concatenate([getattr(piece, name) for piece in pieces])
        for name in ("image", "depth", "label")
    }
    names, scene = (np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("names", "scene"))
    return Samples(names, **stacks, scene=scene, classes=pieces[0].classes)


def test_nearest_resizing_stays_aligned_with_rgb():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    by_area = resize_image(np.repeat(ramp[..., None], 3, 2), (20, 20))[..., 0].astype(float)
    nearest = resize_nearest(ramp.astype(np.uint16), (20, 20))
    assert nearest.dtype == np.uint16
    assert np.abs(nearest - by_area).max() < 1  # the plain nearest mode of OpenCV is 2 pixels off here
    assert np.abs(cv2.resize(ramp, (20, 20), interpolation=cv2.INTER_NEAREST) - by_area).max() >= 2
    assert set(np.unique(resize_nearest(np.array([[0, 9]], np.uint8).repeat(7, 0), (5, 3)))) == {0, 9}
    assert resize_nearest(np.eye(8, dtype=bool), (4, 4)).dtype == bool
    # The centre of the middle new pixel lies on the boundary between the two old ones, and takes the second.
    assert resize_nearest(np.array([[3, 4]]), (1, 7)).tolist() == [[3, 3, 3, 4, 4, 4, 4]]


def test_resizing_keeps_scenes_classes_and_load_parameters(scenes):
    named = replace(
        scenes, classes=("a", *NYUV2_13[1:]), measured=scenes.depth > 0, loaded_with={"data": "here"}
    )
    half = resize_samples(named, (48, 64))
    assert half.size == (48, 64)
    assert half.measured.shape == half.label.shape == half.depth.shape == (12, 48, 64)
    assert (half.classes, half.loaded_with) == (named.classes, named.loaded_with)
    assert list(half.scene) == list(scenes.scene)
    assert resize_samples(named, named.size) is named
    nothing = resize_samples(replace(named, depth=None)[:0], (48, 64))
    assert nothing.image.shape == (0, 48, 64, 3)
    assert nothing.depth is None


def test_samples_are_selected_by_slice_or_positions(scenes):
    for chosen, positions in ((scenes[3:7], [3, 4, 5, 6]), (scenes[np.array([5, 0])], [5, 0])):
        assert list(chosen.names) == list(scenes.names[positions])
        assert list(chosen.scene) == list(scenes.scene[positions])
        for kind in ("image", "depth", "label"):
            np.testing.assert_array_equal(getattr(chosen, kind), getattr(scenes, kind)[positions])
        assert chosen.measured is None
        assert chosen.loaded_with == scenes.loaded_with


def test_absent_labels_are_ignored_and_absent_depth_is_missing(scenes):
    bare = Samples(scenes.names, scenes.image, classes=scenes.classes)
    assert (bare.labels_or_ignored == 255).all()
    assert not bare.depth_or_missing.any()
    assert not bare.measured_depth.any()
    assert (
        bare.labels_or_ignored.shape
        == bare.depth_or_missing.shape
        == bare.measured_depth.shape
        == (12, 96, 128)
    )
    assert (bare.labels_or_ignored.dtype, bare.depth_or_missing.dtype) == (np.uint8, np.uint16)
    assert scenes.labels_or_ignored is scenes.label
    assert scenes.depth_or_missing is scenes.depth


def test_measured_depth_combines_depth_and_measured_mask():
    depth, measured = np.array([[[0, 900, 900, 0]]], np.uint16), np.array([[[True, True, False, False]]])
    samples = Samples(np.array(["a"]), np.zeros((1, 1, 4, 3), np.uint8), depth, classes=("x", "y"))
    assert samples.measured_depth.tolist() == [[[False, True, True, False]]]
    assert replace(samples, measured=measured).measured_depth.tolist() == [[[False, True, False, False]]]


@pytest.mark.parametrize("size", [None, (24, 32)])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_iterate_samples_equals_load_samples(folder, split, size):
    for source in ("synthetic", folder):
        whole = load_samples(source, split, "random", size, 11)
        pieces = iterate_samples(source, split, "random", size, 11, batch_size=4)
        assert len(pieces) == len(whole)
        assert max(map(len, pieces)) <= 4
        joined = join(pieces)
        assert_equal_samples(joined, whole)
        assert list(joined.scene) == list(whole.scene)
        assert_equal_samples(join(pieces), whole)  # batches can be iterated again


def test_each_batch_contains_images_of_one_size(folder, scenes):
    larger = replace(resize_samples(scenes[:3], (120, 160)), names=np.array(["000004a", "000004b", "000099"]))
    write_folder(folder, larger)
    pieces = list(iterate_samples(folder, "train", "none", batch_size=8))
    assert [(len(piece), piece.size) for piece in pieces] == [
        (4, (96, 128)), (2, (120, 160)), (2, (96, 128)), (6, (96, 128)), (1, (120, 160)),
    ]  # fmt: skip
    names = np.concatenate([piece.names for piece in pieces])
    assert list(names) == sorted([*scenes.names, *larger.names])
    by_name = {name: piece.image[position] for piece in pieces for position, name in enumerate(piece.names)}
    np.testing.assert_array_equal(by_name["000004b"], larger.image[1])
    np.testing.assert_array_equal(by_name["000006"], scenes.image[list(scenes.names).index("000006")])


def test_selections_of_a_split_can_be_nested():
    names = np.array(list("abcdef"))

    def read(positions, size):
        return [{"image": np.broadcast_to(positions[:, None, None, None], (len(positions), 2, 2, 3))}]

    split = Split(names, ("x", "y"), read, np.array(list("uuvvww")), depth_range_m=(1, 2))
    chosen = split.select(np.array([5, 3, 1])).select(np.array([2, 0]))
    assert len(chosen) == 2
    assert list(chosen.names) == ["b", "f"]
    assert list(chosen.scene) == ["u", "w"]
    for samples in (chosen[[0, 1]][0], next(iter(chosen)), chosen.load()):
        assert (list(samples.names), list(samples.scene)) == (["b", "f"], ["u", "w"])
        assert samples.image[:, 0, 0, 0].tolist() == [1, 5]
        assert (samples.classes, samples.depth_range_m) == (("x", "y"), (1, 2))


def test_samples_without_classes_are_rejected(scenes):
    """No class set is assumed for a data set that does not declare one."""
    with pytest.raises(TypeError, match="classes"):
        Samples(scenes.names, scenes.image)


def test_samples_record_their_load_parameters(folder):
    assert load_samples("synthetic", "train", limit=10, size=(24, 32), fold=2).loaded_with == {
        "data": "synthetic", "validation": "auto", "limit": 10, "classes": None, "fold": 2, "chosen_validation": "blocks",
        "image_height": 24, "image_width": 32,
    }  # fmt: skip
    assert load_samples(folder, "test").loaded_with == {
        "data": str(folder), "validation": "auto", "limit": None, "classes": None, "fold": 4, "chosen_validation": "blocks",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valdi"}, "split: found 'valdi', expected one of train, valid, test"),
        (
            {"validation": "rnd"},
            "validation: found 'rnd', expected one of auto, predefined, scenes, blocks, random, none",
        ),
        ({"size": (0, 64)}, "size: found (0, 64), expected a height and a width of at least 1 pixel"),
        ({"limit": 0}, "limit: found 0, expected a whole number of 1 or more"),
        ({"batch_size": 0}, "batch_size: found 0, expected a whole number of 1 or more"),
        ({"fold": 7}, "fold: found 7, expected one of 0, 1, 2, 3, 4"),
        (
            {"classes": "nyuv2_40"},
            "classes: found 'nyuv2_40' with data 'synthetic', expected None: only the .mat file has a choice of class sets. "
            "Declare the classes of a folder in DATA/dataset.yaml",
        ),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    good = {
        "source": "synthetic",
        "split": "train",
        "validation": "random",
        "size": (24, 32),
        "limit": 4,
        "batch_size": 2,
    }
    assert sum(map(len, iterate_samples(**good))) == 3
    with pytest.raises(ValueError) as error:
        iterate_samples(**good | arguments)
    assert str(error.value) == message


def test_splits_are_disjoint_and_limit_applies_first(folder):
    for validation in ("random", "blocks", "auto"):
        train, valid = (
            set(load_samples(folder, split, validation, limit=10).names) for split in ("train", "valid")
        )
        assert train
        assert valid
        assert not train & valid
        assert train | valid == set(load_samples(folder, "train", "none").names[:10])


def test_folds_validate_every_image_once(folder):
    valid = [load_samples(folder, "valid", "blocks", fold=fold).names for fold in range(5)]
    assert sorted(np.concatenate(valid)) == sorted(load_samples(folder, "train", "none").names)

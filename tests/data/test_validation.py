import math

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from lib.classes import NYUV2_13
from lib.data.nyuv2 import TABLES
from lib.data.samples import Split
from lib.data.validation import FOLDS, choose_validation, group_neighbouring_ids, select_split, split_names


def numbered(*ids):
    return np.array([f"{number:04d}" for number in ids])


ROOMS = numbered(0, 1, 2, 5, 6, 9, 20, 21, 30, 31, 32, 40)  # six runs


def test_random_split_equals_that_of_exp061():
    train, valid = split_names(np.array([f"{i:06d}" for i in range(795)]), "random")
    expected_train, expected_valid = train_test_split(np.arange(795), test_size=0.2, random_state=42)
    np.testing.assert_array_equal(train, expected_train)
    np.testing.assert_array_equal(valid, expected_valid)
    assert (len(train), len(valid)) == (636, 159)


def test_validation_none_trains_on_everything():
    train, valid = split_names(ROOMS, "none")
    assert list(train) == list(range(12))
    assert len(valid) == 0


def test_blocks_keep_runs_of_ids_whole():
    train, valid = split_names(ROOMS, "blocks")
    assert list(ROOMS[valid]) == ["0030", "0031", "0032"]  # the fifth of six runs
    assert sorted([*train, *valid]) == list(range(12))
    assert list(ROOMS[split_names(ROOMS, "blocks", fold=0)[1]]) == ["0000", "0001", "0002", "0040"]
    unpadded = np.array(sorted(str(int(name)) for name in ROOMS))
    assert sorted(unpadded[split_names(unpadded, "blocks")[1]]) == ["30", "31", "32"]


def test_most_frequent_gap_between_ids_defines_neighbours():
    """If every fifth video frame was kept, 0, 5 and 10 are neighbours, but 10 and 40 are not."""
    names = numbered(0, 5, 10, 40, 45, 50, 100, 105, 200, 205, 210, 215, 300, 305, 310)
    assert list(group_neighbouring_ids(names)) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    assert list(names[split_names(names, "blocks")[1]]) == ["0300", "0305", "0310"]
    milliseconds = numbered(0, 33, 67, 100, 500, 533, 567, 600)
    assert list(group_neighbouring_ids(milliseconds)) == [0] * 4 + [1] * 4
    shuffled = np.random.default_rng(0).permutation(len(names))
    np.testing.assert_array_equal(
        group_neighbouring_ids(names[shuffled]), group_neighbouring_ids(names)[shuffled]
    )


@pytest.mark.parametrize("step", [1, 2, 5, 10])
def test_blocks_do_not_separate_neighbouring_frames(step):
    """Seven scenes of six frames, with ids such as 0, 5, 10; scenes are further apart than frames."""
    ids = np.concatenate([step * (100 * scene + np.arange(6)) for scene in range(7)])
    train, valid = (ids[split] for split in split_names(numbered(*ids), "blocks"))
    assert valid.tolist() == [step * (400 + frame) for frame in range(6)]
    assert np.abs(train[:, None] - valid).min() > step


def test_number_runs_returns_none_for_names_without_runs():
    assert group_neighbouring_ids(np.array(["a", "1", "2"])) is None
    assert group_neighbouring_ids(np.array(["-1", "1"])) is None
    assert group_neighbouring_ids(np.array([], str)) is None
    assert group_neighbouring_ids(numbered(0, 1, 10, 30, 70, 80)) is None  # four of six have no neighbour
    assert group_neighbouring_ids(numbered(0, 1, 2, 30, 70, 80)) is not None  # only half of them have none
    assert group_neighbouring_ids(numbered(7)) is None


@pytest.mark.parametrize("count", [5, 6, 9, 35, 123])
def test_validation_scenes_keeps_scenes_whole(count):
    scene = np.array([f"room_{number % count}" for number in range(3 * count)])
    names = numbered(*range(len(scene)))
    train, valid = split_names(names, "scenes", scene)
    assert not set(scene[train]) & set(scene[valid])
    # the same validation scenes as before folds were introduced
    shuffled = np.random.RandomState(42).permutation(np.unique(scene))
    assert set(scene[valid]) == set(shuffled[: math.ceil(0.2 * count)])


@pytest.mark.parametrize("validation", ["blocks", "scenes"])
def test_the_five_folds_partition_the_images(validation):
    rng = np.random.default_rng(1)
    ids = np.flatnonzero(rng.random(200) < 0.8)
    names, scene = numbered(*ids), np.array([f"room_{number // 9}" for number in ids])
    validate = []
    for fold in range(FOLDS):
        train, valid = split_names(names, validation, scene, fold)
        np.testing.assert_array_equal(np.sort(np.append(train, valid)), np.arange(len(names)))
        assert len(valid) > 0
        validate.extend(valid)
    assert sorted(validate) == list(range(len(names)))


def test_fold_4_of_blocks_validates_every_fifth_run_of_ids():
    """On the official training images, with maximal runs of consecutive ids, as before there were folds."""
    table = pd.read_csv(TABLES / "nyuv2_split.csv")
    ids = table.id[table.split == "train"].to_numpy()
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    names = np.array([f"{number:06d}" for number in ids])
    train, valid = split_names(names, "blocks")
    np.testing.assert_array_equal(ids[valid], np.concatenate(runs[4::5]))
    np.testing.assert_array_equal(ids[train], np.setdiff1d(ids, np.concatenate(runs[4::5])))


def source(names, usual_validation, scene=None):
    return Split(names, NYUV2_13, None, scene, validation=usual_validation)


def test_auto_validation_depends_on_names_and_scenes():
    scene = np.array([f"room_{position // 2}" for position in range(12)])
    words = np.array([f"room_{position}" for position in range(12)])
    assert choose_validation("auto", source(ROOMS, "blocks"), 4) == "blocks"
    assert choose_validation("auto", source(words, "scenes", scene), 4) == "scenes"
    assert choose_validation("auto", source(words, "scenes"), 4) == "random"  # unknown scenes
    assert choose_validation("auto", source(ROOMS, "scenes"), 4) == "blocks"
    assert choose_validation("auto", source(ROOMS, "scenes", np.full(12, "hall")), 4) == "blocks"  # one scene
    assert choose_validation("auto", source(words, "predefined", scene), 4) == "predefined"
    assert choose_validation("scenes", source(words, "predefined", scene), 4) == "scenes"
    assert choose_validation("auto", source(words, "blocks"), 4) == "random"  # names are not numbers
    assert choose_validation("auto", source(ROOMS[:1], "blocks"), 4) == "random"
    assert choose_validation("none", source(ROOMS, "blocks"), 4) == "none"


def earlier_split(names, validation, scene, fold):
    """The images that `split_names` validated when folds of fewer than five runs or scenes could be empty."""
    if validation == "blocks":
        return np.flatnonzero(group_neighbouring_ids(names) % FOLDS == fold)
    shuffled = np.random.RandomState(42).permutation(np.unique(scene))
    return np.flatnonzero(np.isin(scene, np.array_split(shuffled, FOLDS)[(fold + 1) % FOLDS]))


@pytest.mark.parametrize("validation", ["blocks", "scenes"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 9, 10, 11, 23, 64])
def test_every_fold_validates_whole_runs_or_scenes(validation, count):
    """Folds wrap around fewer than five runs or scenes. Folds that were never empty are as before."""
    lengths = np.random.default_rng(count).integers(2, 7, count)
    names = numbered(*np.concatenate([20 * run + np.arange(length) for run, length in enumerate(lengths)]))
    scene = np.repeat([f"room_{run}" for run in range(count)], lengths)
    chosen = set()
    for fold in range(FOLDS):
        train, valid = split_names(names, validation, scene, fold)
        assert not set(scene[train]) & set(scene[valid])
        expected = earlier_split(names, validation, scene, fold)
        assert len(valid) > 0
        assert count < FOLDS or len(expected) > 0
        if len(expected):
            np.testing.assert_array_equal(valid, expected)
        assert choose_validation("auto", source(names, validation, scene), fold) == validation
        chosen |= set(valid)
    assert chosen == set(range(len(names)))


def test_unsuitable_validation_or_fold_is_rejected():
    with pytest.raises(
        ValueError, match="validation: 'scenes' needs data with known scenes; use 'blocks' or 'random'"
    ):
        split_names(ROOMS, "scenes")
    with pytest.raises(
        ValueError,
        match="validation: 'blocks' needs file names that are consecutive numbers within a scene, found a, b, c, ...; use",
    ):
        split_names(np.array(["a", "b", "c", "d"]), "blocks")
    with pytest.raises(ValueError) as error:
        split_names(numbered(0, 1, 10, 30, 70, 80), "blocks")
    assert str(error.value) == (
        "validation: 'blocks' needs file names that are consecutive numbers within a scene, found 0000, 0001, 0010, ..., most "
        "without neighbours; use validation 'random' or 'none'"
    )
    for fold in (5, -1):
        with pytest.raises(ValueError, match=f"fold: found {fold}, expected one of 0, 1, 2, 3, 4"):
            split_names(ROOMS, "blocks", fold=fold)


@pytest.mark.parametrize(
    ("validation", "count", "left"),
    [("blocks", 4, "0 images to train and 4"), ("random", 1, "0 images to train and 1")],
)
def test_validation_that_leaves_a_split_empty_is_rejected(validation, count, left):
    with pytest.raises(ValueError) as error:
        select_split(source(numbered(*range(count)), "blocks"), "train", validation, 4)
    assert str(error.value) == (
        f"validation: {validation!r} leaves {left} to validate out of {count}; raise limit, or use validation 'random' "
        "(2 images or more) or 'none'"
    )
    assert list(select_split(source(numbered(*range(count)), "blocks"), "valid", "none", 4)) == []

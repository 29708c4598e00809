"""Choose validation images, and group images into runs of neighbouring ids."""

import math
from contextlib import suppress

import numpy as np

from lib.data.samples import Split
from lib.options import FOLDS, check_options

AUTO_ORDER = ("scenes", "blocks", "random")  # methods that `auto` tries, from the source's default onwards
RUN_PREFIX = "run_"  # prefix of scene names that were derived from runs of neighbouring ids
VALIDATION_SEED = 42  # fixed, so that training runs with different seeds stay comparable


def split_names(
    names: np.ndarray, validation: str, scene: np.ndarray | None = None, fold: int = FOLDS - 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the training images and of the validation images.

    Args:
        names: `(N,)` names of the images, sorted.
        validation: how the validation images are chosen.
            `random`: 20 % of the images, rounded up. The result equals scikit-learn's
            `train_test_split(test_size=0.2, random_state=42)`, including the order, which determines the
            batches of the validation loss.
            `blocks`: every fifth run of neighbouring ids.
            `scenes`: a fifth of the scenes.
            `none` and `predefined`: no images; all are training images.
        scene: `(N,)` scene of each image; None if unknown.
        fold: index (0 to 4) of the fold used for validation by `blocks` and `scenes`. If there are fewer
            than five runs or scenes, several folds are the same.

    Raises:
        ValueError: if `validation` is not possible for these images, or `fold` is out of range.
    """
    check_options(fold=fold)
    positions = np.arange(len(names))
    if validation in ("none", "predefined"):
        return positions, positions[:0]
    if validation == "random":
        order = np.random.RandomState(VALIDATION_SEED).permutation(len(names))
        valid_count = math.ceil(0.2 * len(names))
        return order[valid_count:], order[:valid_count]
    if validation == "scenes":
        if scene is None:
            raise ValueError("validation: 'scenes' needs data with known scenes; use 'blocks' or 'random'")
        shuffled = np.random.RandomState(VALIDATION_SEED).permutation(np.unique(scene))
        scene_folds = np.array_split(shuffled, FOLDS)
        is_valid = np.isin(scene, scene_folds[(fold + 1) % FOLDS % max(len(shuffled), 1)])
    elif (runs := group_neighbouring_ids(names)) is not None:
        is_valid = runs % FOLDS == fold % (runs.max() + 1)
    else:
        raise ValueError(
            "validation: 'blocks' needs file names that are consecutive numbers within a scene, found "
            f"{', '.join(names[:3])}, ...{'' if read_numbers(names) is None else ', most without neighbours'}"
            "; use validation 'random' or 'none'"
        )
    return positions[~is_valid], positions[is_valid]


def read_numbers(names: np.ndarray) -> np.ndarray | None:
    """Convert `(N,)` names to integers; return None if any name is not a decimal number."""
    return (
        np.array([int(name) for name in names]) if all(name.isdecimal() for name in names.tolist()) else None
    )


def group_neighbouring_ids(names: np.ndarray) -> np.ndarray | None:
    """Group images into runs of neighbouring ids, and return the `(N,)` run index of each image.

    On NYUv2, these runs are nearly the scenes. Consecutive ids are neighbours if their gap is at most 1.5
    times the most frequent gap: 0, 5, 10 form one run, and so do the milliseconds 0, 33, 67.

    Returns None if there are no images, if a name is not a number, or if most images would be alone in a run.
    """
    ids = read_numbers(names)
    if ids is None or not len(ids):
        return None
    order = np.argsort(ids)
    gaps = np.diff(ids[order])
    unique_gaps, counts = np.unique(gaps[gaps > 0], return_counts=True)  # copies in two splits share an id
    most_frequent_gap = unique_gaps[counts.argmax()] if len(unique_gaps) else 1
    runs = np.cumsum(np.append(0, gaps > 1.5 * most_frequent_gap))[np.argsort(order)]
    is_alone = np.bincount(runs)[runs] == 1
    return None if is_alone.mean() > 0.5 else runs


def choose_validation(validation: str, source: Split, fold: int) -> str:
    """Resolve `auto` to a validation method; return any other method unchanged.

    `auto` selects the default method of the source or, if that is not possible for these images, the next one
    in `AUTO_ORDER` that is.

    Raises:
        ValueError: if `validation` is `predefined` and the data set has no valid split.
    """
    if validation == "predefined" and source.validation != "predefined":
        raise ValueError(
            "validation: 'predefined' needs a data set with its own valid split; name it in "
            "DATA/dataset.yaml, such as `splits: {train: train, valid: valid, test: test}`, or use "
            "validation 'auto'"
        )
    if validation != "auto" or source.validation == "predefined":
        return validation if validation != "auto" else "predefined"
    for method in AUTO_ORDER[AUTO_ORDER.index(source.validation) :]:
        with suppress(ValueError):  # not possible for these names or scenes
            if min(map(len, split_names(source.names, method, source.scene, fold))):
                return method
    return "random"


def select_split(source: Split, split: str, validation: str, fold: int) -> np.ndarray:
    """Return the positions of the images in split `train` or `valid`.

    Raises:
        ValueError: if train or valid would be empty, unless `validation` is `none` or `predefined`.
    """
    train, valid = split_names(source.names, validation, source.scene, fold)
    if validation not in ("none", "predefined") and min(len(train), len(valid)) == 0:
        raise ValueError(
            f"validation: {validation!r} leaves {len(train)} images to train and {len(valid)} to validate "
            f"out of {len(source.names)}; raise limit, or use validation 'random' (2 images or more) or "
            "'none'"
        )
    return train if split == "train" else valid

"""Which images validate, and which belong to one scene where nothing but their ids tells."""

import math
from contextlib import suppress

import numpy as np

from lib.data.samples import Split
from lib.options import FOLDS, check_options

IN_ORDER = ("scenes", "blocks", "random")  # what `auto` tries, beginning with the usual one of a source
RUN = "run_"  # begins the name of a scene that is a run of neighbouring ids
VALIDATION_SEED = 42  # never a run's own seed, so that runs with different seeds stay comparable


def split_names(
    names: np.ndarray, validation: str, scene: np.ndarray | None = None, fold: int = FOLDS - 1
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the sorted `(N,)` names that train and that validate.

    Args:
        names: of the images, sorted.
        validation: `random`: 20 % of the images validate; equals scikit-learn's
            `train_test_split(test_size=0.2, random_state=42)`, order included, because batches of the
            validation loss form in that order. `blocks`: every fifth run of neighbouring ids validates.
            `scenes`: a fifth of the scenes validates. `none` and `predefined`: all train.
        scene: `(N,)` the scene of each image, where it is known.
        fold: which of the five folds of `blocks` and `scenes` validates.

    Raises:
        ValueError: a `validation` that these names do not allow, or another fold.
    """
    check_options(fold=fold)
    everything = np.arange(len(names))
    if validation in ("none", "predefined"):
        return everything, everything[:0]
    if validation == "random":
        order = np.random.RandomState(VALIDATION_SEED).permutation(len(names))
        valid_count = math.ceil(0.2 * len(names))
        return order[valid_count:], order[:valid_count]
    if validation == "scenes":
        if scene is None:
            raise ValueError("validation: 'scenes' needs data with known scenes; use 'blocks' or 'random'")
        shuffled = np.random.RandomState(VALIDATION_SEED).permutation(np.unique(scene))
        validates = np.isin(scene, np.array_split(shuffled, FOLDS)[(fold + 1) % FOLDS])
    elif (runs := number_runs(names)) is not None:
        validates = runs % FOLDS == fold
    else:
        raise ValueError(
            "validation: 'blocks' needs file names that are consecutive numbers within a scene, found "
            f"{', '.join(names[:3])}, ...{'' if read_numbers(names) is None else ', most without neighbours'}"
            "; use validation 'random' or 'none'"
        )
    return everything[~validates], everything[validates]


def read_numbers(names: np.ndarray) -> np.ndarray | None:
    """`(N,)` names as numbers; None where they are none."""
    return (
        np.array([int(name) for name in names]) if all(name.isdecimal() for name in names.tolist()) else None
    )


def number_runs(names: np.ndarray) -> np.ndarray | None:
    """`(N,)` number of the run of neighbouring ids that an image belongs to: nearly the scenes of NYUv2.

    Ids are neighbours when the usual gap lies between them, so that 0, 5, 10 are, or half as much again, so
    that milliseconds 0, 33, 67 are. None where names are no numbers, or where most images would be alone.
    """
    ids = read_numbers(names)
    if ids is None or not len(ids):
        return None
    order = np.argsort(ids)
    gaps = np.diff(ids[order])
    steps, counts = np.unique(gaps[gaps > 0], return_counts=True)  # copies in two splits have one id
    usual = steps[counts.argmax()] if len(steps) else 1
    runs = np.cumsum(np.append(0, gaps > 1.5 * usual))[np.argsort(order)]
    alone = np.bincount(runs)[runs] == 1
    return None if alone.mean() > 0.5 else runs


def choose_validation(validation: str, source: Split, fold: int) -> str:
    """What `auto` means for these images: that of their source, or the next that they allow.

    Raises:
        ValueError: `predefined`, where the data set has no valid split.
    """
    if validation == "predefined" and source.validation != "predefined":
        raise ValueError(
            "validation: 'predefined' needs a data set with its own valid split; name it in "
            "DATA/dataset.yaml, such as `splits: {train: train, valid: valid, test: test}`, or use "
            "validation 'auto'"
        )
    if validation != "auto" or source.validation == "predefined":
        return validation if validation != "auto" else "predefined"
    for usual in IN_ORDER[IN_ORDER.index(source.validation) :]:
        with suppress(ValueError):  # these names or scenes do not allow it
            if min(map(len, split_names(source.names, usual, source.scene, fold))):
                return usual
    return "random"


def select_split(source: Split, split: str, validation: str, fold: int) -> np.ndarray:
    """Positions of the images of split `train` or `valid`.

    Raises:
        ValueError: a `validation` that leaves one of the two empty.
    """
    train, valid = split_names(source.names, validation, source.scene, fold)
    if validation not in ("none", "predefined") and min(len(train), len(valid)) == 0:
        raise ValueError(
            f"validation: {validation!r} leaves {len(train)} images to train and {len(valid)} to validate "
            f"out of {len(source.names)}; raise limit, or use validation 'random' (2 images or more) or "
            "'none'"
        )
    return train if split == "train" else valid

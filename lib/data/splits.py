"""Which images validate."""

import math

import numpy as np

SPLITS = ("random", "blocks", "scenes", "official")
SPLIT_SEED = 42  # never a run's own seed, so that runs with different seeds stay comparable


def split_names(names: np.ndarray, split: str, scenes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the sorted `names` that train and that validate; `scenes` names the scene of each.

    `random` equals scikit-learn's `train_test_split(test_size=0.2, random_state=42)`, order
    included, because batches of the validation loss form in that order.
    """
    everything = np.arange(len(names))
    if split == "official":
        return everything, everything[:0]
    if split == "random":
        order = np.random.RandomState(SPLIT_SEED).permutation(len(names))
        valid_count = math.ceil(0.2 * len(names))
        return order[valid_count:], order[:valid_count]
    if split == "scenes":
        if scenes is None:
            raise ValueError("split: 'scenes' needs the .mat file, folders do not name their scenes; use 'blocks'")
        found = np.random.RandomState(SPLIT_SEED).permutation(np.unique(scenes))
        validates = np.isin(scenes, found[: math.ceil(0.2 * len(found))])
        return everything[~validates], everything[validates]
    blocks = _consecutive_blocks(names)
    valid = np.concatenate(blocks[4::5]) if len(blocks) >= 5 else everything[:0]
    return np.setdiff1d(everything, valid), valid


def _consecutive_blocks(names: np.ndarray) -> list[np.ndarray]:
    """Maximal runs of consecutive ids, as positions: nearly the scenes of NYUv2."""
    try:
        ids = np.array([int(name) for name in names.tolist()])
    except ValueError as error:
        found = str(error).rsplit(maxsplit=1)[-1]
        raise ValueError(
            f"split: 'blocks' needs numbers as file names, found {found}; use split 'random' or 'official'"
        ) from None
    order = np.argsort(ids)
    return np.split(order, np.flatnonzero(np.diff(ids[order]) != 1) + 1)


def _select(names: np.ndarray, part: str, split: str, scenes: np.ndarray | None = None) -> np.ndarray:
    if part == "test":
        return names
    train, valid = split_names(names, split, scenes)
    if split != "official" and min(len(train), len(valid)) == 0:
        raise ValueError(
            f"split: {split!r} leaves {len(train)} images to train and {len(valid)} to validate out of "
            f"{len(names)}; raise limit, or use split 'random' (2 images or more) or 'official'"
        )
    return names[train if part == "train" else valid]

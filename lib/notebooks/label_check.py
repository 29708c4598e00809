"""Find suspicious labels: regions where networks not trained on the image confidently disagree."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.data import Split
from lib.data.validation import FOLDS
from lib.device import choose_device
from lib.evaluation import Predicted, predict
from lib.model import load_model
from lib.notebooks import plots
from lib.notebooks.pairs import select_names
from lib.runs import read_images, read_parameters, run_state, runs_folder
from lib.runs.results import recipe
from lib.runs.scoring import iterate_split, with_progress

MIN_REGION_SHARE = 0.005  # share of the image; smaller regions are mostly boundary


def find_folds(run: Path) -> list[Path]:
    """Find the five finished runs, one per validation fold, that have the recipe and seed of a run.

    Returns:
        The folders of the five runs in fold order, with the run itself for its own fold. Only the run itself
        is returned if it is unfinished, if a fold is missing, or if its validation images were chosen by
        `random`, `predefined` or `none`, which have no folds.
    """
    parameters = read_parameters(run)
    others = [path.parent for path in sorted(runs_folder().glob("*/best.pt"))]
    folds = {}
    for folder in [*others, run]:  # the run itself last, because others may have its fold
        candidate = read_parameters(folder) if (folder / "parameters.json").exists() else {}
        same = (recipe(candidate), candidate.get("seed")) == (recipe(parameters), parameters["seed"])
        if same and "fold" in candidate and run_state(folder).trained:
            folds[candidate["fold"]] = folder
    validation = read_images(run).get("validation", parameters["validation"])  # what `auto` chose
    has_folds = len(folds) == FOLDS and validation not in ("random", "predefined", "none")
    return [folds[fold] for fold in range(FOLDS)] if has_folds and run in folds.values() else [run]


def open_checked(runs: list[Path], data: str | None = None) -> Split:
    """Open the images that `check_labels` examines.

    These are the validation images of one run, or all labelled images for five folds.
    """
    parameters = read_parameters(runs[0])
    if len(runs) > 1:
        return iterate_split(parameters | {"validation": "none"}, "train", data)
    return iterate_split(parameters, "valid", data, run=runs[0])


def check_labels(
    runs: list[Path], data: str | None = None, batch_size: int = 8, device: str = "auto"
) -> pd.DataFrame:
    """Apply `rank_regions` to the validation images of each run, as predicted by that run."""
    splits = [iterate_split(read_parameters(run), "valid", data, run=run) for run in runs]
    models = (load_model(run / "best.pt", choose_device(device)) for run in runs)  # loaded one by one
    predictions = (
        batch
        for model, split in zip(models, splits, strict=True)
        for batch in predict(model, split, batch_size, confidence=True)
    )
    image_count = sum(map(len, splits))
    return rank_regions(with_progress("checking labels", image_count, predictions), splits[0].classes)


def rank_regions(predictions: Iterable[Predicted], classes: tuple[str, ...]) -> pd.DataFrame:
    """Rank ground-truth regions that are mostly predicted as another class, the most suspicious first.

    A region is a 4-connected set of pixels with one label that covers at least 0.5 % of its image. Its
    confidence in a class is the sum of the confidence of the pixels predicted as this class, divided by the
    number of pixels in the region. The predicted class is the one with the highest confidence.

    Regions are ranked by `confidence * -log(q) * share**0.3`, where `share` is the region's share of the
    image. `q` is the share-weighted confidence in the predicted class over all regions with the same label,
    normalised over classes and smoothed by 0.001. Without the surprise `-log(q)`, the list would mainly
    contain the network's usual confusions.

    Args:
        predictions: batches with labels and confidence.
        classes: names of the classes.

    Returns:
        One row per region: `image` name, bounding box in pixels (`left`, `top`, `right`, `bottom`; the last
        two are exclusive), `labelled` and `predicted` class names, and `confidence` in the predicted class.
    """
    rows = []
    votes = []
    for batch in predictions:
        for name, label, predicted, confidence in zip(
            batch.samples.names, batch.samples.label, batch.labels, batch.confidence, strict=True
        ):
            for index, box, inside in plots.large_regions(label, MIN_REGION_SHARE, connectivity=4):
                rows.append((name, *box, index, inside.mean()))
                votes.append(np.bincount(predicted[inside], confidence[inside], len(classes)) / inside.sum())
    table = pd.DataFrame(rows, columns=["image", "left", "top", "right", "bottom", "labelled", "share"])
    votes = np.array(votes).reshape(-1, len(classes))
    expected = pd.DataFrame(votes * table[["share"]].to_numpy(float)).groupby(table.labelled).transform("sum")
    expected = expected.div(expected.sum(axis=1), axis=0).to_numpy()
    labelled = table.labelled.to_numpy(int)
    predicted = votes.argmax(1)
    confidence = votes.max(1)
    surprise = -np.log((expected[np.arange(len(table)), predicted] + 1e-3) / (1 + 1e-3))
    names = {"labelled": np.array(classes)[labelled], "predicted": np.array(classes)[predicted]}
    order = np.argsort(-confidence * surprise * table.share**0.3, kind="stable")
    ranked = table.assign(**names, confidence=confidence).iloc[order[(labelled != predicted)[order]]]
    return ranked.drop(columns="share").reset_index(drop=True)


def plot_regions(regions: pd.DataFrame, split: Split) -> Figure | None:
    """Draw the image of each row of `rank_regions` with the region outlined; return None without rows."""
    tiles = {}
    for number, row in regions.iterrows():
        sample = next(iter(select_names(split, [row.image])))
        box = np.s_[row.top : row.bottom, row.left : row.right]
        inside = np.zeros(sample.size, bool)
        inside[box] = sample.label[0][box] == sample.classes.index(row.labelled)
        title = f"{number + 1}: {row.labelled}, predicted {row.predicted}"
        tiles[title] = plots.outline(sample.image[0], inside)
    return plots.plot_grid([tiles]) if tiles else None

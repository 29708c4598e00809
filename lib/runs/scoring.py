"""Score a run, or external predictions, on one split and write the results to the folder of the run."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib.classes import IGNORE_INDEX
from lib.data import DataError, Samples, Split, iterate_samples
from lib.data.decoding import decode_label
from lib.data.folder import normalise_name, walk_files
from lib.device import choose_device
from lib.evaluation import Evaluation, Predicted, count_predictions, predict
from lib.files import lock_run, write_atomically, write_json
from lib.metrics import all_scores, boundary_iou, depth_scores, truth_iou
from lib.model import load_model
from lib.options import check_choice
from lib.progress import progress_bar
from lib.runs import (
    check_version,
    find_run,
    open_run,
    read_images,
    read_parameters,
    runs_folder,
    write_counts,
)
from lib.runs.report import write_report
from lib.significance import compare_checkpoints, score_interval

# parameters that determine the images of a split
IMAGE_PARAMETERS = (
    "data",
    "validation",
    "limit",
    "classes",
    "fold",
)


def find_or_create_run(run: str, predictions: str | None, parameters: dict[str, object]) -> Path:
    """Find the folder of a trained run, or create one for external predictions.

    Args:
        run: name or path of a trained run, or `latest`; ignored if `predictions` is given.
        predictions: folder of masks for `read_external`; None for a trained run.
        parameters: parameters of `evaluate.ipynb`. With `predictions`, those that identify the run and
            select its images are saved as the parameters of the new run.

    Raises:
        ValueError: if the run or the folder of masks does not exist, or a parameter for external predictions
            is missing or invalid.
    """
    if predictions is None:
        return find_run(run)
    if not Path(predictions).expanduser().is_dir():
        raise ValueError(
            f"predictions: found {predictions!r}, which is no folder; expected a folder of PNG masks"
        )
    if parameters["data"] is None:
        raise ValueError(
            "data: found None, expected the data set whose images were predicted, such as a folder's path"
        )
    parameters = {"mask_values": "indices"} | parameters
    check_choice("mask_values", parameters["mask_values"], ("indices", "labels"))
    kept = ("run_name", "recipe", "seed", "predictions", "mask_values", *IMAGE_PARAMETERS)
    external = {name: parameters[name] for name in kept}
    existing = runs_folder() / parameters["run_name"]
    if (existing / "parameters.json").exists() and external.items() <= read_parameters(existing).items():
        return existing
    with open_run(external) as folder:
        return folder


def iterate_split(
    parameters: dict, split: str, data: str | None = None, batch_size: int = 8, run: Path | None = None
) -> Split:
    """Return the images of a split at their native size, selected by the parameters of a run.

    The test split is always read in full, without the run's `limit`.

    Args:
        parameters: parameters of the run.
        split: `train`, `valid` or `test`.
        data: data set to read instead of the run's own.
        batch_size: maximum number of images per batch.
        run: folder of the run. If the data set has the same name as the run's, the training or validation
            images that the run recorded are used, even if images were added since.

    Raises:
        DataError: if recorded images are missing from the data.
        ValueError: if the run was trained with an older version.
    """
    check_version(parameters.get("run_name"), parameters)
    source = parameters["data"] if data is None else data
    is_run_data = run is not None and Path(source).name == Path(parameters["data"]).name
    if is_run_data and split in read_images(run):
        return _select_recorded(run, split, source, parameters, batch_size)
    selected_by = {name: parameters[name] for name in IMAGE_PARAMETERS[1:] if name in parameters}
    if split == "test":
        selected_by["limit"] = None
    return iterate_samples(source, split, batch_size=batch_size, **selected_by)


def _select_recorded(run: Path, split: str, source: str, parameters: dict, batch_size: int) -> Split:
    """Return the images that a run was trained or validated on, and print how many were added since."""
    recorded = read_images(run)
    source_split = (split, "predefined") if recorded["validation"] == "predefined" else ("train", "none")
    pool = iterate_samples(source, *source_split, classes=parameters.get("classes"), batch_size=batch_size)
    positions = pd.Index(pool.names).get_indexer(recorded[split])  # -1: missing
    missing = [name for name, position in zip(recorded[split], positions, strict=True) if position < 0]
    if missing:
        raise DataError(
            f"{source}: {len(missing)} of the {len(recorded[split])} images of split {split!r} of the run "
            f"{run.name!r} are missing, the first is {missing[0]!r}; put them back, or train again"
        )
    new = {*pool.names.tolist()} - {*recorded["train"], *recorded["valid"]}
    if new and parameters.get("limit") is None:
        print(
            f"{len(new)} images of {source} were added after {run.name} was trained, such as {min(new)}; the "
            f"original {len(recorded[split])} {split} images are used."
        )
    return replace(pool.select(positions), split=split, validation=recorded["validation"])


def check_labelled(parameters: dict, split: str) -> None:
    """Raise a ValueError if the labels of a split are held back, so that no run can be scored on it."""
    if not is_labelled(iterate_split(parameters, split)):
        raise ValueError(
            f"split: the labels of split {split!r} of {parameters['data']} are held back, so runs can't be "
            "scored on it; use split valid, or data with labels"
        )


def is_labelled(pieces: Iterable[Samples]) -> bool:
    """Whether any pixel has a label; labels count as held back if they are all 255 or missing."""
    return any((piece.labels_or_ignored != IGNORE_INDEX).any() for piece in pieces)


def score_run(
    run: Path, split: str, pieces: Split, tta: str = "flip", device: str = "auto"
) -> dict[str, object]:
    """Predict a split with and without test-time augmentation and write the run's `evaluation/` folder.

    The folder contains `SPLIT.json` (scores), `SPLIT.npz` (counts per image), `SPLIT.strata.npz` (counts per
    scene by depth, distance to a boundary and region size) and `SPLIT/NAME.png` (class indices, predicted
    without augmentation).

    If labels are held back, there are no scores or counts, and the masks are predicted with augmentation. If
    they all have the same size, they are also saved as `submission.npy`, or `submission_SPLIT.npy` for splits
    other than test: `(N, H, W)`, sorted by name.

    External predictions are scored as they are. An earlier evaluation of the split is replaced only when all
    images are predicted, so that it survives an error.

    Returns:
        The content of `SPLIT.json`.
    """
    with lock_run(run):
        labelled = is_labelled(pieces)
        facts = {
            "data": pieces.data,
            "images": len(pieces),
            "labelled": labelled,
            "validation": None if split == "test" else pieces.validation,
        }
        settings, passes = _predict_passes(run, pieces, labelled, tta, device)
        first = next(iter(passes))
        masks_path = masks_folder(run, f".{split}.partial")
        shutil.rmtree(masks_path, ignore_errors=True)
        passes[first] = _save_masks(passes[first], masks_path)
        counted = {
            name: count_predictions(with_progress(f"predicting, {name}", len(pieces), batches), thorough=True)
            for name, batches in passes.items()
        }
        _remove_evaluation(run, split)
        masks_path.rename(masks_folder(run, split))
        if not labelled:
            masks = read_masks(masks_folder(run, split), sorted(counted[first].names.tolist()))
            if len({mask.shape for mask in masks}) == 1:
                write_atomically(_submission_path(run, split), lambda file: np.save(file, np.stack(masks)))
        return write_evaluation(run, split, facts | settings, counted if labelled else {})


def _predict_passes(
    run: Path, pieces: Split, labelled: bool, tta: str, device: str
) -> tuple[dict[str, object], dict[str, Iterator[Predicted]]]:
    """Return the prediction settings to record, and the predictions by pass: `plain`, `augmented` or both."""
    parameters = read_parameters(run)
    if "predictions" in parameters:
        folder = Path(parameters["predictions"]).expanduser()
        return {}, {"plain": read_external(folder, pieces, parameters["mask_values"])}
    model = load_model(run / "best.pt", choose_device(device))
    views = {"plain": "none"} if labelled else {}
    if tta != "none" or not labelled:
        views["augmented"] = tta
    passes = {name: predict(model, pieces, pieces.batch_size, view) for name, view in views.items()}
    return {"tta": tta, "working_size": model.config.size}, passes


def _submission_path(run: Path, split: str) -> Path:
    return run / "evaluation" / ("submission.npy" if split == "test" else f"submission_{split}.npy")


def _remove_evaluation(run: Path, split: str) -> None:
    """Delete an earlier evaluation, possibly on other data.

    The scores are deleted first, because their presence marks an evaluation as complete.
    """
    for path in (*sorted((run / "evaluation").glob(f"{split}.*")), _submission_path(run, split)):
        path.unlink(missing_ok=True)  # sorted: .json comes before .npz
    shutil.rmtree(masks_folder(run, split), ignore_errors=True)


def write_evaluation(run: Path, split: str, facts: dict, counted: dict[str, Evaluation]) -> dict[str, object]:
    """Write `SPLIT.json` and the report, and return the content of `SPLIT.json`.

    Unless `counted` is empty, also write `SPLIT.npz` and, if available, `SPLIT.strata.npz` for `plain`. The
    counts must be thorough (see `count_predictions`).
    """
    (run / "evaluation").mkdir(exist_ok=True)
    if counted:
        facts = facts | describe_scores(counted)
        write_counts(run / "evaluation" / f"{split}.npz", counted["plain"])
        strata = counted["plain"].strata
        if strata is not None:
            path = run / "evaluation" / f"{split}.strata.npz"
            write_atomically(path, lambda file: np.savez_compressed(file, **strata))
    write_json(facts, run / "evaluation" / f"{split}.json")
    write_report(run)
    return facts


def describe_scores(counted: dict[str, Evaluation]) -> dict[str, object]:
    """Compute the scores of `plain` and, if present, `augmented` predictions, with intervals over scenes.

    The mIoU averages the classes in the ground truth, as in comparisons.
    """
    plain = counted["plain"]
    truth = plain.counts.sum(2)
    intervals = {
        name: score_interval(evaluation.counts, evaluation.scene) for name, evaluation in counted.items()
    }
    low, high = intervals["plain"].class_interval
    columns = {
        "images": (truth > 0).sum(0),
        "support": truth.sum(0) / max(truth.sum(), 1),
        "IoU": truth_iou(plain.counts),
        "low": low,
        "high": high,
    }
    description = {
        "intervals": {name: score.interval for name, score in intervals.items()},
        "depth": depth_scores(plain.depth),
        "scenes": None if plain.scene is None else intervals["plain"].scene_count,
    }
    for name, evaluation in counted.items():
        boundary = float(np.nanmean(boundary_iou(evaluation.boundary)[truth.any(0)]))
        description[name] = all_scores(evaluation.counts) | {"boundary_miou": boundary}
    if "augmented" in counted:
        augmented = counted["augmented"].counts
        columns["IoU, augmented"] = truth_iou(augmented)
        gain = compare_checkpoints(plain.counts, augmented, plain.scene)
        description["gain"] = {name: getattr(gain, name) for name in ("difference", "interval", "p_value")}
    columns["boundary IoU"] = boundary_iou(plain.boundary)
    by_class = pd.DataFrame(columns, index=list(plain.classes)).sort_values("support", ascending=False)
    return description | {"classes": by_class.to_dict("index")}


def with_progress(label: str, total: int, batches: Iterable[Predicted]) -> Iterator[Predicted]:
    """Yield the batches while a progress bar counts their images."""
    with progress_bar(label, total) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.samples))


def _save_masks(batches: Iterable[Predicted], folder: Path) -> Iterator[Predicted]:
    for batch in batches:
        for name, mask in zip(batch.samples.names.tolist(), batch.labels, strict=True):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
        yield batch


def masks_folder(run: Path, split: str) -> Path:
    """Return the folder of a run's predictions for a split (PNGs of class indices)."""
    return run / "evaluation" / split


def read_masks(folder: Path, names: Iterable[str]) -> list[np.ndarray]:
    """Read the predictions for the named images, `(H, W)` uint8 each."""
    return [np.asarray(Image.open(folder / f"{name}.png")) for name in names]


def read_external(folder: Path, pieces: Split, mask_values: str = "indices") -> Iterator[Predicted]:
    """Yield the predictions of any model from its masks `FOLDER/NAME.png`, one per image.

    Args:
        folder: folder of the masks.
        pieces: the images, in batches.
        mask_values: `indices` for class indices in the data's order, or `labels` for the values in the data's
            label files.

    Raises:
        DataError: if a mask is missing or damaged, differs in size from its image, or contains a value that
            is no class. The message mentions the other choice of `mask_values` if all masks fit it.
    """
    available = {
        normalise_name(path.relative_to(folder).with_suffix("").as_posix()): path
        for path in walk_files(folder)
        if path.suffix.lower() == ".png"
    }
    missing = [name for name in pieces.names.tolist() if normalise_name(name) not in available]
    if missing:
        raise DataError(
            f"{folder / missing[0]}.png: no such file; predictions need a PNG mask for every image, named "
            "like it"
        )
    paths = {name: available[normalise_name(name)] for name in pieces.names.tolist()}
    lookup = _build_class_lookup(list(paths.values()), pieces, mask_values)
    for piece in pieces:
        masks = [decode_label(paths[name]) for name in piece.names.tolist()]
        for name, mask in zip(piece.names.tolist(), masks, strict=True):
            if mask.shape != piece.size:
                found, expected = ("x".join(map(str, shape)) for shape in (mask.shape, piece.size))
                raise DataError(
                    f"{paths[name]}: found a mask of {found}, expected {expected}, the size of its image"
                )
        yield Predicted(piece, lookup[np.stack(masks)])


def _build_class_lookup(paths: list[Path], pieces: Split, mask_values: str) -> np.ndarray:
    """Check the values of all masks and return the lookup table from value to uint8 class index."""
    count = len(pieces.classes)
    conventions = {"indices": list(range(count)), "labels": list(pieces.label_values or range(count))}
    values = conventions.pop(mask_values)
    ((other, other_values),) = conventions.items()
    first_path = {value: path for path in reversed(paths) for value in np.unique(decode_label(path)).tolist()}
    unknown = sorted(first_path.keys() - set(values))
    fits_other = first_path.keys() <= set(other_values)
    if unknown:
        expected = f"class indices 0..{count - 1}" if mask_values == "indices" else f"label values {values}"
        hint = f"; all masks fit mask_values {other}: pass `-p mask_values {other}`" if fits_other else ""
        raise DataError(
            f"{first_path[unknown[0]]}: found the value {unknown[0]}, expected {expected} for every pixel; "
            f"a prediction has no unlabelled pixels{hint}"
        )
    if fits_other and any(values.index(value) != other_values.index(value) for value in first_path):
        print(
            f"The masks were read as mask_values {mask_values}; as {other} they would also be valid, but "
            "mean other classes."
        )
    lookup = np.zeros(max(values) + 1, np.uint8)
    lookup[values] = range(count)
    return lookup

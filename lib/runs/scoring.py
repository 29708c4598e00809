"""Score a run, or anybody's predictions, on a split of its data, and leave what a comparison needs in its folder."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib.data import DataError, Split, iterate_samples
from lib.data.decoding import decode_label
from lib.device import choose_device
from lib.evaluation import Evaluation, Predicted, count_predictions, predict
from lib.files import hold_run, write_atomically, write_json
from lib.metrics import all_scores, boundary_iou, depth_scores, truth_iou
from lib.model import load_model
from lib.progress import progress_bar
from lib.runs import find_run, open_run, read_parameters, write_counts
from lib.runs.report import write_report
from lib.significance import compare_checkpoints, score_interval

READ_WITH = (
    "data",
    "validation",
    "limit",
    "classes",
    "fold",
)  # parameters that say which images a split holds


def find_scored(run: str, predictions: str | None, parameters: dict[str, object]) -> Path:
    """The folder of a trained run, or a new one for predictions from elsewhere.

    Args:
        run: name or path of a trained run, or `latest`; unused with predictions.
        predictions: None, or a folder of masks as `read_external` takes them.
        parameters: of `evaluate.ipynb`; with predictions, those that name the run, its recipe and seed, and
            the images are kept as the run's own.
    """
    if predictions is None:
        return find_run(run)
    if not Path(predictions).expanduser().is_dir():
        raise ValueError(
            f"predictions: found {predictions!r}, where there is no folder; expected one of PNG masks"
        )
    if parameters["data"] is None:
        raise ValueError(
            "data: found None, expected the data set whose images were predicted, such as a folder's path"
        )
    kept = ("run_name", "recipe", "seed", "predictions", *READ_WITH)
    with open_run({name: parameters[name] for name in kept}) as folder:
        return folder


def iterate_split(parameters: dict, split: str, data: str | None = None, batch_size: int = 8) -> Split:
    """The images of a split at their own size, selected as the parameters of a run say.

    Args:
        parameters: of the run.
        split: `train`, `valid` or `test`.
        data: another data set than the run's, of which only `test` is selected by nothing.
        batch_size: images of a piece, at most.
    """
    selected = {name: value for name, value in parameters.items() if name in READ_WITH}
    if data is not None:
        selected["data"] = data
    if split == "test":
        selected.pop("limit", None)
    return iterate_samples(selected.pop("data"), split, batch_size=batch_size, **selected)


def score_run(
    run: Path, split: str, pieces: Split, tta: str = "flip", device: str = "auto"
) -> dict[str, object]:
    """Predict a split, without and with test-time augmentation, and write `evaluation/` of the run.

    In it are `SPLIT.json` with the scores, `SPLIT.npz` with the counts per image, and `SPLIT/NAME.png`, the
    predicted class indices. Where labels are held back, these are with augmentation, and `submission.npy` holds
    them, too, `(N, H, W)` in the order of the names, if they are of one size. Predictions from elsewhere are scored
    as they are.

    Returns:
        What `SPLIT.json` holds.
    """
    with hold_run(run):
        return _score(run, split, pieces, tta, device)


def _score(run: Path, split: str, pieces: Split, tta: str, device: str) -> dict[str, object]:
    parameters = read_parameters(run)
    labelled = next((piece.label is not None for piece in pieces), True)
    (run / "evaluation" / f"{split}.json").unlink(
        missing_ok=True
    )  # until it is written again, nothing is scored
    facts = {"data": pieces.data, "images": len(pieces), "labelled": labelled}
    facts |= {"validation": None if split == "test" else pieces.validation}
    if "predictions" in parameters:
        passes = {"plain": read_external(Path(parameters["predictions"]).expanduser(), pieces)}
    else:
        model = load_model(run / "best.pt", choose_device(device))
        facts |= {"tta": tta, "working_size": model.config.size}
        views = {"plain": "none"} if labelled else {}
        views |= {"augmented": tta} if tta != "none" or not labelled else {}
        passes = {name: predict(model, pieces, pieces.batch_size, view) for name, view in views.items()}
    first = next(iter(passes))
    passes[first] = _saved(passes[first], masks_folder(run, split))
    counted = {
        name: count_predictions(_watched(f"predicting, {name}", len(pieces), batches), thorough=True)
        for name, batches in passes.items()
    }
    if not labelled:
        masks = read_masks(masks_folder(run, split), sorted(counted[first].names.tolist()))
        if len({mask.shape for mask in masks}) == 1:
            path = run / "evaluation" / ("submission.npy" if split == "test" else f"submission_{split}.npy")
            write_atomically(path, lambda file: np.save(file, np.stack(masks)))
    return write_evaluation(run, split, facts, counted if labelled else {})


def write_evaluation(run: Path, split: str, facts: dict, counted: dict[str, Evaluation]) -> dict[str, object]:
    """`SPLIT.json`, which it returns, and with thorough counts of `plain` predictions `SPLIT.npz`; then the report."""
    (run / "evaluation").mkdir(exist_ok=True)
    if counted:
        facts = facts | describe_scores(counted)
        write_counts(run / "evaluation" / f"{split}.npz", counted["plain"])
    write_json(facts, run / "evaluation" / f"{split}.json")
    write_report(run)
    return facts


def describe_scores(counted: dict[str, Evaluation]) -> dict[str, object]:
    """Scores of `plain` predictions and, where there are, of `augmented` ones; intervals over scenes.

    The mIoU is over the classes in the truth, as in comparisons.
    """
    plain = counted["plain"]
    truth = plain.counts.sum(2)
    columns = {
        "images": (truth > 0).sum(0),
        "support": truth.sum(0) / max(truth.sum(), 1),
        "IoU": truth_iou(plain.counts),
    }
    described = {"intervals": {}, "depth": depth_scores(plain.depth)}
    for name, evaluation in counted.items():
        boundary = float(np.nanmean(boundary_iou(evaluation.boundary)[truth.any(0)]))
        interval = score_interval(evaluation.counts, evaluation.scene)
        described[name] = all_scores(evaluation.counts) | {"boundary_miou": boundary}
        described["intervals"][name] = interval.interval
        if name == "plain":
            columns |= dict(zip(("low", "high"), interval.class_interval, strict=True))
            described["scenes"] = interval.scene_count if evaluation.scene is not None else None
    if "augmented" in counted:
        augmented = counted["augmented"]
        columns["IoU, augmented"] = truth_iou(augmented.counts)
        gain = compare_checkpoints(plain.counts, augmented.counts, plain.scene)
        described["gain"] = {
            "difference": gain.difference,
            "interval": gain.interval,
            "p_value": gain.p_value,
        }
    columns["boundary IoU"] = boundary_iou(plain.boundary)
    by_class = pd.DataFrame(columns, index=list(plain.classes)).sort_values("support", ascending=False)
    return described | {"classes": by_class.to_dict("index")}


def _watched(label: str, total: int, batches: Iterable[Predicted]) -> Iterator[Predicted]:
    with progress_bar(label, total) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.samples))


def _saved(batches: Iterable[Predicted], folder: Path) -> Iterator[Predicted]:
    for batch in batches:
        for name, mask in zip(batch.samples.names.tolist(), batch.labels, strict=True):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
        yield batch


def masks_folder(run: Path, split: str) -> Path:
    """Where a run keeps its predictions for a split, as PNGs of class indices."""
    return run / "evaluation" / split


def read_masks(folder: Path, names: Iterable[str]) -> list[np.ndarray]:
    """The predictions of these images, `(H, W)` uint8 each."""
    return [np.asarray(Image.open(folder / f"{name}.png")) for name in names]


def read_external(folder: Path, pieces: Iterable) -> Iterator[Predicted]:
    """Masks `FOLDER/NAME.png`, whoever made them, one for each image: indices in the order of the data's classes.

    Raises:
        DataError: a mask that is missing or damaged, of another size than its image, or with a value that is
            no class.
    """
    for piece in pieces:
        labels = [
            _read_mask(folder / f"{name}.png", piece.size, len(piece.classes))
            for name in piece.names.tolist()
        ]
        yield Predicted(piece, np.stack(labels))


def _read_mask(path: Path, size: tuple[int, int], class_count: int) -> np.ndarray:
    if not path.exists():
        raise DataError(f"{path}: no such file; predictions need a PNG mask for every image, named like it")
    mask = decode_label(path)
    if mask.shape != size:
        found, expected = ("x".join(map(str, shape)) for shape in (mask.shape, size))
        raise DataError(f"{path}: found a mask of {found}, expected {expected}, the size of its image")
    if mask.max() >= class_count:
        raise DataError(
            f"{path}: found the value {mask.max()}, expected class indices 0..{class_count - 1} for every pixel; an "
            "unlabelled pixel is no prediction"
        )
    return mask.astype(np.uint8)

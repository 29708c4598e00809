"""A trained network over anybody's pictures: predict each, keep the masks, draw what it sees."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib.data import Split
from lib.evaluation import Predicted, predict
from lib.files import read_json, write_atomically, write_json
from lib.model import SegmentationDepthNet
from lib.notebooks.plots import blend_labels, class_patches, plot_grid, write_names
from lib.progress import progress_bar

CONFIDENCE = "confidence"  # a column of the table, and a text in a mask's file
SEEN_FILE = "predict.json"  # in a folder of masks
SHOWN_PIXELS = 640  # of the longer side in figures, at most


def predict_images(model: SegmentationDepthNet, pieces: Split, save_to: str | None = None) -> pd.DataFrame:
    """Shares of the classes in each picture and the mean confidence in them, by name.

    With `save_to` each picture leaves `NAME.png`, its class indices, in that folder as soon as it is done. What the
    same network has left there of the same pictures is not done again; a ValueError says that it holds something else.
    """
    folder = None if save_to is None else Path(save_to).expanduser()
    rows = {} if folder is None else _open_masks(folder, model, pieces)
    names, classes = pieces.names, model.config.classes
    left = pieces.select(np.flatnonzero([name not in rows for name in names]))
    with progress_bar("predicting", len(names), initial=len(rows)) as bar:
        for batch in predict(model, left, confidence=True):
            name, mask, sure = batch.samples.names[0], batch.labels[0], float(batch.confidence.mean())
            rows[name] = _describe(mask, sure, classes)
            if folder is not None:
                _write_mask(folder / f"{name}.png", mask, sure)
            bar.update()
    return pd.DataFrame.from_dict(rows, "index").loc[names]


def _open_masks(folder: Path, model: SegmentationDepthNet, pieces: Split) -> dict[str, dict[str, float]]:
    """What is known of the masks in a folder, which may be new."""
    digest = hashlib.sha256(repr(model.config).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    made_of = {"network": digest.hexdigest(), "pictures": pieces.data, "classes": list(model.config.classes)}
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        write_json(made_of, folder / SEEN_FILE)
    found = read_json(folder / SEEN_FILE) if (folder / SEEN_FILE).exists() else {}
    for what, value in made_of.items():
        if found.get(what) != value:
            raise ValueError(
                f"save_to: {folder} has {what} {found.get(what)}, not {value}; give another folder"
            )
    masks = [folder / f"{name}.png" for name in pieces.names if (folder / f"{name}.png").exists()]
    return {path.stem: _describe(*_read_mask(path), model.config.classes) for path in masks}


def _describe(mask: np.ndarray, sure: float, classes: Sequence[str]) -> dict[str, float]:
    shares = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
    return {CONFIDENCE: sure, **dict(zip(classes, shares.tolist(), strict=True))}


def _read_mask(path: Path) -> tuple[np.ndarray, float]:
    with Image.open(path) as mask:
        return np.asarray(mask), float(mask.text[CONFIDENCE])


def _write_mask(path: Path, mask: np.ndarray, sure: float) -> None:
    text = PngInfo()
    text.add_text(CONFIDENCE, str(sure))
    write_atomically(path, lambda file: Image.fromarray(mask).save(file, "PNG", pnginfo=text))


def plot_images(predicted: Sequence[Predicted]) -> Figure:
    """A row for each picture: as it is, its classes with their names on them, and how sure the network is."""
    rows, masks, classes = [], [], predicted[0].samples.classes
    for batch in predicted:
        step = -(-max(batch.samples.size) // SHOWN_PIXELS)
        arrays = (batch.samples.image, batch.labels, batch.confidence)
        image, mask, sure = (array[0, ::step, ::step] for array in arrays)
        grey = np.repeat(sure[..., None], 3, -1)
        overlay = blend_labels(image, mask, classes, 0.6)
        rows.append({"picture": image, "classes": overlay, "confidence (black 0, white 1)": grey})
        masks.append(mask)
    figure = plot_grid(rows, [batch.samples.names[0] for batch in predicted], class_patches(classes, masks))
    for axes, mask in zip(figure.axes[1::3], masks, strict=True):
        write_names(axes, mask, classes)
    return figure


def describe_images(table: pd.DataFrame) -> str:
    """In Markdown, what `predict_images` found."""
    shares, sure = table.drop(columns=CONFIDENCE).mean().sort_values(ascending=False), table[CONFIDENCE]
    named = ", ".join(f"{name} ({share:.0%})" for name, share in shares[shares > 0][:3].items())
    never = ", ".join(shares.index[shares == 0]) or "none"
    return (
        f"In {len(table)} pictures the network sees mostly **{named}**; classes that it never names: {never}. Its mean "
        f"confidence is **{sure.mean():.2f}**, and lowest in `{sure.idxmin()}` ({sure.min():.2f})."
    )

"""Apply a trained network to any images: predict, save the masks, and draw and summarise the results."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib.data import Samples, Split
from lib.data.folder import is_hidden
from lib.evaluation import Predicted, predict
from lib.files import write_atomically, write_json
from lib.model import SegmentationDepthNet
from lib.notebooks import plots
from lib.progress import progress_bar

CONFIDENCE = "confidence"  # PNG text entry of a mask: mean confidence of its image
CHECKSUM = "pixels"  # PNG text entry of a mask: checksum of its image and depth
MILLISECONDS = "milliseconds"  # in `table.attrs`: mean time per newly predicted image, NaN without any
CONFIDENCE_COLUMN = ("", CONFIDENCE)  # can't clash with a class, because classes are under `share`
MANIFEST_FILE = "predict.json"  # in a mask folder: its network, images and classes


def predict_images(model: SegmentationDepthNet, pieces: Split, save_to: str | None = None) -> pd.DataFrame:
    """Predict images and tabulate the confidence and the class shares of each.

    Args:
        model: the network.
        pieces: the images, in batches of one.
        save_to: folder for the masks; None saves none. The class indices of each image are written to
            `NAME.png` as soon as they are predicted. Masks that the same network wrote there for the same
            pixels are reused.

    Returns:
        One row per image name: the mean confidence in column `CONFIDENCE_COLUMN`, the share of each class in
        column `("share", class)`. `attrs[MILLISECONDS]` is the mean time per newly predicted image.

    Raises:
        ValueError: the folder has masks of another network or other images, or files from elsewhere.
    """
    folder = None if save_to is None else Path(save_to).expanduser()
    if folder is not None:
        _check_masks(folder, model, pieces)
    rows, elapsed_ms = {}, []
    classes = model.config.classes
    with progress_bar("predicting", len(pieces)) as bar:
        for image in pieces:
            start = time.perf_counter()
            path = None if folder is None else folder / f"{image.names[0]}.png"
            saved = _read_mask(path, image) if path is not None and path.exists() else None
            mask, confidence = saved or _predict_mask(path, model, image)
            if not saved:
                elapsed_ms.append(1000 * (time.perf_counter() - start))
            rows[image.names[0]] = [
                confidence,
                *(np.bincount(mask.ravel(), minlength=len(classes)) / mask.size),
            ]
            bar.update()
    columns = pd.MultiIndex.from_tuples([CONFIDENCE_COLUMN, *(("share", name) for name in classes)])
    table = pd.DataFrame.from_dict(rows, "index", columns=columns)
    table.attrs[MILLISECONDS] = np.mean(elapsed_ms) if elapsed_ms else np.nan
    return table


def _check_masks(folder: Path, model: SegmentationDepthNet, pieces: Split) -> None:
    """Check that the masks in a folder belong to this network, data and classes.

    A missing folder is created. In an empty folder, `MANIFEST_FILE` is written to record the three. Hidden
    files do not count.

    Raises:
        ValueError: the folder has no `MANIFEST_FILE` and is not empty, or the file is damaged or records
            something else.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    manifest = {"network": digest.hexdigest(), "images": pieces.data, "classes": list(model.config.classes)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST_FILE
    if all(is_hidden(entry.name) for entry in folder.iterdir()):
        write_json(manifest, path)
    if not path.exists():
        raise ValueError(
            f"save_to: {folder} is not empty and was not written by predict.ipynb; give another folder"
        )
    try:
        recorded = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"save_to: {path} can't be read ({error}), expected the network, images and classes of the "
            "masks there; give another folder"
        ) from error
    for key, value in manifest.items():
        if recorded.get(key) != value:
            raise ValueError(
                f"save_to: {folder} has {key} {recorded.get(key)}, not {value}; give another folder"
            )


def _read_mask(path: Path, image: Samples) -> tuple[np.ndarray, float] | None:
    """Return a mask and its mean confidence; None if it is damaged or was predicted from other pixels.

    Raises:
        ValueError: `predict_images` did not write the mask.
    """
    try:
        with Image.open(path) as mask:
            mask.load()
    except (OSError, SyntaxError):  # empty or truncated
        return None
    if CONFIDENCE not in mask.info:
        raise ValueError(
            f"save_to: {path} was not written by predict.ipynb, or was edited since; move it away, or "
            "give another folder"
        )
    is_same = mask.info.get(CHECKSUM) == _checksum(image)
    return (np.asarray(mask), float(mask.info[CONFIDENCE])) if is_same else None


def _predict_mask(path: Path | None, model: SegmentationDepthNet, image: Samples) -> tuple[np.ndarray, float]:
    (batch,) = predict(model, image, confidence=True)
    mask, confidence = batch.labels[0], float(batch.confidence.mean())
    if path is not None:
        text = PngInfo()
        text.add_text(CONFIDENCE, str(confidence))
        text.add_text(CHECKSUM, _checksum(image))
        write_atomically(path, lambda file: Image.fromarray(mask).save(file, "PNG", pnginfo=text))
    return mask, confidence


def _checksum(image: Samples) -> str:
    shape = str(image.image.shape).encode()
    return hashlib.sha256(shape + image.image.tobytes() + image.depth_or_missing.tobytes()).hexdigest()


def plot_images(predicted: Sequence[Predicted]) -> Figure:
    """Draw one row per image: RGB, the prediction with class names, and the confidence."""
    classes = predicted[0].samples.classes
    masks = [batch.labels[0] for batch in predicted]
    colour_scale = ScalarMappable(Normalize(0, 1), "gray")
    rows = [
        {
            "RGB": batch.samples.image[0],
            "prediction": plots.colour_labels(batch.labels[0], classes),
            CONFIDENCE: colour_scale.to_rgba(batch.confidence[0], bytes=True)[..., :3],
        }
        for batch in predicted
    ]
    captions = [batch.samples.names[0] for batch in predicted]
    figure = plots.plot_grid(rows, captions, plots.class_patches(classes, masks), colour_scale, CONFIDENCE)
    for axes, mask in zip(figure.axes[1::3], masks, strict=False):
        plots.label_regions(axes, plots.fit_tile(mask), classes)
    return figure


def describe_images(table: pd.DataFrame, save_to: str | None) -> str:
    """Summarise the table of `predict_images` in Markdown, with the prediction time and the mask folder."""
    shares = table["share"].mean().sort_values(ascending=False)
    common = ", ".join(f"{name} ({plots.percent(share)})" for name, share in shares[shares > 0][:3].items())
    never = ", ".join(shares.index[shares == 0]) or "none"
    confidence = table[CONFIDENCE_COLUMN]
    speed = (
        "" if np.isnan(table.attrs[MILLISECONDS]) else f" An image took {table.attrs[MILLISECONDS]:.0f} ms."
    )
    location = (
        f"The masks are in `{save_to}`."
        if save_to
        else "No masks were written; `-p save_to FOLDER` writes them."
    )
    return (
        f"On {len(table)} images the network predicts mostly **{common}**; classes never predicted: {never}. "
        f"Its mean confidence is **{confidence.mean():.2f}**, lowest in `{confidence.idxmin()}` "
        f"({confidence.min():.2f}).{speed} {location}"
    )

"""Open arbitrary images, with or without depth."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data.decoding import SUFFIXES
from lib.data.description import Description
from lib.data.folder import is_hidden, normalise_name, read_sample
from lib.data.samples import DataError, Split
from lib.data.sanity import MAX_SATURATED_SHARE, UINT16_MAX, guess_units, read_depth_stats
from lib.data.synthetic import open_synthetic
from lib.options import check_options


def open_images(
    images: str, depths: str | None, depth_unit_mm: float | None, takes_depth: bool, classes: tuple[str, ...]
) -> Split:
    """Open images of any size, to be read one by one.

    Args:
        images: an image file, a folder of images (subfolders are ignored), or `synthetic` for the built-in
            synthetic scenes, which include depth.
        depths: a depth file, or a folder of depth files named like the images; None without depth.
        depth_unit_mm: millimetres per unit of depth; None means 1, and the values are then checked.
        takes_depth: whether the network takes depth; `depths` must be given if and only if it does.
        classes: names of the network's classes.

    Raises:
        ValueError: if there are no images or depth files, `depths` does not match `takes_depth`, or
            `depth_unit_mm` is out of range.
        DataError: if a file is missing or can't be used. Reading an image can raise it as well.
    """
    if images == "synthetic":
        return replace(open_synthetic("test"), classes=classes, batch_size=1, validation="none", data=images)
    if takes_depth != (depths is not None):
        expected = (
            "also takes depth; give depths, or a run trained with inputs rgb"
            if takes_depth
            else "takes only RGB; leave depths out, or choose another run"
        )
        raise ValueError(f"depths: found {depths!r}, but this network {expected}")
    check_options(depth_unit_mm=depth_unit_mm)
    overrides = {} if depth_unit_mm is None else {"depth_unit_mm": depth_unit_mm}
    description = Description(root=Path(images), **overrides)
    files = {name: {"image": path} for name, path in _list_files("image", images).items()}
    data = str(Path(images).expanduser().resolve())
    if depths is not None:
        depth_files = _find_depth_files(list(files), depths)
        if not overrides:
            _check_depth(depths, list(depth_files.values()), description)
        files = {name: paths | {"depth": depth_files[name]} for name, paths in files.items()}
        depth_root = Path(depths).expanduser().resolve()
        data += f", with depth of {depth_root} in units of {description.depth_unit_mm:g} mm"
    names = np.array(list(files))

    def read(positions: np.ndarray, size: None) -> list[dict[str, np.ndarray]]:
        samples = (read_sample(files[name], size, description) for name in names[positions])
        return [{kind: array[None] for kind, array in arrays.items()} for arrays in samples]

    return Split(names, classes, read, batch_size=1, data=data)


def _find_depth_files(names: list[str], depths: str) -> dict[str, Path]:
    """Return the depth file of each image. If there is one of each, their names may differ."""
    files = _list_files("depth", depths)
    if len(names) == len(files) == 1:
        return dict(zip(names, files.values(), strict=True))
    missing = [name for name in names if name not in files]
    if missing:
        raise DataError(
            f"depths: {len(missing)} files missing in {depths}, the first is that of image {missing[0]!r}; "
            f"expected {missing[0]}.png, named like the image"
        )
    return {name: files[name] for name in names}


def _check_depth(depths: str, paths: list[Path], description: Description) -> None:
    """Raise a DataError if much depth is 65535, all depth is missing, or the unit is implausible."""
    stats = read_depth_stats(paths, description)
    saturated_share = stats[:, 1].mean()
    if saturated_share > MAX_SATURATED_SHARE:
        raise DataError(
            f"depths: {depths} is {UINT16_MAX} in {100 * saturated_share:.0f} % of the pixels, the largest "
            "16-bit value. If it marks missing depth, write 0 there, otherwise give depth_unit_mm"
        )
    if np.isnan(stats[:, 0]).all():
        raise DataError(
            f"depths: {depths} is missing everywhere in {len(stats)} files; export it again, or use a run "
            "trained with inputs rgb"
        )
    problem, units = guess_units(stats[:, 0])
    if problem:
        candidates = " or ".join(f"{unit} {explanation}" for unit, explanation in units.items())
        raise DataError(f"depths: {depths} {problem}: give depth_unit_mm {candidates}")


def _list_files(kind: str, source: str) -> dict[str, Path]:
    root = Path(source).expanduser()
    entries = sorted(path for path in root.glob("*") if not is_hidden(path.name))
    files = {}
    for path in [root] if root.is_file() else entries:
        if path.suffix.lower() in (".heic", ".heif"):
            raise DataError(f"{path}: images of this kind can't be read; convert them to jpg, or remove them")
        name = normalise_name(path.stem)
        if path.suffix.lower() in SUFFIXES[kind] and files.setdefault(name, path) != path:
            raise DataError(f"{path}: a second file named {name!r} beside {files[name].name}; keep one")
    if not files:
        raise ValueError(
            f"{kind}s: found none in {source!r}, expected a file, or a folder of {', '.join(SUFFIXES[kind])}"
        )
    return files

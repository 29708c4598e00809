"""Anybody's pictures, with or without depth, as their files mean them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data.decoding import SUFFIXES, decode_depth, decode_image, depth_to_mm
from lib.data.description import Description
from lib.data.folder import compose, is_hidden
from lib.data.samples import DataError, Split
from lib.data.sanity import choose_evenly, guess_units, look_at_depth
from lib.data.synthetic import open_synthetic


def open_images(
    images: str, depths: str | None, depth_unit_mm: float | None, takes_depth: bool, classes: tuple[str, ...]
) -> Split:
    """Pictures of any sizes, read one by one.

    `synthetic`, a file, or a folder without those in it; depth is a file, or a folder of files named like the images,
    in the stated unit, or in millimetres, which are then doubted.
    A ValueError says what is missing; `DataError` names a file that can't be used, also while they are read.
    """
    if images == "synthetic":
        return replace(open_synthetic("test"), classes=classes, batch_size=1, validation="none", data=images)
    if takes_depth != (depths is not None):
        takes = "takes depth, too" if takes_depth else "takes RGB alone"
        remedy = (
            "give depths, or a run trained with inputs rgb" if takes_depth else "leave it out, or change run"
        )
        raise ValueError(f"depths: found {depths!r}, but this network {takes}; {remedy}")
    files, partners = _list_files("image", images), _list_files("depth", depths) if depths else {}
    if len(files) == len(partners) == 1:  # whatever they are called
        partners = dict(zip(files, partners.values(), strict=True))
    if depths and (missing := [name for name in files if name not in partners]):
        raise DataError(
            f"depths: {len(missing)} files missing in {depths}, the first is that of image {missing[0]!r}; expected "
            f"{missing[0]}.png, named like the image"
        )
    if depths and depth_unit_mm is None:
        sample = choose_evenly([partners[name] for name in files])
        medians = [look_at_depth(path, Description(root=path.parent))[0] for path in sample]
        found, units = guess_units(np.array(medians))
        if found:
            options = [f"{unit} for {name}" for unit, name in units.items()] + ["1 if these are mm"]
            raise DataError(f"depths: {depths} {found}: give depth_unit_mm {' or '.join(options)}")
    names = np.array(list(files))

    def read(positions: np.ndarray, size: None) -> list[dict[str, np.ndarray]]:
        return [_read(files[name], partners.get(name), depth_unit_mm) for name in names[positions]]

    measured = f", with depth of {depths} in units of {depth_unit_mm or 1:g} mm" if depths else ""
    data = f"{Path(images).expanduser().resolve()}{measured}"
    return Split(names, classes, read, batch_size=1, data=data)


def _list_files(kind: str, place: str) -> dict[str, Path]:
    root, files, suffixes = Path(place).expanduser(), {}, SUFFIXES[kind]
    there = sorted(path for path in root.glob("*") if not is_hidden(path.name))
    for path in [root] if root.is_file() else there:
        if path.suffix.lower() in (".heic", ".heif"):
            raise DataError(
                f"{path}: pictures of this kind can't be read; convert them to jpg, or take them away"
            )
        name = compose(path.stem)
        if path.suffix.lower() in suffixes and files.setdefault(name, path) != path:
            raise DataError(f"{path}: a second file named {name!r} beside {files[name].name}; keep one")
    if not files:
        raise ValueError(
            f"{kind}s: found none in {place!r}, expected a file, or a folder of {', '.join(suffixes)}"
        )
    return files


def _read(path: Path, depth_path: Path | None, unit_mm: float | None) -> dict[str, np.ndarray]:
    image = decode_image(path)
    if depth_path is None:
        return {"image": image[None]}
    depth_mm = depth_to_mm(decode_depth(depth_path, takes_bytes=unit_mm is not None), unit_mm or 1)
    if depth_mm.shape != image.shape[:2]:
        found, expected = ("x".join(map(str, array.shape[:2])) for array in (depth_mm, image))
        raise DataError(
            f"{depth_path}: {found}, but its picture {path.name} is {expected}; both must have one size"
        )
    return {"image": image[None], "depth": depth_mm[None]}

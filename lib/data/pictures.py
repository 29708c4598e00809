"""Anybody's pictures, with or without depth, as their files mean them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data.decoding import SUFFIXES, decode_depth, decode_image, depth_to_mm
from lib.data.samples import DataError, Pieces, Samples, Source
from lib.data.scenes import open_scenes

INDOORS_MM = (100, 20_000)  # between these lies the median depth of a picture whose unit nobody stated


def open_pictures(
    images: str, depths: str | None, depth_unit_mm: float, takes_depth: bool, classes: tuple[str, ...]
) -> Pieces:
    """Pictures of any sizes, read one by one.

    `synthetic`, a file, or a folder without those in it; depth is a file, or a folder of files named like the images.
    A ValueError says what is missing; `DataError` names a file that can't be used, also while they are read.
    """
    if images == "synthetic":
        return Pieces(replace(open_scenes("test"), classes=classes), None, 1, "official", images)
    if takes_depth != (depths is not None):
        takes = "takes depth, too" if takes_depth else "takes RGB alone"
        raise ValueError(f"depths: found {depths!r}, but this network {takes}; change depths or run")
    files, partners = _list_files("image", images), _list_files("depth", depths) if depths else {}
    if len(files) == len(partners) == 1:  # whatever they are called
        partners = dict(zip(files, partners.values(), strict=True))
    if depths and (missing := [name for name in files if name not in partners]):
        raise DataError(f"depths: {len(missing)} files missing in {depths}, the first is that of image {missing[0]!r}")
    names = np.array(list(files))

    def read(positions: np.ndarray, size: None) -> list[Samples]:
        return [_read(name, files[name], partners.get(name), depth_unit_mm) for name in names[positions]]

    measured = f", with depth of {depths} in units of {depth_unit_mm:g} mm" if depths else ""
    data = f"{Path(images).expanduser().resolve()}{measured}"
    return Pieces(Source(names, None, classes, read, "official"), None, 1, "official", data)


def _list_files(kind: str, place: str) -> dict[str, Path]:
    root, files, suffixes = Path(place).expanduser(), {}, SUFFIXES[kind]
    for path in [root] if root.is_file() else sorted(root.glob("*")):
        if path.suffix.lower() in (".heic", ".heif"):
            raise DataError(f"{path}: pictures of this kind can't be read; convert them to jpg, or take them away")
        if path.suffix.lower() in suffixes and files.setdefault(path.stem, path) != path:
            raise DataError(f"{path}: a second file named {path.stem!r} beside {files[path.stem].name}; keep one")
    if not files:
        raise ValueError(f"{kind}s: found none in {place!r}, expected a file, or a folder of {', '.join(suffixes)}")
    return files


def _read(name: str, path: Path, depth_path: Path | None, unit_mm: float) -> Samples:
    image, stated = decode_image(path), unit_mm != 1
    if depth_path is None:
        return Samples(np.array([name]), image[None])
    depth_mm = depth_to_mm(decode_depth(depth_path, takes_bytes=stated), unit_mm)
    median = np.median(depth_mm[depth_mm > 0]) if (depth_mm > 0).any() else 1000
    if depth_mm.shape != image.shape[:2] or not (stated or INDOORS_MM[0] <= median <= INDOORS_MM[1]):
        found = f"found {depth_mm.shape} and a median of {median:g} mm, expected {image.shape[:2]} and 100 to 20000 mm"
        raise DataError(f"{depth_path}: {found}; check it and depth_unit_mm")
    return Samples(np.array([name]), image[None], depth_mm[None])

"""What an interrupted training goes on from, and whether it may."""

import zlib
from pathlib import Path

import numpy as np
import torch

from lib.data.samples import Samples
from lib.files import load_checkpoint, save_checkpoint


def checksums(samples: Samples, split: str) -> dict[str, int]:
    """Of all that is known of the pixels of each image, by `split/name`."""
    sums = {}
    for position, name in enumerate(samples.names.tolist()):
        checksum = 0
        for array in (samples.image, samples.depth, samples.label, samples.measured):
            checksum = (
                checksum if array is None else zlib.crc32(np.ascontiguousarray(array[position]), checksum)
            )
        sums[f"{split}/{name}"] = checksum
    return sums


def save_progress(path: Path, stateful: dict, progress: dict, device: torch.device) -> None:
    """Everything that training goes on from: `progress` is the history, and the epoch that has begun."""
    state = {name: owner.state_dict() for name, owner in stateful.items()}
    state["rng"] = [
        torch.get_rng_state(),
        *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []),
    ]
    save_checkpoint(state | {"progress": progress}, path)


def restore_progress(path: Path, stateful: dict, made_of: dict, device: torch.device) -> dict:
    """Undo `save_progress`; where there is no such file, nothing has been done yet.

    Raises:
        ValueError: what was saved was computed otherwise or from other data than `made_of` says.
    """
    if not path.exists():
        return {"history": [], "losses": [], "row": {}} | made_of
    state = load_checkpoint(path, "cpu", (*stateful, "rng", "progress"))
    progress = state["progress"]
    _check_made_of(path.parent.name, progress, made_of)
    for name, owner in stateful.items():
        owner.load_state_dict(state[name])
    torch.set_rng_state(state["rng"][0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][1], device)  # older files have those of all GPUs
    progress["losses"] = [loss.to(device) for loss in progress["losses"]]
    return progress


def _check_made_of(run_name: str, saved: dict, made_of: dict) -> None:
    before = saved.get("computed", "an unknown device")
    if before != made_of["computed"]:
        raise ValueError(
            f"resume: {run_name!r} was trained on {before}, and here it would go on on {made_of['computed']}; pass the "
            "device and the precision that it was trained with, on a machine that has them, or start another run_name "
            "with resume False"
        )
    old, new = saved.get("data", made_of["data"]), made_of["data"]
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        name = changed[0]
        how = (
            "is not the same"
            if name in old and name in new
            else "is missing now"
            if name in old
            else "is new"
        )
        raise ValueError(
            f"resume: the data of {run_name!r} changed since it was started: {len(changed)} images, the first is "
            f"{name!r}, which {how}; put the data back, or start another run_name with resume False"
        )

"""Checkpoints for resuming interrupted training, and checks that device, precision and data are the same."""

import copy
import time
import zlib
from pathlib import Path

import torch
from torch import nn

from lib.data.samples import Samples
from lib.evaluation import Evaluation
from lib.files import load_checkpoint, save_checkpoint
from lib.model import save_model
from lib.runs import write_history, write_scores

# An interruption loses at most this much training. Saving a large network takes one second.
SAVE_INTERVAL_SECONDS = 30


class Checkpoint:
    """The state of a training run, in memory and on disk.

    All files are saved together: `last.pt`, `history.csv` and, for the epoch that is kept, `best.pt`,
    `scores.json` and `counts.npz`. Otherwise training could resume from a `last.pt` that is older than
    `best.pt`. Each file is written atomically.

    Attributes:
        history: history rows of the finished epochs.
        row: history row of the current epoch; empty between epochs.
        losses: loss terms of the current epoch, one tensor per batch.
    """

    def __init__(self, run: Path, stateful: dict[str, object], device: torch.device) -> None:
        self.run = run
        self.stateful = stateful
        self.device = device
        self.history: list[dict] = []
        self.row: dict = {}
        self.losses: list[torch.Tensor] = []
        self._fingerprint: dict = {}
        self._pending: tuple[nn.Module, dict, Evaluation | None] | None = None
        self._last_save = time.monotonic()

    def restore(self, made_of: dict) -> None:
        """Load the state from `last.pt`, if that file exists.

        Args:
            made_of: the current `fingerprint`.

        Raises:
            ValueError: if the device, precision or data have changed since the run was started.
            CheckpointError: if the file can't be read.
        """
        self._fingerprint = made_of
        path = self.run / "last.pt"
        if not path.exists():
            return
        saved = load_checkpoint(path, "cpu", (*self.stateful, "rng", "progress"))
        progress = saved["progress"]
        _check_fingerprint(self.run.name, progress, made_of)
        for name, component in self.stateful.items():
            component.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"][1], self.device)
        self.history = progress["history"]
        self.row = progress["row"]
        self.losses = [loss.to(self.device) for loss in progress["losses"]]

    def begin_epoch(self, epoch: int, learning_rate: float) -> dict:
        """Return a new row for an epoch, or its restored row if the epoch was interrupted."""
        self.row = self.row or {"epoch": epoch, "learning_rate": learning_rate}
        return self.row

    def end_epoch(self, row: dict) -> None:
        """Append the row to the history."""
        self.history.append(row)
        self.row = {}
        self.losses = []

    def keep(self, model: nn.Module, row: dict, scored: Evaluation | None) -> None:
        """Copy this epoch's network and scores for the next `save`."""
        self._pending = copy.deepcopy(model).cpu(), row, scored

    def is_due(self) -> bool:
        """Whether more than `SAVE_INTERVAL_SECONDS` have passed since the last `save`."""
        return time.monotonic() - self._last_save > SAVE_INTERVAL_SECONDS

    def save(self) -> None:
        """Save the state to disk.

        Raises:
            OSError: if a file can't be written; earlier files are intact.
        """
        if self._pending is not None:
            model, row, scored = self._pending
            save_model(model, self.run / "best.pt")
            write_scores(self.run, row, scored)
            self._pending = None
        if self.history:
            write_history(self.run, self.history)
        rng = [torch.get_rng_state()]
        if self.device.type == "cuda":
            rng.append(torch.cuda.get_rng_state(self.device))
        progress = {"history": self.history, "row": self.row, "losses": self.losses} | self._fingerprint
        state = {name: component.state_dict() for name, component in self.stateful.items()}
        save_checkpoint(state | {"rng": rng, "progress": progress}, self.run / "last.pt")
        self._last_save = time.monotonic()

    def finish(self) -> None:
        """Delete `last.pt`, because a finished run is not resumed."""
        (self.run / "last.pt").unlink(missing_ok=True)


def fingerprint(computed: str, train: Samples, valid: Samples) -> dict[str, object]:
    """Return what must match on resumption: the device and precision, and the checksum of every image."""
    return {"computed": computed, "data": _checksums(train, "train") | _checksums(valid, "valid")}


def _checksums(samples: Samples, split: str) -> dict[str, int]:
    """Return the CRC-32 of each sample's arrays (RGB, depth, label, measured), keyed by `split/name`."""
    fields = (samples.image, samples.depth, samples.label, samples.measured)
    by_image = zip(*(array for array in fields if array is not None), strict=True)
    sums = (zlib.crc32(b"".join(array.tobytes() for array in arrays)) for arrays in by_image)
    return {f"{split}/{name}": checksum for name, checksum in zip(samples.names.tolist(), sums, strict=True)}


def _check_fingerprint(run_name: str, saved: dict, current: dict) -> None:
    if saved["computed"] != current["computed"]:
        raise ValueError(
            f"resume: {run_name!r} was trained on {saved['computed']}, but here it would continue on "
            f"{current['computed']}; use the same device and precision as before, on a machine that has "
            "them, or start another run_name with resume False"
        )
    old, new = saved["data"], current["data"]
    changed = {name for name, _ in old.items() ^ new.items()}
    if changed:
        name = min(changed)
        change = "is new"
        if name in old:
            change = "is not the same" if name in new else "is missing now"
        raise ValueError(
            f"resume: the data of {run_name!r} changed since it was started: {len(changed)} images, the "
            f"first is {name!r}, which {change}; restore the data, or start another run_name with "
            "resume False"
        )

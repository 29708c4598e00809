"""Resume state: what an interrupted training continues from, and whether it may."""

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

CHECKPOINT_SECONDS = 30  # that an interrupted run loses at most; a large network takes a second to write


class Checkpoint:
    """A training run's state, in memory and on disk.

    Everything is written together, or `last.pt` would continue beside a `best.pt` of epochs that it does not
    know: `last.pt`, `history.csv` and, for the epoch that is kept, `best.pt`, `scores.json` and `counts.npz`.
    Each file is whole or not there.

    Attributes:
        history: the rows of the finished epochs.
        row: of the epoch that has begun; empty between epochs.
        losses: its terms of the loss, a tensor per batch.
    """

    def __init__(self, run: Path, stateful: dict[str, object], device: torch.device) -> None:
        self.run = run
        self.stateful = stateful
        self.device = device
        self.history: list[dict] = []
        self.row: dict = {}
        self.losses: list[torch.Tensor] = []
        self._made_of: dict = {}
        self._kept: tuple[nn.Module, dict, Evaluation | None] | None = None
        self._saved = time.monotonic()

    def restore(self, made_of: dict) -> None:
        """Continue from `last.pt`; without that file nothing has been computed yet.

        Raises:
            ValueError: it was computed differently or from other data than `fingerprint` says now.
        """
        self._made_of = made_of
        path = self.run / "last.pt"
        if not path.exists():
            return
        saved = load_checkpoint(path, "cpu", (*self.stateful, "rng", "progress"))
        progress = saved["progress"]
        _check_made_of(self.run.name, progress, made_of)
        for name, owner in self.stateful.items():
            owner.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"][1], self.device)
        self.history = progress["history"]
        self.row = progress["row"]
        self.losses = [loss.to(self.device) for loss in progress["losses"]]

    def begin_epoch(self, epoch: int, learning_rate: float) -> dict:
        """The row of an epoch, which may have begun before an interruption."""
        self.row = self.row or {"epoch": epoch, "learning_rate": learning_rate}
        return self.row

    def end_epoch(self, row: dict) -> None:
        """Add the row to the history."""
        self.history.append(row)
        self.row = {}
        self.losses = []

    def keep(self, model: nn.Module, row: dict, scored: Evaluation | None) -> None:
        """Remember this epoch's network and scores for the next `save`."""
        self._kept = copy.deepcopy(model).cpu(), row, scored

    def is_due(self) -> bool:
        """Whether the last `save` is long enough ago."""
        return time.monotonic() - self._saved > CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write everything.

        Raises:
            OSError: it can't be written; earlier files are intact.
        """
        if self._kept is not None:
            model, row, scored = self._kept
            save_model(model, self.run / "best.pt")
            write_scores(self.run, row, scored)
            self._kept = None
        if self.history:
            write_history(self.run, self.history)
        rng = [torch.get_rng_state()]
        if self.device.type == "cuda":
            rng.append(torch.cuda.get_rng_state(self.device))
        progress = {"history": self.history, "row": self.row, "losses": self.losses} | self._made_of
        state = {name: owner.state_dict() for name, owner in self.stateful.items()}
        save_checkpoint(state | {"rng": rng, "progress": progress}, self.run / "last.pt")
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Delete `last.pt`: a finished run is not continued."""
        (self.run / "last.pt").unlink(missing_ok=True)


def fingerprint(computed: str, train: Samples, valid: Samples) -> dict[str, object]:
    """What a resumed run must share with its beginning: device and precision, and checksums of all images."""
    return {"computed": computed, "data": _checksums(train, "train") | _checksums(valid, "valid")}


def _checksums(samples: Samples, split: str) -> dict[str, int]:
    """Of all pixels of each image, by `split/name`."""
    kinds = (samples.image, samples.depth, samples.label, samples.measured)
    by_image = zip(*(array for array in kinds if array is not None), strict=True)
    sums = (zlib.crc32(b"".join(array.tobytes() for array in arrays)) for arrays in by_image)
    return {f"{split}/{name}": checksum for name, checksum in zip(samples.names.tolist(), sums, strict=True)}


def _check_made_of(run_name: str, saved: dict, made_of: dict) -> None:
    if saved["computed"] != made_of["computed"]:
        raise ValueError(
            f"resume: {run_name!r} was trained on {saved['computed']}, but here it would continue on "
            f"{made_of['computed']}; use the same device and precision as before, on a machine that has "
            "them, or start another run_name with resume False"
        )
    old, new = saved["data"], made_of["data"]
    changed = {name for name, _ in old.items() ^ new.items()}
    if changed:
        name = min(changed)
        how = "is new"
        if name in old:
            how = "is not the same" if name in new else "is missing now"
        raise ValueError(
            f"resume: the data of {run_name!r} changed since it was started: {len(changed)} images, the "
            f"first is {name!r}, which {how}; restore the data, or start another run_name with resume False"
        )

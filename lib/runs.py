"""A run's folder: parameters, history, scores, counts, report."""

import datetime
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from lib.classes import CLASS_NAMES
from lib.files import read_json, write_atomically, write_json, write_text
from lib.metrics import averaged_classes, iou, mean_iou, pixel_accuracy

MAY_CHANGE = ("workers", "save_figures")  # between the parts of a resumed run; neither changes its result
_LOCKS: dict[Path, FileLock] = {}
REPORTED_EPOCHS = 5  # the report shows epochs 1, 5, 10, ... and the best


def runs_folder() -> Path:
    """Where runs are kept: `runs/` beside `lib/`, unless the environment variable RUNS_DIR says otherwise."""
    return Path(os.environ.get("RUNS_DIR") or Path(__file__).resolve().parents[1] / "runs")


def start_run(run_name: str, parameters: dict[str, object], resume: bool = False) -> Path:
    """Make the folder of a new run, or return that of an interrupted one.

    An older run of that name is kept under a dated name. The run is this process's own until
    `release_run` or the end of the process.

    Raises:
        ValueError: a name that is no plain folder name; nothing to resume; other parameters than the run's.
        RuntimeError: another process has the run.
    """
    if not run_name or run_name.startswith(".") or set(run_name) & set('/\\:*?"<>|'):
        raise ValueError(f"run_name: found {run_name!r}, expected a plain folder name such as 'exp061'")
    run = runs_folder() / run_name
    parameters = {name: value for name, value in parameters.items() if name != "resume"}
    if resume:
        _check_resumable(run, parameters)
    _lock(run)
    if resume:
        return run
    if run.exists():
        finished = datetime.datetime.fromtimestamp(run.stat().st_mtime)
        older = run.with_name(f"{run_name}.{finished:%Y-%m-%dT%H-%M-%S}")
        while older.exists():
            older = older.with_name(older.name + "~")
        run.rename(older)
    run.mkdir()
    write_json(parameters, run / "parameters.json")
    return run


def _lock(run: Path, seconds: float = 0) -> None:
    run.parent.mkdir(parents=True, exist_ok=True)
    lock = _LOCKS.setdefault(run, FileLock(run.with_name(f".{run.name}.lock")))
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise RuntimeError(
            f"run_name: {run.name!r} is being trained by another process; wait for it, or choose another run_name"
        ) from None


def release_run(run: Path) -> None:
    """Let other processes have the run."""
    if run in _LOCKS:
        _LOCKS.pop(run).release(force=True)


def wait_for_run(run: Path, seconds: float = 60) -> None:
    """Wait until no process has the run: one that was just killed may still hold it.

    Raises:
        RuntimeError: another process has it all the time.
    """
    _lock(run, seconds)
    release_run(run)


def is_trained(run: Path, epochs: int) -> bool:
    """Whether all epochs of a run are there."""
    return (run / "report.md").exists() and len(read_history(run)) >= epochs


def is_evaluated(run: Path, part: str) -> bool:
    """Whether `evaluate.ipynb` has scored a run on a part, or predicted one whose labels are held back."""
    return (run / "evaluation" / f"{part}.npz").exists() or _submission(run, part).exists()


def _check_resumable(run: Path, parameters: dict[str, object]) -> None:
    if not (run / "parameters.json").exists():
        there = sorted(path.parent.name for path in run.parent.glob("*/parameters.json"))
        raise ValueError(
            f"resume: no run {run.name!r} in {run.parent}, there are: {', '.join(there) or 'none'}; "
            "start it with resume False"
        )
    saved = read_json(run / "parameters.json")
    differing = [
        f"{name} = {saved.get(name, 'unknown')!r} (found {parameters.get(name, 'unknown')!r})"
        for name in saved | parameters
        if name not in MAY_CHANGE and saved.get(name, "unknown") != parameters.get(name, "unknown")
    ]
    if differing:
        hint = ""
        if saved.get("epochs") != parameters.get("epochs"):
            hint = "; epochs can't change because the schedule has spread the learning rate over them from the start"
        raise ValueError(
            f"resume: {run.name!r} was started with {', '.join(differing)}; resume it with its own parameters, or "
            f"start another run_name with resume False{hint}"
        )


def describe_progress(run: Path, epochs: int) -> str:
    """What is there of a run before it trains."""
    if not (run / "last.pt").exists():
        return f"{run.name}: starts from the beginning"
    done = len(read_history(run)) if (run / "history.csv").exists() else 0
    if done >= epochs:
        return f"{run.name}: is finished, all {epochs} epochs are there; nothing changes"
    return f"{run.name}: resumes, {done} of {epochs} epochs are there"


def write_history(run: Path, history: list[dict]) -> None:
    """One row per epoch so far."""
    write_text(pd.DataFrame(history).to_csv(index=False), run / "history.csv")


def read_history(run: Path) -> pd.DataFrame:
    """The rows that `write_history` wrote."""
    return pd.read_csv(run / "history.csv")


def write_scores(run: Path, row: dict, names: np.ndarray, counts: np.ndarray) -> None:
    """The best epoch's row and its scores and counts per image `(N, C, C)`, at the working size."""
    scores = {"best_epoch": row["epoch"]} | {name: value for name, value in row.items() if name != "epoch"}
    if len(counts):
        scores |= {"valid_miou": mean_iou(counts), "valid_pixel_acc": pixel_accuracy(counts)}
        scores |= {"averaged_classes": averaged_classes(counts)}
        scores |= {"class_iou": dict(zip(CLASS_NAMES, iou(counts).round(6).tolist(), strict=True))}
    shutil.rmtree(run / "evaluation", ignore_errors=True)  # of an earlier best epoch
    write_json(scores, run / "scores.json")
    write_atomically(run / "counts.npz", lambda file: np.savez_compressed(file, names=names, counts=counts))


def read_scores(run: Path) -> dict:
    """What `write_scores` wrote, without the counts."""
    return read_json(run / "scores.json")


def find_run(run: str) -> Path:
    """The folder of a trained run: `latest`, a name, or a path.

    Raises:
        ValueError: there is none; the message names the command that makes one.
    """
    trained = sorted(runs_folder().glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if run == "latest" and trained:
        return trained[-1].parent
    folder = Path(run) if Path(run).is_absolute() else runs_folder() / run
    if run == "latest" or not (folder / "best.pt").exists():
        there = ", ".join(path.parent.name for path in trained) or "none"
        raise ValueError(
            f"run: found {run!r}, trained runs in {runs_folder()}: {there}. Make one with "
            "`papermill train.ipynb out.ipynb`"
        )
    return folder


def read_parameters(run: Path) -> dict:
    """The parameters that a run was started with."""
    return read_json(run / "parameters.json")


def write_evaluation(run: Path, part: str, names: np.ndarray, counts: np.ndarray, scores: dict) -> None:
    """Counts per image `(N, C, C)` at native size and the scores made from them; completes the report."""
    folder = run / "evaluation"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{part}.npz", lambda file: np.savez_compressed(file, names=names, counts=counts))
    write_json(scores, folder / f"{part}.json")
    write_report(run)


def write_submission(run: Path, part: str, names: np.ndarray, predicted: np.ndarray) -> Path:
    """`submission.npy`: predicted classes `(N, H, W)` uint8 in the order of the names.

    Raises:
        ValueError: another type or shape, values that are no class, or names out of order.
    """
    classes = len(CLASS_NAMES)
    if predicted.dtype != np.uint8 or predicted.ndim != 3 or len(predicted) != len(names) or predicted.max() >= classes:
        raise ValueError(
            f"submission: found {predicted.dtype} {predicted.shape} up to {predicted.max()}, expected uint8 "
            f"({len(names)}, H, W) of classes 0..{classes - 1}"
        )
    if list(names) != sorted(names):
        raise ValueError("submission: found names out of order, expected them sorted")
    path = _submission(run, part)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: np.save(file, predicted))
    return path


def _submission(run: Path, part: str) -> Path:
    return run / "evaluation" / ("submission.npy" if part == "test" else f"submission_{part}.npy")


def write_report(run: Path) -> Path:
    """`report.md`: configuration, results, per-class IoU and progression of a run."""
    parameters = read_parameters(run)
    scores, history = read_scores(run), read_history(run)
    sections = [
        f"# {run.name}",
        summarise(run),
        "## Configuration\n\n" + _table(["parameter", "value"], parameters.items()),
        "## Results summary\n\n" + _table(["validation", "value"], _summary(scores).items()),
    ]
    if "class_iou" in scores:
        rows = [(name, "-" if value != value else f"{value:.3f}") for name, value in scores["class_iou"].items()]
        sections.append("## Per-class IoU\n\n" + _table(["class", "IoU"], rows))
    sections.append("## Training progression\n\n" + _progression(history, scores["best_epoch"]))
    for path in sorted((run / "evaluation").glob("*.json")):
        sections.append(_evaluation_section(path.stem, read_json(path)))
    write_text("\n\n".join(sections) + "\n", run / "report.md")
    return run / "report.md"


def summarise(run: Path) -> str:
    """One sentence in Markdown: the best epoch, its scores, the classes learned best and least."""
    scores, epochs = read_scores(run), len(read_history(run))
    if "class_iou" not in scores:
        return f"Trained for {epochs} epochs; nothing validates in this split, so the last epoch is kept."
    ranked = pd.Series(scores["class_iou"], dtype=float).dropna().sort_values(ascending=False, kind="stable")
    best, least = (
        ", ".join(f"{name} ({value:.2f})" for name, value in end.items()) for end in (ranked[:3], ranked[-3:])
    )
    return (
        f"Epoch {scores['best_epoch']} of {epochs} is the best: validation **mIoU {scores['valid_miou']:.3f}** over "
        f"{scores['averaged_classes']} classes, and pixel accuracy {scores['valid_pixel_acc']:.3f}. "
        f"Learned best: {best}. Learned least: {least}."
    )


def _evaluation_section(part: str, scores: dict) -> str:
    """Scores on one part, without and with test-time augmentation, then by class."""
    shown = {"plain": scores["plain"], f"tta {scores['tta']}": scores["augmented"]}
    rows = [(name, *(f"{column[name]:.4f}" for column in shown.values())) for name in scores["plain"]]
    by_class = [
        (name, *("-" if value != value else f"{value:.3f}" for value in values.values()))
        for name, values in scores["classes"].items()
    ]
    header = list(next(iter(scores["classes"].values())))
    return (
        f"## Evaluation on part {part}\n\n{scores['images']} images of {scores['data']}, scored at their own "
        f"{scores['label_size'][0]}x{scores['label_size'][1]} pixels; the network works at "
        f"{scores['working_size'][0]}x{scores['working_size'][1]}.\n\n"
        + _table(["score", *shown], rows) + "\n\n" + _table(["class", *header], by_class)
    )  # fmt: skip


def _summary(scores: dict) -> dict[str, str]:
    if "class_iou" not in scores:
        return {"best epoch": f"{scores['best_epoch']} (the last: nothing validates in this split)"}
    return {
        "best epoch": str(scores["best_epoch"]),
        "mIoU": f"{scores['valid_miou']:.4f} over {scores['averaged_classes']} of {len(CLASS_NAMES)} classes",
        "pixel accuracy": f"{scores['valid_pixel_acc']:.4f}",
        "loss": f"{scores['valid_loss']:.4f}",
    }


def _progression(history: pd.DataFrame, best_epoch: int) -> str:
    shown = history[history.epoch.isin([1, best_epoch, history.epoch.max()]) | (history.epoch % REPORTED_EPOCHS == 0)]
    columns = ["epoch", "train_loss", "valid_loss", "valid_miou", "valid_pixel_acc"]
    rows = []
    for row in shown.itertuples():
        cells = [str(row.epoch)] + [f"{getattr(row, column):.4f}" for column in columns[1:]]
        rows.append([f"**{cell}**" for cell in cells] if row.epoch == best_epoch else cells)
    return _table(columns, rows)


def _table(header: list[str], rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

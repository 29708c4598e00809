"""A run's folder: parameters, history, scores, counts, report."""

import datetime
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data import CLASS_NAMES
from lib.metrics import averaged_classes, iou, mean_iou, pixel_accuracy

REPORTED_EPOCHS = 5  # the report shows epochs 1, 5, 10, ... and the best


def runs_folder() -> Path:
    """Where runs are kept: `runs/` beside `lib/`, unless the environment variable RUNS_DIR says otherwise."""
    return Path(os.environ.get("RUNS_DIR") or Path(__file__).resolve().parents[1] / "runs")


def start_run(run_name: str, parameters: dict[str, object]) -> Path:
    """Make the folder of a new run; an older run of that name is kept under a dated name.

    Raises:
        ValueError: a name that is no plain folder name.
    """
    if not run_name or run_name.startswith(".") or set(run_name) & set('/\\:*?"<>|'):
        raise ValueError(f"run_name: found {run_name!r}, expected a plain folder name such as 'exp061'")
    run = runs_folder() / run_name
    if run.exists():
        finished = datetime.datetime.fromtimestamp(run.stat().st_mtime)
        older = run.with_name(f"{run_name}.{finished:%Y-%m-%dT%H-%M-%S}")
        while older.exists():
            older = older.with_name(older.name + "~")
        run.rename(older)
    run.mkdir(parents=True)
    _write_json(parameters, run / "parameters.json")
    return run


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
    _write_json(scores, run / "scores.json")
    partial = run / "counts.npz.partial"
    with open(partial, "wb") as file:
        np.savez_compressed(file, names=names, counts=counts)
    os.replace(partial, run / "counts.npz")


def read_scores(run: Path) -> dict:
    """What `write_scores` wrote, without the counts."""
    return json.loads((run / "scores.json").read_text())


def write_text(text: str, path: Path) -> None:
    """Write beside the file, then put it in its place, so that no reader sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _write_json(content: dict, path: Path) -> None:
    write_text(json.dumps(content, indent=2) + "\n", path)


def write_report(run: Path) -> Path:
    """`report.md`: configuration, results, per-class IoU and progression of a run."""
    parameters = json.loads((run / "parameters.json").read_text())
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

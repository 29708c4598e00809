"""Write `report.md`, a one-page summary of a run."""

from pathlib import Path

import numpy as np
import pandas as pd

from lib.classes import escape_html
from lib.files import read_json, write_text
from lib.runs import read_history, read_parameters, read_scores

MIN_RISE = 0.01  # train for longer if mIoU rose by more in the last quarter of the epochs
REPORTED_EPOCHS = 5  # the report shows epochs 1, 5, 10, ..., the best and the last


def write_report(run: Path) -> Path:
    """Write `report.md` and return its path.

    It contains the configuration, results and training progression, and evaluations, if available.
    """
    sections = [
        f"# {run.name}",
        "## Configuration\n\n" + _table(pd.DataFrame({"value": read_parameters(run)}), "g"),
    ]
    if (run / "scores.json").exists():
        scores = read_scores(run)
        sections += [
            summarise(run),
            "## Results summary\n\n" + _table(pd.DataFrame({"validation": _summary(scores)}), "g"),
            "## Training progression\n\n" + _progression(read_history(run), scores["best_epoch"]),
        ]
        if "class_iou" in scores:
            sections.append(
                "## Per-class IoU\n\n" + _table(pd.DataFrame({"IoU": scores["class_iou"]}), ".3f")
            )
    for path in sorted((run / "evaluation").glob("[!.]*.json")):
        sections.append(_evaluation_section(path.stem, read_json(path)))
    write_text(escape_html("\n\n".join(sections)) + "\n", run / "report.md")
    return run / "report.md"


def summarise(run: Path) -> str:
    """Summarise training in Markdown: the kept epoch, its scores, their trend, best and worst classes."""
    scores = read_scores(run)
    history = read_history(run)
    epochs = len(history)
    if "class_iou" not in scores:
        return f"Trained for {epochs} epochs; there are no validation images, so the last epoch is kept."
    ranked = pd.Series(scores["class_iou"], dtype=float).dropna().sort_values(ascending=False, kind="stable")
    shown_count = max(1, min(3, len(ranked) // 2))
    entries = [f"{name} ({value:.2f})" for name, value in ranked.items()]
    kept = "the last" if read_parameters(run).get("checkpoint") == "last" else "the best"
    return (
        f"Epoch {scores['best_epoch']} of {epochs} is {kept}: validation **mIoU {scores['valid_miou']:.3f}** "
        f"(chance level {scores['chance_miou']:.3f}) "
        f"{describe_classes(pd.Series(scores['class_iou'], dtype=float))}, and pixel accuracy "
        f"{scores['valid_pixel_acc']:.3f}. {_describe_trend(history.valid_miou)}Best classes: "
        f"{', '.join(entries[:shown_count])}. Worst classes: {', '.join(entries[-shown_count:])}."
    )


def _describe_trend(miou: pd.Series) -> str:
    """Describe the change in mIoU over the last quarter of the epochs and whether to train for longer."""
    window = -(-len(miou) // 4)
    if window == len(miou):
        return ""
    rise = miou.iloc[-1] - miou.iloc[-1 - window]
    advice = ": train for more epochs before you judge the recipe" if rise > MIN_RISE else ""
    span = f"last {window} epochs" if window > 1 else "last epoch"
    return f"In the {span} the mIoU changed by {rise:+.3f}{advice}. "


def describe_classes(iou: pd.Series) -> str:
    """Describe how many classes an mIoU averages and which have no pixels (NaN in the IoU per class)."""
    absent = iou.index[iou.isna()].tolist()
    missing = f" ({', '.join(absent)} {'has' if len(absent) == 1 else 'have'} no pixel)" if absent else ""
    return f"over {iou.notna().sum()} of {len(iou)} classes{missing}"


def _summary(scores: dict) -> dict[str, str]:
    if "class_iou" not in scores:
        return {"best epoch": f"{scores['best_epoch']} (the last: no validation images)"}
    return {
        "best epoch": str(scores["best_epoch"]),
        "mIoU": f"{scores['valid_miou']:.4f} over {scores['averaged_classes']} of {len(scores['class_iou'])} "
        "classes",
        "pixel accuracy": f"{scores['valid_pixel_acc']:.4f}",
        "loss": f"{scores['valid_loss']:.4f}",
    }


def _progression(history: pd.DataFrame, best_epoch: int) -> str:
    shown = history.epoch.isin([1, best_epoch, history.epoch.max()]) | (history.epoch % REPORTED_EPOCHS == 0)
    columns = ["epoch", "train_loss", "valid_loss", "valid_miou", "valid_pixel_acc"]
    epochs = history.epoch.map(lambda epoch: f"**{epoch}**" if epoch == best_epoch else str(epoch))
    return _table(history.assign(epoch=epochs).loc[shown, columns].set_index("epoch"), ".4f")


def _table(scores: pd.DataFrame, float_format: str) -> str:
    """Format a Markdown table; missing scores, such as classes not in the ground truth, become dashes."""
    cells = scores.map(_escape_cell).rename(index=_escape_cell, columns=_escape_cell)
    return cells.astype(object).where(cells.notna(), None).to_markdown(floatfmt=float_format, missingval="-")


def _escape_cell(value: object) -> object:
    """Escape bars and remove line breaks, which would start a new cell or row."""
    return " ".join(value.split()).replace("|", "\\|") if isinstance(value, str) else value


def _evaluation_section(split: str, scores: dict) -> str:
    """Format the scores on one split, without and with test-time augmentation, and per class."""
    text = (
        f"## Evaluation on split {split}\n\n{scores['images']} images of {scores['data']}, at their own size"
    )
    if not scores["labelled"]:
        suffix = f" with tta {scores['tta']}" if "tta" in scores else ""
        return f"{text}, predicted{suffix}; their labels are held back."
    overall = pd.DataFrame({name: scores[name] for name in ("plain", "augmented") if name in scores})
    by_class = pd.DataFrame(scores["classes"]).T
    float_formats = ["", *(".0f" if name == "images" else ".3f" for name in by_class)]
    return (
        f"{text}: mIoU {scores['plain']['miou']:.4f} over {scores['plain']['averaged_classes']} classes "
        f"({describe_interval(*scores['intervals']['plain'], scores['scenes'])}).\n\n"
        f"{_table(overall.drop('averaged_classes'), '.4f')}\n\n{_table(by_class, float_formats)}"
    )


def describe_interval(low: float | None, high: float | None, scenes: int | None) -> str:
    """Describe a 95 % interval and its sampling units, or explain why there is none.

    If `scenes` is None, scenes are unknown and images are treated as independent.
    """
    units = (
        "images treated as independent, because their scenes are unknown"
        if scenes is None
        else f"{scenes} scenes"
    )
    if low is None or np.isnan(low):
        if scenes == 1:
            return (
                "no interval: all images are from one scene; if each image shows its own scene, write "
                "`scene: '^(.*)$'` into dataset.yaml, otherwise set `scene` to a .csv with the columns "
                "name,scene"
            )
        return f"no interval: too few {'images' if scenes is None else f'scenes, {scenes}'}"
    return f"95 % interval {low:.3f} to {high:.3f} over {units}"

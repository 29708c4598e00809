"""The conclusion of evaluate.ipynb."""

from pathlib import Path

import pandas as pd

from lib.runs.report import describe_classes, describe_interval


def summarise_evaluation(run: Path, split: str, scores: dict) -> str:
    """In Markdown: the scores that `score_run` returned, the best and the worst class, and where predictions are."""
    saved = f"Predictions of {scores['images']} images are in `{run.name}/evaluation/{split}`."
    if not scores["labelled"]:
        return saved
    plain = scores["plain"]
    iou = pd.DataFrame(scores["classes"], dtype=float).T.IoU
    over = describe_classes(iou)
    best, worst = iou.idxmax(), iou.idxmin()
    return (
        f"On {scores['images']} {split} images **{run.name}** has an mIoU of **{plain['miou']:.3f}** {over} "
        f"({describe_interval(*scores['intervals']['plain'], scores['scenes'])}) and a pixel accuracy of "
        f"{plain['pixel_accuracy']:.3f}. Best class: {best} (IoU {iou[best]:.2f}); worst: {worst} "
        f"({iou[worst]:.2f}). {saved}"
    )

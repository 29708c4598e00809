"""Predictions that were saved, and the conclusion of evaluate.ipynb."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.evaluation import Predicted
from lib.notebooks.browse import Look
from lib.runs import read_parameters, read_scores
from lib.runs.report import describe_classes, describe_interval


def saved_look(read: Callable[[Sequence[str]], list[np.ndarray]]) -> Look:
    """What `browse_results` shows of saved masks, read by the images' names; they have no confidence."""
    return lambda samples: Predicted(samples, np.stack(read(samples.names.tolist())))


def summarise_evaluation(run: Path, split: str, scores: dict) -> str:
    """In Markdown: the scores of `score_run`, the best and the worst class, and where predictions are."""
    saved = f"Predictions of {scores['images']} images are in `{run.name}/evaluation/{split}`."
    if not scores["labelled"]:
        return saved
    iou = pd.DataFrame(scores["classes"], dtype=float).T.IoU
    best, worst = iou.idxmax(), iou.idxmin()
    return (
        f"On {scores['images']} {split} images **{run.name}** has an mIoU of "
        f"**{scores['plain']['miou']:.3f}** {describe_classes(iou)} "
        f"({describe_interval(*scores['intervals']['plain'], scores['scenes'])}) and a pixel accuracy of "
        f"{scores['plain']['pixel_accuracy']:.3f}. Best class: {best} (IoU {iou[best]:.2f}); worst: {worst} "
        f"({iou[worst]:.2f}). {_compare_with_validation(run) if split == 'test' else ''}{saved}"
    )


def _compare_with_validation(run: Path) -> str:
    """The score of the validation images in training, and why that of the test images is another."""
    score = read_scores(run)["valid_miou"] if (run / "scores.json").exists() else None
    if score is None:
        return ""
    chosen = " (which also selected the epoch)" if read_parameters(run)["checkpoint"] == "best" else ""
    return f"In training, validation mIoU was {score:.3f}: on other images{chosen}, at the training size. "

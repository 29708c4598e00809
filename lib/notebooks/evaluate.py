"""Load saved predictions for browsing and summarise an evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.evaluation import Predicted
from lib.notebooks.browse import Predictor
from lib.runs import read_parameters, read_scores
from lib.runs.report import describe_classes, describe_interval


def saved_predictor(read: Callable[[Sequence[str]], list[np.ndarray]]) -> Predictor:
    """Return a function for `browse_results` that loads saved masks instead of running a network.

    `read` returns the `(H, W)` masks of the given image names. The predictions have no confidence.
    """
    return lambda samples: Predicted(samples, np.stack(read(samples.names.tolist())))


def summarise_evaluation(run: Path, split: str, scores: dict) -> str:
    """Summarise an evaluation in Markdown: scores, best and worst class, and the folder of predictions.

    `scores` is the return value of `score_run`. Without labels, only the folder is given.
    """
    location = f"Predictions of {scores['images']} images are in `{run.name}/evaluation/{split}`."
    if not scores["labelled"]:
        return location
    iou = pd.DataFrame(scores["classes"], dtype=float).T.IoU
    best, worst = iou.idxmax(), iou.idxmin()
    return (
        f"On {scores['images']} {split} images **{run.name}** has an mIoU of "
        f"**{scores['plain']['miou']:.3f}** {describe_classes(iou)} "
        f"({describe_interval(*scores['intervals']['plain'], scores['scenes'])}) and a pixel accuracy of "
        f"{scores['plain']['pixel_accuracy']:.3f}. Best class: {best} (IoU {iou[best]:.2f}); worst: {worst} "
        f"({iou[worst]:.2f}). {_compare_with_validation(run) if split == 'test' else ''}{location}"
    )


def _compare_with_validation(run: Path) -> str:
    """Describe the validation score in training and why the test score differs; empty without a score."""
    score = read_scores(run)["valid_miou"] if (run / "scores.json").exists() else None
    if score is None:
        return ""
    selection = " (which also selected the epoch)" if read_parameters(run)["checkpoint"] == "best" else ""
    return f"In training, validation mIoU was {score:.3f}: on other images{selection}, at the training size. "

import json

import numpy as np
import pytest

from lib.notebooks.evaluate import summarise_evaluation

SCORES = {
    "labelled": True,
    "images": 4,
    "scenes": 4,
    "classes": {name: {"IoU": value} for name, value in {"wall": 0.8, "cup": 0.1, "car": np.nan}.items()},
    "intervals": {"plain": [0.4, 0.5]},
    "plain": {"miou": 0.45, "pixel_accuracy": 0.7},
}


@pytest.mark.parametrize(
    ("split", "valid_miou", "checkpoint", "said"),
    [
        (
            "test",
            0.512,
            "best",
            "validation mIoU was 0.512: on other images (which also selected the epoch), at",
        ),
        ("test", 0.512, "last", "validation mIoU was 0.512: on other images, at the training size."),
        ("test", None, "last", None),  # no validation images
        ("valid", 0.512, "best", None),
    ],
)
def test_summary_compares_the_test_score_with_validation(tmp_path, split, valid_miou, checkpoint, said):
    (tmp_path / "scores.json").write_text(json.dumps({"valid_miou": valid_miou}))
    (tmp_path / "parameters.json").write_text(json.dumps({"checkpoint": checkpoint}))
    text = summarise_evaluation(tmp_path, split, SCORES)
    assert "**0.450** over 2 of 3 classes (car has no pixel)" in text
    assert "Best class: wall (IoU 0.80); worst: cup (0.10)" in text
    assert (said in text) if said else ("In training" not in text)


def test_summary_of_external_predictions_omits_the_validation_score(tmp_path):
    assert "In training" not in summarise_evaluation(tmp_path, "test", SCORES)

"""Names of classes, runs and images may be untrusted. They are displayed but never interpreted as HTML."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import evaluation, history

from lib.classes import escape_html
from lib.data import Samples, Split
from lib.files import ROOT
from lib.notebooks import Markdown, style
from lib.notebooks.compare import score_table, show_scores
from lib.notebooks.evaluate import summarise_evaluation
from lib.notebooks.explore import class_shares, count_data, describe_data
from lib.notebooks.predict import describe_images
from lib.runs import open_run, write_history, write_scores
from lib.runs.report import summarise
from lib.runs.results import group_recipes, read_runs
from lib.runs.scoring import write_evaluation

EVIL = "<img src=x onerror=alert(1)>"
CLASSES = (EVIL, "a|b", "c\nd")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A scored run with HTML or table syntax in the names of its classes, recipe, data and images."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    counts = np.full((2, 3, 3), 5)
    scored = evaluation(counts, (EVIL, "b|c"), None, CLASSES)
    parameters = {"run_name": "r", "seed": 0, "recipe": EVIL, "data": EVIL, "validation": "random"}
    with open_run(parameters) as run:
        (run / "best.pt").touch()
        write_history(run, history(1))
        write_scores(run, history(1)[0], scored)
        facts = {"data": EVIL, "images": 2, "labelled": True, "validation": "random"}
        facts = write_evaluation(run, "valid", facts, {"plain": scored})
    return run, facts


def shown(text):
    return Markdown(text)._repr_markdown_()


def test_html_in_names_is_escaped_in_all_outputs(run):
    folder, facts = run
    recipes = group_recipes(read_runs("r", "valid"))
    label = np.ones((1, 4, 4), np.uint8)
    samples = Samples(np.array([EVIL]), np.zeros((1, 4, 4, 3), np.uint8), label=label, classes=CLASSES)
    split = Split(samples.names, samples.classes, None)
    columns = pd.MultiIndex.from_tuples([("", "confidence"), *(("share", name) for name in CLASSES)])
    predicted = pd.DataFrame([[0.5, 0.2, 0.3, 0.5]], [EVIL], columns)
    predicted.attrs["milliseconds"] = 12.0
    texts = {
        "report.md": (folder / "report.md").read_text(),
        "train": shown(summarise(folder)),
        "evaluate": shown(summarise_evaluation(folder, "valid", facts)),
        "explore": shown(describe_data(count_data(samples), split, split)),
        "predict": shown(describe_images(predicted, None)),
        "table of classes": style(class_shares(count_data(samples))).to_html(),
        "table of predictions": style(predicted.T).format("{:.1%}").to_html(),
        "table of runs": show_scores(score_table(recipes)).to_html(),
        "cells": style(pd.DataFrame({EVIL: [EVIL]})).to_html(),
    }
    for place, text in texts.items():
        assert "<img" not in text, place
        assert "&lt;img src=x onerror=alert(1)>" in text, place


def test_pipes_and_newlines_in_names_do_not_break_report_tables(run):
    folder, _ = run
    report = (folder / "report.md").read_text()
    for line in report.splitlines():
        if line.startswith("|"):
            table = line
            assert table.endswith("|")
    assert "a\\|b" in report
    assert "c d" in report
    for table in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_ordinary_names_and_markdown_render_unchanged():
    table = pd.DataFrame({"mIoU": [0.5]}, ["soft_iou_weight 0.5"])
    assert "soft_iou_weight 0.5" in style(table).to_html()
    assert shown("**wall** (0.50) > `floor` $x$") == "**wall** (0.50) > `floor` $x$"
    assert escape_html("a & b") == "a &amp; b"


def test_ampersands_are_kept_in_code_spans_alone():
    assert shown("`R&D_1` & ``a&lt;b``") == "`R&D_1` &amp; ``a&lt;b``"
    assert shown("R&D` and\nR&D`") == "R&amp;D` and\nR&amp;D`"


@pytest.mark.parametrize(
    "text", ["`{}`", "``{}``", "**{}** `x`", "\\`{}`", "an odd `\n`{}`", "| ` | `{}` | ` |"]
)
@pytest.mark.parametrize("name", ["{}", "`{}", "{}`", "`{}`", "a`{}`b`{}", "www.a`{}`", "`&{}&lt;"])
def test_html_in_names_with_backticks_is_escaped(text, name):
    escaped = shown(text.format(name.format(*[EVIL] * 2)))
    assert "<" not in escaped
    assert "&lt;img src=x onerror=alert(1)>" in escaped


def test_notebooks_use_only_the_escaping_display_functions():
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert not re.search(r"IPython.display import .*(Markdown|HTML)", code), path
        assert not re.search(r"(?<!^style)\w*[\])\w]\.style\.", code), path

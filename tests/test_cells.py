"""Cells of train.ipynb, run in other orders as users do: a run's folder must match what was computed."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL = """
limit, epochs, image_height, image_width, batch_size = 24, 2, 32, 48, 4
encoder, augment, device, precision = "tu-test_resnet.r160_in1k", "none", "cpu", "fp32"
validation = "random"
"""
STOP = """
import lib.training
step, steps = lib.training.training_step, iter(range(9))
lib.training.training_step = lambda *arguments: step(*arguments) if next(steps) < 2 else 1 / 0
"""
GO_ON = "lib.training.training_step, resume = step, True"


@pytest.fixture
def run_cells(tmp_path, monkeypatch):
    """Function that runs cells in one kernel and returns what they printed.

    A cell is `check`, `data`, `network` or `train` of the notebook, or any code.
    """
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = [cell for cell in nbformat.read(NOTEBOOKS / "train.ipynb", 4).cells if cell.cell_type == "code"]
    starts = next(index for index, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    named = dict(zip(("check", "data", "network", "train"), code[starts + 1 :], strict=False))
    assert "fit(" in named["train"].source

    def run(*cells):
        chosen = [
            *code[: starts + 1],
            *(named.get(cell) or nbformat.v4.new_code_cell(cell) for cell in (SMALL, *cells)),
        ]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source) for cell in chosen])
        NotebookClient(
            notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": NOTEBOOKS}}
        ).execute()
        return [_outputs(cell) for cell in notebook.cells[starts + 2 :]]

    return run


def _outputs(cell):
    """The epoch lines that a cell printed, without times, and its error."""
    printed = "".join(output.get("text", "") for output in cell.outputs)
    error = "".join(
        f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error"
    )
    return re.findall(r"epoch +\d+: .*(?=, \d+ s)", printed), error


def test_rerun_and_resume_in_one_kernel_reproduce_the_history(run_cells):
    """Train twice in a row. Then stop before the first checkpoint, and resume in the same kernel."""
    cells = ("check", "data", "network", "train", "train", STOP, "train", GO_ON, "train")
    *_, first, again, _, stopped, _, resumed = run_cells(*cells)
    assert len(first[0]) == 2
    assert again == first
    assert "ZeroDivisionError" in stopped[1]
    assert resumed == first


def test_edited_parameters_take_effect_or_are_refused(run_cells, tmp_path):
    edits = ["validation = 'none'", "validation, image_height = 'random', 64", "image_height, limit = 32, 12"]
    edits += ["limit, learning_rate = 24, '0.1'", "learning_rate = 10.0"]
    refused = [cell for edit in edits for cell in (edit, "train")]
    last = ("learning_rate, soft_iou_weight, depth_weight, seed = 0.01, 0.25, 0.0, 7", "train")
    outputs = run_cells(
        "check",
        "data",
        "network",
        *refused,
        "validation, learning_rate = 'none', 0.01",
        "check",
        "train",
        "validation = 'random'",
        *last,
    )
    errors = [error for _, error in outputs if error]
    assert len(errors) == 6
    for name, error in zip(("validation", "image_height", "limit"), errors, strict=False):
        assert f"ValueError: {name}: is " in error
        assert "run the cell that loads the data again" in error
    assert "learning_rate: found '0.1', expected float" in errors[3]
    assert "learning_rate: found 10.0, expected a number above 0 and below 1" in errors[4]
    assert "ValueError: validation: is 'none' now" in errors[5]  # checked, but the data was not reloaded
    saved = json.loads((tmp_path / "demo" / "parameters.json").read_text())
    assert (saved["soft_iou_weight"], saved["depth_weight"], saved["seed"]) == (0.25, 0.0, 7)
    history = pd.read_csv(tmp_path / "demo" / "history.csv")
    assert (history.train_depth_l1 == 0).all()  # no depth head was built
    np.testing.assert_allclose(
        history.train_loss, history.train_cross_entropy + 0.25 * history.train_soft_iou
    )


START = """
import multiprocessing, torch, lib.batches
multiprocessing.set_start_method("{method}", force=True)
lib.batches.sys = type("NotLinux", (), {{"platform": "darwin"}})  # else workers are forked, whatever is set
num_workers, run_name = 2, "{method}"
"""


@pytest.mark.slow
def test_history_is_the_same_for_every_worker_start_method(run_cells):
    """Workers start from a notebook's kernel, whose main module has no file."""
    histories = []
    for method in ("fork", "spawn", "forkserver"):
        *_, (history, error) = run_cells(START.format(method=method), "check", "data", "network", "train")
        assert error == ""
        assert len(history) == 2
        histories.append(history)
    assert histories[0] == histories[1] == histories[2]

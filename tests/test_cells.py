"""Cells of train.ipynb in another order than written, as people run them: what a folder says must be what was computed."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL = """
limit, epochs, image_height, image_width, batch_size = 24, 2, 32, 48, 4
encoder, augment, device, precision = "tu-test_resnet.r160_in1k", "none", "cpu", "fp32"
split = "random"
"""
STOP = """
import lib.training
step, steps = lib.training.training_step, iter(range(9))
lib.training.training_step = lambda *arguments: step(*arguments) if next(steps) < 2 else 1 / 0
"""
GO_ON = "lib.training.training_step, resume = step, True"


@pytest.fixture
def run_cells(tmp_path, monkeypatch):
    """A function that runs cells in one kernel: `check`, `data`, `network`, `train` of the notebook, or any code."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = [cell for cell in nbformat.read(NOTEBOOKS / "train.ipynb", 4).cells if cell.cell_type == "code"]
    starts = next(index for index, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    named = dict(zip(("check", "data", "network", "train"), code[starts + 1 :], strict=False))
    assert "fit(" in named["train"].source

    def run(*cells):
        chosen = [*code[: starts + 1], *(named.get(cell) or nbformat.v4.new_code_cell(cell) for cell in (SMALL, *cells))]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source) for cell in chosen])
        NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": NOTEBOOKS}}).execute()
        return [_outputs(cell) for cell in notebook.cells[starts + 2 :]]

    return run


def _outputs(cell):
    """What a cell printed, without times, and its error."""
    printed = "".join(output.get("text", "") for output in cell.outputs)
    error = "".join(f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error")
    return re.findall(r"epoch +\d+: .*(?=, \d+ s)", printed), error


def _saved(tmp_path):
    return json.loads(next(tmp_path.glob("*/parameters.json")).read_text())


def test_training_twice_is_training_anew(run_cells):
    *_, (first, _), (again, error) = run_cells("check", "data", "network", "train", "train")
    assert error == ""
    assert len(first) == 2
    assert again == first


def test_what_is_trained_with_is_what_is_written(run_cells, tmp_path):
    outputs = run_cells("check", "data", "network", "soft_iou_weight, depth_weight, seed = 0.25, 0.0, 7", "train")
    *_, (lines, error) = outputs
    assert error == ""
    assert len(lines) == 2
    saved = _saved(tmp_path)
    assert (saved["soft_iou_weight"], saved["depth_weight"], saved["seed"]) == (0.25, 0.0, 7)
    history = (tmp_path / saved["run_name"] / "history.csv").read_text()
    assert ",0.0," in history  # the depth term: no head was built


@pytest.mark.parametrize(("edit", "name"), [("split = 'official'", "split"), ("image_height = 64", "image_height"), ("limit = 12", "limit")])
def test_samples_of_other_parameters_are_refused(run_cells, tmp_path, edit, name):
    for check in ((), ("check",)):
        *_, (lines, error) = run_cells("check", "data", "network", edit, *check, "train")
        assert f"ValueError: {name}: is " in error
        assert "run the cell that loads the data again" in error
        assert lines == []
        assert not list(tmp_path.glob("*/parameters.json"))


def test_a_wrong_edit_is_refused_without_the_check(run_cells):
    *_, (_, error) = run_cells("check", "data", "network", "learning_rate = '0.1'", "train")
    assert "learning_rate: found '0.1', expected float" in error
    *_, (_, error) = run_cells("check", "data", "network", "learning_rate = 10.0", "train")
    assert "learning_rate: found 10.0, expected a number between 0 and 1" in error


def test_a_stop_in_the_first_epoch_and_resume_in_the_same_kernel_is_exact(run_cells):
    *_, (whole, _) = run_cells("check", "data", "network", "train")
    *_, (_, stopped), _, (resumed, error) = run_cells("check", "data", "network", STOP, "train", GO_ON, "train")
    assert "ZeroDivisionError" in stopped
    assert error == ""
    assert resumed == whole

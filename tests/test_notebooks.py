import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lib.runs.results import group_recipes, read_runs

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
COMMITTED = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if not path.name.endswith("out.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
EXPERIMENTS = sorted((NOTEBOOKS / "experiments").glob("*.yaml"))


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def papermill(tmp_path, *arguments, notebook="train", cwd=NOTEBOOKS, **environment):
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS / f"{notebook}.ipynb"), str(tmp_path / "out.ipynb")]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "soft_iou_wieght", "0.5"], "soft_iou_wieght: no such parameter, did you mean soft_iou_weight?"),
        (["-p", "data", "/no/such/place"], "/no/such/place: no such folder; expected DATA/train/{image,"),
    ],
)
def test_mistakes_end_papermill_with_an_error(tmp_path, arguments, message):
    result = papermill(tmp_path, *arguments)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_a_notebook_copied_elsewhere_says_how_lib_is_found(tmp_path, path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cells(path)[0].source)])
    with pytest.raises(CellExecutionError, match=r"---> .* Not found\? Set PYTHONPATH to the repository's root"):
        NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()


def test_without_a_run_the_command_that_makes_one_is_named(tmp_path):
    result = papermill(tmp_path, notebook="evaluate", RUNS_DIR=str(tmp_path))
    assert result.returncode == 1
    assert "run: found 'latest', trained runs in" in result.stderr
    assert "Make one with `papermill train.ipynb out.ipynb`" in result.stderr


def test_comparing_without_runs_shows_the_committed_example(tmp_path):
    result = papermill(tmp_path, notebook="compare", RUNS_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    outputs = [output for cell in cells(tmp_path / "out.ipynb") for output in cell.outputs]
    text = " ".join(output.get("data", {}).get("text/markdown", "") for output in outputs)
    assert "**baseline_again** against **baseline**" in text
    assert "**The recipe baseline is better.**" in text  # than a tenth of its learning rate
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 5
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("depth", [True, False])
def test_exploring_a_folder(tmp_path, folder, depth):
    if not depth:
        shutil.rmtree(folder / "train" / "depth")
        shutil.rmtree(folder / "test" / "depth")
        (folder / "dataset.yaml").write_text("folders: {image: image, depth: null, label: label}")
    result = papermill(tmp_path, "-p", "data", str(folder), notebook="explore")
    assert result.returncode == 0, result.stderr
    outputs = [output for cell in cells(tmp_path / "out.ipynb") for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = " ".join(output.get("data", {}).get("text/markdown", "") for output in outputs)
    assert text.startswith("**12 images, 13 classes, ")
    assert "of 3 validation images share a scene" in text
    assert ("median depth" in text) == depth
    assert ("These data have no depth." in text) != depth
    tables = " ".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert ("without depth" in tables) == depth
    assert not [output for output in outputs if WIDGET in output.get("data", {})]


def test_train_runs_from_the_root_too_and_leaves_no_red(tmp_path):
    """Papermill runs a kernel where it is called, nbval in the notebook's own folder."""
    small = {"run_name": "tiny", "limit": 12, "epochs": 2, "image_height": 48, "image_width": 64, "device": "cpu"}
    arguments = [text for name, value in small.items() for text in ("-p", name, str(value))]
    result = papermill(tmp_path, *arguments, cwd=NOTEBOOKS.parent)
    assert result.returncode == 0, result.stderr
    outputs = [output for cell in cells(tmp_path / "out.ipynb") for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 3  # curves, bars, predictions; each once
    assert any("100%" in output.get("data", {}).get("text/plain", "") for output in outputs)  # the bar's last state


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_notebooks_are_executed_and_small(path):
    assert path.stat().st_size < 300_000
    code = cells(path)
    assert not [output for cell in code for output in cell.outputs if WIDGET in output.get("data", {})]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        lines = cell.source.count("\n") + 1
        assert lines <= 25 or "parameters" in cell.metadata.get("tags", [])
        assert "def " not in cell.source
    assert "sys.path[:0]" in code[0].source
    assert "parameters" in code[2].metadata.tags
    assert "check_parameters()" in code[3].source


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_papermill_prints_every_parameter_with_its_comment(path):
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(path)]
    manual = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    declared = cells(path)[2].source.splitlines()
    assert len(declared) >= 1
    for line in declared:
        name, comment = line.split(":")[0], line.split("  # ")[1]
        assert f"  {name}: " in manual
        assert comment in manual


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_know_the_parameters(path):
    parameters = yaml.safe_load(path.read_text())
    declared = {line.split(":")[0] for line in cells(NOTEBOOKS / "train.ipynb")[2].source.splitlines()}
    assert set(parameters) <= declared
    assert parameters["run_name"] == path.stem
    assert path.read_text().startswith("# ")
    assert f"-f experiments/{path.name}" in path.read_text()


def test_the_runs_of_the_question_are_those_planned_and_of_one_version():
    results = NOTEBOOKS / "experiments" / "results" / "nyuv2"
    runs = [json.loads(path.read_text()) for path in results.glob("*/parameters.json")]
    planned = {(weight, fold, seed) for weight in (0, 0.5) for fold in range(5) for seed in (1, 2, 3)}
    assert planned <= {(run["soft_iou_weight"], run["fold"], run["seed"]) for run in runs}
    setting = yaml.safe_load((NOTEBOOKS / "experiments" / "nyuv2_question.yaml").read_text())
    varied = ("run_name", "encoder_weights", "soft_iou_weight", "class_weights", "seed")
    assert all(run[name] == value for run in runs for name, value in setting.items() if name not in varied)
    assert len({run["commit"] for run in runs}) == len({run["encoder_weights_digest"] for run in runs}) == 1


def test_right_pixels_are_those_of_the_kept_counts():
    results = NOTEBOOKS / "experiments" / "results"
    table = pd.read_csv(results / "nyuv2_right.csv.gz", header=[0, 1, 2], index_col=[0, 1, 2])
    patterns = {"cross-entropy": "*iou_weight=0-fold*", "0.5 soft IoU": "*iou_weight=0.5-fold*",
                "median class weights": "*class_weights=median*"}  # fmt: skip
    for name, pattern in patterns.items():
        (members,) = group_recipes(read_runs(str(results / "nyuv2" / pattern), "valid")).values()
        assert [run.parameters["seed"] for run in members] == [1, 2, 3]
        for run in members:
            rows = table.loc[name, run.parameters["seed"]]
            right, pixels = (rows["class"].xs(kind, axis=1, level=1) for kind in ("right", "pixels"))
            pooled = np.stack([run.counts[run.scene == scene].sum(0) for scene in rows.index])
            np.testing.assert_array_equal(right, np.diagonal(pooled, axis1=1, axis2=2))
            np.testing.assert_array_equal(pixels, pooled.sum(2))
            assert set(rows.index) == set(run.scene)


def test_exp061_is_the_published_one():
    exp061, exp060, exp050, batch = (
        yaml.safe_load((NOTEBOOKS / "experiments" / f"{name}.yaml").read_text())
        for name in ("exp061", "exp060", "exp050", "exp061_batch")
    )
    published = {
        "split": "random", "image_height": 480, "image_width": 640, "inputs": "rgbd", "depth_encoding": "inverse",
        "encoder": "resnet101", "encoder_weights": "imagenet", "soft_iou_weight": 0.5, "soft_iou_pooling": "exp061",
        "depth_weight": 0.1, "epochs": 30, "batch_size": 8, "learning_rate": 1e-4, "weight_decay": 1e-4,
        "schedule": "cosine", "augment": "exp061", "precision": "fp32", "seed": 42,
    }  # fmt: skip
    assert exp061.items() >= published.items()
    differences = lambda other: {name for name in exp061 if exp061[name] != other.get(name)} - {"run_name"}  # noqa: E731
    assert differences(batch) == {"soft_iou_pooling"}
    assert differences(exp060) == {"soft_iou_weight", "soft_iou_pooling"}
    assert differences(exp050) == {"soft_iou_weight", "soft_iou_pooling", "depth_weight", "inputs"}

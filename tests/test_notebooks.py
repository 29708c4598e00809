import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill as pm
import pytest
import yaml
from click.testing import CliRunner
from papermill.cli import papermill as command_line

from lib.options import explain_unknown

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
COMMITTED = [
    path
    for pattern in ("*.ipynb", "studies/*/*.ipynb")
    for path in sorted(NOTEBOOKS.glob(pattern))
    if not path.name.endswith("out.ipynb")
]
WIDGET = "application/vnd.jupyter.widget-view+json"
EXPERIMENTS = sorted((NOTEBOOKS / "experiments").glob("*.yaml"))
STUDIES = sorted((NOTEBOOKS / "studies").glob("*/study.yaml"))
BOOTSTRAP, PARAMETERS, CHECK = range(3)  # the first code cells of every notebook


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def declared(notebook):
    """A notebook's parameters with their defaults, as source text."""
    return {
        name: entry["default"]
        for name, entry in pm.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb")).items()
    }


def papermill(tmp_path, *arguments, notebook="train", cwd=NOTEBOOKS, **environment):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOKS / f"{notebook}.ipynb"),
        str(tmp_path / "out.ipynb"),
    ]
    environment = os.environ | environment
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def outputs_of(path):
    """All outputs of a notebook, which must contain no error and nothing on stderr."""
    outputs = [output for cell in cells(path) for output in cell.outputs]
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    return outputs


def texts_of(outputs, kind="markdown"):
    return " ".join(output.get("data", {}).get(f"text/{kind}", "") for output in outputs)


def pictures_of(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]


# finding lib


def test_notebooks_share_one_bootstrap_cell():
    """A study may omit the import of Optional."""
    bootstrap = cells(NOTEBOOKS / "train.ipynb")[BOOTSTRAP]
    optional = "from typing import Optional\n\n"
    assert optional in bootstrap.source
    for path in COMMITTED:
        cell = cells(path)[BOOTSTRAP]
        assert cell.metadata["jupyter"] == {"source_hidden": True}, path
        if path.parent == NOTEBOOKS:
            assert cell.source == bootstrap.source, path
        else:
            assert cell.source in (bootstrap.source, bootstrap.source.replace(optional, "")), path


def found_lib(folder, python_path=None):
    """The project whose lib the bootstrap cell finds from a folder, or None."""
    source = cells(NOTEBOOKS / "train.ipynb")[BOOTSTRAP].source.replace("%matplotlib inline\n", "")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    command = [
        sys.executable,
        "-P",
        "-c",
        f"{source}\nimport lib\nprint(lib.__file__)",
    ]  # -P keeps the working directory off sys.path
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        assert "ModuleNotFoundError: No module named 'lib'" in result.stderr
        return None
    return Path(result.stdout.strip()).parents[1]


@pytest.mark.parametrize("place", [".", "notebooks", "notebooks/studies/soft_iou"])
def test_lib_is_found_from_within_the_project(place):
    assert found_lib(ROOT / place) == ROOT


def test_lib_is_found_from_elsewhere_with_pythonpath(tmp_path):
    assert found_lib(tmp_path, ROOT) == ROOT
    assert found_lib(tmp_path) is None


def test_enclosing_project_takes_precedence_over_pythonpath(tmp_path):
    """A second worktree must run its own code."""
    for module in ("__init__", "notebooks/__init__", "notebooks/parameters"):
        path = tmp_path / "lib" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("check_parameters = None")
    (tmp_path / "notebooks" / "studies").mkdir(parents=True)
    assert found_lib(tmp_path / "notebooks" / "studies", ROOT) == tmp_path


# parameters


OLDER = {
    "train": {"split": "validation", "keep": "checkpoint", "workers": "num_workers"},
    "evaluate": {"part": "split"},
    "compare": {"part": "split", "other": "compare_with"},
    "error_analysis": {"part": "split"},
    "sweep": {"part": "split", "where": "cluster"},
}


@pytest.mark.parametrize("notebook", OLDER)
def test_error_for_older_parameter_gives_its_new_name(notebook):
    for older, newer in OLDER[notebook].items():
        assert explain_unknown(older, declared(notebook)) == f"{older}: is called {newer} now"


def test_default_run_and_recipe_names():
    assert declared("train")["run_name"] == '"demo"'
    assert declared("evaluate")["run_name"] == declared("evaluate")["recipe"] == '"external"'


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["-p", "soft_iou_wieght", "0.5", "-p", "keep", "last"],
            [
                "soft_iou_wieght: no such parameter, did you mean soft_iou_weight?",
                "keep: is called checkpoint now",
            ],
        ),
        (["-p", "data", "/no/such/place"], ["/no/such/place: no such folder; expected DATA/train/{image,"]),
    ],
)
def test_invalid_parameters_make_papermill_fail(tmp_path, arguments, messages):
    result = papermill(tmp_path, *arguments)
    assert result.returncode == 1
    for message in messages:
        assert message in result.stderr


def test_evaluate_without_runs_shows_the_training_command(tmp_path):
    result = papermill(tmp_path, notebook="evaluate", RUNS_DIR=str(tmp_path))
    assert result.returncode == 1
    assert "run: found 'latest', trained runs in" in result.stderr
    assert "Make one with `papermill train.ipynb out.ipynb`" in result.stderr


def test_comparing_without_runs_shows_the_committed_example(tmp_path):
    result = papermill(tmp_path, notebook="compare", RUNS_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    outputs = outputs_of(tmp_path / "out.ipynb")
    assert "**baseline_again** against **baseline**" in texts_of(outputs)
    assert "prefer baseline." in texts_of(outputs)  # to a tenth of its learning rate
    assert len(pictures_of(outputs)) == 4  # including the static image of the browser


@pytest.mark.parametrize("depth", [True, False])
def test_explore_describes_a_folder_with_or_without_depth(tmp_path, folder, depth):
    if not depth:
        shutil.rmtree(folder / "train" / "depth")
        shutil.rmtree(folder / "test" / "depth")
        (folder / "dataset.yaml").write_text("folders: {image: image, depth: null, label: label}")
    result = papermill(tmp_path, "-p", "data", str(folder), notebook="explore")
    assert result.returncode == 0, result.stderr
    outputs = outputs_of(tmp_path / "out.ipynb")
    text = texts_of(outputs)
    assert "**12 images, 13 classes, " in text
    assert "validation (2 images, by blocks) shares no run of neighbouring ids with training" in text
    assert ("median depth" in text) == depth
    assert ("These data have no depth." in text) != depth
    assert ("without depth" in texts_of(outputs, "html")) == depth
    assert not [output for output in outputs if WIDGET in output.get("data", {})]


def test_train_runs_from_the_root_without_stderr(tmp_path):
    """Papermill starts the kernel in the caller's folder, nbval in the notebook's."""
    small = {
        "run_name": "tiny",
        "limit": 12,
        "epochs": 2,
        "image_height": 48,
        "image_width": 64,
        "device": "cpu",
    }
    arguments = [text for name, value in small.items() for text in ("-p", name, str(value))]
    result = papermill(tmp_path, *arguments, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    outputs = outputs_of(tmp_path / "out.ipynb")
    assert len(pictures_of(outputs)) == 3  # curves, bars, predictions; each once
    assert "100%" in texts_of(outputs, "plain")  # the progress bar's last state


# committed files


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_notebooks_are_executed_and_small(path):
    assert path.stat().st_size < 300_000
    code = cells(path)
    assert not [output for output in outputs_of(path) if WIDGET in output.get("data", {})]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        lines = cell.source.count("\n") + 1
        assert lines <= 25 or "parameters" in cell.metadata.get("tags", [])
        assert "def " not in cell.source
    assert "parameters" in code[PARAMETERS].metadata.tags
    assert "check_parameters()" in code[CHECK].source
    assert str(ROOT) not in path.read_text()  # a path on this machine


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_papermill_prints_every_parameter_with_its_comment(path):
    result = CliRunner().invoke(command_line, ["--help-notebook", str(path)])
    assert result.exit_code == 0
    lines = [line for line in cells(path)[PARAMETERS].source.splitlines() if not line.startswith("# ")]
    assert len(lines) >= 1
    for line in lines:
        name, comment = line.split(":")[0], line.split("  # ")[1]
        assert f"  {name}: " in result.output
        assert comment in result.output


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_use_known_train_parameters(path):
    parameters = yaml.safe_load(path.read_text())
    assert parameters.keys() <= declared("train").keys()
    assert parameters["run_name"] == path.stem
    assert path.read_text().startswith("# ")
    assert f"-f experiments/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_studies_use_known_sweep_parameters(path):
    parameters = yaml.safe_load(path.read_text())
    assert parameters.keys() <= declared("sweep").keys()
    assert parameters["fixed"].keys() | parameters["grid"].keys() <= declared("train").keys()
    assert parameters["results"] == f"studies/{path.parent.name}"
    assert path.read_text().startswith("# ")
    assert f"-f studies/{path.parent.name}/study.yaml" in path.read_text()


def test_exp061_is_as_published_and_its_variants_differ_as_stated():
    exp061, exp060, exp050, batch = (
        yaml.safe_load((NOTEBOOKS / "experiments" / f"{name}.yaml").read_text())
        for name in ("exp061", "exp060", "exp050", "exp061_batch")
    )
    published = {
        "validation": "random", "image_height": 480, "image_width": 640, "inputs": "rgbd", "depth_encoding": "inverse",
        "encoder": "resnet101", "encoder_weights": "imagenet", "soft_iou_weight": 0.5, "soft_iou_pooling": "exp061",
        "depth_weight": 0.1, "epochs": 30, "batch_size": 8, "learning_rate": 1e-4, "weight_decay": 1e-4,
        "schedule": "cosine", "augment": "exp061", "precision": "fp32", "seed": 42,
    }  # fmt: skip
    assert exp061.items() >= published.items()

    def differences(other):
        return {name for name, _ in exp061.items() ^ other.items()} - {"run_name"}

    assert differences(batch) == {"soft_iou_pooling"}
    assert differences(exp060) == {"soft_iou_weight", "soft_iou_pooling"}
    assert differences(exp050) == {"soft_iou_weight", "soft_iou_pooling", "depth_weight", "inputs"}

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import torch
import yaml
from conftest import history
from filelock import FileLock
from scored_runs import scored_folder, scored_run, some_counts

from lib.files import ROOT, read_json, write_json
from lib.notebooks import sweep
from lib.notebooks.conclusions import run_tests
from lib.notebooks.sweep import FinishedRuns, execute_run, executed_notebook, plan_runs, progress_table
from lib.runs import open_run, read_history, run_state, write_history
from lib.runs.report import write_report
from lib.runs.results import RUNS_FILE, group_recipes, read_results, read_runs, write_results

TINY = {
    "limit": 24,
    "image_height": 32,
    "image_width": 48,
    "epochs": 2,
    "encoder": "tu-test_resnet.r160_in1k",
}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The folder of runs."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    (tmp_path / "runs" / "notebooks").mkdir(parents=True)
    return tmp_path / "runs"


def names(*arguments):
    return list(plan_runs(*arguments))


def test_plan_contains_every_combination_and_seed():
    planned = plan_runs(
        "nyuv2_small", {"data": "/nyu"}, {"epochs": [1, 2], "inputs": ["rgb", "rgbd"]}, [1, 2]
    )
    assert len(planned) == 8
    first = next(iter(planned.values()))
    expected = {
        "run_name": next(iter(planned)),
        "data": "/nyu",
        "epochs": 1,
        "inputs": "rgb",
        "seed": 1,
        "resume": False,
    }
    assert first.items() >= expected.items()
    assert first["batch_size"] == 16  # from the experiment
    assert first["precision"] == "auto"  # the default of the notebook
    assert [parameters["seed"] for parameters in planned.values()] == [1] * 4 + [2] * 4
    assert re.fullmatch(r"nyuv2_small-epochs=1-inputs=rgb-seed=1-[0-9a-f]{6}", first["run_name"])


def test_run_name_depends_only_on_parameters_that_affect_the_result():
    one, two = names(None, {}, {"soft_iou_weight": [1, 2]}, [5])
    assert names(None, {}, {"soft_iou_weight": [2, 1]}, [4, 5])[2:] == [two, one]
    assert names(None, {"epochs": 8, "num_workers": 2, "device": "cpu"}, {"soft_iou_weight": [1]}, [5]) == [
        one
    ]
    assert names(None, {"epochs": 13}, {"soft_iou_weight": [1]}, [5]) != [one]
    assert names(None, {}, {"soft_iou_weight": [1.0]}, [5])[0][-6:] == one[-6:]
    assert len(set(names(None, {}, {"fold": [0, 1, 2, 3, 4]}, [5]))) == 5


def test_run_name_is_independent_of_paths_to_data_and_weights(tmp_path, monkeypatch):
    for folder, content in (("here", 1), ("there", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        torch.save({"weight": torch.full((2,), content)}, tmp_path / folder / "encoder.pth")

    def planned(folder, grid):
        places = {
            "data": str(tmp_path / folder / "nyu"),
            "encoder_weights": str(tmp_path / folder / "encoder.pth"),
        }
        if grid:
            return names(None, {}, {name: [place] for name, place in places.items()}, [1])
        return names(None, places, {}, [1])

    for grid in (False, True):
        assert planned("here", grid) == planned("there", grid) != planned("other", grid)
    assert planned("here", True)[0].startswith("sweep-data=nyu-encoder_weights=encoder.pth-seed=1-")
    monkeypatch.chdir(tmp_path)
    (relative,) = plan_runs(
        None, {"data": "here/nyu", "encoder_weights": "here/encoder.pth"}, {}, [1]
    ).values()
    assert relative["data"] == str(tmp_path / "here" / "nyu")  # workers have another working directory
    assert relative["encoder_weights"] == str(tmp_path / "here" / "encoder.pth")
    (relative,) = plan_runs(None, {}, {"data": ["here/nyu"], "encoder_weights": ["imagenet"]}, [1]).values()
    assert relative["data"] == str(tmp_path / "here" / "nyu")
    assert relative["encoder_weights"] == "imagenet"


def test_two_datasets_with_the_same_name_are_rejected():
    with pytest.raises(
        ValueError, match="data: found /a/nyu and /b/nyu, which give runs the same name; rename one folder"
    ):
        plan_runs(None, {}, {"data": ["/a/nyu", "/b/nyu"]}, [1])


def test_soft_iou_pooling_adds_no_run_if_the_weight_is_zero():
    planned = plan_runs(None, {}, {"soft_iou_weight": [0, 0.5], "soft_iou_pooling": ["exp061", "batch"]}, [1])
    assert sorted((run["soft_iou_weight"], run["soft_iou_pooling"]) for run in planned.values()) == [
        (0, "batch"), (0.5, "batch"), (0.5, "exp061"),
    ]  # fmt: skip


LISTS = "expected non-empty lists"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (None, {}, {"soft_iou_wieght": [1]}, [1]),
            "fixed, grid: soft_iou_wieght: no such parameter, did you mean soft_iou_weight? there are: data, inputs, ",
        ),
        ((None, {"seed": 3}, {}, [1]), "fixed, grid: seed: no such parameter, there are: data, "),
        ((None, {"split": "blocks"}, {}, [1]), "fixed, grid: split: is called validation now"),
        ((None, {}, {"keep": ["best", "last"]}, [1]), "fixed, grid: keep: is called checkpoint now"),
        ((None, {"workers": 2}, {}, [1]), "fixed, grid: workers: is called num_workers now"),
        (("nyu", {}, {}, [1]), "experiment: found 'nyu', expected one of exp050, "),
        ((None, {}, {"epochs": 3}, [1]), f"grid, seeds: found {{'epochs': 3}} and [1], {LISTS}"),
        ((None, {}, {"epochs": []}, [1]), f"grid, seeds: found {{'epochs': []}} and [1], {LISTS}"),
        ((None, {}, {}, []), f"grid, seeds: found {{}} and [], {LISTS}"),
    ],
)
def test_plan_reports_mistakes_in_its_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        plan_runs(*arguments)
    assert str(error.value).startswith(message)


def test_plan_reports_mistakes_in_an_experiment_file(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "train.ipynb").symlink_to(sweep.NOTEBOOKS / "train.ipynb")
    monkeypatch.setattr(sweep, "NOTEBOOKS", tmp_path)
    for content, message in (
        ({"keep": "last"}, "experiment mine: keep: is called checkpoint now"),
        ({"epochs": 2, "split": "random"}, "experiment mine: split: is called validation now"),
        ({"epoch": 2}, "experiment mine: epoch: no such parameter, did you mean epochs? there are: data, "),
    ):
        (tmp_path / "experiments" / "mine.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError) as error:
            plan_runs("mine", {}, {}, [1])
        assert str(error.value).startswith(message)
    good = {"run_name": "mine", "seed": 7, "resume": False, "validation": "random"}
    (tmp_path / "experiments" / "mine.yaml").write_text(yaml.safe_dump(good))
    (parameters,) = plan_runs("mine", {}, {}, [1]).values()
    assert (parameters["validation"], parameters["seed"]) == ("random", 1)


@pytest.fixture
def executed(runs, monkeypatch):
    """The calls of training and scoring, which are replaced by fast fakes."""
    calls = []

    def execute(notebook, output, parameters, **options):
        assert Path(output) == executed_notebook(parameters["run_name"])
        calls.append((Path(notebook).name, parameters["resume"]))
        with open_run(parameters, parameters["resume"]) as run:
            write_history(run, history(parameters["epochs"]))
            write_report(run)

    def score(run, split, pieces, tta, device):
        calls.append(("score", split, pieces.data, len(pieces), device))
        aside = scored_folder(run.parent / "aside", run.name, split=split, data=pieces.data)
        shutil.copytree(aside / "evaluation", run / "evaluation", dirs_exist_ok=True)
        (run / "evaluation" / split).mkdir(exist_ok=True)
        for large in ("best.pt", "last.pt", "report.md", f"evaluation/{split}/000000.png"):
            (run / large).write_bytes(b"large")
        shutil.rmtree(aside)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(sweep, "score_run", score)
    return calls


def test_finished_steps_are_not_repeated(executed, runs):
    ((name, parameters),) = plan_runs(None, TINY | {"device": "cpu"}, {}, [1]).items()
    trained, scored = ("train.ipynb", False), ("score", "test", "synthetic", 100, "cpu")
    execute_run(parameters, "test")
    assert executed == [trained, scored]  # evaluate.ipynb is not executed
    execute_run(parameters, "test")
    assert len(executed) == 2
    shutil.rmtree(runs / name / "evaluation")
    execute_run(parameters, "test")
    assert executed[2:] == [scored]
    execute_run(parameters, "valid")
    assert executed[3:] == [("score", "valid", "synthetic", 4, "cpu")]
    write_history(runs / name, history(1))  # as in an interrupted run
    shutil.rmtree(runs / name / "evaluation")
    execute_run(parameters, "test")
    assert executed[4:] == [("train.ipynb", True), scored]


def test_scoring_uses_the_current_path_of_the_data(executed, runs, folder, tmp_path):
    ((name, parameters),) = plan_runs(None, TINY | {"data": str(folder), "limit": None}, {}, [1]).items()
    execute_run(parameters, "test")
    shutil.rmtree(runs / name / "evaluation")
    moved = shutil.move(folder / "test", tmp_path / "moved" / folder.name / "test")
    execute_run(parameters | {"data": str(Path(moved).parent)}, "test")
    assert executed[-1][:4] == ("score", "test", str(Path(moved).parent), 3)


def test_scores_on_other_data_do_not_count(executed, runs, tmp_path):
    """As after `evaluate.ipynb -p data elsewhere`: the run is scored again on its own data."""
    planned = plan_runs(None, TINY, {}, [1])
    ((name, parameters),) = planned.items()
    execute_run(parameters, "test")
    path = runs / name / "evaluation" / "test.json"
    own = read_json(path)
    assert own["data"] == "synthetic"
    write_json(own | {"data": "/disk/elsewhere"}, path)
    assert FinishedRuns(planned, "test", str(tmp_path / "results")).runs == {}
    assert not (tmp_path / "results").exists()
    execute_run(parameters, "test")
    assert read_json(path)["data"] == "synthetic"
    assert list(FinishedRuns(planned, "test", str(tmp_path / "results")).runs) == [name]


def test_run_used_by_another_process_fails_after_waiting(executed, runs, monkeypatch):
    (parameters,) = plan_runs(None, TINY, {}, [1]).values()
    monkeypatch.setattr(sweep, "LOCK_TIMEOUT_SECONDS", 0.1)
    with open_run(parameters), pytest.raises(RuntimeError, match="is in use by another process"):
        execute_run(parameters, "test")
    assert executed == []


def test_run_of_an_older_version_is_ignored(runs):
    folder = scored_folder(runs, "older", split="test")
    parameters = read_json(folder / "parameters.json")
    for name in ("validation", "fold"):
        parameters.pop(name)
    write_json(parameters, folder / "parameters.json")
    (folder / "report.md").touch()  # marks the run as trained
    assert FinishedRuns(plan_runs(None, TINY, {}, [1]), "test").runs == {}


def test_finished_run_is_recognised_by_its_parameters(executed, runs):
    """Its name and the path of its data don't matter."""
    ((name, parameters),) = plan_runs(None, TINY, {}, [1]).items()
    assert FinishedRuns({name: parameters}, "test").runs == {}
    execute_run(parameters | {"run_name": "mine"}, "test")
    (found,) = FinishedRuns({name: parameters}, "test").runs.items()
    assert (found[0], found[1].name, found[1].split) == (name, "mine", "test")
    same = {"data": "/elsewhere/synthetic", "num_workers": 3, "device": "cuda", "run_name": "other"}
    assert list(FinishedRuns({"a": parameters | same}, "test").runs) == ["a"]
    for other in (
        {"seed": 2},
        {"fold": 0},
        {"schedule": "cosine"},
        {"encoder_weights": "imagenet"},
        {"lovasz_weight": 1},
    ):
        assert FinishedRuns({"a": parameters | other}, "test").runs == {}
    assert FinishedRuns({name: parameters}, "valid").runs == {}  # scored on another split
    write_history(runs / "mine", history(1))
    assert FinishedRuns({name: parameters}, "test").runs == {}  # one epoch of two


def test_other_folders_among_the_runs_are_ignored(executed, runs):
    """Predictions for held-back labels, external predictions and an unfinished run."""
    ((name, parameters),) = plan_runs(None, TINY, {}, [1]).items()
    execute_run(parameters, "test")
    for other, finished in (("unlabelled", True), ("begun", False)):
        execute_run(parameters | {"run_name": other, "seed": 5}, "test")
        (runs / other / "evaluation" / "test.npz").unlink()
        if not finished:
            (runs / other / "report.md").unlink()
    external = {"recipe": "external", "seed": 1, "predictions": "/masks", "data": "synthetic"}
    scored_folder(runs, "masks", split="test", external=external)
    assert [run.name for run in FinishedRuns({name: parameters}, "test").runs.values()] == [name]


def test_results_contain_only_what_a_comparison_needs(executed, runs, tmp_path):
    planned = plan_runs(None, TINY, {}, [1])
    (name,) = planned
    execute_run(planned[name], "test")
    FinishedRuns(planned, "test", str(tmp_path / "results"))
    assert {path.name for path in (tmp_path / "results").glob("[!.]*")} == {"runs.jsonl", "counts.npz"}
    (kept,) = read_runs(str(tmp_path / "results"), "test")
    assert (kept.name, kept.parameters["seed"], kept.masks) == (name, 1, None)
    assert kept.score == read_runs(name, "test")[0].score


def test_finished_runs_are_appended_to_existing_results(executed, runs, tmp_path):
    others = [
        scored_run("a", group="arm", commit="abc"),
        scored_run("b", some_counts(0.5), split="test", seed=1),
    ]
    write_results(tmp_path, others)
    before = (tmp_path / RUNS_FILE).read_text()
    planned = plan_runs(None, TINY, {}, [1, 2, 3])
    first, second, _ = planned
    execute_run(planned[first], "test")
    finished = FinishedRuns(planned, "test", str(tmp_path))
    assert list(finished.runs) == [first]
    assert [run.name for run in read_results(tmp_path)] == ["a", "b", first]
    execute_run(planned[second], "test")
    finished.update()
    assert list(finished.runs) == [first, second]
    assert [run.name for run in read_results(tmp_path)] == ["a", "b", first, second]
    assert (tmp_path / RUNS_FILE).read_text().startswith(before)
    for one, other in zip(others, read_results(tmp_path), strict=False):
        np.testing.assert_array_equal(one.counts, other.counts)
    written = (tmp_path / RUNS_FILE).stat().st_mtime_ns
    finished.update()
    FinishedRuns(planned, "test", str(tmp_path))
    assert (tmp_path / RUNS_FILE).stat().st_mtime_ns == written  # nothing new, so nothing is written


def test_concurrent_sweeps_keep_results_of_each_other(executed, runs, tmp_path):
    """Two machines share a study and train different seeds."""
    planned = plan_runs(None, TINY, {}, [1, 2])
    sweeps = [FinishedRuns({name: parameters}, "test", str(tmp_path)) for name, parameters in planned.items()]
    for finished, parameters in zip(sweeps, planned.values(), strict=True):
        execute_run(parameters, "test")
        finished.update()
    assert [run.name for run in read_results(tmp_path)] == list(planned)


def test_runs_are_not_lost_if_two_sweeps_write_at_once(executed, runs, tmp_path):
    """Each update waits for the other, also if both found the folder empty."""
    planned = plan_runs(None, TINY, {}, list(range(1, 7)))
    sweeps = [FinishedRuns({name: parameters}, "test", str(tmp_path)) for name, parameters in planned.items()]
    for parameters in planned.values():
        execute_run(parameters, "test")
    with ThreadPoolExecutor() as pool:
        list(pool.map(FinishedRuns.update, sweeps))
    assert {run.name for run in read_results(tmp_path)} == set(planned)
    ignored = ["git", "check-ignore", "--no-index", "notebooks/studies/mine/.runs.jsonl.lock"]
    subprocess.run(ignored, cwd=ROOT, check=True, capture_output=True)


def test_locked_results_are_reported(executed, runs, tmp_path, monkeypatch):
    planned = plan_runs(None, TINY, {}, [1])
    execute_run(*planned.values(), "test")
    monkeypatch.setattr(sweep, "LOCK_TIMEOUT_SECONDS", 0.1)
    with (
        FileLock(tmp_path / ".runs.jsonl.lock"),
        pytest.raises(RuntimeError, match="results: .*can't be locked .*wait until no other sweep writes to"),
    ):
        FinishedRuns(planned, "test", str(tmp_path))
    assert not (tmp_path / RUNS_FILE).exists()


@pytest.mark.parametrize(
    ("folds", "split", "accepted"),
    [
        ([3], "test", True), ([0, 1, 2, 3, 4], "valid", True), ([4, 3, 2, 1, 0], "valid", True),
        ([0, 1], "valid", False), ([0, 1, 2, 3, 4], "test", False),
    ],
)  # fmt: skip
def test_folds_that_cannot_be_pooled_are_rejected_before_training(
    executed, no_ray, runs, folds, split, accepted
):
    planned = plan_runs(None, TINY | {"limit": 80}, {"fold": folds}, [1])
    if accepted:
        *_, table = sweep.sweep(planned, split)
        assert table.state.tolist() == ["done"] * len(folds)
    else:
        with pytest.raises(ValueError, match=r"grid: found fold \[0, 1.*expected one fold, or all five"):
            next(sweep.sweep(planned, split))
        assert executed == []


@pytest.fixture
def no_ray(monkeypatch):
    """Resources, settings and names of the runs that a sweep starts. They run at once, without Ray."""
    started = []

    class Task:
        def options(self, **resources):
            started.append(resources)
            return self

        def remote(self, root, settings, parameters, split):
            started[0] |= settings
            started.append(parameters["run_name"])
            execute_run(parameters, split)
            return parameters["run_name"]

    monkeypatch.setattr(sweep, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(sweep, "_max_per_machine", {"CPU": 8, "GPU": 0}.get)
    monkeypatch.setattr(sweep, "_remote_task", Task)
    monkeypatch.setattr(sweep, "_task_error", lambda reference: None)
    monkeypatch.setattr(sweep.ray, "wait", lambda references, **options: (references, []))
    return started


def test_a_run_in_the_results_counts_as_done(executed, no_ray, runs, tmp_path):
    planned, results = plan_runs(None, TINY, {}, [1, 2]), str(tmp_path / "results")
    first, second = planned
    execute_run(planned[first], "test")
    FinishedRuns(planned, "test", results)
    shutil.rmtree(runs / first)  # as in a fresh clone
    *_, table = sweep.sweep(planned, "test", results=results)
    assert no_ray[1:] == [second]
    assert table.state.tolist() == ["done", "done"]
    assert table.epochs.tolist() == ["2 of 2", "2 of 2"]
    assert table.valid_miou.notna().all()
    assert [run.name for run in read_results(tmp_path / "results")] == [first, second]
    *_, table = sweep.sweep(planned, "test", results=results)
    assert no_ray[3:] == []
    *_, table = sweep.sweep(planned, "valid", results=results)  # not yet scored on this split
    assert no_ray[4:] == [first, second]
    assert [run.split for run in read_results(tmp_path / "results")] == ["test", "test", "valid", "valid"]


def test_runs_finished_before_results_was_set_are_added(executed, no_ray, runs, tmp_path):
    planned = plan_runs(None, TINY, {}, [1])
    (name,) = planned
    execute_run(planned[name], "test")
    list(sweep.sweep(planned, "test", results=str(tmp_path / "results")))
    assert no_ray[1:] == []
    assert [run.name for run in read_results(tmp_path / "results")] == [name]


def test_results_of_a_study_are_found_from_any_working_directory(tmp_path, monkeypatch):
    """As with `results: studies/soft_iou` in study.yaml. A new folder is in the working directory."""
    monkeypatch.chdir(tmp_path)
    study = FinishedRuns({}, "valid", "studies/soft_iou")
    assert study.folder == sweep.NOTEBOOKS / "studies" / "soft_iou"
    assert len(read_results(study.folder)) > 30
    assert FinishedRuns({}, "valid", "new").folder == tmp_path / "new"
    (tmp_path / "studies" / "soft_iou").mkdir(parents=True)
    assert FinishedRuns({}, "valid", "studies/soft_iou").folder == tmp_path / "studies" / "soft_iou"
    assert list(tmp_path.iterdir()) == [tmp_path / "studies"]  # looking up the folder creates nothing


def test_progress_table_shows_the_state_of_each_run(runs):
    planned = plan_runs(None, TINY, {}, [1, 2, 3])
    _, running, failed = planned
    executed_notebook(running).touch()
    with open_run(planned[running]) as run:
        write_history(run, [row | {"seconds": 60.0} for row in history(1)])
    done = plan_runs(None, TINY | {"epochs": 3}, {}, [4])
    finished = {name: scored_run("mine") for name in done}
    table = progress_table(planned | done, finished, {failed: "ValueError: no"})
    assert table.state.tolist() == ["waiting", "running", "failed", "done"]
    assert table.epochs.tolist() == ["0 of 2", "1 of 2", "0 of 2", "3 of 3"]
    assert table.minutes_left.iloc[3] == 0
    assert table.minutes_left[running] == 1
    assert table.valid_miou[running] == 0.1
    assert table.error[failed] == "ValueError: no"


def test_unavailable_clusters_splits_and_resources_are_rejected(runs, monkeypatch):
    with pytest.raises(ValueError, match="cluster: found '127.0.0.1:1', but no Ray cluster answers"):
        next(sweep.sweep(plan_runs(None, TINY, {}, [1]), "test", "127.0.0.1:1"))
    with pytest.raises(ValueError, match="split: found 'tset', expected one of train, valid, test"):
        next(sweep.sweep({}, "tset"))
    monkeypatch.setattr(sweep, "_max_per_machine", {"CPU": 8, "GPU": 0}.get)
    for cpus, gpus, message in (
        (9, 0, "cpus_per_run: found 9"),
        (0, 0, r"cpus_per_run: found 0, expected from 1 to 8 \(the largest machine\)"),
        (1, 1, "gpus_per_run: found 1, expected from 0 to 0 "),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.check_resources(cpus, gpus)
    sweep.check_resources(8, 0)


@pytest.mark.parametrize(
    ("machine", "asked", "num_workers", "expected"),
    [
        ((8, 0), (None, None), 0, {"num_cpus": 1, "num_gpus": 0, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}),
        ((8, 2), (None, None), 4, {"num_cpus": 5, "num_gpus": 1, "OMP_NUM_THREADS": "1"}),
        ((2, 0), (None, 0), 4, {"num_cpus": 2, "num_gpus": 0, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}),
        ((8, 2), (4, 0), 1, {"num_cpus": 4, "num_gpus": 0, "OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}),
        (
            (8, 1), (2, 0.5), 0,
            {"num_cpus": 2, "num_gpus": 0.5, "OMP_NUM_THREADS": "2", "PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.5"},
        ),
    ],
)  # fmt: skip
def test_runs_get_their_share_of_cpus_gpus_and_gpu_memory(
    executed, no_ray, runs, monkeypatch, machine, asked, num_workers, expected
):
    """A run without a GPU sees none. A run on a shared GPU may use its share of the memory."""
    monkeypatch.setattr(sweep, "_max_per_machine", dict(zip(("CPU", "GPU"), machine, strict=True)).get)
    list(sweep.sweep(plan_runs(None, TINY | {"num_workers": num_workers}, {}, [1]), "test", "local", *asked))
    assert no_ray[0] == expected | {"RUNS_DIR": str(runs)}


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_setAllocatorSettings"),
    reason="this torch does not know PYTORCH_ALLOC_CONF: two runs share a GPU's memory without a limit",
)
def test_torch_accepts_the_limit_on_gpu_memory():
    (setting,) = (
        value for name, value in sweep.worker_environment(1, 0.5).items() if name == "PYTORCH_ALLOC_CONF"
    )
    torch._C._accelerator_setAllocatorSettings(setting)
    with pytest.raises(ValueError, match="per_process_memory_fraction is invalid"):
        torch._C._accelerator_setAllocatorSettings(setting.replace("0.5", "7"))
    torch._C._accelerator_setAllocatorSettings(setting.replace("0.5", "1.0"))


def test_failed_run_does_not_stop_the_other(runs, tmp_path):
    """End to end: Ray, papermill, train.ipynb and scoring; then the results are read without weights."""
    planned = plan_runs(None, TINY, {"encoder": [TINY["encoder"], "resnet81"]}, [1])
    good, bad = planned
    *_, table = sweep.sweep(planned, "valid", results=str(tmp_path / "results"))
    assert table.state.tolist() == ["done", "failed"]
    assert "did you mean resnet18" in table.error[bad]
    assert run_state(runs / good)[:3] == (2, 2, True)
    assert run_state(runs / good).evaluated == ("valid",)
    assert executed_notebook(good).exists()
    assert executed_notebook(bad).exists()
    assert [path.name for path in (runs / "notebooks").iterdir() if "evaluate" in path.name] == []
    (read,) = read_runs(str(tmp_path / "results"), "valid")
    assert (read.name, len(read.names), len(read.history)) == (good, 4, 2)
    assert read.processor
    assert {path.name for path in (tmp_path / "results").glob("[!.]*")} == {"runs.jsonl", "counts.npz"}


def interrupt_when(process, condition):
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be interrupted"
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_sweep_resumes_without_repeating_finished_runs(runs):
    fixed = f"{{fixed: {json.dumps(TINY)}, "
    command = [
        sys.executable, "-m", "papermill", str(sweep.NOTEBOOKS / "sweep.ipynb"), str(runs / "sweep.out.ipynb"),
        "-y", fixed + "grid: {soft_iou_weight: [0, 0.5, 1]}, seeds: [1, 2, 3, 4]}",
    ]  # fmt: skip
    finished = lambda: {path: path.stat().st_mtime_ns for path in runs.glob("*/evaluation/test.json")}  # noqa: E731
    with subprocess.Popen(
        command, cwd=sweep.NOTEBOOKS, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        interrupt_when(process, lambda: len(finished()) >= 5)
    time.sleep(5)  # wait for its remaining processes to end
    before = finished()
    assert 5 <= len(before) < 12
    subprocess.run(command, cwd=sweep.NOTEBOOKS, check=True, capture_output=True)
    after = finished()
    assert len(after) == 12
    assert before.items() <= after.items()


def ray_workers():
    """The processes of this sweep in which Ray runs a task, found by the title that Ray gives them."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.cmdline()[:1] == ["ray::run_on_worker"]]


@pytest.mark.slow
def test_run_with_a_killed_worker_resumes_to_the_same_history(runs, monkeypatch):
    epoch_count = 40  # the history is only saved every 30 seconds
    fixed = TINY | {
        "limit": 64,
        "image_height": 96,
        "image_width": 128,
        "epochs": epoch_count,
        "augment": "crops",
    }
    ((name, parameters),) = plan_runs(None, fixed, {}, [1]).items()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed, epochs = None, []
    for table in sweep.sweep({name: parameters}, "valid"):
        epochs.append(int(table.epochs[name].split()[0]))
        if killed is None and epochs[-1] >= 3:
            (worker,) = ray_workers()
            worker.kill()
            killed = epochs[-1]
    assert 3 <= killed < epoch_count
    assert table.state[name] == "done"
    assert min(epochs[epochs.index(killed) :]) >= killed  # it resumed and did not start again
    execute_run(parameters | {"run_name": "alone"}, "valid")  # if it existed earlier, the sweep would use it
    found, expected = (read_history(runs / run).drop(columns="seconds") for run in (name, "alone"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.slow
def test_sweep_over_folds_is_pooled_for_the_recipe_test(runs):
    fixed = TINY | {"limit": 80, "epochs": 1}
    planned = plan_runs(None, fixed, {"fold": [0, 1, 2, 3, 4], "soft_iou_weight": [0, 0.5]}, [1, 2])
    *_, table = sweep.sweep(planned, "valid")
    assert table.state.tolist() == ["done"] * 20
    recipes = group_recipes(list(FinishedRuns(planned, "valid").runs.values()))
    assert list(recipes) == ["soft_iou_weight 0", "soft_iou_weight 0.5"]
    assert [len(members) for members in recipes.values()] == [2, 2]
    assert len(recipes["soft_iou_weight 0"][0].names) == 80
    (result,) = run_tests(recipes).values()
    assert result.recipe_test.scene_count == 40
    assert result.spread.folds == 5


TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_ray_startup_is_tried_up_to_three_times(monkeypatch, slow):
    starts = []

    def init(**options):
        starts.append(options)
        if len(starts) <= slow:
            raise Exception(TIMED_OUT)

    monkeypatch.setattr("ray.init", init)
    with (
        pytest.raises(
            RuntimeError,
            match="cluster: Ray did not start within 30 seconds, 3 times, because .*cluster auto",
        )
        if slow == 3
        else contextlib.nullcontext(),
        sweep.ray_session("local"),
    ):
        assert len(starts) == slow + 1


@pytest.mark.parametrize(("folder", "short"), [("slurm_jobdir_1355700_tmp.t0016_" * 3, True), ("t", False)])
def test_ray_uses_a_short_folder_if_the_temporary_path_is_long(monkeypatch, tmp_path, folder, short):
    temporary = f"/tmp/{folder}"
    monkeypatch.setattr("tempfile.tempdir", temporary)
    given = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    with sweep.ray_session("local"):
        assert given.get("_temp_dir", "/tmp/ray-").startswith("/tmp/ray-")
        assert ("_temp_dir" in given) == short
        if short:
            os.rmdir(given["_temp_dir"])


@pytest.mark.parametrize("value", ["x" * 300, "ü" * 300])
def test_names_of_planned_runs_have_at_most_200_bytes(value):
    grid = {"soft_iou_weight": [0.5], "encoder": [value, value + "2"]}
    runs = plan_runs(None, {}, grid, [1, 2])
    assert len(runs) == 4
    for name in runs:
        assert len(os.fsencode(name)) <= 200
        assert "-seed=" in name


def test_sweep_on_held_back_labels_fails_before_its_first_run(folder, monkeypatch):
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("started"))
    runs = plan_runs(None, {"data": str(folder)}, {"soft_iou_weight": [0.5]}, [1])
    with pytest.raises(ValueError, match="split: the labels of split 'test' of .* are held back"):
        next(sweep.sweep(runs, "test"))

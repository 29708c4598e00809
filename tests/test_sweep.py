import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import papermill
import pytest
import ray
from conftest import history

from lib import sweep
from lib.runs import (
    is_evaluated,
    is_trained,
    read_history,
    release_run,
    start_run,
    write_history,
    write_report,
    write_scores,
)
from lib.sweep import execute_run, executed_notebooks, plan_runs, progress_table

SLOW = pytest.mark.skipif(
    not os.environ.get("SLOW"), reason="minutes long; run it with SLOW=1 pytest tests/test_sweep.py"
)
TINY = {"limit": 12, "image_height": 32, "image_width": 48, "epochs": 2}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    return tmp_path


def names(*arguments):
    return list(plan_runs(*arguments))


def test_a_plan_holds_every_combination_and_seed():
    planned = plan_runs("nyuv2_small", {"data": "/nyu"}, {"epochs": [1, 2], "inputs": ["rgb", "rgbd"]}, [1, 2])
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
    assert first["batch_size"] == 16  # the experiment's
    assert first["precision"] == "auto"  # the notebook's default
    assert [parameters["seed"] for parameters in planned.values()] == [1] * 4 + [2] * 4
    assert re.fullmatch(r"nyuv2_small-epochs=1-inputs=rgb-seed=1-[0-9a-f]{6}", first["run_name"])


def test_a_name_depends_on_the_parameters_alone():
    one, two = names(None, {}, {"soft_iou_weight": [1, 2]}, [5])
    assert names(None, {}, {"soft_iou_weight": [2, 1]}, [4, 5])[2:] == [two, one]
    assert names(None, {"epochs": 12, "workers": 2, "device": "cpu"}, {"soft_iou_weight": [1]}, [5]) == [one]
    assert names(None, {"epochs": 13}, {"soft_iou_weight": [1]}, [5]) != [one]
    assert names(None, {}, {"soft_iou_weight": [1.0]}, [5])[0][-6:] == one[-6:]
    assert names(None, {}, {"data": ["/data/nyu"]}, [5])[0].startswith("sweep-data=data_nyu-seed=5-")


def test_without_soft_iou_its_pooling_makes_no_second_run():
    planned = plan_runs(None, {}, {"soft_iou_weight": [0, 0.5], "soft_iou_pooling": ["exp061", "batch"]}, [1])
    assert sorted((run["soft_iou_weight"], run["soft_iou_pooling"]) for run in planned.values()) == [
        (0, "batch"), (0.5, "batch"), (0.5, "exp061"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (None, {}, {"soft_iou_wieght": [1]}, [1]),
            "fixed, grid: found 'soft_iou_wieght', expected one of data, split, ",
        ),
        ((None, {"seed": 3}, {}, [1]), "fixed, grid: found 'seed', expected one of "),
        (("nyu", {}, {}, [1]), "experiment: found 'nyu', expected one of exp050, "),
        (
            (None, {}, {"epochs": 3}, [1]),
            "grid, seeds: found {'epochs': 3} and [1], expected lists of one value or more",
        ),
        (
            (None, {}, {"epochs": []}, [1]),
            "grid, seeds: found {'epochs': []} and [1], expected lists of one value or more",
        ),
        ((None, {}, {}, []), "grid, seeds: found {} and [], expected lists of one value or more"),
    ],
)
def test_mistakes_in_a_plan(arguments, message):
    with pytest.raises(ValueError) as error:
        plan_runs(*arguments)
    assert str(error.value).startswith(message)


@pytest.fixture
def executed(runs, monkeypatch):
    """What papermill was asked to execute; training and evaluating take no time here."""
    calls = []

    def execute(notebook, output, parameters, **options):
        calls.append((Path(notebook).stem, parameters.get("resume")))
        if Path(notebook).stem == "train":
            run = start_run(parameters["run_name"], parameters, parameters["resume"])
            release_run(run)
            write_history(run, history(parameters["epochs"]))
            write_scores(run, history(1)[0], [], [])
            write_report(run)
        else:
            (runs / parameters["run"] / "evaluation").mkdir(exist_ok=True)
            (runs / parameters["run"] / "evaluation" / "test.npz").touch()

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return calls


def test_what_is_done_is_not_done_again(executed, runs):
    ((name, parameters),) = plan_runs(None, TINY, {}, [1]).items()
    execute_run(parameters, "test")
    assert executed == [("train", False), ("evaluate", None)]
    execute_run(parameters, "test")
    assert len(executed) == 2
    (runs / name / "evaluation" / "test.npz").unlink()
    execute_run(parameters, "test")
    assert executed[2:] == [("evaluate", None)]
    write_history(runs / name, history(1))  # as an interrupted run has it
    execute_run(parameters, "test")
    assert executed[3:] == [("train", True), ("evaluate", None)]


def test_a_default_that_changed_is_noticed(executed, runs):
    ((name, parameters),) = plan_runs(None, TINY, {}, [1]).items()
    execute_run(parameters, "test")
    assert sweep._is_done(name, parameters, "test")
    with pytest.raises(
        ValueError, match=f"{name}: found another schedule than its name says, so a default has changed"
    ):
        sweep._is_done(name, parameters | {"schedule": "cosine"}, "test")


def test_the_table_tells_the_state_of_each_run(runs):
    planned = plan_runs(None, TINY, {}, [1, 2, 3])
    _, running, failed = planned
    (runs / "notebooks").mkdir()
    executed_notebooks(running)[1].touch()
    run = start_run(running, planned[running])
    write_history(run, [row | {"seconds": 60.0} for row in history(1)])
    table = progress_table(planned, "test", {failed: "ValueError: no"})
    assert table.state.tolist() == ["waiting", "running", "failed"]
    assert table.epochs.tolist() == ["0 of 2", "1 of 2", "0 of 2"]
    assert table.minutes_left[running] == 1
    assert table.valid_miou[running] == 0.1
    assert table.error[failed] == "ValueError: no"


def test_places_and_shares_that_are_not_there(runs, monkeypatch):
    with pytest.raises(ValueError, match="where: found '127.0.0.1:1', where no Ray cluster answers"):
        next(sweep.sweep(plan_runs(None, TINY, {}, [1]), "test", "127.0.0.1:1"))
    with pytest.raises(ValueError, match="part: found 'tset', expected one of train, valid, test"):
        next(sweep.sweep({}, "tset"))
    monkeypatch.setattr(sweep, "_most", {"CPU": 8, "GPU": 0}.get)
    for cpus, gpus, message in (
        (9, 0, "cpus_per_run: found 9"),
        (0, 0, "cpus_per_run: found 0"),
        (1, 1, "gpus_per_run: "),
    ):
        with pytest.raises(ValueError, match=message):
            sweep._check_share(cpus, gpus)
    sweep._check_share(8, 0)


def test_a_failed_run_fails_alone(runs):
    planned = plan_runs(None, TINY, {"encoder": ["resnet18", "resnet81"]}, [1])
    good, bad = planned
    *_, table = sweep.sweep(planned, "test")
    assert table.state.tolist() == ["done", "failed"]
    assert "did you mean resnet18" in table.error[bad]
    assert is_trained(runs / good, 2)
    assert is_evaluated(runs / good, "test")
    assert executed_notebooks(bad)[0].exists()


def interrupt_when(process, condition):
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be interrupted"
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@SLOW
def test_twelve_runs_killed_in_the_middle_repeat_nothing(runs):
    fixed = "{fixed: {limit: 12, image_height: 32, image_width: 48, epochs: 2}, "
    command = [
        sys.executable, "-m", "papermill", str(sweep.NOTEBOOKS / "sweep.ipynb"), str(runs / "sweep.out.ipynb"),
        "-y", fixed + "grid: {soft_iou_weight: [0, 0.5, 1]}, seeds: [1, 2, 3, 4]}",
    ]  # fmt: skip
    finished = lambda: {path: path.stat().st_mtime_ns for path in runs.glob("*/evaluation/test.npz")}  # noqa: E731
    with subprocess.Popen(command, cwd=sweep.NOTEBOOKS, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        interrupt_when(process, lambda: len(finished()) >= 5)
    time.sleep(5)  # what was left of it ends
    before = finished()
    assert 5 <= len(before) < 12
    subprocess.run(command, cwd=sweep.NOTEBOOKS, check=True, capture_output=True)
    after = finished()
    assert len(after) == 12
    assert before.items() <= after.items()


@SLOW
def test_a_run_whose_machine_is_lost_goes_on_elsewhere_to_the_same_history(runs, monkeypatch):
    fixed = {"limit": 48, "image_height": 64, "image_width": 96, "epochs": 12, "augment": "crops"}
    ((name, parameters),) = plan_runs(None, fixed, {}, [1]).items()
    alone = parameters | {"run_name": "alone"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    execute_run(alone, "test")
    from ray.cluster_utils import Cluster  # no public part of Ray: here, or its change would fail the whole file

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    killed, epochs = None, []
    for table in sweep.sweep({name: parameters}, "test", cluster.address):
        epochs.append(int(table.epochs[name].split()[0]))
        if killed is None and epochs[-1] >= 3:
            (busy,) = (node for node in nodes if node.node_id == _where_it_runs())
            cluster.remove_node(busy, allow_graceful=False)
            killed = epochs[-1]
    cluster.shutdown()
    assert killed < 12
    assert table.state[name] == "done"
    assert min(epochs[epochs.index(killed) :]) >= killed  # it went on and did not begin again
    history, expected = (read_history(runs / run).drop(columns="seconds") for run in (name, "alone"))
    pd.testing.assert_frame_equal(history, expected, check_exact=True)


def _where_it_runs():
    """The Ray node that has no core left."""
    from ray._private.state import state

    free = state.available_resources_per_node()
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    (node,) = (node for node in nodes if free[node].get("CPU", 0) < 1)
    return node

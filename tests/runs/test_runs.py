import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import counts, evaluation, history
from filelock import FileLock

from lib.classes import NYUV2_13
from lib.data import load_samples
from lib.device import describe_processor
from lib.files import write_json
from lib.runs import (
    METADATA,
    RunState,
    find_run,
    lock_run,
    open_run,
    read_counts,
    read_parameters,
    read_scores,
    run_state,
    runs_folder,
    write_history,
    write_scores,
)
from lib.runs.report import summarise, write_report
from lib.runs.scoring import write_evaluation


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """An empty runs folder."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    return tmp_path


def test_environment_variable_sets_the_runs_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    assert runs_folder() == tmp_path
    monkeypatch.setenv("RUNS_DIR", "~/runs")
    assert runs_folder() == Path.home() / "runs"
    monkeypatch.setenv("RUNS_DIR", "relative")  # the kernels of a sweep have another working directory
    assert runs_folder() == Path.cwd() / "relative"
    monkeypatch.delenv("RUNS_DIR")
    assert runs_folder() == Path(__file__).parents[2] / "runs"


def test_older_runs_with_the_same_name_are_kept(runs):
    for seed in range(3):
        with open_run({"run_name": "trial", "seed": seed, "resume": False}) as run:
            assert run == runs / "trial"
            saved = json.loads((run / "parameters.json").read_text())
            assert {name: saved[name] for name in saved if name not in METADATA} == {
                "run_name": "trial",
                "seed": seed,
            }
    older = sorted((runs / "older").iterdir())
    assert all(path.name.startswith("trial.20") for path in older)
    assert sorted(json.loads((path / "parameters.json").read_text())["seed"] for path in older) == [0, 1]
    assert {path.name for path in runs.iterdir()} - {".trial.lock"} == {"trial", "older"}


@pytest.mark.parametrize("computed", [False, True])
def test_failed_run_replaces_the_previous_one_only_after_a_checkpoint(runs, computed):
    def fail(seed):
        with open_run({"run_name": "trial", "seed": seed}) as run:
            if computed:
                (run / "last.pt").touch()
            raise MemoryError

    with open_run({"run_name": "trial", "seed": 0}) as run:
        pass
    with pytest.raises(MemoryError):
        fail(1)
    assert read_parameters(run)["seed"] == computed
    assert len(list((runs / "older").iterdir())) == computed


def test_run_records_commit_and_processor(runs, tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("repository")
    monkeypatch.setattr("lib.runs.ROOT", root)

    def git(*arguments):
        command = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def recorded():
        with open_run({"run_name": "a"}) as run:
            saved = read_parameters(run)
        assert saved["processor"] == describe_processor()
        return saved["commit"], saved["tree_unchanged"]

    assert recorded() == (None, None)  # no repository
    (root / "code").write_text("one")
    git("init", "-q")
    git("add", "code")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")[:12]
    assert recorded() == (head, True)
    git("tag", "-a", "v1", "-m", "a release")
    assert recorded() == (head, True)
    (root / "code").write_text("two")
    assert recorded() == (head, False)
    monkeypatch.setenv("PATH", str(root))
    assert recorded() == (None, None)  # no git


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../up",
        "a/b",
        "/a",
        "a\\b",
        ".hidden",
        ".",
        "..",
        "a:b",
        "a*",
        "a?",
        "older",
        "notebooks",
        'a"',
        "a|b",
    ],
)
def test_invalid_run_names_are_rejected(runs, name):
    with (
        pytest.raises(ValueError, match="run_name: found .* expected a plain folder name such as 'exp061'"),
        open_run({"run_name": name}),
    ):
        pytest.fail("opened")
    assert not list(runs.iterdir())


@pytest.mark.parametrize(
    "name", ["exp061", "exp061-seed 2", "a.b", "größer", "older2", "n=3", "first", "theirs"]
)
def test_valid_run_names_are_accepted(runs, name):
    with open_run({"run_name": name}) as run:
        assert run.name == name
    assert run_state(run) == RunState(0, 0, False, ())


def test_only_one_process_can_open_a_run(runs):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from lib.runs import open_run\nwith open_run({'run_name': 'taken'}): pass"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    with open_run({"run_name": "taken", "seed": 7}) as run:
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert second.stderr.splitlines()[-1] == (
            "RuntimeError: run_name: 'taken' is in use by another process; wait for it, or choose another run_name"
        )
        assert '"seed": 7' in (run / "parameters.json").read_text()
    assert not (runs / "older").exists()
    with open_run({"run_name": "taken"}):  # released at the end of the block
        pass
    with pytest.raises(KeyboardInterrupt), open_run({"run_name": "taken"}):
        raise KeyboardInterrupt
    with open_run({"run_name": "taken"}):  # and after an error
        pass


def test_locking_a_run_fails_if_it_stays_locked_but_waits_for_its_release(tmp_path):
    lock = FileLock(tmp_path / ".taken.lock")
    with (
        lock,
        pytest.raises(RuntimeError, match="run_name: 'taken' is in use by another process"),
        lock_run(tmp_path / "taken", wait_seconds=0.1),
    ):
        pytest.fail("held")
    with lock_run(tmp_path / "taken"), pytest.raises(RuntimeError), lock_run(tmp_path / "taken"):
        pytest.fail("held twice")
    with lock.acquire(timeout=0):  # released at the end of the block
        pass
    lock = FileLock(tmp_path / ".taken.lock", thread_local=False)
    lock.acquire()
    release = threading.Timer(0.5, lock.release)
    release.start()
    with lock_run(tmp_path / "taken", wait_seconds=60):
        release.join()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_error_names_a_disk_without_locks(runs, monkeypatch, code):
    """Network disks raise an error number without a path."""

    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RuntimeError) as error, open_run({"run_name": "remote"}):
        pytest.fail("opened")
    assert str(error.value) == (
        f"RUNS_DIR: files in {runs} can't be locked ({os.strerror(code)}); set the environment variable RUNS_DIR to a "
        "folder on a local disk"
    )


def test_error_names_a_runs_folder_below_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "file" / "runs"))
    with pytest.raises(
        RuntimeError, match=r"RUNS_DIR: files in .*/file/runs can't be locked \(Not a directory\); set"
    ):
        open_run({"run_name": "a"}).__enter__()


STARTED = {
    "run_name": "one",
    "epochs": 3,
    "learning_rate": 0.001,
    "seed": 0,
    "num_workers": 0,
    "save_figures": False,
}


@pytest.fixture
def begun(runs):
    with open_run(STARTED | {"resume": False}) as run:
        (run / "last.pt").touch()  # some progress was saved
        return run


@pytest.mark.parametrize("changed", [{}, {"resume": True}, {"num_workers": 2, "save_figures": True}])
def test_resume_keeps_the_original_parameters(begun, changed):
    before = (begun / "parameters.json").read_bytes()
    with open_run(STARTED | changed, resume=True) as run:
        assert run == begun
    assert (begun / "parameters.json").read_bytes() == before
    assert not (begun.parent / "older").exists()


def test_resume_keeps_the_recorded_commit_and_processor(begun):
    saved = read_parameters(begun)
    elsewhere = saved | {
        "commit": "abc",
        "tree_unchanged": not saved["tree_unchanged"],
        "processor": "another",
    }
    write_json(elsewhere, begun / "parameters.json")
    with open_run(STARTED, resume=True) as run:
        assert read_parameters(run) == elsewhere  # as recorded at the start


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"learning_rate": 0.01, "seed": 7},
            "resume: 'one' was started with learning_rate = 0.001 (found 0.01), seed = 0 (found 7); resume it with "
            "its own parameters, or start another run_name with resume False",
        ),
        (
            {"epochs": 5},
            "resume: 'one' was started with epochs = 3 (found 5); resume it with its own parameters, or start another "
            "run_name with resume False; epochs can't change, because the learning rates of all epochs were "
            "scheduled at the start",
        ),
        (
            {"novelty": 1},
            "resume: 'one' was started with novelty = 'unknown' (found 1); resume it with its own parameters, or "
            "start another run_name with resume False",
        ),
    ],
)
def test_resume_with_other_parameters_is_rejected(begun, changed, message):
    with pytest.raises(ValueError) as error, open_run(STARTED | changed, resume=True):
        pytest.fail("opened")
    assert str(error.value) == message


def test_missing_or_incomplete_run_cannot_be_resumed(begun):
    with (
        pytest.raises(ValueError) as error,
        open_run(STARTED | {"run_name": "two"}, resume=True),
    ):
        pytest.fail("opened")
    assert str(error.value) == (
        f"resume: no run 'two' in {begun.parent}, there are: one; start it with resume False"
    )
    (begun / "parameters.json").write_text('{"epochs": ')
    with (
        pytest.raises(ValueError, match=r"one/parameters.json: can't be read .* the run is incomplete"),
        open_run(STARTED, resume=True),
    ):
        pytest.fail("opened")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("edited", "message"),
    [
        (
            {"limit": 9},
            "limit: is 9 now, but the samples were loaded with 6; run the cell that loads the data again, and then this one",
        ),
        ({"data": "/nyu"}, "data: is '/nyu' now, but the samples were loaded with 'synthetic'; run"),
        (
            {"validation": "blocks"},
            "validation: is 'blocks' now, but the samples were loaded with 'random'; run",
        ),
        ({"fold": 1}, "fold: is 1 now, but the samples were loaded with 2; run"),
        ({"classes": "nyuv2_40"}, "classes: is 'nyuv2_40' now, but the samples were loaded with None; run"),
        ({"image_width": 64}, "image_width: is 64 now, but the samples were loaded with 32; run"),
    ],
)
def test_samples_loaded_with_other_parameters_are_rejected(begun, edited, message, resume):
    """A data parameter was edited, but the cell that loads the data was not run again."""
    of_data = {
        "data": "synthetic",
        "validation": "random",
        "limit": 6,
        "classes": None,
        "fold": 2,
        "image_height": 24,
        "image_width": 32,
    }
    splits = [load_samples("synthetic", split, "random", (24, 32), 6, fold=2) for split in ("train", "valid")]
    with open_run(STARTED | of_data | {"run_name": "good"}, samples=splits):
        pass
    before = (begun / "parameters.json").read_bytes()
    for samples in (splits, splits[1:]):
        with (
            pytest.raises(ValueError, match=message.replace("(", r"\(")),
            open_run(STARTED | of_data | edited, resume, samples),
        ):
            pytest.fail("opened")
    assert (begun / "parameters.json").read_bytes() == before
    assert not (begun.parent / "older").exists()


def test_samples_made_by_hand_are_accepted_with_any_parameters(runs, scenes):
    with open_run(
        STARTED | {"data": "elsewhere", "limit": 3}, samples=[replace(scenes, loaded_with=None)]
    ) as run:
        assert run.exists()


def test_run_state_counts_epochs_and_lists_evaluated_splits(trained, tmp_path):
    assert run_state(tmp_path / "nowhere") == RunState(0, 0, False, ())
    run = trained("a", evaluated=False, epochs=5)
    assert run_state(run) == RunState(5, 3, False, ())
    assert run_state(run).describe() == "resumes, 3 of 5 epochs are done"
    run = trained("a", evaluated=False, epochs=3)
    assert not run_state(run).trained  # no report yet
    write_report(run)
    assert run_state(run) == RunState(3, 3, True, ())
    assert run_state(run).describe() == "is finished, all 3 epochs are done; nothing changes"
    assert run_state(trained("b", epochs=3)) == RunState(3, 3, True, ("test",))
    (run / "history.csv").unlink()
    assert run_state(run) == RunState(3, 0, False, ())
    assert run_state(run).describe() == "starts from the beginning"


def test_report_contains_configuration_scores_and_progression(tmp_path):
    rows = history(12)
    write_history(tmp_path, rows)
    (tmp_path / "parameters.json").write_text('{"encoder": "resnet18"}')
    write_scores(tmp_path, rows[6], evaluation(counts()))
    report = write_report(tmp_path).read_text()
    assert report.startswith(f"# {tmp_path.name}\n")
    for cells in (
        ["encoder", "resnet18"], ["best epoch", "7"], ["mIoU", "0.9583 over 12 of 13 classes"],
        ["pixel accuracy", "0.9730"], ["loss", "0.4286"], ["bed", "0.750"],
    ):  # bed and books at 0.75, ten at 1  # fmt: skip
        assert cells in table_rows(report)
    assert ["window", "-"] in table_rows(report)
    progression = table_rows(report[report.index("## Training progression") : report.index("## Per-class")])[
        2:
    ]
    assert [row[0] for row in progression] == ["1", "5", "**7**", "10", "12"]
    strict = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)  # NaN isn't JSON
    assert (strict["class_iou"]["floor"], strict["class_iou"]["window"]) == (1, None)
    assert "Best classes: ceiling (1.00)" in summarise(tmp_path)
    assert "bed (0.75)" in summarise(tmp_path).split("Worst classes")[1]


@pytest.mark.parametrize(
    ("miou", "said"),
    [
        ([0.1, 0.3, 0.4, 0.45], "In the last epoch the mIoU changed by +0.050: train for more epochs"),
        (
            [0.1, 0.3, 0.3, 0.3, 0.3, 0.31, 0.3, 0.305],
            "In the last 2 epochs the mIoU changed by -0.005. Best classes",
        ),
        ([0.1], "(chance level 0.0"),
    ],
)
def test_summary_reports_the_final_change_in_miou(tmp_path, miou, said):
    rows = [row | {"valid_miou": score} for row, score in zip(history(len(miou)), miou, strict=True)]
    write_history(tmp_path, rows)
    (tmp_path / "parameters.json").write_text("{}")
    write_scores(tmp_path, rows[-1], evaluation(counts()))
    assert said in summarise(tmp_path)


def table_rows(report):
    """Return the cells of every row of every table."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.splitlines()
        if line.startswith("|")
    ]


def test_report_without_validation(tmp_path):
    rows = [
        row | dict.fromkeys(("valid_loss", "valid_miou", "valid_pixel_acc"), np.nan) for row in history(2)
    ]
    write_history(tmp_path, rows)
    (tmp_path / "parameters.json").write_text("{}")
    write_scores(tmp_path, rows[1], None)
    report = write_report(tmp_path).read_text()
    assert "there are no validation images, so the last epoch is kept" in report
    assert ["best epoch", "2 (the last: no validation images)"] in table_rows(report)
    assert "Per-class" not in report
    assert ["1", "2.0000", "-", "-", "-"] in table_rows(report)
    assert "nan" not in report
    assert read_scores(tmp_path)["valid_miou"] is None
    assert not (tmp_path / "counts.npz").exists()
    assert pd.read_csv(tmp_path / "history.csv").valid_miou.isna().all()


def test_older_run_returns_if_the_disk_is_full_at_the_start(runs, monkeypatch):
    with open_run({"run_name": "trial", "seed": 0}) as run:
        (run / "last.pt").touch()

    def fail(content, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.runs.write_json", fail)
    with pytest.raises(OSError, match="No space left"), open_run({"run_name": "trial", "seed": 1}):
        pytest.fail("opened")
    assert read_parameters(runs / "trial")["seed"] == 0
    assert list((runs / "older").iterdir()) == []


def test_run_cannot_start_from_the_run_that_it_replaces_or_from_latest(trained):
    name = trained("first").name
    replaced = pytest.raises(
        ValueError, match=f"init_from: found '{name}', the run that the new run .* replace"
    )
    with replaced, open_run({"run_name": name, "init_from": name}):
        pytest.fail("opened")
    latest = pytest.raises(ValueError, match="init_from: found 'latest', expected the name of a run")
    with latest, open_run({"run_name": "other", "init_from": "latest"}):
        pytest.fail("opened")
    with open_run({"run_name": "other", "init_from": name}) as run:
        assert read_parameters(run)["init_from_digest"]


def test_hidden_files_beside_evaluations_are_ignored(runs):
    """macOS writes them on disks of other systems."""
    with open_run({"run_name": "trial"}) as run:
        (run / "evaluation").mkdir()
        (run / "evaluation" / "._valid.json").write_bytes(b"\x00\x05")
        assert run_state(run).evaluated == ()
        assert write_report(run).exists()


def test_find_run_by_name_by_path_or_latest(trained, tmp_path):
    with pytest.raises(
        ValueError, match=r"run: found 'latest', trained runs in .*: none. Make one with `papermill train"
    ):
        find_run("latest")
    first, second = trained("first"), trained("second")
    assert find_run("latest") == second
    assert find_run("first") == find_run(str(first)) == first
    with pytest.raises(
        ValueError, match=r"run: found 'third', trained runs in .*: first, second. Make one with"
    ):
        find_run("third")
    trained("second")  # the previous run is now in older/, which is not searched
    assert find_run("latest") == second


def test_evaluation_is_written_to_report_scores_and_counts(trained):
    run = trained("a", scene=("u", "v"))
    report = (run / "report.md").read_text()
    assert "## Evaluation on split test" in report
    assert (
        "2 images of synthetic, at their own size: mIoU 0.9583 over 12 classes (no interval: too few scenes, 2)."
        in report
    )
    assert ["miou", "0.9583", "0.9583"] in table_rows(report)
    assert "averaged" not in report
    assert ["bed", "2", "0.108", "0.750", "-", "-", "0.750", "1.000"] in table_rows(report)
    scores = json.loads((run / "evaluation" / "test.json").read_text(), parse_constant=pytest.fail)
    assert scores["images"] == 2
    assert scores["tta"] == "flip"
    assert scores["data"] == "synthetic"
    assert scores["plain"]["miou"] == scores["augmented"]["miou"] == pytest.approx(23 / 24)
    assert scores["classes"]["window"]["IoU"] is None
    assert scores["depth"]["rmse_m"] == 0.5
    saved = read_counts(run / "evaluation" / "test.npz")
    np.testing.assert_array_equal(saved.counts, counts())
    assert list(saved.scene) == ["u", "v"]
    assert list(saved.names) == ["a", "b"]
    assert saved.classes == NYUV2_13


def test_unlabelled_split_is_evaluated_without_scores(trained):
    run = trained("a", evaluated=False)
    facts = {"data": "nyu", "images": 2, "labelled": False, "tta": "flip", "working_size": [2, 3]}
    write_evaluation(run, "test", facts, {})
    assert (
        "2 images of nyu, at their own size, predicted with tta flip; their labels are held back."
        in (run / "report.md").read_text()
    )
    assert run_state(run).evaluated == ("test",)
    assert not (run / "evaluation" / "test.npz").exists()


def test_saved_counts_include_the_class_names(trained):
    run = trained("a", matrices=np.ones((2, 3, 3), np.int64), classes=("x", "y", "z"))
    assert read_counts(run / "evaluation" / "test.npz").classes == ("x", "y", "z")
    assert "| z " in (run / "report.md").read_text()


def test_new_best_epoch_deletes_the_previous_evaluation(trained):
    run = trained("a")
    write_scores(run, history(2)[1], evaluation(counts()))
    assert run_state(run).evaluated == ()
    assert read_scores(run)["best_epoch"] == 2


@pytest.mark.parametrize(("checkpoint", "said"), [("best", "is the best"), ("last", "is the last")])
def test_summary_states_which_epoch_is_kept(trained, checkpoint, said):
    run = trained("a", checkpoint=checkpoint)
    assert summarise(run).startswith(
        f"Epoch 3 of 3 {said}: validation **mIoU 0.958** (chance level 0.043) over 12 of 13 classes (window has no pixel), "
        "and"
    )

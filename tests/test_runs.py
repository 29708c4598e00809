import numpy as np
import pandas as pd
import pytest
from conftest import counts, history
from filelock import FileLock

from lib.runs import (
    find_run,
    is_evaluated,
    is_trained,
    read_scores,
    runs_folder,
    start_run,
    summarise,
    wait_for_run,
    write_history,
    write_report,
    write_scores,
    write_submission,
)


def test_runs_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    assert runs_folder() == tmp_path
    monkeypatch.delenv("RUNS_DIR")
    assert runs_folder().name == "runs"
    assert (runs_folder().parent / "lib" / "runs.py").exists()


def test_an_older_run_of_the_name_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    for seed in range(3):
        run = start_run("trial", {"seed": seed})
        assert run == tmp_path / "trial"
        assert f'"seed": {seed}' in (run / "parameters.json").read_text()
    kept = [path for path in tmp_path.iterdir() if path != run and path.name != ".trial.lock"]
    assert len(kept) == 2
    assert all(path.name.startswith("trial.20") for path in kept)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a:b"])
def test_names_that_are_no_folder(name):
    with pytest.raises(ValueError, match="run_name: found .* expected a plain folder name"):
        start_run(name, {})


def test_report(tmp_path):
    rows = history(12)
    write_history(tmp_path, rows)
    (tmp_path / "parameters.json").write_text('{"encoder": "resnet18"}')
    write_scores(tmp_path, rows[6], np.array(["a", "b"]), counts())
    report = write_report(tmp_path).read_text()
    assert "| encoder | resnet18 |" in report
    assert "| best epoch | 7 |" in report
    assert "| mIoU | 0.9583 over 12 of 13 classes |" in report  # bed and books at 0.75, ten at 1
    assert "| pixel accuracy | 0.9730 |" in report
    assert "| loss | 0.4286 |" in report
    assert "| bed | 0.750 |" in report
    assert "| window | - |" in report
    progression = report[report.index("## Training progression") :].splitlines()[4:]
    assert [line.split("|")[1].strip() for line in progression if line] == ["1", "5", "**7**", "10", "12"]
    assert read_scores(tmp_path)["class_iou"]["floor"] == 1
    assert "Learned best: ceiling (1.00)" in summarise(tmp_path)
    assert "bed (0.75)" in summarise(tmp_path).split("Learned least")[1]


def test_report_without_validation(tmp_path):
    rows = [row | dict.fromkeys(("valid_loss", "valid_miou", "valid_pixel_acc"), np.nan) for row in history(2)]
    write_history(tmp_path, rows)
    (tmp_path / "parameters.json").write_text("{}")
    write_scores(tmp_path, rows[1], np.array([]), np.zeros((0, 13, 13)))
    report = write_report(tmp_path).read_text()
    assert "nothing validates in this split" in report
    assert "2 (the last" in report
    assert "Per-class" not in report
    assert pd.read_csv(tmp_path / "history.csv").valid_miou.isna().all()


def test_find_run(trained, tmp_path):
    with pytest.raises(
        ValueError, match=r"run: found 'latest', trained runs in .*: none. Make one with `papermill train"
    ):
        find_run("latest")
    first, second = trained("first"), trained("second")
    assert find_run("latest") == second
    assert find_run("first") == find_run(str(first)) == first
    with pytest.raises(ValueError, match=r"run: found 'third', trained runs in .*: first, second. Make one with"):
        find_run("third")


def test_evaluation_completes_the_report(trained):
    report = (trained("a") / "report.md").read_text()
    assert "## Evaluation on part test" in report
    assert "2 images of synthetic, scored at their own 4x6 pixels; the network works at 2x3." in report
    assert "| miou | 0.9583 | 0.9583 |" in report
    assert "| bed | 0.100 | 0.500 |" in report


def test_submission(tmp_path):
    predicted = np.zeros((2, 4, 6), np.uint8)
    path = write_submission(tmp_path, "test", np.array(["a", "b"]), predicted)
    assert path.name == "submission.npy"
    np.testing.assert_array_equal(np.load(path), predicted)
    for wrong in (predicted[:1], predicted.astype(int), predicted + np.uint8(13), predicted[0]):
        with pytest.raises(ValueError, match="submission: found .*, expected uint8 "):
            write_submission(tmp_path, "test", np.array(["a", "b"]), wrong)
    with pytest.raises(ValueError, match="submission: found names out of order, expected them sorted"):
        write_submission(tmp_path, "test", np.array(["b", "a"]), predicted)


def test_a_run_is_waited_for(tmp_path):
    lock = FileLock(tmp_path / ".taken.lock")
    with lock, pytest.raises(RuntimeError, match="run_name: 'taken' is being trained by another process"):
        wait_for_run(tmp_path / "taken", seconds=0.1)
    wait_for_run(tmp_path / "taken", seconds=0)
    with lock.acquire(timeout=0):  # and it was let go
        pass


def test_what_there_is_of_a_run(trained):
    run = trained("a", evaluated=False)
    assert not is_trained(run, 3)  # no report yet
    write_report(run)
    assert is_trained(run, 3)
    assert not is_trained(run, 4)
    assert not is_evaluated(run, "test")
    write_submission(run, "test", np.array(["a"]), np.zeros((1, 2, 2), np.uint8))
    assert is_evaluated(run, "test")
    assert not is_evaluated(run, "valid")
    assert is_evaluated(trained("b"), "test")

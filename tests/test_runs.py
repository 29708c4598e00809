import numpy as np
import pandas as pd
import pytest

from lib.runs import read_scores, runs_folder, start_run, summarise, write_history, write_report, write_scores


def history(count):
    return [
        {"epoch": epoch, "train_loss": 2 / epoch, "valid_loss": 3 / epoch, "valid_miou": 0.1, "valid_pixel_acc": 0.5}
        for epoch in range(1, count + 1)
    ]


def counts():
    each = np.zeros((2, 13, 13), np.int64)
    each[:, np.arange(12), np.arange(12)] = 6
    each[:, 0, 1] = 2  # bed taken for books; window never occurs
    return each


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

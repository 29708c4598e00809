import os

import numpy as np
import pandas as pd
import pytest

from lib.data import CLASS_NAMES
from lib.metrics import all_scores
from lib.runs import (
    class_tables,
    describe_published,
    describe_selection,
    evaluated_runs,
    find_run,
    read_published,
    read_scores,
    runs_folder,
    scores_by_recipe,
    start_run,
    summarise,
    write_evaluation,
    write_history,
    write_report,
    write_scores,
    write_submission,
)


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


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A function that makes the folder of a trained and, if wanted, evaluated run."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))

    def make(name, evaluated=True, names=("a", "b"), matrices=None, data="synthetic", **parameters):
        run = start_run(name, {"seed": 0, "run_name": name} | parameters)
        (run / "best.pt").touch()
        os.utime(run / "best.pt", (len(list(tmp_path.iterdir())),) * 2)
        write_history(run, history(3))
        write_scores(run, history(3)[2], np.array(["a", "b"]), counts())
        if evaluated:
            matrices = counts() if matrices is None else matrices
            classes = {name: {"support": 0.1, "IoU": 0.5} for name in CLASS_NAMES}
            scores = {"data": data, "images": 2, "label_size": [4, 6], "working_size": [2, 3], "tta": "flip"}
            scores |= {"plain": all_scores(matrices), "augmented": all_scores(matrices), "classes": classes}
            write_evaluation(run, "test", np.array(names), matrices, scores)
        return run

    return make


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


def test_all_means_the_runs_of_one_data_set(trained):
    trained("a")
    trained("b", data="/nyu")
    trained("c", evaluated=False)
    trained("d", data="/nyu")
    assert [run.name for run in evaluated_runs("all", "test", "synthetic")] == ["a"]
    assert [run.name for run in evaluated_runs("all", "test", "/nyu")] == ["b", "d"]
    for name, time in (("a", 9), ("b", 1), ("d", 2)):
        os.utime(runs_folder() / name / "evaluation" / "test.json", (time, time))
    assert [run.name for run in evaluated_runs("all", "test")] == ["a"]
    assert [run.name for run in evaluated_runs("d, a", "test")] == ["d", "a"]
    assert evaluated_runs("all", "valid") == []
    with pytest.raises(ValueError, match="part: found 'valdi', expected one of train, valid, test"):
        evaluated_runs("all", "valdi")


def test_all_leaves_out_what_was_set_aside(trained):
    first = trained("a")
    trained("a")
    assert first.exists()
    assert len(list(first.parent.glob("a.2*"))) == 1
    assert [run.name for run in evaluated_runs("all", "test")] == ["a"]


def test_runs_that_cannot_be_compared(trained):
    other_truth = counts()
    other_truth[1, 3, 3] += 1
    trained("a")
    trained("images", names=("a", "c"))
    trained("order", names=("b", "a"))
    trained("labels", matrices=other_truth)
    trained("classes", matrices=np.ones((2, 4, 4), int))
    trained("raw", evaluated=False)
    problems = {
        "images": "'a' and 'images' can't be compared on part 'test': 2 and 2 images, 2 of them in one only, such as b; ",
        "order": "'a' and 'order' can't be compared on part 'test': 2 and 2 images, 0 of them in one only, in another order; ",
        "labels": "'a' and 'labels' can't be compared on part 'test': the labels of 1 of 2 images differ, such as those of b; ",
        "classes": "'a' and 'classes' can't be compared on part 'test': 13 and 4 classes; ",
    }
    for name, problem in problems.items():
        with pytest.raises(ValueError) as error:
            evaluated_runs(f"a, {name}", "test")
        assert str(error.value) == f"runs: {problem}evaluate both on the same data and part"
    with pytest.raises(
        ValueError, match=r"'raw' is not evaluated on part 'test'; run `papermill evaluate.ipynb .* -p run raw"
    ):
        evaluated_runs("a, raw", "test")


def test_recipes_are_runs_that_differ_in_the_seed_alone(trained):
    for name, seed, weight in (("ce0", 0, 0), ("iou0", 0, 0.5), ("ce1", 1, 0), ("iou2", 2, 0.5)):
        trained(name, seed=seed, soft_iou_weight=weight, workers=seed)
    table = scores_by_recipe(evaluated_runs("all", "test"), "iou0")
    assert list(table.columns) == ["iou0", "ce0"]
    assert list(table.index) == [0, 1, 2]
    assert table["ce0"].notna().tolist() == [True, True, False]
    trained("again", seed=1, soft_iou_weight=0.0, soft_iou_pooling="image")
    table = scores_by_recipe(evaluated_runs("all", "test"), "ce0")
    assert list(table.columns) == ["ce0", "iou0"]


def test_published_figures():
    table = read_published("experiments", "exp061, exp060")
    assert table.valid_miou.tolist() == [0.6204, 0.6228]
    by_class = read_published("class_iou", "exp061")
    assert list(by_class.columns) == list(CLASS_NAMES)
    assert by_class.mean(axis=1).iloc[0] == pytest.approx(0.6204, abs=0.001)
    with pytest.raises(ValueError, match="published: found exp099, there are: exp000, "):
        read_published("experiments", "exp061, exp099")
    text = describe_published("exp060, exp061")
    assert text.startswith("exp061 minus exp060: validation mIoU -0.0024, test -0.0029. ")
    assert "it can't be concluded" in text
    assert "it can't be concluded" in describe_published("")


def test_published_figures_stand_beside_nyuv2_only(trained):
    trained("a")
    trained("b", data="/nyu")
    synthetic, nyu = (class_tables(evaluated_runs(name, "test"), "exp061") for name in ("a", "b"))
    assert [list(table.columns) for table in synthetic.values()] == [["a"], ["exp061 (published)"]]
    assert [list(table.columns) for table in nyu.values()] == [["b", "exp061 (published)"]]
    assert "published figures are of NYUv2's validation images" in next(iter(nyu))


def test_one_run_is_told_how_to_make_another(trained):
    trained("a")
    text = describe_selection(evaluated_runs("all", "test"), "test")
    assert "there is only a." in text
    assert "papermill train.ipynb ce.out.ipynb -p run_name ce" in text
    assert "there is none" in describe_selection([], "test")


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

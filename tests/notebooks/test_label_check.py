import numpy as np
import pytest
from conftest import history
from small_run import train

from figures import draw
from lib.data import Samples, load_samples
from lib.evaluation import Predicted, predict
from lib.model import load_model
from lib.notebooks.label_check import check_labels, find_folds, open_checked, plot_regions, rank_regions
from lib.runs import open_run, write_history

CLASSES = ("wall", "floor", "tv")


def predicted(label, prediction, confidence=0.9):
    """One batch of `(N, H, W)` labels with the predictions of a network."""
    label = np.asarray(label, np.uint8)
    names = np.array([f"{number:03d}" for number in range(len(label))])
    samples = Samples(names, np.zeros((*label.shape, 3), np.uint8), label=label, classes=CLASSES)
    sure = np.broadcast_to(np.float32(confidence), label.shape)
    return Predicted(samples, np.asarray(prediction, np.uint8), sure)


def test_a_region_is_listed_with_its_box_and_confidence():
    label = np.zeros((2, 20, 20), np.uint8)
    label[0, 5:10, 8:12] = 2  # predicted as floor
    label[1, 15:, :] = 1  # correct
    label[1, 0, 0] = 1  # wrong, but too small to be listed
    prediction = label.copy()
    prediction[0, 5:10, 8:12] = 1
    prediction[0, 5, 8:12] = 2  # a fifth of the region is correct
    prediction[1, 0, 0] = 2
    (row,) = rank_regions([predicted(label, prediction)], CLASSES).to_dict("records")
    assert row == {
        "image": "000", "left": 8, "top": 5, "right": 12, "bottom": 10,
        "labelled": "tv", "predicted": "floor", "confidence": pytest.approx(0.8 * 0.9),
    }  # fmt: skip


def test_surprising_confusions_rank_before_usual_ones():
    """Every tv is predicted as wall, but only one of many floors is."""
    label = np.zeros((12, 20, 20), np.uint8)
    label[:, :5, :5] = 2
    label[:, 15:, :5] = 1
    prediction = label.copy()
    prediction[:, :5, :5] = 0
    prediction[7, 15:, :5] = 0
    ranked = rank_regions([predicted(label, prediction)], CLASSES)
    assert len(ranked) == 13
    assert ranked.iloc[0][["image", "labelled", "predicted"]].tolist() == ["007", "floor", "wall"]


def test_large_and_confident_regions_come_first():
    label = np.zeros((4, 20, 20), np.uint8)
    label[0, :5, :5] = label[1, :5, :10] = label[2, :5, :5] = 1
    prediction = np.zeros_like(label)
    label[3] = prediction[3] = 1
    sure = np.full(label.shape, 0.9, np.float32)
    sure[2] = 0.5
    batches = [predicted(label, prediction, sure)]
    assert rank_regions(batches, CLASSES).image.tolist() == ["001", "000", "002"]


def test_unlabelled_images_give_an_empty_table_and_no_figure():
    unlabelled = np.full((1, 8, 8), 255, np.uint8)
    ranked = rank_regions([predicted(unlabelled, np.zeros_like(unlabelled))], CLASSES)
    assert ranked.empty
    assert plot_regions(ranked, None) is None


@pytest.fixture(scope="module")
def folds():
    """Names of five runs, one for each fold of 40 synthetic images."""
    runs = {}
    for fold in range(5):
        name = f"labels_{fold}"
        splits = [
            load_samples("synthetic", side, "blocks", limit=40, fold=fold) for side in ("train", "valid")
        ]
        train(
            name, splits[0], held_out=2, epochs=1, data="synthetic", validation="blocks", limit=40, fold=fold
        )
        runs[fold] = name
    return runs


def confidences(batches):
    """The name of each image and its confidence by pixel."""
    return [each for batch in batches for each in zip(batch.samples.names, batch.confidence, strict=True)]


@pytest.fixture
def checked(monkeypatch):
    """Filled by `check_labels` with the `confidences` of its predictions."""
    found = []
    monkeypatch.setattr(
        "lib.notebooks.label_check.rank_regions",
        lambda predictions, classes: found.extend(confidences(predictions)),
    )
    return found


def test_five_folds_check_every_image_once_with_the_network_that_validates_on_it(folds, checked):
    from lib.runs import runs_folder

    run = runs_folder() / folds[3]
    found = find_folds(run)
    assert [path.name for path in found] == list(folds.values())
    everything = open_checked(found)
    assert len(everything) == 40
    check_labels(found, device="cpu")
    assert sorted(name for name, _ in checked) == everything.names.tolist()
    for fold, name in folds.items():
        valid = load_samples("synthetic", "valid", "blocks", limit=40, fold=fold)
        expected = predict(load_model(runs_folder() / name / "best.pt"), valid, confidence=True)
        for image, confidence in confidences(expected):
            np.testing.assert_allclose(dict(checked)[image], confidence, rtol=1e-5)


def test_run_is_checked_on_its_recorded_validation_images(folds, checked, monkeypatch):
    """Validation images selected anew could include images that the run was trained on."""
    from lib.runs import runs_folder

    run = runs_folder() / folds[0]
    samples = load_samples("synthetic", "train", "none", limit=40)
    every = samples.names.tolist()
    own = {"train": every[3:], "valid": every[:3], "validation": "blocks"}
    monkeypatch.setattr("lib.runs.scoring.read_images", lambda run: own)
    assert open_checked([run]).names.tolist() == every[:3]
    check_labels([run], device="cpu")
    assert [name for name, _ in checked] == every[:3]
    expected = predict(load_model(run / "best.pt"), samples[:3], confidence=True)
    for (_, found), (_, confidence) in zip(checked, confidences(expected), strict=True):
        np.testing.assert_allclose(found, confidence, rtol=1e-5)


@pytest.mark.parametrize(("chosen", "count"), [("blocks", 5), ("predefined", 1), ("random", 1)])
def test_folds_are_pooled_only_if_the_chosen_validation_has_folds(folds, monkeypatch, chosen, count):
    """`auto` may have chosen a method that validates every run on the same images."""
    from lib.runs import runs_folder

    monkeypatch.setattr("lib.notebooks.label_check.read_images", lambda run: {"validation": chosen})
    assert len(find_folds(runs_folder() / folds[0])) == count


def write_run(name, fold, done=2):
    """The folder of a run of two epochs, without weights."""
    parameters = {"run_name": name, "seed": 0, "fold": fold, "epochs": 2, "validation": "blocks"}
    with open_run(parameters) as run:
        (run / "best.pt").touch()
        (run / "report.md").touch()
        write_history(run, history(done))
    return run


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Folders of five finished runs, one for each fold."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    return [write_run(f"fold_{fold}", fold) for fold in range(5)]


def test_unfinished_runs_are_no_folds(written):
    assert find_folds(written[0]) == written
    unfinished = write_run("fold_4", 4, done=1)
    assert find_folds(written[0]) == [written[0]]
    assert find_folds(unfinished) == [unfinished]
    other = write_run("another_4", 4)
    assert find_folds(written[0]) == [*written[:4], other]
    assert find_folds(unfinished) == [unfinished]


def test_run_itself_takes_its_fold(written):
    twins = [write_run(f"{place}_fold", 2) for place in "az"]  # listed before and after fold_2
    for run in (written[2], *twins):
        assert find_folds(run) == [*written[:2], run, *written[3:]]


@pytest.mark.parametrize(
    "parameters",
    [None, "{}", '{"seed": 0, "epochs": 2, "validation": "blocks"}', '{"fold": 1, "epochs": 2, "data": "x"}'],
)
def test_other_folders_among_the_runs_are_skipped(written, parameters):
    foreign = written[0].parent / "foreign"
    foreign.mkdir()
    (foreign / "best.pt").touch()
    if parameters:
        (foreign / "parameters.json").write_text(parameters)
    assert find_folds(written[0]) == written


def test_run_without_other_folds_checks_its_validation_images(folds):
    from lib.runs import runs_folder

    other = runs_folder() / "labels_other"
    train("labels_other", load_samples("synthetic", "train", "blocks", limit=40), epochs=1, seed=5,
          data="synthetic", validation="blocks", limit=40, fold=4)  # fmt: skip
    assert find_folds(other) == [other]
    split = open_checked([other])
    assert split.names.tolist() == load_samples("synthetic", "valid", "blocks", limit=40).names.tolist()
    ranked = check_labels([other], device="cpu")
    assert set(ranked.image) <= set(split.names)
    regions = ranked.head(2)
    titles = [f"{at + 1}: {row.labelled}, predicted {row.predicted}" for at, row in regions.iterrows()]
    assert set(titles) <= set(draw(plot_regions(regions, split)))

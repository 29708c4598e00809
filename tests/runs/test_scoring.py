import json
import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import write_folder
from PIL import Image
from small_run import PARAMETERS, fit_run, small_samples, train

from lib.classes import NYUV2_13
from lib.data import DataError, iterate_samples, load_samples
from lib.evaluation import evaluate, predict
from lib.files import write_json
from lib.metrics import DEPTH, DISTANCE, REGION, mean_iou, truth_iou
from lib.model import build_model, load_model, save_model
from lib.notebooks.browse import plot_predictions
from lib.notebooks.error_analysis import count_errors
from lib.runs import open_run, read_counts, read_parameters, run_state, runs_folder
from lib.runs.results import group_recipes, read_scored
from lib.runs.scoring import (
    check_labelled,
    find_or_create_run,
    iterate_split,
    masks_folder,
    read_external,
    read_masks,
    score_run,
)

ENCODER = "tu-test_resnet.r160_in1k"
DATA = {"data": "synthetic", "validation": "auto", "limit": 80, "classes": None, "fold": 4}


@pytest.fixture(scope="module")
def trained_run():
    """The folder of a run trained for two epochs."""
    train("scored", small_samples(), epochs=2, learning_rate=0.01, **DATA)
    return runs_folder() / "scored"


@pytest.fixture
def run(trained_run, monkeypatch, tmp_path):
    """A copy of `trained_run` that a test may score, in its own runs folder."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    copy = shutil.copytree(trained_run, tmp_path / "runs" / "scored")
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    return copy


@pytest.fixture(scope="module")
def scored(trained_run):
    """`trained_run`, scored on its validation images, and the result of `score_run`."""
    return trained_run, score_run(
        trained_run, "valid", iterate_split(read_parameters(trained_run), "valid"), "flip", "cpu"
    )


def on_folder(run, root):
    """Change the parameters as if the run had been trained on a folder."""
    write_json(
        read_parameters(run) | {"data": str(root), "limit": None, "validation": "random"},
        run / "parameters.json",
    )


def open_external(data, predictions, **changes):
    """Return the run folder of external predictions."""
    named = {"run_name": "external", "recipe": "external", "seed": 0, "predictions": str(predictions)}
    return find_or_create_run("latest", str(predictions), DATA | named | {"data": str(data)} | changes)


def test_saved_counts_masks_and_scores_match_evaluate(scored):
    run, facts = scored
    valid = load_samples("synthetic", "valid", limit=80)
    expected = evaluate(load_model(run / "best.pt"), valid)
    with np.load(run / "evaluation" / "valid.npz") as saved:
        assert set(saved) == {"names", "counts", "scene", "classes"}
        np.testing.assert_array_equal(saved["counts"], expected.counts)
        assert list(saved["names"]) == list(valid.names)
        assert list(saved["scene"]) == list(valid.scene)
        assert tuple(saved["classes"]) == NYUV2_13
    masks = sorted((run / "evaluation" / "valid").iterdir())
    assert [path.stem for path in masks] == list(valid.names)
    np.testing.assert_array_equal(read_masks(masks_folder(run, "valid"), valid.names), expected.predicted)
    assert Image.open(masks[0]).mode == "L"
    assert facts["plain"]["miou"] == mean_iou(expected.counts)
    flipped = evaluate(load_model(run / "best.pt"), valid, tta="flip")
    assert facts["augmented"]["miou"] == mean_iou(flipped.counts) != facts["plain"]["miou"]
    for column, evaluation in (("IoU", expected), ("IoU, augmented", flipped)):
        by_class = [facts["classes"][name][column] for name in NYUV2_13]
        np.testing.assert_array_equal(by_class, truth_iou(evaluation.counts))
    difference = mean_iou(flipped.counts) - mean_iou(expected.counts)
    assert facts["gain"]["difference"] == pytest.approx(difference)
    assert facts["images"] == len(valid) == 16
    assert (facts["data"], facts["validation"], facts["tta"], facts["labelled"]) == (
        "synthetic",
        "blocks",
        "flip",
        True,
    )
    assert facts["scenes"] == len(set(valid.scene))


def test_strata_add_up_to_the_counts_of_the_run(scored):
    run, _ = scored
    counted = read_counts(run / "evaluation" / "valid.npz")
    by_scene = [counted.counts[counted.scene == scene].sum(0) for scene in np.unique(counted.scene)]
    strata = read_scored(run, "valid").strata
    assert set(strata) == {DEPTH, DISTANCE, REGION}
    for counts in strata.values():
        np.testing.assert_array_equal(counts.sum(1), by_scene)
        assert (counts.sum((0, 2, 3)) > 0).sum() > 2  # pixels fall into several bins


def test_evaluation_file_is_strictly_valid_json(scored):
    """NaN is not valid JSON, so it becomes null."""

    def refuse(constant):
        raise AssertionError(constant)

    run, facts = scored
    text = (run / "evaluation" / "valid.json").read_text()
    saved = json.loads(text, parse_constant=refuse)
    assert saved["intervals"]["plain"] == list(facts["intervals"]["plain"])
    assert list(saved["classes"]) == list(facts["classes"])
    supports = [row["support"] for row in saved["classes"].values()]
    assert supports == sorted(supports, reverse=True)
    assert sum(supports) == pytest.approx(1)


def test_evaluation_appears_in_report_and_run_state(scored):
    run, facts = scored
    report = (run / "report.md").read_text()
    assert "## Training progression" in report
    assert "## Evaluation on split valid\n\n16 images of synthetic, at their own size: mIoU " in report
    low, high = facts["intervals"]["plain"]
    assert (
        f"over {facts['plain']['averaged_classes']} classes (95 % interval {low:.3f} to {high:.3f} over 8 scenes)."
        in report
    )
    assert run_state(run).evaluated == ("valid",)
    read = read_scored(run, "valid")
    assert read.score == pytest.approx(mean_iou(read.counts))
    assert (read.name, read.data, read.validation, len(read.history)) == ("scored", "synthetic", "blocks", 2)


def test_absent_classes_and_missing_intervals_are_null(run):
    write_json(read_parameters(run) | {"limit": 20}, run / "parameters.json")
    facts = score_run(run, "valid", iterate_split(read_parameters(run), "valid"), "flip", "cpu")
    saved = json.loads((run / "evaluation" / "valid.json").read_text())
    assert facts["scenes"] == 2
    absent = [name for name, row in facts["classes"].items() if np.isnan(row["IoU"])]
    assert 0 < len(absent) < 13
    assert [name for name, row in saved["classes"].items() if row["IoU"] is None] == absent
    assert np.isnan(facts["intervals"]["plain"]).all()
    assert saved["intervals"]["plain"] == saved["gain"]["interval"] == [None, None]
    assert "(no interval: too few scenes, 2)" in (run / "report.md").read_text()


def test_iterate_split_selects_images_by_run_parameters(run):
    def names(split, **parameters):
        write_json(read_parameters(run) | parameters, run / "parameters.json")
        return list(iterate_split(read_parameters(run), split).names)

    for choice in ({"fold": 4}, {"fold": 1}, {"validation": "random"}, {"validation": "random", "limit": 20}):
        for split in ("train", "valid"):
            expected = iterate_samples("synthetic", split, **{"limit": 80} | choice)
            assert names(split, **choice) == list(expected.names)
    assert len(names("test", limit=20)) == 100  # limit applies only to training and validation images


def test_scoring_another_dataset_with_its_own_classes(run, tmp_path, scenes):
    model = build_model(encoder=ENCODER, classes=("a", "b", "c"), size=(24, 32))
    save_model(model, run / "best.pt")
    three = scenes.map(
        lambda array: (
            np.where(array == 255, 255, array % 3).astype(np.uint8)
            if array.ndim == 3 and array.dtype == np.uint8
            else array
        )
    )
    write_folder(tmp_path / "a", three)
    write_folder(tmp_path / "b", three[:6], "test")
    for name in "ab":
        (tmp_path / name / "dataset.yaml").write_text(yaml.safe_dump({"classes": ["a", "b", "c"]}))
    on_folder(run, tmp_path / "a")
    assert list(iterate_split(read_parameters(run), "valid").classes) == ["a", "b", "c"]
    facts = score_run(
        run, "test", iterate_split(read_parameters(run), "test", str(tmp_path / "b")), "flip", "cpu"
    )
    assert facts["data"] == str(tmp_path / "b")
    assert facts["images"] == 6
    counts = read_counts(run / "evaluation" / "test.npz")
    assert counts.classes == ("a", "b", "c")
    assert counts.counts.shape == (6, 3, 3)
    assert counts.scene is None or len(counts.scene) == 6


def test_submission_is_written_if_labels_are_held_back(run, folder):
    on_folder(run, folder)
    facts = score_run(run, "test", iterate_split(read_parameters(run), "test"), "flip", "cpu")
    test = load_samples(folder, "test")
    expected = evaluate(load_model(run / "best.pt"), test, tta="flip").predicted
    assert (expected != evaluate(load_model(run / "best.pt"), test).predicted).any()
    handed_in = np.load(run / "evaluation" / "submission.npy")
    assert handed_in.dtype == np.uint8
    np.testing.assert_array_equal(handed_in, expected)
    np.testing.assert_array_equal(read_masks(masks_folder(run, "test"), test.names), expected)
    assert not (run / "evaluation" / "test.npz").exists()
    assert not facts["labelled"]
    assert "3 images of " in (run / "report.md").read_text()
    assert "predicted with tta flip; their labels are held back" in (run / "report.md").read_text()
    assert run_state(run).evaluated == ("test",)
    with pytest.raises(
        ValueError,
        match="runs: 'scored' has no score on split 'test', because its labels are held back; compare runs on split",
    ):
        read_scored(run, "test")


def two_sizes(root, scenes, labels):
    write_folder(root, scenes[:3], "test", labels)
    small = scenes[3:5].map(lambda array: array[:, 10:58, 20:84] if array.ndim >= 3 else array)
    write_folder(root, small, "test", labels)
    write_folder(root, scenes[:3])
    return [scenes[:3], small]


def test_images_of_two_sizes_are_scored_at_their_own_size(run, tmp_path, scenes):
    pieces = two_sizes(tmp_path / "data", scenes, True)
    on_folder(run, tmp_path / "data")
    facts = score_run(run, "test", iterate_split(read_parameters(run), "test"), "flip", "cpu")
    model = load_model(run / "best.pt")
    expected = [evaluate(model, piece) for piece in pieces]
    counts = read_counts(run / "evaluation" / "test.npz")
    np.testing.assert_array_equal(counts.counts, np.concatenate([each.counts for each in expected]))
    masks = read_masks(masks_folder(run, "test"), counts.names)
    assert [mask.shape for mask in masks] == [(96, 128)] * 3 + [(48, 64)] * 2
    for mask, predicted in zip(masks, (image for each in expected for image in each.predicted), strict=True):
        np.testing.assert_array_equal(mask, predicted)
    assert facts["images"] == 5


def test_submission_is_not_written_for_images_of_two_sizes(run, tmp_path, scenes):
    two_sizes(tmp_path / "data", scenes, False)
    on_folder(run, tmp_path / "data")
    score_run(run, "test", iterate_split(read_parameters(run), "test"), "flip", "cpu")
    assert len(list(masks_folder(run, "test").iterdir())) == 5
    assert not (run / "evaluation" / "submission.npy").exists()


def test_split_without_images_is_rejected(run):
    write_json(read_parameters(run) | {"validation": "none"}, run / "parameters.json")
    with pytest.raises(
        ValueError,
        match="split: found no image to evaluate; with validation none there are no validation images, use split test",
    ):
        score_run(run, "valid", iterate_split(read_parameters(run), "valid"), "flip", "cpu")


def evaluation_files(run):
    """The files of a run's evaluations with their bytes."""
    folder = run / "evaluation"
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_failed_rescoring_keeps_the_earlier_evaluation(run, monkeypatch):
    pieces = iterate_split(read_parameters(run), "valid")
    score_run(run, "valid", pieces, "none", "cpu")
    earlier = evaluation_files(run)
    with monkeypatch.context() as patch:
        patch.setattr("lib.runs.scoring.predict", fail_after_one_batch)
        with pytest.raises(MemoryError):
            score_run(run, "valid", pieces, "none", "cpu")
    assert {path: earlier[path] for path in earlier} == {
        path: content for path, content in evaluation_files(run).items() if path in earlier
    }
    assert run_state(run).evaluated == ("valid",)
    with pytest.raises(ValueError, match="device: found 'cuda:9'"):
        score_run(run, "valid", pieces, "none", "cuda:9")
    assert read_scored(run, "valid").names.tolist() == pieces.names.tolist()
    score_run(run, "valid", pieces, "none", "cpu")
    assert evaluation_files(run).keys() == earlier.keys()  # nothing unfinished is left


def fail_after_one_batch(*arguments):
    yield next(predict(*arguments))
    raise MemoryError


def test_external_masks_get_the_scores_of_the_run_that_made_them(scored, run):
    made, facts = scored
    folder = open_external("synthetic", made / "evaluation" / "valid")
    assert folder == runs_folder() / "external"
    found = score_run(folder, "valid", iterate_split(read_parameters(folder), "valid"))
    assert found["plain"] == facts["plain"]
    assert found["intervals"]["plain"] == facts["intervals"]["plain"]
    assert "augmented" not in found
    ours, theirs = (vars(read_counts(each / "evaluation" / "valid.npz")) for each in (made, folder))
    assert list(ours) == ["names", "scene", "classes", "counts"]
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    report = (folder / "report.md").read_text()
    assert report.startswith("# external\n\n## Configuration")
    assert (
        f"## Evaluation on split valid\n\n16 images of synthetic, at their own size: mIoU {facts['plain']['miou']:.4f} over"
        in report
    )
    read = read_scored(folder, "valid")
    assert read.history is None
    assert (read.parameters["recipe"], read.parameters["seed"], read.validation) == ("external", 0, "blocks")
    copied = read_masks(masks_folder(folder, "valid"), read.names)
    np.testing.assert_array_equal(copied, read_masks(masks_folder(made, "valid"), read.names))


def test_external_run_is_reopened_if_its_parameters_are_the_same(scored):
    made, _ = scored
    folder = open_external("synthetic", made / "evaluation" / "valid")
    score_run(folder, "valid", iterate_split(read_parameters(folder), "valid"))
    assert open_external("synthetic", made / "evaluation" / "valid") == folder
    assert run_state(folder).evaluated == ("valid",)
    assert not list((runs_folder() / "older").glob("external*"))
    open_external("synthetic", made / "evaluation" / "valid", seed=1)
    assert run_state(folder).evaluated == ()
    assert len(list((runs_folder() / "older").glob("external*"))) == 1


def test_external_masks_become_a_submission_if_labels_are_held_back(run, folder):
    on_folder(run, folder)
    score_run(run, "test", iterate_split(read_parameters(run), "test"), "flip", "cpu")
    external = open_external(folder, masks_folder(run, "test"), validation="random", limit=None)
    score_run(external, "test", iterate_split(read_parameters(external), "test"))
    submissions = [np.load(each / "evaluation" / "submission.npy") for each in (run, external)]
    np.testing.assert_array_equal(*submissions)
    assert "3 images of " in (external / "report.md").read_text()
    assert "their labels are held back" in (external / "report.md").read_text()


def test_missing_predictions_or_data_are_rejected(tmp_path):
    with pytest.raises(
        ValueError, match=r"predictions: found '/nowhere', which is no folder; expected a folder of PNG"
    ):
        open_external("synthetic", "/nowhere")
    with pytest.raises(
        ValueError, match="data: found None, expected the data set whose images were predicted"
    ):
        find_or_create_run("latest", str(tmp_path), DATA | {"data": None})


@pytest.fixture
def masks(tmp_path, folder):
    """Valid masks for the training split: a function that reads them, their folder and the samples."""
    samples = load_samples(folder, "train", "none")
    (tmp_path / "masks").mkdir()
    for name, label in zip(samples.names, samples.label, strict=True):
        Image.fromarray(np.where(label == 255, 0, label)).save(tmp_path / "masks" / f"{name}.png")
    return (
        lambda **options: list(
            read_external(
                tmp_path / "masks", iterate_samples(folder, "train", "none", batch_size=5), **options
            )
        ),
        tmp_path / "masks",
        samples,
    )


@pytest.mark.parametrize("change", ["none", "16 bits", "palette"])
def test_masks_with_8_or_16_bits_or_a_palette_are_read(masks, change):
    read, folder, samples = masks
    for path in folder.iterdir() if change != "none" else []:
        mask = np.asarray(Image.open(path))
        if change == "palette":
            picture = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
            picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        else:
            picture = Image.fromarray(mask.astype(np.uint16))
        picture.save(path)
    labels = np.concatenate([batch.labels for batch in read()])
    np.testing.assert_array_equal(labels, np.where(samples.label == 255, 0, samples.label))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (None, "no such file; predictions need a PNG mask for every image, named like it"),
        (lambda mask: mask[:-1], "found a mask of 95x128, expected 96x128, the size of its image"),
        (lambda mask: mask.T, "found a mask of 128x96, expected 96x128"),
        (lambda mask: np.stack([mask] * 3, -1), "found mode RGB of Pillow, expected one channel of 8 or 16 bits"),
        (lambda mask: mask > 3, "found grey of 1, 2 or 4 bits, expected one channel of 8 or 16 bits"),
        (lambda mask: np.where(mask == mask[0, 0], 255, mask).astype(np.uint8), "found the value 255, expected class indices 0..12 for"),
        (lambda mask: np.where(mask == mask[0, 0], 13, mask).astype(np.uint8), "found the value 13, expected class indices 0..12 for"),
    ],
    ids=["missing", "smaller", "turned", "colour", "1 bit", "unlabelled", "no class"],
)  # fmt: skip
def test_error_names_a_missing_or_invalid_mask(masks, change, problem):
    read, folder, samples = masks
    path = folder / f"{samples.names[7]}.png"
    mask = np.asarray(Image.open(path))
    path.unlink()
    if change is not None:
        Image.fromarray(change(mask)).save(path)
    with pytest.raises(DataError) as error:
        read()
    assert str(error.value).startswith(f"{path}: {problem}")


def test_error_names_a_damaged_mask(masks):
    read, folder, samples = masks
    path = folder / f"{samples.names[7]}.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{path}: can't be decoded .*copy it again"):
        read()


def test_one_image_is_scored_without_an_interval(run, tmp_path, scenes):
    write_folder(tmp_path / "data", scenes[:4])
    write_folder(tmp_path / "data", scenes[:1], "test")
    on_folder(run, tmp_path / "data")
    facts = score_run(run, "test", iterate_split(read_parameters(run), "test"), "flip", "cpu")
    assert 0 < facts["plain"]["miou"] < 1
    assert np.isnan([*facts["intervals"]["plain"], *facts["gain"]["interval"]]).all()
    assert "(no interval: too few images)" in (run / "report.md").read_text()


@pytest.fixture
def without_depth(tmp_path, monkeypatch):
    """A run trained on data without depth, with one subfolder per room; its samples and parameters."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    scenes, root = small_samples(), tmp_path / "data"
    write_folder(root, replace(scenes, names=np.char.add(np.char.add(scenes.scene, "/"), scenes.names)))
    shutil.rmtree(root / "train" / "depth")
    (root / "dataset.yaml").write_text(
        "scene: ^([^/]+)/\nclasses: [" + ", ".join(f"my {name}" for name in NYUV2_13) + "]"
    )
    loaded_with = DATA | {"data": str(root), "limit": None}
    splits = [load_samples(root, split, size=(48, 64)) for split in ("train", "valid")]
    parameters = (
        PARAMETERS | loaded_with | {"run_name": "rgb", "inputs": "rgb", "depth_weight": 0.0, "epochs": 1}
    )
    with open_run(parameters, samples=splits) as run:
        fit_run(run, parameters, *splits)
    return run, splits, parameters


def test_training_and_scoring_work_without_depth(without_depth):
    run, (train, valid), _ = without_depth
    assert valid.depth is None
    assert valid.loaded_with["chosen_validation"] == "scenes"
    pieces = iterate_split(read_parameters(run), "valid")
    facts = score_run(run, "valid", pieces, "flip", "cpu")
    assert facts["images"] == len(valid) > 0
    assert all(np.isnan(value) for value in facts["depth"].values())
    masks = sorted(
        path.relative_to(run / "evaluation" / "valid")
        for path in (run / "evaluation" / "valid").rglob("*.png")
    )
    assert [path.with_suffix("").as_posix() for path in masks] == list(valid.names)
    plot_predictions(pieces[np.arange(2)], read_masks(masks_folder(run, "valid"), valid.names[:2]))
    errors = count_errors(load_model(run / "best.pt"), pieces)
    np.testing.assert_array_equal(errors.confusion, read_scored(run, "valid").counts)
    assert read_scored(run, "valid").classes == train.classes
    (recipes,) = group_recipes([read_scored(run, "valid")]).values()
    assert list(recipes[0].scene) == list(valid.scene)
    external = open_external(read_parameters(run)["data"], masks_folder(run, "valid"), limit=None)
    found = score_run(external, "valid", iterate_split(read_parameters(external), "valid"))
    assert found["plain"]["miou"] == facts["plain"]["miou"]


@pytest.mark.parametrize("change", [{"inputs": "rgbd"}, {"depth_weight": 0.1}])
def test_depth_options_are_rejected_if_data_have_no_depth(without_depth, change):
    _, splits, parameters = without_depth
    parameters = parameters | {"run_name": "deep"} | change
    with pytest.raises(ValueError, match="but these data have no depth; use inputs rgb and depth_weight 0"):
        fit_run(runs_folder() / "deep", parameters, *splits)
    assert not (runs_folder() / "deep").exists()


def shift_masks(folder, by):
    for path in folder.iterdir():
        Image.fromarray(np.asarray(Image.open(path)) + np.uint8(by)).save(path)


LABELS_FROM_1 = f"classes: {list(NYUV2_13)}\nfirst_label: 1\n"


def test_mask_values_labels_reads_masks_with_label_values(folder, masks, capsys):
    """Label values start at 1. The values of all masks are checked before any mask is read."""
    read, place, samples = masks
    for path in (folder / "train" / "label").iterdir():
        label = np.asarray(Image.open(path))
        Image.fromarray(np.where(label == 255, 0, label + 1).astype(np.uint8)).save(path)
    (folder / "dataset.yaml").write_text(LABELS_FROM_1)
    expected = np.where(samples.label == 255, 0, samples.label)
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in read()]), expected)
    shift_masks(place, 1)  # now they contain 1..13, like the labels
    with pytest.raises(
        DataError, match=r"the value 13, .*; all masks fit mask_values labels: pass `-p mask_values labels`"
    ):
        read()
    found = np.concatenate([batch.labels for batch in read(mask_values="labels")])
    np.testing.assert_array_equal(found, expected)
    assert "read as mask_values" not in capsys.readouterr().out


@pytest.mark.parametrize(("mask_values", "other"), [("indices", "labels"), ("labels", "indices")])
def test_ambiguous_mask_values_print_the_chosen_interpretation(folder, masks, capsys, mask_values, other):
    read, place, samples = masks
    for path in (folder / "train" / "label").iterdir():
        label = np.asarray(Image.open(path))
        Image.fromarray(np.where(label == 255, 0, label + 1).astype(np.uint8)).save(path)
    for path in place.iterdir():
        Image.fromarray(np.asarray(Image.open(path)).clip(3, 7)).save(path)
    (folder / "dataset.yaml").write_text(LABELS_FROM_1)
    labels = np.concatenate([batch.labels for batch in read(mask_values=mask_values)])
    expected = np.where(samples.label == 255, 0, samples.label).clip(3, 7) - (mask_values == "labels")
    np.testing.assert_array_equal(labels, expected)
    said = f"The masks were read as mask_values {mask_values}; as {other} they would also be valid, but mean other classes."
    assert said in capsys.readouterr().out


def test_other_files_next_to_the_masks_are_ignored(masks):
    read, place, samples = masks
    (place / f"{samples.names[0]}.txt").write_text("not a mask")
    (place / "notes.txt").write_text("neither")
    assert sum(len(batch.samples) for batch in read()) == 12


def test_mask_names_may_use_decomposed_unicode(masks):
    read, place, _ = masks
    for path in (place.parent / "train").rglob("*.png"):
        path.rename(path.with_name(unicodedata.normalize("NFC", f"é{path.name}")))
    for path in list(place.iterdir()):
        path.rename(path.with_name(unicodedata.normalize("NFD", f"é{path.name}")))
    assert sum(len(batch.samples) for batch in read()) == 12


def own_run(run, root, **loaded):
    """Return a run that recorded its training and validation images, and these samples."""
    parameters = read_parameters(run) | {"data": str(root), "limit": None, "validation": "random"} | loaded
    chosen = {name: parameters[name] for name in ("validation", "limit")}
    splits = [load_samples(root, split, size=(24, 32), **chosen) for split in ("train", "valid")]
    with open_run(
        parameters | {"run_name": "own"},
        samples=[replace(one, loaded_with={"chosen_validation": "random"}) for one in splits],
    ) as folder:
        shutil.copy(run / "best.pt", folder)
    return folder, *splits


def test_images_added_after_training_do_not_change_the_splits(run, folder, scenes, capsys):
    own, train, valid = own_run(run, folder)
    write_folder(folder, replace(scenes[:5], names=np.array([f"00000{at}a" for at in range(5)])))
    drawn = iterate_split(read_parameters(own), "valid")
    assert set(drawn.names) & set(train.names)  # a new draw would contain training images
    for split, samples in (("train", train), ("valid", valid)):
        found = iterate_split(read_parameters(own), split, run=own)
        assert list(found.names) == list(samples.names)
        assert (found.split, found.validation) == (split, "random")
        assert (
            f"5 images of {folder} were added after own was trained, such as 000000a; the original"
            in capsys.readouterr().out
        )
    facts = score_run(own, "valid", iterate_split(read_parameters(own), "valid", run=own), "none", "cpu")
    assert facts["images"] == len(valid)
    assert set(read_counts(own / "evaluation" / "valid.npz").names) == set(valid.names)


def test_error_names_missing_images_of_a_split(run, folder, scenes):
    own, _, valid = own_run(run, folder)
    for kind in ("image", "depth", "label"):
        (folder / "train" / kind / f"{valid.names[0]}.png").unlink()
    with pytest.raises(
        DataError,
        match=f"1 of the 3 images of split 'valid' of the run 'own' are missing, the first is '{valid.names[0]}'",
    ):
        iterate_split(read_parameters(own), "valid", run=own)
    assert len(iterate_split(read_parameters(own), "train", run=own)) == 9


def test_recorded_images_are_used_only_for_data_of_the_same_name(run, folder, scenes, tmp_path, capsys):
    """A copy of the data keeps its name, and so its recorded images; other data are split anew."""
    own, _, valid = own_run(run, folder)
    write_folder(tmp_path / "other", replace(scenes[:10], names=np.array([f"{at:03d}" for at in range(10)])))
    found = iterate_split(read_parameters(own), "valid", str(tmp_path / "other"), run=own)
    assert len(found) == 2
    assert not set(found.names) & set(valid.names)
    assert capsys.readouterr().out == ""
    copied = shutil.copytree(folder, tmp_path / "copies" / folder.name)
    write_folder(copied, replace(scenes[:5], names=np.array([f"00000{at}a" for at in range(5)])))
    found = iterate_split(read_parameters(own), "valid", str(copied), run=own)
    assert list(found.names) == list(valid.names)
    assert f"5 images of {copied} were added" in capsys.readouterr().out


def test_evaluating_other_data_deletes_the_earlier_evaluation(run, folder, scenes, tmp_path):
    on_folder(run, folder)
    score_run(run, "test", iterate_split(read_parameters(run), "test"), "none", "cpu")
    assert (run / "evaluation" / "submission.npy").exists()
    write_folder(tmp_path / "b", replace(scenes[:2], names=np.array(["x", "y"])), "test")
    facts = score_run(
        run, "test", iterate_split(read_parameters(run), "test", str(tmp_path / "b")), "none", "cpu"
    )
    assert facts["labelled"]
    assert sorted(path.name for path in masks_folder(run, "test").iterdir()) == ["x.png", "y.png"]
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["test", "test.json", "test.npz"]


def test_labels_that_are_all_255_count_as_held_back(run, folder, scenes):
    """As for the test images of Cityscapes, a submission is written."""
    write_folder(folder, replace(scenes[:3], label=np.full_like(scenes.label[:3], 255)), "test")
    on_folder(run, folder)
    facts = score_run(run, "test", iterate_split(read_parameters(run), "test"), "none", "cpu")
    assert not facts["labelled"]
    assert len(np.load(run / "evaluation" / "submission.npy")) == 3
    with pytest.raises(
        ValueError, match="split: the labels of split 'test' of .* are held back, so runs can't be"
    ):
        check_labelled(read_parameters(run), "test")
    check_labelled(read_parameters(run), "valid")
    label = np.full_like(scenes.label[:3], 255)
    label[2, 0, 0] = 1  # a single pixel
    write_folder(folder, replace(scenes[:3], label=label), "test")
    (folder / "dataset.yaml").write_text("ignore: [255]")
    check_labelled(read_parameters(run), "test")


@pytest.mark.parametrize("name", ["a" * 201, "ü" * 101])
def test_overlong_run_names_are_rejected(name):
    with pytest.raises(
        ValueError, match="run_name: found .* expected a plain folder name such as 'exp061' of at most 200"
    ):
        open_run({"run_name": name}).__enter__()
    with open_run({"run_name": name[:100]}) as folder:
        assert folder.is_dir()


def test_run_of_an_older_version_is_rejected():
    """Ignoring its old parameter `split` would select other validation images."""
    with pytest.raises(ValueError, match="run 'mine' was trained before parameters were renamed"):
        iterate_split({"run_name": "mine", "data": "synthetic", "split": "random", "fold": 4}, "valid")

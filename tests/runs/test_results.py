import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scored_runs import CLASSES, DEFAULTS, names_of, scored_folder, scored_run, some_counts

from lib.classes import NYUV2_13
from lib.files import read_json, write_json
from lib.metrics import mean_iou
from lib.runs.results import (
    COUNTS_FILE,
    RUNS_FILE,
    group_recipes,
    identity,
    read_results,
    read_runs,
    read_scored,
    recipe,
    select_runs,
    without_fold,
    write_results,
)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty runs folder; the committed example has no runs either."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr("lib.runs.results.EXAMPLE", tmp_path / "example")
    write_results(tmp_path / "example", [])
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def found(runs, split="valid", data=None, where=None):
    return [run.name for run in read_runs(runs, split, data, where)]


def grouped(runs="all", baseline=None):
    return named(group_recipes(read_runs(runs, "valid"), baseline))


def named(recipes):
    return {name: [run.name for run in members] for name, members in recipes.items()}


def refused(runs, baseline=None, **options):
    with pytest.raises(ValueError) as error:
        group_recipes(read_runs(runs, "valid", **options), baseline)
    return str(error.value)


def assert_equal_runs(first, second):
    """Assert that everything that a comparison of runs reads is equal."""
    for array in ("names", "counts", "scene"):
        np.testing.assert_array_equal(getattr(first, array), getattr(second, array))
    facts = ("name", "group", "split", "validation", "classes", "commit", "tree_unchanged", "processor")
    assert {fact: getattr(first, fact) for fact in facts} == {fact: getattr(second, fact) for fact in facts}
    if first.history is None:
        assert second.history is None
    else:
        pd.testing.assert_frame_equal(first.history, second.history)


# one run


def test_read_scored_reads_a_run_without_weights(home):
    counts = some_counts(0.6)
    run = scored_folder(home, "a", counts, seed=3, commit="abc", tree_unchanged=False, processor="a CPU")
    assert not (run / "best.pt").exists()
    read = read_scored(run, "valid")
    np.testing.assert_array_equal(read.counts, counts)
    assert read.score == mean_iou(counts)
    assert list(read.names) == names_of(24)
    assert list(read.scene[:4]) == ["room 0"] * 3 + ["room 1"]
    assert (read.name, read.group, read.split, read.classes) == ("a", None, "valid", CLASSES)
    assert (read.data, read.validation) == ("/disk/nyu", "blocks")
    assert read.parameters == DEFAULTS | {"run_name": "a", "seed": 3}  # recorded facts are not parameters
    assert (read.commit, read.tree_unchanged, read.processor) == ("abc", False, "a CPU")
    assert read.history.epoch.tolist() == [1, 2, 3]
    assert not read.is_pooled


def test_error_for_unscored_run_gives_the_command(home):
    scored_folder(home, "a", split="test")
    scored_folder(home, "b")
    command = "run `papermill evaluate.ipynb evaluate.out.ipynb -p run a -p split valid`"
    assert refused("a") == f"runs: 'a' is not evaluated on split 'valid'; {command}"
    (home / "b" / "evaluation" / "valid.json").unlink()  # as during rescoring
    assert refused("b").startswith("runs: 'b' is not evaluated on split 'valid'; run `papermill")
    assert found("all") == []


def test_run_with_old_parameter_names_is_skipped_or_rejected(home):
    scored_folder(home, "new")
    older = scored_folder(home, "older", seed=1)
    parameters = read_json(older / "parameters.json")
    parameters["split"] = parameters.pop("validation")
    write_json(parameters, older / "parameters.json")
    facts = read_json(older / "evaluation" / "valid.json")
    facts.pop("validation")
    write_json(facts, older / "evaluation" / "valid.json")
    assert found("all") == ["new"]
    assert refused("new,older").startswith("run 'older' was trained before parameters were renamed")


def test_select_restricts_a_run_to_some_images():
    run = replace(scored_run("a"), image_fold=np.arange(24) % 5)
    some = run.select(run.image_fold == 3)
    assert list(some.names) == [f"{number:06d}" for number in (3, 8, 13, 18, 23)]
    np.testing.assert_array_equal(some.counts, run.counts[3::5])
    assert list(some.scene) == ["room 1", "room 2", "room 4", "room 6", "room 7"]
    assert set(some.image_fold) == {3}
    assert replace(run, scene=None, image_fold=None).select(np.array([2])).scene is None


def test_reading_unsaved_predictions_raises_an_error():
    mask = np.ones((2, 3), np.uint8)
    run = replace(scored_run("a"), masks={"000001": mask})
    np.testing.assert_array_equal(run.read_masks(["000001"]), [mask])
    with pytest.raises(FileNotFoundError, match="000002.png"):
        run.read_masks(["000001", "000002"])
    with pytest.raises(FileNotFoundError, match="000001.png"):
        scored_run("b").read_masks(["000001"])


# the two files of a study


def test_results_survive_a_round_trip(tmp_path):
    masks = {"000000": np.full((2, 3), 2, np.uint8), "000004": np.zeros((4, 3), np.uint8)}
    recorded = {"commit": "0bf463a", "tree_unchanged": True, "processor": "a CPU"}
    runs = [
        replace(scored_run("a", some_counts(0.6), group="arm", seed=1, **recorded), masks=masks),
        scored_run("b", some_counts(0.7), encoder_weights="/disk/lite0.pth", seed=2),
        scored_run("c", some_counts(0.8)[:9], classes=("x", "y", "z"), scene=None, split="test"),
        scored_run("masks", external=external(3), chosen_validation=None),
    ]
    write_results(tmp_path / "new" / "study", runs)
    read = read_results(tmp_path / "new" / "study")
    assert len(read) == 4
    for before, after in zip(runs, read, strict=True):
        assert_equal_runs(before, after)
        assert after.counts.dtype == np.int64
        assert (after.data, after.folder, after.image_fold) == ("nyu", None, None)
    assert {name: mask.tolist() for name, mask in read[0].masks.items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    assert read[1].masks is None
    assert read[1].parameters == DEFAULTS | {"data": "nyu", "encoder_weights": "lite0.pth", "seed": 2}
    assert read[0].parameters["encoder_weights"] is None
    write_results(tmp_path / "again", read)  # writing them again loses nothing
    assert (tmp_path / "again" / RUNS_FILE).read_text() == (
        tmp_path / "new" / "study" / RUNS_FILE
    ).read_text()


def test_identical_image_lists_are_stored_once(tmp_path):
    runs = [scored_run("a"), scored_run("b", some_counts(0.5), seed=1)]
    runs += [scored_run("c", some_counts()[:9]), scored_run("unknown scenes", scene=None)]
    write_results(tmp_path, runs)
    with np.load(tmp_path / COUNTS_FILE) as saved:
        lists = {name.split("/")[0]: saved[name].tolist() for name in saved.files if name.endswith("/names")}
    assert list(lists.values()) == [names_of(24), names_of(9), names_of(24)]
    lines = [json.loads(line) for line in (tmp_path / RUNS_FILE).read_text().splitlines()]
    assert [line["images"] for line in lines] == [list(lists)[at] for at in (0, 0, 1, 2)]
    assert [run.scene is None for run in read_results(tmp_path)] == [False, False, False, True]


def test_results_contain_no_local_paths(tmp_path):
    """Paths of data, weights and predictions are shortened, and the counts file has no paths."""
    weights = {"encoder_weights": "/disk/weights/lite0.pth", "encoder_weights_digest": 64 * "a"}
    masks = external(0) | {"predictions": "/disk/masks"}
    runs = [
        scored_run("a", **weights),
        scored_run("b", data="/disk/nyu/", seed=1),
        scored_run("c", external=masks),
    ]
    write_results(tmp_path, runs)
    assert "/disk" not in (tmp_path / RUNS_FILE).read_text()
    assert b"disk" not in (tmp_path / COUNTS_FILE).read_bytes()
    assert [run.data for run in read_results(tmp_path)] == ["nyu", "nyu", "nyu"]


def test_history_without_validation_is_read_back_as_nan(tmp_path):
    run = scored_run("a")
    write_results(tmp_path, [replace(run, history=run.history.assign(valid_miou=np.nan))])
    json.loads((tmp_path / RUNS_FILE).read_text(), parse_constant=pytest.fail)  # NaN isn't JSON
    (read,) = read_results(tmp_path)
    assert read.history.valid_miou.isna().all()
    assert np.isnan(read.history.valid_miou.max())


def test_results_keep_both_splits_of_a_run(tmp_path):
    runs = [scored_run("a", some_counts(0.6)), scored_run("a", some_counts(0.8)[:9], split="test")]
    write_results(tmp_path, runs)
    for before, after in zip(runs, read_results(tmp_path), strict=True):
        assert_equal_runs(before, after)


def test_runs_with_the_same_name_keep_their_own_counts(tmp_path):
    """Run names are chosen by hand, so two people may both use `demo`."""
    runs = [scored_run("demo", some_counts(0.6)), scored_run("demo", some_counts(0.8), seed=1)]
    write_results(tmp_path, runs)
    for before, after in zip(runs, read_results(tmp_path), strict=True):
        assert_equal_runs(before, after)


def refused_results(folder):
    with pytest.raises(ValueError) as error:
        read_results(folder)
    start = f"{folder}: can't be read as the results of a study ("
    end = "); expected runs.jsonl and counts.npz, as `sweep.ipynb -p results` writes them"
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(end)
    return str(error.value).removeprefix(start).removesuffix(end)


@pytest.mark.parametrize("file", [RUNS_FILE, COUNTS_FILE])
@pytest.mark.parametrize("damage", ["missing", "cut short", "nothing in it", "changed"])
def test_error_names_the_folder_of_damaged_results(tmp_path, file, damage):
    write_results(tmp_path, [scored_run("a"), scored_run("b", seed=1)])
    path = tmp_path / file
    whole = path.read_bytes()
    path.unlink()
    middle = len(whole) // 2
    content = {
        "cut short": whole[:-9],
        "nothing in it": b"",
        "changed": whole[:middle] + bytes(99) + whole[middle + 99 :],
    }
    if damage != "missing":
        path.write_bytes(content[damage])
    if (file, damage) == (RUNS_FILE, "nothing in it"):
        assert read_results(tmp_path) == []  # no runs yet
    else:
        refused_results(tmp_path)


def test_malformed_or_inconsistent_results_are_rejected(tmp_path):
    write_results(tmp_path, [scored_run("a")])
    line = json.loads((tmp_path / RUNS_FILE).read_text())
    (tmp_path / RUNS_FILE).write_text(json.dumps(line | {"counts": "b"}))
    assert "counts/b" in refused_results(tmp_path)
    for other in ({"name": "a"}, line | {"novelty": 1}, []):
        (tmp_path / RUNS_FILE).write_text(json.dumps(other))
        refused_results(tmp_path)


# which runs


def test_runs_are_read_by_name_by_path_and_from_studies(home, tmp_path, monkeypatch):
    for name in ("b", "a"):
        scored_folder(home, name)
    scored_folder(tmp_path / "elsewhere", "c")
    write_results(
        tmp_path / "study", [scored_run("e"), scored_run("d", seed=1), scored_run("f", split="test")]
    )
    assert found("b, a") == found("b,a,") == ["b", "a"]
    assert found(str(home / "a")) == ["a"]
    assert found(f"a, {tmp_path / 'study'}") == ["a", "e", "d"]
    assert found(f"{tmp_path / 'elsewhere' / 'c'},b") == ["c", "b"]
    assert found(str(tmp_path / "study"), "test") == ["f"]
    monkeypatch.chdir(tmp_path)
    assert found("elsewhere/c") == ["c"]
    assert found("study") == ["e", "d"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/elsewhere/c, ~/study") == ["c", "e", "d"]
    with pytest.raises(ValueError, match="split: found 'valdi', expected one of train, valid, test"):
        found("all", "valdi")


def test_studies_are_found_from_any_working_directory(tmp_path, monkeypatch):
    """nbval runs a notebook in its own folder, papermill in the caller's."""
    monkeypatch.chdir(tmp_path)
    assert found("studies/pretrained", "valid")[0] == "nyuv2_pretrained_fold4"


def test_unknown_runs_and_missing_splits_are_rejected(home, tmp_path):
    scored_folder(home, "a")
    scored_folder(tmp_path / "folder of runs", "b")
    write_results(tmp_path / "study", [scored_run("c", split="test"), scored_run("d", split="train", seed=1)])
    for entry in ("e", str(tmp_path / "folder of runs"), "a*"):
        assert refused(f"a, {entry}") == (
            f"runs: found '{entry}', which is neither a run nor a folder with runs.jsonl; runs in {home}: a"
        )
    study = tmp_path / "study"
    assert refused(str(study)) == f"split: found 'valid', the runs of {study} were scored on test, train"


def test_all_reads_runs_scored_on_the_latest_data_set(home):
    scored_folder(home, "a")
    scored_folder(home, "b", data="/other")
    scored_folder(home, "c", split="test")
    scored_folder(home, "d", data="/other")
    scored_folder(home / "older", "e")
    for number, name in enumerate("abd"):
        os.utime(home / name / "evaluation" / "valid.json", (number, number))
    assert found("all") == ["b", "d"]  # the data set of the latest evaluation
    assert found("all", data="/disk/nyu") == ["a"]
    os.utime(home / "a" / "evaluation" / "valid.json", (9, 9))
    assert found("all") == ["a"]
    assert found("all", "test") == ["c"]
    assert found("all", "train") == []


def test_all_adds_the_example_to_fewer_than_two_own_runs(home, tmp_path):
    write_results(tmp_path / "example", [scored_run("x", group="one"), scored_run("y", group="other")])
    assert found("all") == ["x", "y"]
    scored_folder(home, "mine")
    assert found("all") == ["x", "y", "mine"]  # scored on the same images
    assert found("all", data="/disk/nyu") == ["mine"]
    scored_folder(home, "one more")
    assert found("all") == ["mine", "one more"]


def test_all_reads_a_single_run_on_a_split_missing_in_the_example(home, tmp_path):
    write_results(tmp_path / "example", [scored_run("x", group="one"), scored_run("y", group="other")])
    assert found("all", "test") == []
    scored_folder(home, "mine", split="test")
    assert found("all", "test") == ["mine"]


# queries


@pytest.fixture
def several():
    """Three runs that differ in soft_iou_weight and classes; the first has no ema_decay."""
    runs = [
        scored_run(name, soft_iou_weight=weight) for name, weight in zip("abc", (0, 0.5, 1.5), strict=True)
    ]
    named = [replace(run, parameters=run.parameters | {"ema_decay": 0.9}) for run in runs[1:]]
    return [runs[0], named[0], replace(named[1], parameters=named[1].parameters | {"classes": "nyuv2_40"})]


@pytest.mark.parametrize(
    ("where", "matching"),
    [
        ("soft_iou_weight in (0, 0.5)", "ab"),
        ("soft_iou_weight > 0.5", "c"),
        ("soft_iou_weight == 0.5 and classes.isnull()", "b"),
        ("classes == 'nyuv2_40'", "c"),
        ("classes.isnull()", "ab"),
        ("classes != 'nyuv2_40'", "ab"),
        ("ema_decay.notnull()", "bc"),
        ("seed == 0 and limit.isnull()", "abc"),
        ("data.str.contains('nyu')", "abc"),
    ],
)
def test_query_selects_runs_by_parameters(several, where, matching):
    assert [run.name for run in select_runs(several, where)] == list(matching)


def test_read_runs_applies_the_query(home):
    for name, rate in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        scored_folder(home, name, learning_rate=rate)
    assert found("c, a, b", where="learning_rate > 0.15") == ["c", "b"]
    assert found("all", where="learning_rate < 0.15") == ["a"]


@pytest.mark.parametrize(
    "where", ["soft_iou_wieght == 0", "soft_iou_weight ==", "soft_iou_weight = 0", "import os"]
)
def test_error_for_invalid_query_lists_the_parameters(several, where):
    with pytest.raises(ValueError) as error:
        select_runs(several, where)
    assert str(error.value).startswith(f"where: found {where!r}, which can't be evaluated (")
    assert "; expected a query over the parameters run_name, data, validation, " in str(error.value)
    assert str(error.value).endswith('ema_decay, such as "soft_iou_weight in (0, 0.5) and classes.isnull()"')


def test_query_must_be_a_condition(several):
    """A bare parameter name would be interpreted as positions of runs."""
    with pytest.raises(ValueError, match="where: found 'seed'"):
        select_runs(several, "seed")


def test_error_for_query_without_match_lists_the_values(several):
    with pytest.raises(ValueError) as error:
        select_runs(several, "soft_iou_weight == 7")
    assert str(error.value).startswith(
        "where: 'soft_iou_weight == 7' matches none of 3 runs; their parameters: run_name: a, b, c; data: /disk/nyu; "
    )
    assert "; soft_iou_weight: 0, 0.5, 1.5; " in str(error.value)
    assert "; classes: None, nyuv2_40; " in str(error.value)


# recipes


STARTED = {"run_name": "one", "epochs": 3, "learning_rate": 0.001, "seed": 0, "fold": 4, "num_workers": 0,
           "save_figures": False, "encoder_weights": None, "soft_iou_weight": 0.5, "soft_iou_pooling": "batch"}  # fmt: skip


def test_recipe_contains_only_parameters_that_affect_the_result():
    same = [
        {"seed": 5},
        {"fold": 0},
        {"run_name": "two"},
        {"num_workers": 4},
        {"device": "cuda"},
        {"resume": True},
        {"save_figures": True},
        {"commit": "abc", "tree_unchanged": False, "processor": "a CPU"},
        {"epochs": 3.0},  # JSON may distinguish 3 from 3.0
    ]
    assert {recipe(STARTED | change) for change in same} == {recipe(STARTED)}  # recipes are hashable
    other = [
        {"epochs": 4},
        {"learning_rate": 1e-4},
        {"soft_iou_pooling": "image"},
        {"encoder_weights": "imagenet"},
        {"soft_iou_weight": 0},
    ]
    assert len({recipe(STARTED | change) for change in [{}, *other]}) == 1 + len(other)
    without = [
        STARTED | {"soft_iou_weight": weight, "soft_iou_pooling": form}
        for weight in (0, 0.0)
        for form in ("batch", "image")
    ]
    assert len({recipe(each) for each in without}) == 1  # without the loss term, its pooling is irrelevant
    assert recipe({"resume": True, "flag": True}) != recipe({"flag": 1})


def test_identity_is_independent_of_file_locations(tmp_path):
    for folder, content in (("here", 1), ("there", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        torch.save({"weight": torch.full((2,), content)}, tmp_path / folder / "lite0.pth")

    def placed(folder):
        weights = str(tmp_path / folder / "lite0.pth")
        return STARTED | {"data": f"/{folder}/nyu", "encoder_weights": weights}

    run = identity(placed("here"))
    assert run == identity(placed("there") | {"run_name": "two", "device": "cuda"})
    assert run != identity(placed("other"))
    digest = identity(placed("here") | {"encoder_weights_digest": 64 * "a"})  # as recorded by a run
    assert digest == identity(
        STARTED | {"data": "nyu", "encoder_weights": "lite0.pth", "encoder_weights_digest": 64 * "a"}
    )
    assert digest != run
    assert identity(STARTED | {"seed": 1}) != identity(STARTED) != identity(STARTED | {"fold": 0})
    forms = [STARTED | {"soft_iou_weight": 0, "soft_iou_pooling": form} for form in ("batch", "image")]
    assert identity(forms[0]) == identity(forms[1]) != identity(STARTED)


def test_results_preserve_the_identity_of_runs(tmp_path):
    """A sweep finds finished runs in the results by their identity."""
    weights = {"encoder_weights": "/disk/lite0.pth", "encoder_weights_digest": 64 * "a"}
    runs = [scored_run("a", **weights), scored_run("b", seed=1), scored_run("c", fold=0)]
    write_results(tmp_path, runs)
    assert [identity(run.parameters) for run in read_results(tmp_path)] == [
        identity(run.parameters) for run in runs
    ]


def test_runs_that_differ_only_in_seed_form_one_recipe(home):
    for name, seed, weight in (("ce0", 0, 0), ("iou0", 0, 0.5), ("ce1", 1, 0), ("iou2", 2, 0.5)):
        scored_folder(
            home, name, seed=seed, soft_iou_weight=weight, num_workers=seed, data=f"/disk{seed}/nyu"
        )
    assert grouped("ce0, iou0, ce1, iou2") == {
        "soft_iou_weight 0": ["ce0", "ce1"],
        "soft_iou_weight 0.5": ["iou0", "iou2"],
    }


def test_single_runs_and_single_recipes_are_labelled_by_run_name(home):
    scored_folder(home, "alone", learning_rate=0.1)
    assert grouped("alone") == {"alone": ["alone"]}
    scored_folder(home, "s0")
    scored_folder(home, "s1", seed=1)
    assert grouped("s0, s1") == {"s0": ["s0", "s1"]}
    assert grouped("alone, s0, s1") == {"alone": ["alone"], "learning_rate 0.003": ["s0", "s1"]}


def test_irrelevant_parameters_do_not_appear_in_recipe_names():
    """The pooling of soft IoU is irrelevant if its weight is 0."""
    runs = [
        scored_run("a0", soft_iou_weight=0, soft_iou_pooling="image"),
        scored_run("a1", soft_iou_weight=0.0, seed=1),
    ]
    runs += [scored_run("b0"), scored_run("b1", seed=1)]
    assert named(group_recipes(runs)) == {
        "soft_iou_weight 0": ["a0", "a1"],
        "soft_iou_weight 0.5": ["b0", "b1"],
    }


def test_recipes_with_equal_names_get_a_suffix():
    runs = [
        scored_run(
            f"{digest}{seed}", seed=seed, encoder_weights="/w/lite0.pth", encoder_weights_digest=64 * digest
        )
        for digest in "ab"
        for seed in (0, 1)
    ]
    assert list(group_recipes(runs)) == ["encoder_weights lite0.pth", "encoder_weights lite0.pth (b0)"]


def test_same_weights_in_another_folder_are_one_recipe():
    runs = []
    for seed, folder in enumerate(("/here", "/there")):
        weights = {"encoder_weights": f"{folder}/lite0.pth", "encoder_weights_digest": 64 * "a"}
        runs += [scored_run(f"a{seed}", seed=seed, **weights), scored_run(f"none{seed}", seed=seed)]
    assert named(group_recipes(runs)) == {
        "encoder_weights lite0.pth": ["a0", "a1"],
        "encoder_weights None": ["none0", "none1"],
    }


def test_groups_with_the_same_recipe_stay_separate(tmp_path):
    """The arms of an A/A test differ only in their seeds. A third group contains two recipes."""
    arms = {"baseline": (1, 2), "baseline_again": (3, 4)}
    runs = [scored_run(f"r{seed}", seed=seed, group=arm) for arm, seeds in arms.items() for seed in seeds]
    runs += [scored_run(f"w{weight}", soft_iou_weight=weight, group="weights") for weight in (0, 1.5)]
    write_results(tmp_path, runs)
    assert named(group_recipes(read_results(tmp_path))) == {
        "baseline": ["r1", "r2"], "baseline_again": ["r3", "r4"], "w0": ["w0"], "w1.5": ["w1.5"],
    }  # fmt: skip
    assert named(group_recipes([replace(run, group=None) for run in runs[:4]])) == {
        "r1": ["r1", "r2", "r3", "r4"]
    }


def external(seed, recipe="external"):
    """Parameters of external predictions."""
    return {"recipe": recipe, "seed": seed, "predictions": f"/masks/{seed}", "data": "/disk/nyu", "validation": "blocks",
            "limit": None, "classes": None, "fold": 4}  # fmt: skip


def test_external_predictions_are_grouped_by_their_recipe():
    runs = []
    for seed in (0, 1):
        runs += [scored_run(f"masks {seed}", external=external(seed)), scored_run(f"ours {seed}", seed=seed)]
    runs.append(scored_run("others", external=external(0, "another")))
    assert named(group_recipes(runs)) == {
        "external": ["masks 0", "masks 1"], "ours 0": ["ours 0", "ours 1"], "another": ["others"],
    }  # fmt: skip
    fast = [scored_run(f"fast {seed}", learning_rate=0.1, seed=seed) for seed in (0, 1)]
    assert list(group_recipes(runs[:4] + fast)) == ["external", "learning_rate 0.003", "learning_rate 0.1"]


def test_the_baseline_comes_first(home):
    for weight in (0, 0.5):
        for seed in (0, 1):
            scored_folder(home, f"w{weight} s{seed}", soft_iou_weight=weight, seed=seed)
    scored_folder(home, "zero", soft_iou_weight=7.0)
    first = {
        None: "soft_iou_weight 0", "soft_iou_weight 0.5": "soft_iou_weight 0.5", "w0.5 s1": "soft_iou_weight 0.5",
        "zero": "zero", "w0 s1": "soft_iou_weight 0",
    }  # fmt: skip
    for baseline, name in first.items():
        names = list(grouped("all", baseline))
        assert names[0] == name
        assert len(names) == 3
    assert refused("all", "none") == (
        "baseline: found 'none', there are: soft_iou_weight 0, soft_iou_weight 0.5, zero"
    )


def test_error_explains_why_runs_cannot_be_compared():
    other_truth = some_counts()
    other_truth[4, 1, 1] += 1
    a = scored_run("a")
    others = [
        scored_run("images", names=[*names_of(23), "other"], scene=None),
        scored_run("fewer", some_counts()[:20]),
        scored_run("order", names=names_of()[::-1], scene=None),
        scored_run("labels", other_truth),
    ]
    problems = (
        "24 and 24 images, 2 of them in one only, such as 000023",
        "24 and 20 images, 4 of them in one only, such as 000020",
        "24 and 24 images, 0 of them in one only, in another order",
        "the labels of 1 of 24 images differ, such as those of 000004",
    )
    for other, problem in zip(others, problems, strict=True):
        with pytest.raises(ValueError) as error:
            group_recipes([a, other])
        assert str(error.value) == (
            f"runs: 'a' and {other.name!r} can't be compared: {problem}; evaluate both on the same data, split and fold"
        )
    for other, found, expected in (
        (scored_run("names", classes=("floor", "wall", "table")), "'chair' as class 2", "'table' as class 2"),
        (
            scored_run("13", np.ones((24, 13, 13), int), classes=NYUV2_13),
            "3 (the last is 'chair')",
            "13 (the last",
        ),
    ):
        with pytest.raises(ValueError) as error:
            group_recipes([a, other])
        assert str(error.value).startswith(
            f"classes: the run 'a' has {found}, the run {other.name!r} has {expected}"
        )


# folds


def five_folds(recipe, seed=0, folds=range(5), **parameters):
    """Runs of one seed, each scored on the scenes of its fold of `blocks`, and the counts of all images."""
    counts = some_counts(0.7, seed, scenes=15)
    whole = scored_run("whole", counts, seed=seed, **parameters)
    runs = []
    for fold in folds:
        run = whole.select(np.arange(45) // 3 % 5 == fold)
        runs.append(
            replace(run, name=f"{recipe} s{seed} f{fold}", parameters=run.parameters | {"fold": fold})
        )
    return runs, counts


def test_five_folds_of_a_seed_are_pooled_into_one_run(tmp_path):
    folds = {
        (rate, seed): five_folds(f"r{rate}", seed, learning_rate=rate) for rate in (1, 2) for seed in (0, 1)
    }
    write_results(tmp_path, [run for runs, _ in folds.values() for run in runs])
    recipes = group_recipes(read_results(tmp_path))
    assert list(recipes) == ["learning_rate 1", "learning_rate 2"]
    for rate, members in zip((1, 2), recipes.values(), strict=True):
        assert [run.name for run in members] == ["five folds, seed 0", "five folds, seed 1"]
        assert [run.parameters["seed"] for run in members] == [0, 1]
        for seed, run in enumerate(members):
            assert list(run.names) == names_of(45)
            np.testing.assert_array_equal(run.counts, folds[rate, seed][1])
            assert list(run.scene) == [f"room {number // 3}" for number in range(45)]
            assert list(run.image_fold) == [number // 3 % 5 for number in range(45)]
            assert run.is_pooled
            assert run.history is None


def test_strata_are_saved_and_pooled_in_scene_order(tmp_path):
    runs, _ = five_folds("a", 0)
    rooms = [np.unique(run.scene) for run in runs]
    by_room = [np.array([int(room.split()[1]) for room in there]).reshape(-1, 1, 1, 1) for there in rooms]
    runs = [replace(run, strata={"depth (m)": numbers}) for run, numbers in zip(runs, by_room, strict=True)]
    write_results(tmp_path, runs)
    ((pooled,),) = group_recipes(read_results(tmp_path)).values()
    numbers = [int(room.split()[1]) for room in np.unique(pooled.scene)]
    assert pooled.strata["depth (m)"].ravel().tolist() == numbers
    assert pooled.select(np.arange(3)).strata is None
    ((partly,),) = group_recipes([replace(runs[0], strata=None), *runs[1:]]).values()
    assert partly.strata is None


def test_without_fold_excludes_the_images_of_the_fold():
    recipes = group_recipes(
        five_folds("a", 0)[0] + five_folds("a", 1)[0] + five_folds("b", 0, learning_rate=1)[0]
    )
    others = without_fold(recipes, 4)
    assert named(others) == named(recipes)
    _, counts = five_folds("a", 1)
    kept = np.arange(45) // 3 % 5 != 4
    run = next(iter(others.values()))[1]
    np.testing.assert_array_equal(run.counts, counts[kept])
    assert list(run.names) == np.array(names_of(45))[kept].tolist()
    assert set(run.image_fold) == {0, 1, 2, 3}
    assert len(set(run.scene)) == 12
    assert run.score == mean_iou(counts[kept]) != mean_iou(counts)


def test_without_fold_rejects_runs_that_are_not_pooled():
    with pytest.raises(
        ValueError, match="fold: the run 'a' is of one fold, expected runs pooled over five folds"
    ):
        without_fold(group_recipes([scored_run("a")]), 4)


def test_seed_without_all_folds_is_excluded():
    runs = five_folds("a", 0)[0] + five_folds("a", 1, folds=(0, 1, 2, 4))[0]
    (members,) = group_recipes(runs).values()
    assert [run.parameters["seed"] for run in members] == [0]


def test_folds_are_pooled_separately_for_each_group():
    runs = [replace(run, group=arm) for arm in ("one", "two") for run in five_folds(arm, 0)[0]]
    assert named(group_recipes(runs)) == {"one": ["five folds, seed 0"], "two": ["five folds, seed 0"]}


def test_runs_are_rejected_if_no_seed_has_all_folds():
    with pytest.raises(ValueError) as error:
        group_recipes(five_folds("a", 0, folds=(0, 1, 2))[0] + five_folds("a", 1, folds=(3, 4))[0])
    assert str(error.value) == (
        "runs: found folds seed 0: [0, 1, 2]; seed 1: [3, 4]; expected one fold, or all of 0 to 4 of a seed; name "
        "other runs"
    )


def test_folds_scored_on_the_same_images_are_not_pooled():
    """For example on split test: counting every image five times would add no information."""
    with pytest.raises(ValueError) as error:
        group_recipes([scored_run(f"f{fold}", fold=fold) for fold in range(5)])
    assert str(error.value) == (
        "runs: the five folds of 'f4' are scored on the same images, such as 000000; folds are pooled over their "
        "validation images, so use split valid, or name runs of one fold"
    )


def test_pooled_scenes_are_unknown_if_one_fold_has_none():
    runs, _ = five_folds("a")
    ((pooled,),) = group_recipes([*runs[:4], replace(runs[4], scene=None, validation="random")]).values()
    assert pooled.scene is None


def test_pooled_recipes_of_one_seed_all_have_a_name_of_their_own():
    runs = []
    for weight in (0, 0.5, 1):
        for fold in range(5):
            names = names_of(first=100 * fold)
            runs.append(
                scored_run(f"w{weight}-{fold}", names=names, soft_iou_weight=weight, fold=fold, seed=1)
            )
    recipes = group_recipes(runs)
    assert list(recipes) == ["soft_iou_weight 0", "soft_iou_weight 0.5", "soft_iou_weight 1"]
    assert all(len(members) == 1 and members[0].is_pooled for members in recipes.values())


def test_recipes_of_one_name_are_told_apart():
    shared = {"recipe": "theirs", "data": "/disk/nyu", "seed": 0, "predictions": "masks"}
    runs = [scored_run("external", external=shared | {"limit": limit}) for limit in (10, 20, 30)]
    assert [members[0].parameters["limit"] for members in group_recipes(runs).values()] == [10, 20, 30]


def test_single_runs_of_two_folds_are_compared_on_a_common_test_split():
    first = scored_run("a", split="test", fold=0, learning_rate=0.01)
    second = scored_run("b", split="test", fold=4)
    assert [len(members) for members in group_recipes([first, second]).values()] == [1, 1]
    with pytest.raises(ValueError, match="found folds seed 0"):  # two folds of one recipe are no two seeds
        group_recipes([first, scored_run("c", split="test", fold=1, learning_rate=0.01), second])

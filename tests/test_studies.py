"""Recompute the numbers in the READMEs of notebooks/studies from the two data files of each study."""

import itertools
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from lib.metrics import DISTANCE, class_accuracy, iou, pixel_accuracy
from lib.notebooks.compare import compare_strata
from lib.notebooks.conclusions import measure_spread, result_table, run_tests
from lib.notebooks.sweep import plan_runs
from lib.runs.results import group_recipes, identity, read_results, recipe, select_runs, without_fold
from lib.significance import compare_checkpoints, compare_recipes, plan, score_interval

ROOT = Path(__file__).parents[1]
STUDIES_FOLDER = ROOT / "notebooks" / "studies"
STUDIES = sorted(path.parent for path in STUDIES_FOLDER.glob("*/runs.jsonl"))
DEPTH, EXAMPLE, PRETRAINED, SOFT_IOU = (
    STUDIES_FOLDER / name for name in ("depth", "example", "pretrained", "soft_iou")
)


def published(study, start, end):
    """The decimal numbers, as written, between two texts of a README."""
    found = re.search(
        re.escape(start) + "(.*?)" + re.escape(end), (study / "README.md").read_text(), re.DOTALL
    )
    assert found, f"{study.name}/README.md has no {start!r} before {end!r}"
    texts = re.findall(r"[+-]?\d\.\d+", found[1])
    assert texts, f"{study.name}/README.md has no decimal number between {start!r} and {end!r}"
    return texts


def rounded(values, texts):
    """The values formatted like the texts: as many digits, and a sign where the text has one."""
    return [
        f"{value:{'+' if text[0] in '+-' else ''}.{len(text.split('.')[1])}f}"
        for value, text in zip(values, texts, strict=True)
    ]


def scores(members):
    """mIoU by seed, then the mean."""
    assert [run.parameters["seed"] for run in members] == [1, 2, 3]
    by_seed = [run.score for run in members]
    return [*by_seed, np.mean(by_seed)]


def recipe_test(baseline, members, comparisons=1):
    """The adjusted result, and its difference, both ends of the interval and p."""
    counts = [np.stack([run.counts for run in side]) for side in (baseline, members)]
    result = compare_recipes(*counts, baseline[0].scene).adjusted(comparisons)
    return result, [result.difference, *result.interval, result.p_value]


@pytest.fixture(scope="module")
def recipes():
    """The three recipes of the soft IoU study, pooled over its folds."""
    runs = select_runs(read_results(SOFT_IOU), "seed in (1, 2, 3)")
    found = group_recipes(runs, "class_weights median, soft_iou_weight 0")
    return dict(zip(("weights", "cross-entropy", "soft IoU"), found.values(), strict=True))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_study_folder_has_only_a_few_files(study):
    files = {
        path.name
        for path in study.iterdir()
        if not path.name.startswith(".") and "out.ipynb" not in path.name
    }
    assert {"README.md", "runs.jsonl", "counts.npz"} <= files
    assert len(files) <= 5


def test_no_run_folder_is_tracked():
    command = ["git", "ls-files", "--", "notebooks", "runs"]
    tracked = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "notebooks/train.ipynb" in tracked
    assert not [
        path for path in tracked if path.endswith(("parameters.json", ".pt")) or path.startswith("runs/")
    ]


def test_study_results_contain_no_paths():
    for study in STUDIES:
        for run in read_results(study):
            texts = [text for text in (run.data, *run.parameters.values()) if isinstance(text, str)]
            assert not [text for text in texts if "/" in text], run.name


# soft IoU


def differing(wanted, parameters):
    """Names of the parameters whose values differ, among those that both sides have."""
    return [name for name in wanted.keys() & parameters.keys() if wanted[name] != parameters[name]]


def test_soft_iou_runs_match_study_yaml():
    study, made = yaml.safe_load((SOFT_IOU / "study.yaml").read_text()), read_results(SOFT_IOU)
    planned = plan_runs(None, study["fixed"] | {"data": "/disk/NYUv2"}, study["grid"], study["seeds"])
    assert len(planned) == 30
    elsewhere = ("run_name", "resume", "data", "encoder_weights", "device", "num_workers")
    matching = []
    for parameters in planned.values():
        wanted = {name: value for name, value in parameters.items() if name not in elsewhere}
        (run,) = [run for run in made if not differing(wanted, run.parameters)]
        matching.append(run.name)
    assert len(set(matching)) == 30
    assert {(run.split, run.data) for run in made} == {(study["split"], "NYUv2")}


def test_sweep_recognises_the_finished_soft_iou_runs():
    """The weights must be the same, but may be stored elsewhere."""
    study, made = yaml.safe_load((SOFT_IOU / "study.yaml").read_text()), read_results(SOFT_IOU)
    weights = {"encoder_weights_digest": made[0].parameters["encoder_weights_digest"]}
    planned = plan_runs(None, study["fixed"] | {"data": "/disk/NYUv2"}, study["grid"], study["seeds"])
    known = {identity(run.parameters) for run in made}
    assert {identity(parameters | weights) for parameters in planned.values()} <= known


def test_soft_iou_runs_share_one_commit_and_one_set_of_weights():
    made = read_results(SOFT_IOU)
    (commit,) = re.findall(r"commit `(\w+)`", (SOFT_IOU / "README.md").read_text())
    assert all(run.commit.startswith(commit) and run.tree_unchanged for run in made)
    assert len({run.parameters["encoder_weights_digest"] for run in made}) == 1


@pytest.mark.parametrize(
    ("recipe", "start", "end"),
    [
        ("cross-entropy", "| cross-entropy alone |", "|\n"),
        ("soft IoU", "| with 0.5 soft IoU `batch` |", "|\n"),
        ("weights", "15 more runs of the same commit (", ")"),
    ],
)
def test_soft_iou_scores_by_seed_match_the_readme(recipes, recipe, start, end):
    texts = published(SOFT_IOU, start, end)
    assert rounded(scores(recipes[recipe]), texts) == texts


def test_planned_soft_iou_test_matches_the_readme(recipes):
    texts = published(SOFT_IOU, "**Planned recipe test**: ", "3 seeds, 123 scenes)")
    result, values = recipe_test(recipes["cross-entropy"], recipes["soft IoU"])
    assert rounded(values, texts) == texts
    assert result.scene_count == 123
    assert not (result.class_p_value < 0.05).any()  # "No class differs significantly"


def test_soft_iou_result_without_tuning_fold_matches_the_readme(recipes):
    texts = published(SOFT_IOU, "Without fold 4: ", ")")
    others = without_fold(recipes, 4)
    _, values = recipe_test(others["cross-entropy"], others["soft IoU"])
    assert rounded(values, texts) == texts


def test_class_weights_control_matches_the_readme(recipes):
    results = {}
    for name, start, end in (
        ("cross-entropy", "cross-entropy alone has ", ") and soft IoU"),
        ("soft IoU", "and soft IoU -", ")"),
    ):
        texts = published(SOFT_IOU, start.removesuffix("-"), end)
        results[name], values = recipe_test(recipes["weights"], recipes[name], comparisons=2)
        assert rounded(values, texts) == texts
    result, classes = results["cross-entropy"], recipes["weights"][0].classes
    clear = {
        name: difference > 0
        for name, difference, p in zip(classes, result.class_difference, result.class_p_value, strict=True)
        if p < 0.05
    }
    assert clear == {"books": False, "table": False, "wall": True, "furniture": True}


def test_class_weights_raise_recall_and_lower_pixel_accuracy(recipes):
    texts = published(SOFT_IOU, "lower pixel accuracy from ", ";")
    accuracy = {name: np.mean([pixel_accuracy(run.counts) for run in runs]) for name, runs in recipes.items()}
    assert rounded([accuracy["cross-entropy"], accuracy["weights"]], texts) == texts
    assert accuracy["soft IoU"] == pytest.approx(accuracy["cross-entropy"], abs=0.005)
    recall = {
        name: np.mean([class_accuracy(run.counts) for run in runs], axis=0) for name, runs in recipes.items()
    }
    pixels = recipes["weights"][0].counts.sum((0, 2))
    rare = np.argsort(pixels)[:4]
    assert (recall["weights"] > recall["cross-entropy"])[rare].all()


def test_soft_iou_tuning_scores_match_the_readme():
    texts = published(SOFT_IOU, "Tuning (mIoU on fold 4 at 480x640, one run each): ", ". The first")
    runs = select_runs(read_results(SOFT_IOU), "seed == 42")
    assert len(runs) == 6
    settings = [
        "learning_rate == 0.001",
        "learning_rate == 0.002 and encoder_lr_scale == 1 and weight_decay == 0.01 and augment == 'crops_colour'",
        "learning_rate == 0.004",
        "encoder_lr_scale == 0.3",
        "weight_decay == 0.1",
        "augment == 'crops'",
    ]
    found = [select_runs(runs, setting) for setting in settings]
    values = [run.score for (run,) in found]
    texts = [text for text in texts if re.fullmatch(r"0\.[1-9]\d\d", text)]  # scores, not settings
    assert rounded(values, texts) == texts
    assert values[4] < values[1]  # "lower in the fourth digit"
    assert all(run.parameters["fold"] == 4 and run.parameters["soft_iou_weight"] == 0 for run in runs)


def test_required_seeds_and_scenes_match_the_soft_iou_readme(recipes):
    """About 30 seeds on 550 scenes for +0.006. On these 123 scenes, no number of seeds is enough."""
    texts = published(SOFT_IOU, "(sd over seeds ", "per scene")
    spread = measure_spread(recipes)
    assert rounded([spread.run_sd[0], spread.variance_per_scene], texts) == texts
    powers = [
        plan(seeds, 5, scenes, spread.run_sd[0], spread.variance_per_scene).power(0.006)
        for seeds, scenes in ((30, 550), (1000, 123))
    ]
    assert powers[0] >= 0.8 > powers[1]


def test_soft_iou_result_table_matches_the_readme(recipes):
    """Compared with `result_table`, row by row."""
    planned = {name: recipes[name] for name in ("cross-entropy", "soft IoU")}
    rows = [*result_table(run_tests(planned)).itertuples(), *result_table(run_tests(recipes)).itertuples()]
    lines = [line for line in (SOFT_IOU / "README.md").read_text().splitlines() if line.count("|") == 9][2:]
    for row, line in zip(rows, lines, strict=True):
        *texts, comparisons, conclusion = (cell.strip() for cell in line.split("|")[3:-1])
        assert rounded([row.difference, row.low, row.high, row.p], texts) == texts
        assert (row.comparisons, row.conclusion) == (int(comparisons), conclusion)


# other studies


def test_pretrained_runs_match_the_published_tables():
    runs = read_results(PRETRAINED)
    experiment = yaml.safe_load((ROOT / "notebooks" / "experiments" / "nyuv2_pretrained.yaml").read_text())
    *full, plain, _ = [run for run in runs if run.parameters["epochs"] == experiment["epochs"]]
    for run, normalised in zip(full, ("Exp061", "the weights", "the weights"), strict=True):
        assert (len(run.names), len(set(run.scene)), run.parameters["fold"]) == (197, 24, 4)
        minutes = run.history.seconds.sum() / 60
        row = f"| {run.parameters['learning_rate']} | {normalised} | {minutes:.0f} | {run.score:.3f} |"
        assert row in (PRETRAINED / "README.md").read_text()
    best = max(full, key=lambda run: run.score)
    chosen = {
        name: value
        for name, value in experiment.items()
        if name not in ("run_name", "validation", "encoder_weights")
    }
    assert chosen.items() <= best.parameters.items()
    assert chosen.items() <= plain.parameters.items()
    page = (ROOT / "notebooks" / "docs" / "results.md").read_text()
    assert f"| {best.history.seconds.sum() / 60:.0f} minutes of one core | {best.score:.3f} |" in page
    small = [run for run in runs if run.parameters["image_height"] == 96]
    for first, other in zip(small[::2], small[1::2], strict=True):
        rate, soft = (first.parameters[name] for name in ("learning_rate", "soft_iou_weight"))
        assert (
            f"| {rate} | {soft} | {first.score:.3f} | {other.score:.3f} |"
            in (PRETRAINED / "README.md").read_text()
        )
    assert all(run.tree_unchanged for run in runs)


def test_pretrained_fold_0_results_match_the_pages():
    plain, scales = read_results(PRETRAINED)[-2:]
    assert recipe(plain.parameters) == recipe(scales.parameters)
    assert [run.parameters["fold"] for run in read_results(PRETRAINED)].count(0) == 2
    assert (len(plain.names), len(set(plain.scene)), scales.group) == (149, 25, "scales at test time")
    page = (PRETRAINED / "README.md").read_text()
    minutes = f"{plain.history.seconds.sum() / 60:.0f}"
    for run, name, time in ((plain, "none", minutes + " "), (scales, "`scales`", "")):
        low, high = score_interval(run.counts, run.scene).interval
        assert f"| {name} | {time}| {run.score:.3f} | {low:.3f} to {high:.3f} |" in page
    gain = compare_checkpoints(plain.counts, scales.counts, plain.scene)
    low, high = gain.interval
    assert f"adds {gain.difference:.3f} on scenes like these ({low:.3f} to {high:.3f}, p < 0.001" in page
    assert gain.p_value < 0.001
    row = f"| 149, fold 0, 1 run | 192x256, 24 | {minutes} minutes (busy) | RGB and depth {plain.score:.3f} |"
    assert row in (ROOT / "README.md").read_text()
    results = (ROOT / "notebooks" / "docs" / "results.md").read_text()
    assert f"| {minutes} minutes of one busy core | {plain.score:.3f} |" in results
    assert f"`tta: scales` | | {scales.score:.3f} |" in results
    header = (ROOT / "notebooks" / "experiments" / "nyuv2_pretrained.yaml").read_text()
    assert (
        f"{plain.score:.3f} on fold 0, on which the learning rate was not tuned, {scales.score:.3f} with tta"
        in header
    )


def test_example_study_has_an_effect_and_a_null_comparison():
    recipes = group_recipes(read_results(EXAMPLE), "baseline")
    seeds = {name: sorted(run.parameters["seed"] for run in runs) for name, runs in recipes.items()}
    assert seeds == {
        "baseline": [1, 2, 3, 4, 5],
        "baseline_again": [6, 7, 8, 9, 10],
        "tenth_learning_rate": [1, 2, 3, 4, 5],
    }
    runs = [run for members in recipes.values() for run in members]
    (commit,) = re.findall(r"commit `(\w+)`", (EXAMPLE / "README.md").read_text())
    assert all(run.commit.startswith(commit) and len(run.names) == 100 for run in runs)
    assert {
        (run.parameters["image_height"], run.parameters["image_width"], len(run.history)) for run in runs
    } == {(48, 64, 6)}
    again, _ = recipe_test(recipes["baseline"], recipes["baseline_again"])
    slower, _ = recipe_test(recipes["baseline"], recipes["tenth_learning_rate"])
    assert again.p_value > 0.05 > slower.p_value
    assert slower.difference < 0


def alarms(groups):
    """Number of pairs of runs of one recipe; how many differ in a test over images, and over scenes."""
    pairs = [pair for runs in groups for pair in itertools.combinations(runs, 2)]
    differing = [
        sum(compare_checkpoints(a.counts, b.counts, scene(a)).p_value < 0.05 for a, b in pairs)
        for scene in (lambda run: None, lambda run: run.scene)
    ]
    return [len(pairs), *differing]


def test_false_alarm_counts_match_the_statistics_page():
    """The table in docs/statistics.md."""
    page = (ROOT / "notebooks" / "docs" / "statistics.md").read_text()
    same = [run for run in read_results(EXAMPLE) if run.group in ("baseline", "baseline_again")]
    cells = {}
    for run in select_runs(read_results(SOFT_IOU), "seed in (1, 2, 3)"):
        cells.setdefault((recipe(run.parameters), run.parameters["fold"]), []).append(run)
    for name, groups in {"built-in": [same], "NYUv2": cells.values()}.items():
        (found,) = re.findall(rf"\| {name}.* \| (\d+) pairs of single runs \| (\d+) of \d+ \| (\d+) of", page)
        assert alarms(groups) == [int(text) for text in found]
    assert (len(same), len({recipe(run.parameters) for run in same}), len(cells)) == (10, 1, 15)
    splits = [(same[0], *four) for four in itertools.combinations(same[1:], 4)]
    different = 0
    for five in splits:
        others = [run for run in same if run not in five]
        counts = [np.stack([run.counts for run in side]) for side in (five, others)]
        different += compare_recipes(*counts, same[0].scene).p_value < 0.05
    assert f"{different} of {len(splits)} |" in page


def test_reference_scores_match_the_results_page():
    """The tables in docs/results.md, as the author of the experiments reported them."""
    page = (ROOT / "notebooks" / "docs" / "results.md").read_text()
    tables = [
        ROOT / "lib" / "data" / "tables" / f"published_{name}.csv" for name in ("experiments", "class_iou")
    ]
    scores, by_class = (pd.read_csv(path).set_index("experiment") for path in tables)
    for name in ("exp050", "exp060", "exp061"):
        assert f"| {scores.valid_miou[name]:.4f} |" in re.search(rf"\| {name}.*", page, re.IGNORECASE)[0]
        assert f"| {scores.lb_score[name]:.4f} |" in re.search(rf"\| {name}.*", page, re.IGNORECASE)[0]
    for name, values in by_class.loc[["exp050", "exp060", "exp061"]].items():
        assert f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" in page
    assert by_class.loc["exp061"].mean() == pytest.approx(0.6204, abs=0.001)


def test_normalisation_results_match_the_readme():
    study = STUDIES_FOLDER / "normalisation"
    recipes = group_recipes(read_results(study), "rgb_normalisation exp061")
    for name in ("exp061", "weights"):
        texts = published(study, f"| `{name}` |", "|\n")
        assert rounded(scores(recipes[f"rgb_normalisation {name}"]), texts) == texts
    result, values = recipe_test(*recipes.values())
    texts = published(study, "better by ", ";")
    assert rounded(values, texts) == texts
    assert not (result.class_p_value < 0.05).any()
    (commit,) = re.findall(r"commit `(\w+)`", (study / "README.md").read_text())
    assert all(run.commit.startswith(commit) and run.tree_unchanged for run in read_results(study))


# depth


@pytest.fixture(scope="module")
def inputs():
    """The recipes RGB, RGB and depth, and depth alone, pooled over folds."""
    return group_recipes(select_runs(read_results(DEPTH), "seed in (1, 2, 3)"), "RGB")


@pytest.fixture(scope="module")
def planned_arms(inputs):
    return {name: inputs[name] for name in ("RGB", "RGB and depth")}


def test_depth_study_has_exactly_the_expected_runs():
    study, made = yaml.safe_load((DEPTH / "study.yaml").read_text()), read_results(DEPTH)
    rgb = {"fold": [0, 1, 2, 3, 4], "inputs": ["rgb"], "learning_rate": [0.004]}
    alone = {"fold": [0, 1, 2, 3, 4], "inputs": ["depth"]}
    grids = [(study["grid"], study["seeds"]), (rgb, study["seeds"]), (alone, study["seeds"])]
    rates = {"fold": [4], "inputs": ["rgb", "rgbd"], "learning_rate": [0.001, 0.002, 0.004, 0.008]}
    grids.append((rates, [42]))
    weights = {"encoder_weights_digest": made[0].parameters["encoder_weights_digest"]}
    planned = [
        identity(parameters | weights)
        for grid, seeds in grids
        for parameters in plan_runs(None, study["fixed"] | {"data": "/disk/NYUv2"}, grid, seeds).values()
    ]
    assert sorted(planned) == sorted(identity(run.parameters) for run in made)
    (commit,) = re.findall(r"commit `(\w+)`", (DEPTH / "README.md").read_text())
    assert {run.commit.startswith(commit) for run in made if run.parameters["seed"] != 42} == {True}
    assert all(run.tree_unchanged for run in made)
    assert len({run.processor for run in made}) == 1


def test_depth_tuning_scores_match_the_readme():
    tuned = [run for run in read_results(DEPTH) if run.parameters["seed"] == 42]
    for arm, start, end in (
        ("rgb", "and 0.008): RGB alone ", "; with"),
        ("rgbd", "; with depth ", ". The fourth"),
    ):
        texts = published(DEPTH, start, end)
        runs = [run for run in tuned if run.parameters["inputs"] == arm]
        runs.sort(key=lambda run: run.parameters["learning_rate"])
        assert rounded([run.score for run in runs], texts) == texts


def test_gain_from_depth_matches_the_readme(planned_arms):
    for name in planned_arms:
        texts = published(DEPTH, f"| {name} |", "|\n")
        assert rounded(scores(planned_arms[name]), texts) == texts
    result, values = recipe_test(*planned_arms.values())
    texts = published(DEPTH, "RGB and depth is better, ", "3 seeds, 123 scenes)")
    assert rounded(values[:3], texts[:3]) == texts[:3]
    assert values[3] < float(texts[3]) == 0.001
    by_class = dict(
        zip(
            planned_arms["RGB"][0].classes,
            zip(result.class_difference, *result.class_interval, strict=True),
            strict=True,
        )
    )
    for name in ("floor", "table", "wall"):
        texts = published(DEPTH, f"{name} ", ")")
        assert rounded(by_class[name], texts) == texts
    significant = [name for name, p in zip(by_class, result.class_p_value, strict=True) if p < 0.05]
    assert significant == ["floor", "table", "wall"]
    share = result.seed_variance / (result.seed_variance + result.scene_variance)
    assert f"{100 * share:.0f} % of the variance" in (DEPTH / "README.md").read_text()
    _, values = recipe_test(*without_fold(planned_arms, 4).values())
    texts = published(DEPTH, "Without fold 4: ", ")")
    assert rounded(values[:3], texts[:3]) == texts[:3]
    assert values[3] < float(texts[3]) == 0.001
    accuracy = [np.mean([pixel_accuracy(run.counts) for run in runs]) for runs in planned_arms.values()]
    texts = published(DEPTH, "without a test): ", " with depth")
    assert rounded(accuracy, texts) == texts


def test_gain_from_depth_by_stratum_matches_the_readme(planned_arms):
    table = compare_strata(*planned_arms.values(), farthest_m=10.0)
    by_boundary = table[table.stratum == DISTANCE]
    assert by_boundary.bin[by_boundary.p < 0.05].tolist() == ["1-2", "2-4", "4-8", "8-16"]
    texts = published(DEPTH, "away from a boundary (", ")")
    found = by_boundary.difference[by_boundary.p < 0.05]
    assert rounded([found.min(), found.max()], texts) == texts
    by_depth = table[table.stratum == "depth (m)"]
    assert by_depth.bin[by_depth.p < 0.05].tolist() == ["3-4"]
    texts = published(DEPTH, "**By distance from the camera**: ", ", significant")
    assert rounded([by_depth.difference.min(), by_depth.difference.max()], texts) == texts


def test_depth_alone_results_match_the_readme(inputs):
    texts = published(DEPTH, "| Depth alone |", "|\n")
    assert rounded(scores(inputs["Depth alone"]), texts) == texts
    significant = {}
    for name, start, count in (  # the second is given without p
        ("RGB", "higher than RGB by ", 4),
        ("RGB and depth", "that arm is higher by ", 3),
    ):
        arms = (inputs[name], inputs["Depth alone"])
        result, values = recipe_test(*(arms if name == "RGB" else arms[::-1]), comparisons=2)
        texts = published(DEPTH, start, ")")
        assert rounded(values[:count], texts) == texts
        result, _ = recipe_test(*arms)
        by_class = zip(inputs["RGB"][0].classes, result.class_difference, result.class_p_value, strict=True)
        significant[name] = {(other, difference > 0) for other, difference, p in by_class if p < 0.05}
    better = {"floor", "bed", "sofa", "chair", "table", "furniture"}
    worse = {"window", "picture", "wall"}
    both = significant["RGB"] & significant["RGB and depth"]
    assert both == {(name, True) for name in better} | {(name, False) for name in worse}
    floor = inputs["RGB"][0].classes.index("floor")
    arms = ("Depth alone", "RGB and depth", "RGB")
    means = [np.mean([iou(run.counts)[floor] for run in inputs[name]]) for name in arms]
    texts = published(DEPTH, "Floor is ", ". In this")
    assert rounded(means, texts) == texts


def test_first_page_results_match_the_study_readmes():
    """Each result between markers on the first page is also in the README of its study."""
    page = (ROOT / "README.md").read_text()
    for study in (DEPTH, SOFT_IOU):
        (stated,) = re.findall(rf"<!-- studies/{study.name} -->(.*?)<!-- end -->", page)
        detail = (study / "README.md").read_text()
        difference, rest = stated.split(" mIoU (")
        assert difference in detail
        assert rest.split("; 3 seeds")[0] in detail


def test_fine_tuning_results_match_the_pages():
    study, page = STUDIES_FOLDER / "fine_tuning", (ROOT / "notebooks" / "docs" / "experiments.md").read_text()
    arms = group_recipes(read_results(study), "from ImageNet")
    for name, runs in arms.items():
        texts = published(study, f"| {name} |", "|\n")
        assert rounded(scores(runs), texts) == texts
        assert re.search(rf"\| {name}.* \| {texts[-1]} \|", page)
    for name, end, count in (("from a run", ")", 4), ("from scratch", ", p < 0.001", 3)):
        _, values = recipe_test(arms["from ImageNet"], arms[name], comparisons=2)
        texts = published(study, "is better by " if name == "from a run" else "is worse by ", end)
        assert rounded(values[:count], texts) == texts
        assert f"{values[0]:+.3f} ({values[1]:+.3f} to {values[2]:+.3f})" in page
    assert values[3] < 0.001
    assert all(run.tree_unchanged and run.commit.startswith("a895853") for run in read_results(study))


def test_new_channels_results_match_the_readme():
    study = STUDIES_FOLDER / "new_channels"
    arms = group_recipes(read_results(study), "new channels at zero")
    for start, runs in zip(("| zero |", "| the mean of RGB's |"), arms.values(), strict=True):
        texts = published(study, start, "|\n")
        assert rounded(scores(runs), texts) == texts
    _, values = recipe_test(*arms.values())
    texts = published(study, "Recipe test: ", "; 3 seeds")
    assert rounded(values, texts) == texts

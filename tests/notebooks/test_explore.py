import csv
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_folder

from figures import SETS, draw, relabel
from lib.batches import training_loader
from lib.classes import NYUV2_13
from lib.data import DataError, Samples, Split, iterate_samples, load_samples
from lib.data.nyuv2 import TABLES
from lib.data.validation import group_neighbouring_ids
from lib.notebooks.browse import plot_samples
from lib.notebooks.explore import (
    FALSE_POSITIVE_RATE,
    Leakage,
    class_shares,
    conclude_data,
    count_data,
    count_test_images,
    depth_quantiles,
    describe_data,
    find_leakage,
    plot_adjacency,
    plot_batch,
    plot_depth,
    plot_leaks,
    tabulate_leakage,
)
from lib.notebooks.plots import choose_depth_scale

FLOOR, WALL = NYUV2_13.index("floor"), NYUV2_13.index("wall")


def small_samples(label, depth=2000, measured=None):
    label = np.asarray(label, np.uint8)[None]
    depth = np.broadcast_to(np.uint16(depth), label.shape)
    image = np.zeros((*label.shape, 3), np.uint8)
    return Samples(np.array(["000007"]), image, depth, label, measured, classes=NYUV2_13)


def test_count_data_counts_pixels_depth_and_adjacency():
    label = np.full((24, 32), WALL)
    label[12:] = FLOOR
    label[:, 0] = 255
    depth = np.full((24, 32), 1250, np.uint16)
    depth[0] = 0
    counts = count_data(small_samples(label, depth))
    assert counts.pixels[0, [WALL, FLOOR, 13]].tolist() == [12 * 31, 12 * 31, 24]
    assert counts.pixels.sum() == counts.depth.sum() == label.size
    assert counts.depth[WALL, 0] == 31
    assert counts.depth[FLOOR, 13] == 12 * 31  # 1.2 to 1.3 m
    assert counts.adjacency[WALL, FLOOR] == counts.adjacency[FLOOR, WALL] == 31  # reach 1, vertical pairs
    assert counts.adjacency.sum() == 62
    assert class_shares(counts).pixels[["floor", "wall"]].tolist() == [0.5, 0.5]
    assert class_shares(counts)["without depth"]["wall"] == pytest.approx(1 / 12)
    assert np.isnan(class_shares(counts)["without depth"]["tv"])


def test_filled_depth_holes_count_as_missing():
    measured = np.ones((1, 24, 32), bool)
    measured[0, :6] = False
    counts = count_data(small_samples(np.full((24, 32), WALL), measured=measured))
    assert counts.depth[WALL, 0] == 6 * 32


def test_depth_beyond_the_range_falls_into_the_last_bin():
    counts = count_data(small_samples(np.full((4, 4), WALL), 65_000))
    assert counts.depth[WALL, -1] == 16


def test_depth_quantiles_ignore_missing_depth():
    histogram = np.zeros(101, int)
    histogram[0], histogram[11:21] = 1000, 5  # the measured depth is uniform from 1 to 2 m
    np.testing.assert_allclose(
        depth_quantiles(histogram, (0.1, 0.5, 0.9), np.linspace(0, 10, 101)), (1.1, 1.5, 1.9)
    )


def test_depth_bins_follow_the_range_of_the_data():
    near = replace(small_samples(np.full((4, 4), WALL), 250), depth_range_m=(0.1, 2.0))
    counts = count_data(near)
    assert counts.depth[WALL, 1 + 12] == 16  # 0.24 to 0.26 m
    assert "All pixels: nine in ten from 0.2 to 0.3 m" in draw(plot_depth(counts))


def test_most_nyuv2_random_validation_frames_share_a_training_scene():
    with open(TABLES / "nyuv2_split.csv") as file:
        ids = [row["id"] for row in csv.DictReader(file) if row["split"] == "train"]
    names = np.array(sorted(f"{int(number):06d}" for number in ids))
    image = np.zeros((len(names), 1, 1, 3), np.uint8)
    leakage = find_leakage(Samples(names, image, scene=group_neighbouring_ids(names), classes=NYUV2_13))
    shared = {
        validation: (int(leak.same_scene.sum()), len(leak.valid)) for validation, leak in leakage.items()
    }
    assert shared["random"] == (154, 159)
    assert shared["blocks"] == (0, 197)
    assert shared["scenes"][0] == 0


def test_leakage_finds_exact_copies(scenes):
    names = np.array([f"room {index:02d}" for index in range(24)])
    twice = Samples(names, np.concatenate([scenes.image] * 2), classes=scenes.classes)
    leakage = find_leakage(twice)
    assert set(leakage) == {"random"}  # other methods need numbered names or known scenes
    leak = leakage["random"]
    assert leak.same_scene is None
    assert len(leak.valid) + leak.train_count == 24
    twin_trains = ~np.isin((leak.valid + 12) % 24, leak.valid)
    assert twin_trains.any()
    np.testing.assert_array_equal(leak.match[twin_trains], (leak.valid[twin_trains] + 12) % 24)
    assert leak.copies == twin_trains.sum()
    assert tabulate_leakage(leakage).loc["random", "exact copies"] == leak.copies


def test_most_similar_training_image_is_the_other_view_of_the_room(scenes):
    leak = find_leakage(scenes)["random"]
    for valid, match, shared in zip(leak.valid, leak.match, leak.same_scene, strict=True):
        assert shared == (scenes.scene[valid] == scenes.scene[match])
        assert shared == (abs(valid - match) == 1 and valid // 2 == match // 2)
    assert find_leakage(scenes)["blocks"].same_scene.sum() == 0
    shown = draw(plot_leaks(scenes, leak))
    assert {"validation", "most similar in training"} <= set(shown)
    assert sum("same scene, other view" in text for text in shown) == min(2, leak.same_scene.sum())


def test_most_similar_pairs_are_shown_first():
    """Scenes are unknown. Image 3 is a copy of image 0, image 4 resembles image 1, image 5 resembles none."""
    image = np.zeros((6, 8, 8, 3), np.uint8)
    image[1], image[2], image[5] = 200, (0, 0, 255), (255, 0, 0)
    image[4] = image[1]
    image[4, :4] = 90
    samples = Samples(np.array(list("abcdef")), image, classes=("wall", "floor"))
    leak = Leakage(3, np.array([5, 4, 3]), np.array([2, 1, 0]), None, 1)
    assert [text for text in draw(plot_leaks(samples, leak)) if " and " in text] == ["d and a", "e and b"]


def test_leakage_table_gives_near_duplicates_expected_by_chance():
    leak = Leakage(5000, np.arange(10), np.arange(10), None, 4)
    assert tabulate_leakage({"random": leak}).loc["random"].to_dict() == {
        "training images": 5000,
        "validation images": 10,
        "sharing a scene": "unknown",
        "exact copies": 0,
        "near-duplicates": 4,
        "expected by chance": round(10 * (1 - (1 - FALSE_POSITIVE_RATE) ** 5000), 1),
    }
    assert tabulate_leakage({}).empty


@pytest.mark.parametrize(("step", "gaps"), [(1, (1,)), (5, (5,)), (33, (33, 33, 34))])
def test_leakage_is_independent_of_the_step_between_ids(scenes, step, gaps):
    """Ids count frames, every fifth frame or milliseconds: always 12 frames of one scene."""
    ids = np.cumsum([0, *np.resize(gaps, 11)])
    names = np.array([f"{number:06d}" for number in ids])
    leakage = find_leakage(replace(scenes, names=names, scene=group_neighbouring_ids(names)))
    assert set(leakage) == {"random"}  # one run can't be split
    assert tabulate_leakage(leakage).loc["random", ["validation images", "sharing a scene"]].tolist() == [
        3,
        3,
    ]


def describe(samples, validation="random", folds=3):
    """The summary if every `folds`-th image is a validation image."""
    valid = np.arange(len(samples)) % folds == 0
    train, valid = (
        Split(samples.names, samples.classes, None, samples.scene, validation=validation).select(where)
        for where in (np.flatnonzero(~valid), np.flatnonzero(valid))
    )
    return describe_data(count_data(samples), train, valid)


def made_up_samples(depth=2750):
    """Four images of three classes: mostly wall, floor in one image, tv in none; an eighth is unlabelled."""
    label = np.zeros((4, 4, 4), np.uint8)
    label[:, :1, :2] = 255
    label[0, 3] = 1
    depth = np.full(label.shape, depth, np.uint16)
    depth[:, 0, 0] = 0
    names = np.array(["a", "b", "c", "d"])
    return Samples(names, np.zeros((4, 4, 4, 3), np.uint8), depth, label, classes=("wall", "floor", "tv"))


def test_data_summary_includes_warnings():
    samples = made_up_samples()
    assert describe(samples) == (
        "**4 images, 3 classes, median depth 2.8 m, depth missing in 6.2 %, "
        "12.5 % unlabelled; validation (2 images, by random) may share scenes with training, because the "
        "scenes are unknown.**\n- These classes are in no image: tv. If one of them has a label value that is read as unlabelled, such as "
        "255, declare it under `classes` and `ignore`."
    )
    assert "validation (2 images, by scenes) shares no scene with training.**" in describe(
        replace(samples, scene=np.array(["u", "v", "v", "u"])), "scenes"
    )
    assert "validation (2 images, by random) shares scenes with training in 1 of them.**" in describe(
        replace(samples, scene=np.array(["u", "u", "v", "w"]))
    )
    no_depth = describe(replace(samples, depth=None))
    assert "3 classes, no depth, 12.5 % unlabelled; validation" in no_depth
    assert no_depth.count("depth") == 1
    label = np.full_like(samples.label, 255)
    label[1] = 0
    warnings = describe(replace(samples, label=label)).splitlines()[1:]
    assert warnings == [
        "- These classes are in no image: floor, tv. If one of them has a label value that is read as unlabelled, such as "
        "255, declare it under `classes` and `ignore`.",
        "- 3 images have no labelled pixel.",
        "- 75.0 % of the pixels are unlabelled.",
    ]


def test_median_depth_beyond_the_range_is_given_as_a_bound():
    samples = made_up_samples()
    assert "median depth over 9.9 m" in describe(replace(samples, depth=np.full_like(samples.depth, 60_000)))


def test_depth_at_the_ends_of_the_range_is_inside():
    """Many sensors are capped at 10 m. One in eight of the depths is a millimetre beyond each end."""
    samples = made_up_samples(10_000)
    assert "outside" not in describe(samples)
    samples.depth[:2] = 710
    samples.depth[3] = 9950
    assert "outside" not in describe(samples)
    samples = made_up_samples(10_000)
    samples.depth[:, 0] = 0
    samples.depth[:, 1, :2], samples.depth[:, 2, :2] = 709, 10_001
    assert "\n- 33.3 % of the depths are outside 0.71 to 10 m" in describe(samples)


@pytest.mark.parametrize("depth", [275, 13_750])
def test_wrong_depth_unit_or_missing_depth_gives_a_warning(depth):
    """Centimetres, or 5000 units per metre, are read as millimetres."""
    assert describe(made_up_samples(depth)).endswith(
        "\n- 100.0 % of the depths are outside 0.71 to 10 m, the range to which networks clip them: check `depth_unit_mm` and "
        "`depth_range_m` in `dataset.yaml`."
    )
    mostly_missing = made_up_samples()
    mostly_missing.depth[:, :3] = 0
    assert describe(mostly_missing).endswith("\n- 75.0 % of the pixels have no depth.")


def own_valid(root, scenes, train, valid):
    """A data set with its own valid split. `train` and `valid` are pairs: positions in `scenes`, names."""
    for split, (positions, names) in (("train", train), ("valid", valid)):
        write_folder(root, replace(scenes[positions], names=np.array(names)), split)
    (root / "dataset.yaml").write_text("splits: {train: train, valid: valid}")
    return [iterate_samples(root, split) for split in ("train", "valid")]


FRAMES = [f"{frame:06d}" for frame in range(12)]


@pytest.mark.parametrize(
    ("train", "valid", "said"),
    [
        ((range(6), FRAMES[:6]), (range(6), FRAMES[:6]), "shares runs of neighbouring ids with training in 6 of them"),  # copies
        (([0, 1, 2, 3, 5, 6, 7, 8], [FRAMES[at] for at in (0, 1, 2, 3, 5, 6, 7, 8)]), ([4, 9], [FRAMES[4], FRAMES[9]]),
         "shares runs of neighbouring ids with training in 2 of them"),  # every fifth frame
        ((range(6), FRAMES[:6]), (range(6, 9), ["000100", "000101", "000102"]),
         "shares no run of neighbouring ids with training"),
        ((range(6), FRAMES[:6]), (range(6, 9), ["a", "b", "c"]), "may share scenes with training"),
        ((range(6), list("uvwxyz")), (range(6), list("uvwxyz")), "may share scenes with training"),
    ],
)  # fmt: skip
def test_predefined_valid_split_is_checked_for_shared_scenes(tmp_path, scenes, train, valid, said):
    splits = own_valid(tmp_path, scenes, *((list(at), names) for at, names in (train, valid)))
    assert f"by predefined) {said}" in describe_data(count_data(scenes), *splits)


def test_copies_in_a_predefined_valid_split_are_found(tmp_path, scenes):
    """Also under another name. A copy with one changed pixel is a near-duplicate."""
    train, valid = own_valid(tmp_path, scenes, (list(range(8)), list("abcdefgh")), ([3, 9, 10], list("xyz")))
    leak = find_leakage(train.load(), valid)["predefined"]
    assert (leak.train_count, leak.valid.tolist(), leak.copies) == (8, [8, 9, 10], 1)
    assert leak.match[0] == 3
    assert tabulate_leakage({"predefined": leak}).loc["predefined", "exact copies"] == 1
    assert set(find_leakage(train.load(), replace(valid, validation="random"))) == {"random"}


def test_copies_are_near_duplicates_even_if_unrelated_images_are_equal():
    """All images are black, so that no similarity exceeds that of unrelated pairs."""
    names = np.array([f"room {index:02d}" for index in range(24)])
    leak = find_leakage(Samples(names, np.zeros((24, 4, 4, 3), np.uint8), classes=("wall", "floor")))[
        "random"
    ]
    assert (len(leak.valid), leak.copies, leak.near_duplicates) == (5, 5, 5)


@pytest.mark.parametrize(("count", "pairs"), [(20, 14 * 15 / 2), (400, 1e4)])
def test_chance_of_near_duplicates_counts_the_unrelated_pairs(count, pairs):
    """The limit of few images is the largest similarity of any unrelated pair."""
    names = np.array([f"room {index:03d}" for index in range(count)])
    image = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    leakage = find_leakage(Samples(names, image, classes=("wall", "floor")))
    table = tabulate_leakage(leakage).loc["random"]
    expected = 0.2 * count * (1 - (1 - 1 / pairs) ** (0.8 * count))
    assert table["expected by chance"] == round(expected, 1)


@pytest.mark.parametrize(
    ("names", "scene", "said"),
    [
        (["0000", "0001", "0007"], ["run_0000", "run_0000", "run_0001"], "run of neighbouring ids"),
        (["run_0001/0", "run_0001/1", "run_0002/0"], ["run_0001", "run_0001", "run_0002"], "scene"),
    ],
)
def test_scenes_are_called_runs_of_ids_only_if_images_are_numbered(names, scene, said):
    split = Split(np.array(names), ("wall", "floor"), None, np.array(scene), validation="blocks")
    sides = split.select(np.arange(2)), split.select(np.arange(2, 3))
    label = np.zeros((3, 4, 4), np.uint8)
    counts = count_data(
        Samples(split.names, np.zeros((3, 4, 4, 3), np.uint8), label=label, classes=split.classes)
    )
    assert f"shares no {said} with training" in describe_data(counts, *sides)
    assert f"shares no {said} with training" in conclude_data(class_shares(counts), *sides)


@pytest.mark.parametrize(
    ("scene", "warned"),
    [
        (["run_0000"] * 60, True),
        (["a"] * 57 + ["b"] * 3, True),
        (["a"] * 30 + ["b"] * 30, False),
        (["a"] * 5, False),
    ],
)
def test_warning_if_one_scene_has_nearly_all_images(scene, warned):
    """Images numbered 0001, 0002, ... are read as frames of a video."""
    label = np.zeros((len(scene), 4, 4), np.uint8)
    label[:, 2:] = 1
    image = np.zeros((*label.shape, 3), np.uint8)
    names = np.array([f"{number:04d}" for number in range(len(scene))])
    samples = Samples(names, image, label=label, scene=np.array(scene), classes=("wall", "floor"))
    text = describe(samples)
    assert (
        "write `scene: '^(.*)$'` into `dataset.yaml`; otherwise set `scene` to a .csv with" in text
    ) == warned


def test_conclusion_lists_validation_method_and_rarest_classes():
    label = np.full((6, 10, 10), 0, np.uint8)
    label[:, 0, :3], label[:, 1, :2], label[:, 2, 0], label[:, 3] = 1, 2, 3, 255
    names = np.array([f"{number:03d}" for number in range(6)])
    image = np.zeros((*label.shape, 3), np.uint8)
    samples = Samples(names, image, label=label, scene=names, classes=("wall", "desk", "cup", "pen", "car"))
    split = Split(names, samples.classes, None, names, validation="scenes")
    sides = split.select(np.arange(4)), split.select(np.arange(4, 6))
    text = conclude_data(class_shares(count_data(samples)), *sides)
    assert "Validate by **scenes**, the choice of `validation auto` for these images; it shares no" in text
    assert "The rarest classes are **cup (2.2 %), pen (1.1 %)** of the labelled pixels. They will" in text
    assert "as much as wall (93.3 %)" in text


@pytest.mark.parametrize(
    ("labelled", "said"),
    [
        (range(1), None),
        (range(2), "The rarest class is **b (50.0 %)** of the labelled pixels. It will"),
        (range(3), "The rarest class is **c (33.3 %)** of the labelled pixels. It will"),
        (
            range(6),
            "The rarest classes are **d (16.7 %), e (16.7 %), f (16.7 %)** of the labelled pixels. They",
        ),
        (
            range(9),
            "The rarest classes are **g (11.1 %), h (11.1 %), i (11.1 %)** of the labelled pixels. They",
        ),
    ],
)
def test_at_most_half_of_the_classes_are_called_rare(labelled, said):
    label = np.repeat(np.uint8(labelled), 9).reshape(1, -1, 9)
    image = np.zeros((*label.shape, 3), np.uint8)
    samples = Samples(np.array(["a"]), image, label=label, classes=tuple("abcdefghij"))
    text = conclude_data(
        class_shares(count_data(samples)), *[Split(samples.names, samples.classes, None)] * 2
    )
    assert (said in text) if said else ("rare" not in text)


def test_leakage_memory_grows_with_images_and_not_with_pairs():
    peaks = []
    for count in (500, 5000):
        names = np.array([f"{number:06d}" for number in range(count)])
        image = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 3), np.uint8)
        samples = Samples(names, image, scene=group_neighbouring_ids(names), classes=("a", "b"))
        tracemalloc.start()
        find_leakage(samples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 15 * peaks[0]  # ten times as many images; a hundred times as many pairs


def test_damaged_test_split_is_an_error_but_a_missing_one_is_not(folder):
    assert count_test_images(str(folder), None, None) == 3
    (folder / "dataset.yaml").write_text("splits: {train: train}")
    assert count_test_images(str(folder), None, None) is None
    (folder / "dataset.yaml").unlink()
    (folder / "test" / "depth" / "000000.png").unlink()
    with pytest.raises(DataError, match="1 of 3 files missing"):
        count_test_images(str(folder), None, None)
    shutil.rmtree(folder / "test")
    assert count_test_images(str(folder), None, None) is None


def test_synthetic_scenes_give_no_warnings():
    splits = [load_samples("synthetic", "train", "none")]
    splits += [iterate_samples("synthetic", split) for split in ("train", "valid")]
    text = describe_data(count_data(splits[0]), *splits[1:])
    assert "shares no scene with training.**" in text
    assert "\n" not in text


def test_data_without_depth_gets_no_depth_column_or_panel(scenes):
    without = replace(scenes, depth=None)
    counts = count_data(without)
    assert counts.depth[:, 1:].sum() == 0
    assert class_shares(counts).columns.tolist() == ["pixels", "images"]
    batch = next(iter(training_loader(without, "exp061", 2, 0, 42)))
    for figure in (plot_samples(without[:2], None), plot_batch(without, batch, None)):
        texts = draw(figure)
        assert "labels" in texts
        assert "depth (m)" not in texts


@pytest.mark.parametrize("count", SETS)
def test_text_fits_in_figures_for_any_class_set(scenes, count):
    samples = relabel(scenes, count)
    counts = count_data(samples)
    depth_scale = choose_depth_scale([samples])
    draw(plot_samples(samples[:2], depth_scale))
    draw(plot_batch(samples, next(iter(training_loader(samples, "exp061", 2, 0, 42))), depth_scale))
    assert any(text.startswith("All pixels: nine in ten from ") for text in draw(plot_depth(counts)))
    assert "adjacent to" in draw(plot_adjacency(counts))

import csv
from dataclasses import replace

import numpy as np
import pytest
from test_plots import SETS, draw, relabel

from lib.batches import training_loader
from lib.classes import NYUV2_13
from lib.data import Samples
from lib.data.nyuv2 import TABLES
from lib.data.splits import number_runs
from lib.explore import (
    CHANCE,
    Leakage,
    class_shares,
    count_data,
    depth_quantiles,
    describe_data,
    describe_leakage,
    find_leakage,
    plot_batch,
    plot_class_shares,
    plot_depth,
    plot_leaks,
    plot_meetings,
    plot_samples,
)

FLOOR, WALL = NYUV2_13.index("floor"), NYUV2_13.index("wall")


def small_samples(label, depth=2000, measured=None):
    label = np.asarray(label, np.uint8)[None]
    depth = np.broadcast_to(np.uint16(depth), label.shape)
    return Samples(np.array(["000007"]), np.zeros((*label.shape, 3), np.uint8), depth, label, measured)


def test_counts_of_a_small_room():
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
    assert counts.meetings[WALL, FLOOR] == counts.meetings[FLOOR, WALL] == 31  # reach 1, down only
    assert counts.meetings.sum() == 62
    assert class_shares(counts).pixels[["floor", "wall"]].tolist() == [0.5, 0.5]
    assert class_shares(counts)["without depth"]["wall"] == pytest.approx(1 / 12)
    assert np.isnan(class_shares(counts)["without depth"]["tv"])


def test_filled_holes_count_as_missing():
    measured = np.ones((1, 24, 32), bool)
    measured[0, :6] = False
    counts = count_data(small_samples(np.full((24, 32), WALL), measured=measured))
    assert counts.depth[WALL, 0] == 6 * 32


def test_depth_beyond_the_scale_stays_in_the_last_step():
    counts = count_data(small_samples(np.full((4, 4), WALL), 65_000))
    assert counts.depth[WALL, -1] == 16


def test_quantiles_of_depth():
    histogram = np.zeros(101, int)
    histogram[0], histogram[11:21] = 1000, 5  # missing depth changes nothing; the rest is even from 1 to 2 m
    np.testing.assert_allclose(depth_quantiles(histogram, (0.1, 0.5, 0.9)), (1.1, 1.5, 1.9))


def test_most_validation_frames_of_split_random_have_their_scene_in_training():
    with open(TABLES / "nyuv2_split.csv") as file:
        ids = [row["id"] for row in csv.DictReader(file) if row["part"] == "train"]
    names = np.array(sorted(f"{int(number):06d}" for number in ids))
    image = np.zeros((len(names), 1, 1, 3), np.uint8)
    leakage = find_leakage(Samples(names, image, scene=number_runs(names)))
    shared = {split: (int(leak.same_scene.sum()), len(leak.valid)) for split, leak in leakage.items()}
    assert shared["random"] == (154, 159)
    assert shared["blocks"] == (0, 197)
    assert shared["scenes"][0] == 0


def test_leakage_finds_copies(scenes):
    twice = Samples(np.array([f"room {index:02d}" for index in range(24)]), np.concatenate([scenes.image] * 2))
    leakage = find_leakage(twice)
    assert set(leakage) == {"random"}  # names are no numbers, and scenes are unknown
    leak = leakage["random"]
    assert leak.same_scene is None
    assert len(leak.valid) + leak.train_count == 24
    twin_trains = ~np.isin((leak.valid + 12) % 24, leak.valid)
    assert twin_trains.any()
    np.testing.assert_array_equal(leak.match[twin_trains], (leak.valid[twin_trains] + 12) % 24)


def test_the_other_view_of_a_room_is_its_match(scenes):
    leak = find_leakage(scenes)["random"]
    for valid, match, shared in zip(leak.valid, leak.match, leak.same_scene, strict=True):
        assert shared == (scenes.scene[valid] == scenes.scene[match])
        assert shared == (abs(valid - match) == 1 and valid // 2 == match // 2)
    assert find_leakage(scenes)["blocks"].same_scene.sum() == 0
    titles = {
        f"{scenes.names[v]}, {scenes.names[m]}" for v, m in zip(leak.valid, leak.match, strict=True) if v // 2 == m // 2
    }
    assert {"validation", "training"} | titles <= set(draw(plot_leaks(scenes, leak)))


def test_chance_alone_gives_near_copies():
    leak = Leakage(5000, np.arange(10), np.arange(10), None, 4)
    assert leak.by_chance == pytest.approx(10 * (1 - (1 - CHANCE) ** 5000))
    assert describe_leakage({"random": leak}) == (
        "Split `random`: 10 validation images; near copies in training: 4 (3.9 by chance)."
    )
    assert describe_leakage({}) == "Too few images to split."


def test_findings_of_the_data_come_from_the_counts(scenes):
    labelled = scenes.label[scenes.label != 255]
    text = describe_data(count_data(scenes), {})
    assert f"{np.mean(scenes.label == 255):.1%} of the pixels are unlabelled" in text
    assert f"{np.mean(labelled == WALL):.1%} are wall, the most common class" in text
    assert f"{np.mean(scenes.depth == 0):.1%} of the pixels have none" in text


def test_data_without_depth(scenes):
    without = replace(scenes, depth=None)
    counts = count_data(without)
    assert counts.depth[:, 1:].sum() == 0
    assert "depth" not in describe_data(counts, {})
    batch = next(iter(training_loader(without, "exp061", 2, 0, 42)))
    for figure in (plot_samples(without[:2]), plot_batch(without, batch)):
        texts = draw(figure)
        assert "labels" in texts
        assert "depth (m)" not in texts


@pytest.mark.parametrize("count", SETS)
def test_figures_have_room_for_any_class_set(scenes, count):
    samples = relabel(scenes, count)
    counts = count_data(samples)
    draw(plot_samples(samples[:2]))
    draw(plot_batch(samples, next(iter(training_loader(samples, "exp061", 2, 0, 42)))))
    assert any("times as many pixels as" in text for text in draw(plot_class_shares(counts)))
    assert any(text.startswith("All pixels: nine in ten from ") for text in draw(plot_depth(counts)))
    assert "meets" in draw(plot_meetings(counts))

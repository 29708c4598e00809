"""Tool exports and public data sets are read with the dataset.yaml in lib/data/README.md, and scored."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lib
from lib.data import iterate_samples, load_samples
from lib.evaluation import evaluate
from lib.metrics import mean_iou
from lib.model import build_model

README = (Path(lib.__file__).parent / "data" / "README.md").read_text()
NAMES = ["a", "b", "c", "d", "e", "f"]
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (24, 32, 3), np.uint8) for _ in NAMES]
LABELS = [np.kron(RNG.permutation([0, 1, 2, 1]).reshape(2, 2), np.ones((12, 16), np.uint8)) for _ in NAMES]
DEPTHS = [RNG.integers(1500, 4000, (24, 32)).astype(np.uint16) for _ in NAMES]


def blocks(tool, language):
    section = README.split(f"### {tool}\n")[1].split("\n#")[0]
    assert len(section.strip().splitlines()) <= 35
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def describe(root, tool):
    (text,) = blocks(tool, "yaml")
    assert len(text.splitlines()) <= 10
    (root / "dataset.yaml").write_text(text)


def save(root, pattern, arrays, palette=None):
    for number, (name, array) in enumerate(zip(NAMES, arrays, strict=True)):
        path = root / pattern.format(name=name, number=number, task=number + 1, scene=number // 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.asarray(array, np.uint16 if array.dtype == np.uint16 else np.uint8))
        if palette is not None:
            picture.putpalette(palette)
        picture.save(path)


def score(root, split="train"):
    """Load the data with and without a size, and return the mIoU and evaluation of an untrained network."""
    samples = load_samples(root, split, "none" if split == "train" else "auto", (24, 32))
    torch.manual_seed(0)
    config = {"inputs": "rgb", "size": (24, 32), "depth_head": False}
    model = build_model(encoder="tu-test_resnet.r160_in1k", classes=samples.classes, **config)
    found = evaluate(model, iterate_samples(root, split, "none" if split == "train" else "auto"))
    return mean_iou(found.counts), found


def expect(root, classes, labels, split="train"):
    samples = load_samples(root, split, "none" if split == "train" else "auto")
    assert samples.classes == tuple(classes)
    np.testing.assert_array_equal(samples.label, labels)
    value, found = score(root, split)
    assert 0 <= value <= 1
    assert found.counts.sum() == sum((label != 255).sum() for label in labels)


def test_cvat_export_is_read_and_scored(tmp_path):
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
    save(tmp_path, "JPEGImages/{name}.jpg", IMAGES)
    save(tmp_path, "SegmentationClass/{name}.png", [colours[label] for label in LABELS])
    save(tmp_path, "SegmentationObject/{name}.png", [colours[label] for label in LABELS])
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nchair:128,0,0::\ntable:0,128,0::\n"
    )
    names = tmp_path / "ImageSets" / "Segmentation" / "default.txt"
    names.parent.mkdir(parents=True)
    names.write_text("\n".join(NAMES))
    describe(tmp_path, "CVAT")
    expect(tmp_path, ("background", "chair", "table"), LABELS)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_roboflow_export_is_read_and_scored(tmp_path, split):
    for place in ("train", "valid", "test"):
        save(tmp_path, f"{place}/{{name}}_jpg.rf.0a1b.jpg", IMAGES)
        save(tmp_path, f"{place}/{{name}}_jpg.rf.0a1b_mask.png", LABELS)
        (tmp_path / place / "_classes.csv").write_text(
            "Pixel Value, Class\n0, background\n1, chair\n2, table\n"
        )
    describe(tmp_path, "Roboflow")
    expect(tmp_path, ("background", "chair", "table"), LABELS, split)


def test_label_studio_export_is_read_and_scored(tmp_path):
    binary = [np.where(label == 1, 255, 0) for label in LABELS]
    save(tmp_path, "image/{name}.jpg", IMAGES)
    save(tmp_path, "masks/task-{task}-annotation-7{task}-by-1-tag-chair-0.png", binary)
    export = [
        {"id": number + 1, "data": {"image": f"/data/upload/1/{name}.jpg"}}
        for number, name in enumerate(NAMES)
    ]
    (tmp_path / "export.json").write_text(json.dumps(export))
    (code,) = blocks("Label Studio", "python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    describe(tmp_path, "Label Studio")
    expect(tmp_path, ("background", "chair"), [label == 1 for label in LABELS])


def test_labelme_export_is_read_and_scored(tmp_path):
    save(tmp_path, "JPEGImages/{name}.jpg", IMAGES)
    labels = [label.copy() for label in LABELS]
    labels[2][0] = 255  # __ignore__
    palette = np.random.default_rng(1).integers(0, 256, 768).tolist()
    save(tmp_path, "SegmentationClassPNG/{name}.png", labels, palette)
    save(tmp_path, "SegmentationClassVisualization/{name}.jpg", IMAGES)
    (tmp_path / "class_names.txt").write_text("_background_\nchair\ntable\n")
    describe(tmp_path, "labelme")
    expect(tmp_path, ("background", "chair", "table"), labels)


def test_scannet_layout_is_read_and_scored(tmp_path):
    raw = [np.where(label == 2, 3, label + 1).astype(np.uint16) for label in LABELS]
    raw[0][:2] = 1163
    save(tmp_path, "scans/scene000{scene}_00/color/{number}.jpg", IMAGES)
    save(tmp_path, "scans/scene000{scene}_00/depth/{number}.png", DEPTHS)
    save(tmp_path, "scans/scene000{scene}_00/label-filt/{number}.png", raw)
    (tmp_path / "scans" / "scene0000_00" / "scene0000_00.txt").write_text("axisAlignment = 1\n")
    describe(tmp_path, "ScanNet")
    labels = [label.copy() for label in LABELS]
    labels[0][:2] = 255
    expect(tmp_path, ("wall", "chair", "floor"), labels)
    train = load_samples(tmp_path, "train", "none")
    np.testing.assert_array_equal(train.depth, DEPTHS)
    assert list(train.scene) == ["scene0000_00"] * 3 + ["scene0001_00"] * 3


def test_cityscapes_layout_is_read_and_scored(tmp_path):
    ids = np.array([7, 8, 11], np.uint8)
    for place in ("train", "val", "test"):
        save(tmp_path, f"leftImg8bit/{place}/aachen{{scene}}/{{name}}_leftImg8bit.png", IMAGES)
        values = [np.full_like(label, 3) if place == "test" else ids[label] for label in LABELS]
        save(tmp_path, f"gtFine/{place}/aachen{{scene}}/{{name}}_gtFine_labelIds.png", values)
        save(tmp_path, f"gtFine/{place}/aachen{{scene}}/{{name}}_gtFine_color.png", IMAGES)
    describe(tmp_path, "Cityscapes")
    expect(tmp_path, ("road", "sidewalk", "building"), LABELS)
    expect(tmp_path, ("road", "sidewalk", "building"), LABELS, "valid")
    assert (load_samples(tmp_path, "test").label == 255).all()  # held back
    valid = iterate_samples(tmp_path, "valid")
    assert (valid.validation, sorted(set(valid.scene))) == ("predefined", ["aachen0", "aachen1"])


def test_default_layout_without_depth_is_read_and_scored(tmp_path):
    """The first layout in the README. Without a dataset.yaml, the classes are those of NYUv2."""
    tree = README.split("## A folder\n")[1].split("```\n")[1]
    assert tree.splitlines()[0].startswith("DATA/train/image/kitchen/0001.jpg")
    save(tmp_path, "train/image/kitchen/{name}.jpg", IMAGES)
    save(tmp_path, "train/label/kitchen/{name}.png", LABELS)
    save(tmp_path, "test/image/kitchen/{name}.jpg", IMAGES)
    assert load_samples(tmp_path, "test").label is None
    train = load_samples(tmp_path, "train", "none")
    assert train.depth is None
    assert list(train.names) == [f"kitchen/{name}" for name in NAMES]
    (tmp_path / "dataset.yaml").write_text("first_label: 0")
    assert 0 <= score(tmp_path)[0] <= 1

import json
from copy import deepcopy
from functools import cache
from itertools import product

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import interpolate

from lib import export
from lib.batches import encode_inputs
from lib.classes import NYUV2_13
from lib.data import Samples
from lib.data.samples import resize_image, resize_nearest
from lib.evaluation import evaluate
from lib.export import export_onnx
from lib.model import build_model


def network(inputs, classes, architecture, size=(64, 96)):
    """A tiny network that predicts every class, like a trained one."""
    torch.manual_seed(0)
    model = build_model(
        inputs=inputs, classes=classes, architecture=architecture, encoder="tu-test_efficientnet", size=size
    )
    image, depth = (
        torch.tensor(np.stack(arrays))
        for arrays in zip(*(camera(size, seed) for seed in range(8)), strict=True)
    )
    encoded = encode_inputs(image, depth.float(), model.config)
    with torch.no_grad():
        for _ in range(10):
            model.train()(encoded)  # adapts the normalisation statistics to such images
        logits = model.eval()(encoded).logits
        head = model.net.segmentation_head[0]
        head.bias -= logits.mean((0, 2, 3))
        for weights in (head.weight, head.bias):
            weights *= 3 / logits.std()
    return model


def camera(size, seed=0):
    """A camera-like image, smooth with noise, and depth with holes."""
    rng = np.random.default_rng(seed)
    image = resize_image(rng.integers(0, 200, (9, 11, 3), np.uint8), size) + rng.integers(
        0, 50, (*size, 3), np.uint8
    )
    depth = resize_nearest(rng.integers(600, 12000, (9, 11), np.uint16), size)
    depth[rng.random(size) < 0.1] = 0
    return image, depth


def run(session, image, depth):
    feeds = {"image": image[None], "depth": depth[None]}
    return session.run(None, {taken.name: feeds[taken.name] for taken in session.get_inputs()})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Function that builds and exports a network. It is cached, because exporting takes seconds."""

    @cache
    def make(inputs, classes, architecture):
        model, path = (
            network(inputs, classes, architecture),
            tmp_path_factory.mktemp("exported") / "network.onnx",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(path.parent))
            assert export_onnx(model, "~/network.onnx") >= 0.999
        return model, path

    return make


THREE = ("bed", "wall", "floor")
# each input, number of classes and architecture at least once; the other eight are slow
COMBINATIONS = (
    ("rgb", NYUV2_13, "fpn"),
    ("rgbd", THREE, "deeplabv3plus"),
    ("rgbd_xy", NYUV2_13, "deeplabv3plus"),
    ("rgbd_xy", THREE, "fpn"),
)
OTHERS = set(product(("rgb", "rgbd", "rgbd_xy"), (NYUV2_13, THREE), ("deeplabv3plus", "fpn"))) - set(
    COMBINATIONS
)


@pytest.mark.parametrize(
    ("inputs", "classes", "architecture"),
    [*COMBINATIONS, *(pytest.param(*others, marks=pytest.mark.slow) for others in sorted(OTHERS))],
)
def test_onnx_labels_match_evaluate(exported, inputs, classes, architecture):
    model, path = exported(inputs, classes, architecture)
    session = onnxruntime.InferenceSession(path)
    assert [taken.name for taken in session.get_inputs()] == ["image", "depth"][: 1 + (inputs != "rgb")]
    assert [given.name for given in session.get_outputs()] == ["labels", "confidence"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(classes)
    # the third is the working size, the last is enlarged
    for size in ((427, 561), (128, 192), (64, 96), (40, 300)):
        image, depth = camera(size)
        labels, confidence = run(session, image, depth)
        samples = Samples(np.array(["camera"]), image[None], depth[None], classes=classes)
        expected = evaluate(model, samples).predicted
        assert len(np.unique(expected)) == len(classes)
        assert (labels.dtype, labels.shape) == (np.uint8, (1, *size))
        assert (confidence.dtype, confidence.shape) == (np.float32, (1, *size))
        assert (labels == expected).mean() >= 0.999, size
        assert confidence.min() >= 1 / len(classes) - 1e-5
        assert confidence.max() <= 1


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((427, 561), (96, 128)), ((480, 640), (240, 320)), ((480, 640), (96, 128)), ((576, 768), (96, 128)),
        ((96, 128), (96, 128)), ((480, 640), (480, 320)), ((1, 1), (4, 4)), ((90, 99), (96, 128)),
    ],
)  # fmt: skip
def test_torch_resizing_equals_opencv_exactly(size, to):
    image, depth = camera(size)
    np.testing.assert_array_equal(
        export.resize_image(torch.tensor(image)[None], to)[0], resize_image(image, to)
    )
    np.testing.assert_array_equal(
        export.resize_depth(torch.tensor(depth)[None], to)[0], resize_nearest(depth, to)
    )


@pytest.mark.parametrize(
    ("size", "to"),
    [((97, 640), (96, 96)), ((1203, 1777), (96, 128)), ((480, 640), (64, 96)), ((40, 300), (96, 128))],
)
def test_resized_values_that_end_in_a_half_differ_by_at_most_1(size, to):
    image, depth = camera(size)
    difference = export.resize_image(torch.tensor(image)[None], to)[0].numpy() - resize_image(image, to)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.002
    np.testing.assert_array_equal(
        export.resize_depth(torch.tensor(depth)[None], to)[0], resize_nearest(depth, to)
    )


def test_export_is_refused_if_resizing_differs(exported, tmp_path, monkeypatch):
    """Images are shrunk bilinearly instead of by area means."""

    def shrink(image, size):
        return interpolate(image.permute(0, 3, 1, 2).float(), size, mode="bilinear").permute(0, 2, 3, 1)

    model, _ = exported("rgb", NYUV2_13, "fpn")
    monkeypatch.setattr(export, "resize_image", shrink)
    with pytest.raises(ValueError, match="not written"):
        export_onnx(model, tmp_path / "network.onnx")


def test_export_is_refused_if_labels_disagree(exported, tmp_path, monkeypatch):
    model, path = exported("rgb", NYUV2_13, "fpn")
    monkeypatch.setattr(export, "_convert", lambda model: path.read_bytes())
    other = deepcopy(model)
    other.net.segmentation_head[0].bias.data[0] += 1
    with pytest.raises(
        ValueError, match="network.onnx: not written; .* agree on .* of the pixels, expected 99.9 %"
    ):
        export_onnx(other, tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())

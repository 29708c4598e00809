import json
import os
import pickle
import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from small_run import ENCODER, PARAMETERS

from lib.classes import NYUV2_13
from lib.files import CheckpointError
from lib.model import build_model, load_encoder_weights, weights_digest
from lib.runs import open_run
from lib.runs.results import recipe

INPUT_CHANNELS = {"rgb": 3, "depth": 1, "rgbd": 4, "rgbd_xy": 6}

TIMM_NAME = ENCODER.removeprefix("tu-")


@pytest.fixture(scope="module")
def classifier():
    """timm's model of the tiny encoder, including its head of 1,000 classes."""
    torch.manual_seed(5)
    return timm.create_model(TIMM_NAME, pretrained=False)


def filled(path, **config):
    return build_model(
        classes=NYUV2_13, **{"encoder": ENCODER, "inputs": "rgb", "encoder_weights": str(path)} | config
    ).net.encoder


def refused(path, **config):
    with pytest.raises(CheckpointError) as error:
        filled(path, **config)
    assert str(error.value).startswith(f"encoder_weights: {path}")
    return str(error.value)


def assert_filled(encoder, expected):
    """Assert that every tensor of the encoder equals timm's."""
    found = encoder.model.state_dict()
    assert len(found) > 50
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def as_smp_saves(weights):
    """Names as in a whole network of segmentation-models-pytorch, decoder included."""
    return {f"encoder.model.{name}": tensor for name, tensor in weights.items()} | {
        "decoder.block": torch.ones(2, 2)
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {}},
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {f"backbone.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()},
        as_smp_saves,
        lambda weights: {
            "state_dict": {f"module.{name}": tensor for name, tensor in as_smp_saves(weights).items()}
        },
    ],
    ids=[
        "timm",
        "state_dict",
        "model",
        "module.",
        "backbone.",
        "smp encoder",
        "smp network",
        "smp in parallel",
    ],
)
def test_weight_names_of_timm_and_smp_are_accepted(tmp_path, classifier, wrap):
    weights = classifier.state_dict()
    torch.save(wrap(weights), tmp_path / "weights.pth")
    assert_filled(filled(tmp_path / "weights.pth"), weights)


@pytest.mark.parametrize(
    ("encoder", "deeper"),
    [("resnet18", "resnet34"), ("tu-resnet18", "resnet34"), ("tu-lcnet_050", "lcnet_050")],
)
def test_weights_of_a_deeper_network_are_refused(tmp_path, encoder, deeper):
    """All tensors of a ResNet-18 have the names and shapes of a ResNet-34's, but not their values."""
    weights = timm.create_model(deeper, pretrained=False).state_dict()
    if deeper == "lcnet_050":  # a block more than there are
        weights["blocks.4.9.conv_pw.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth", encoder=encoder, architecture="unet")
    assert "of further blocks, such as " in message


def test_blocks_that_timm_leaves_out_of_an_encoder_are_ignored(tmp_path):
    weights = timm.create_model("ghostnet_100", pretrained=False).state_dict()
    left_out = [name for name in weights if name.startswith("blocks.8.")]
    assert left_out
    drawn = []
    for kept in (weights, {name: weights[name] for name in weights if name not in left_out}):
        torch.save(kept, tmp_path / "weights.pth")
        torch.manual_seed(0)
        encoder = filled(tmp_path / "weights.pth", encoder="tu-ghostnet_100", architecture="unet")
        found = encoder.model.state_dict()["blocks_0.0.ghost1.primary_conv.0.weight"]
        torch.testing.assert_close(found, weights["blocks.0.0.ghost1.primary_conv.0.weight"], rtol=0, atol=0)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]  # the check draws nothing from the run's generator


def test_safetensors_weights_are_loaded(tmp_path, classifier):
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    assert_filled(filled(tmp_path / "weights.safetensors"), classifier.state_dict())


def test_weights_of_native_smp_encoder_are_loaded(tmp_path):
    pretrained = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    torch.save(pretrained, tmp_path / "weights.pth")
    found = filled(tmp_path / "weights.pth", encoder="resnet18").state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, pretrained[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout"])
def test_weights_load_despite_timm_feature_renaming(tmp_path, name):
    """timm's feature extractors call `stem.0` `stem_0`, and `stages.0` `stages_0`."""
    whole = timm.create_model(name, pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    encoder = filled(tmp_path / "weights.pth", encoder=f"tu-{name}", architecture="fpn")
    expected = {tensor.double().sum().item() for tensor in whole.state_dict().values()}
    assert {tensor.double().sum().item() for tensor in encoder.state_dict().values()} <= expected


@pytest.mark.parametrize("inputs", INPUT_CHANNELS)
@pytest.mark.parametrize("name", [TIMM_NAME, "repvgg_a0"])  # the input of repvgg goes to two layers
def test_first_layers_adapt_like_timm_pretrained_weights(tmp_path, inputs, name):
    torch.save(timm.create_model(name, pretrained=False).state_dict(), tmp_path / "weights.pth")
    options = {"file": str(tmp_path / "weights.pth"), "hf_hub_id": None}
    theirs = timm.create_model(
        name, pretrained=True, in_chans=INPUT_CHANNELS[inputs], pretrained_cfg_overlay=options
    ).state_dict()
    encoder = filled(tmp_path / "weights.pth", inputs=inputs, encoder=f"tu-{name}", architecture="fpn")
    assert_filled(encoder, {name.replace("stages.", "stages_"): tensor for name, tensor in theirs.items()})


def test_a_weights_file_draws_no_random_numbers(tmp_path, classifier):
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    drawn = []
    for path in (None, str(tmp_path / "weights.pth")):
        torch.manual_seed(0)
        build_model(classes=NYUV2_13, encoder=ENCODER, encoder_weights=path)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("inputs", INPUT_CHANNELS)
def test_first_layer_adapts_like_smp_pretrained_weights(tmp_path, monkeypatch, inputs):
    pretrained = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    torch.save(pretrained, tmp_path / "weights.pth")
    save_file(pretrained, tmp_path / "hub.safetensors")
    monkeypatch.setattr(smp.encoders, "hf_hub_download", lambda *_, **__: str(tmp_path / "hub.safetensors"))
    theirs = smp.encoders.get_encoder("resnet18", INPUT_CHANNELS[inputs], weights="imagenet").state_dict()
    ours = filled(tmp_path / "weights.pth", encoder="resnet18", inputs=inputs).state_dict()
    torch.testing.assert_close(ours["conv1.weight"], theirs["conv1.weight"], rtol=0, atol=1e-7)


def test_weights_of_another_encoder_are_refused(tmp_path, classifier):
    path = tmp_path / "weights.pth"
    torch.save(smp.encoders.get_encoder("resnet18", weights=None).state_dict(), path)
    message = refused(path)
    assert (
        "does not fill the 90 tensors of the encoder: 28 missing, such as model.conv1.0.weight, model."
        in message
    )
    assert "; 47 of another shape, such as model.bn1.weight (64,) instead of (32,), model." in message
    assert message.endswith(
        "expected the weights of exactly this encoder, with names as in timm or segmentation-models-pytorch"
    )
    weights = classifier.state_dict()
    torch.save(weights | {"layer2.0.conv1.weight": torch.ones(3, 3)}, path)
    message = refused(path)
    assert (
        "encoder: 1 of another shape, such as model.layer2.0.conv1.weight (3, 3) instead of (48, 32, 3, 3); exp"
        in message
    )
    assert "missing" not in message
    assert "unexpected" not in message  # the classifier's head is ignored
    del weights["layer4.0.bn2.running_var"]  # one missing tensor is enough
    torch.save(weights, path)
    assert "encoder: 1 missing, such as model.layer4.0.bn2.running_var; " in refused(path)


def test_first_layer_weights_must_match_the_inputs(tmp_path, classifier):
    six = timm.create_model(TIMM_NAME, pretrained=False, in_chans=6)
    torch.save(six.state_dict(), tmp_path / "weights.pth")
    assert "model.conv1.0.weight (16, 6, 3, 3) instead of (16, 3, 3, 3)" in refused(tmp_path / "weights.pth")
    assert_filled(filled(tmp_path / "weights.pth", inputs="rgbd_xy"), six.state_dict())


def test_weights_of_an_unrelated_network_are_refused(tmp_path):
    classifier = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 10))
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth")
    assert "75 missing, such as model.conv1.0.weight" in message
    assert "; expected the weights of exactly this encoder" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_weights_are_refused(tmp_path, classifier, suffix):
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(classifier.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "can't be read as weights (" in refused(path)
    assert "it is truncated, or contains code" in refused(path)


class Burglar:
    """A malicious pickle: loading it carelessly creates a folder."""

    def __init__(self, touched):
        self.touched = str(touched)

    def __reduce__(self):
        return os.mkdir, (self.touched,)


def test_code_in_a_weights_file_is_not_executed(tmp_path, classifier):
    path, touched = tmp_path / "weights.pth", tmp_path / "touched"
    for content in (Burglar(touched), classifier.state_dict() | {"more": Burglar(touched)}):
        torch.save(content, path)
        assert "contains code, which is not executed here: save only the state_dict" in refused(path)
        path.write_bytes(pickle.dumps(content, protocol=2))
        assert "contains code" in refused(path)
        assert not touched.exists()
    pickle.loads(path.read_bytes())  # check that plain pickle does execute it
    assert touched.exists()


def test_pickled_network_is_refused(tmp_path, classifier):
    torch.save(classifier, tmp_path / "weights.pth")
    assert "save only the state_dict" in refused(tmp_path / "weights.pth")


def test_files_without_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    assert refused(path) == f"encoder_weights: {path}: no such file"
    torch.save([torch.ones(2)], path)
    assert "can't be read as weights" in refused(path)
    torch.save({"epoch": 3}, path)
    assert "does not fill the" in refused(path)
    torch.save({}, path)
    assert "75 missing" in refused(path)


def test_run_identifies_weights_by_content_not_path(tmp_path, monkeypatch, classifier):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    here, there, other = (tmp_path / name for name in ("here.pth", "there.safetensors", "other.pth"))
    torch.save(classifier.state_dict(), here)
    there.write_bytes(here.read_bytes())
    torch.save(classifier.state_dict() | {"more": torch.ones(1)}, other)
    saved = []
    for path in (here, there, other):
        with open_run(PARAMETERS | {"run_name": path.stem, "encoder_weights": str(path)}) as run:
            saved.append(json.loads((run / "parameters.json").read_text()))
    assert saved[0]["encoder_weights_digest"] == weights_digest(str(here))
    assert re.fullmatch("[0-9a-f]{64}", saved[0]["encoder_weights_digest"])
    assert recipe(saved[0]) == recipe(saved[1]) != recipe(saved[2])
    with open_run(PARAMETERS | {"run_name": "here", "encoder_weights": str(there)}, resume=True) as run:
        assert run.name == "here"
    changed = PARAMETERS | {"run_name": "here", "encoder_weights": str(other)}
    with (
        pytest.raises(
            ValueError, match="'here' was started with encoder_weights = .*, encoder_weights_digest = "
        ),
        open_run(changed, resume=True),
    ):
        pass


@pytest.mark.parametrize("architecture", ["pspnet", "deeplabv3plus"])
def test_named_weights_fill_an_encoder_of_any_depth(monkeypatch, classifier, architecture):
    """The encoder of pspnet has fewer stages than the one whose weights are fetched."""
    create_model = timm.create_model

    def create_pretrained(*arguments, pretrained=False, **options):
        model = create_model(*arguments, pretrained=False, **options)
        if pretrained:
            model.load_state_dict(classifier.state_dict(), strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", create_pretrained)
    encoder = filled("imagenet", architecture=architecture)
    for name, tensor in encoder.model.state_dict().items():
        torch.testing.assert_close(tensor, classifier.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("encoder", ["tu-vovnet39a", "tu-darknet17"])
def test_timm_models_without_pretrained_weights_are_reported(encoder):
    with pytest.raises(ValueError, match=f"^encoder_weights: found 'imagenet', {encoder} has none; or None"):
        load_encoder_weights(torch.nn.Identity(), "imagenet", encoder, 3)


def test_named_and_absent_weights_have_no_digest():
    assert weights_digest(None) is weights_digest("imagenet") is None

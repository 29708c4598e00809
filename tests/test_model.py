from dataclasses import asdict, replace

import huggingface_hub.errors
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from lib.classes import NYUV2_13, NYUV2_40
from lib.files import CheckpointError
from lib.model import ARCHITECTURES, ModelConfig, build_model, load_model, save_model

INPUT_CHANNELS = {"rgb": 3, "depth": 1, "rgbd": 4, "rgbd_xy": 6}

TINY = "tu-test_resnet.r160_in1k"


def tiny(**config):
    return build_model(**{"encoder": TINY, "classes": NYUV2_13} | config).eval()


@pytest.mark.parametrize("size", [(96, 128), (97, 130), (33, 47)])
def test_output_size_equals_input_size(size):
    prediction = tiny()(torch.randn(2, 4, *size))
    assert prediction.logits.shape == (2, 13, *size)
    assert prediction.depth.shape == (2, 1, *size)


@pytest.mark.parametrize(
    ("inputs", "classes"), [*zip(INPUT_CHANNELS, (NYUV2_40, NYUV2_13, ("a", "b"), NYUV2_13), strict=True)]
)
def test_network_has_configured_channels_and_classes(inputs, classes):
    model = tiny(inputs=inputs, classes=classes, depth_head=False)
    assert model.config == ModelConfig(classes=classes, inputs=inputs, encoder=TINY, depth_head=False)
    prediction = model(torch.randn(1, INPUT_CHANNELS[inputs], 32, 32))
    assert prediction.logits.shape == (1, len(classes), 32, 32)
    assert prediction.depth is None


def test_forward_equals_bare_net_if_no_padding_is_needed():
    model, inputs = tiny(), torch.randn(1, 4, 64, 64)
    torch.testing.assert_close(model(inputs).logits, model.net(inputs))


def test_encoder_has_output_stride_16():
    """The last stage is dilated: it keeps the resolution of the one before."""
    for encoder in (TINY, "resnet18"):
        features = tiny(encoder=encoder).net.encoder(torch.randn(1, 4, 64, 64))
        assert [feature.shape[-1] for feature in features] == [64, 32, 16, 8, 4, 4]


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2", "efficientnet-b0", "mit_b0"])
def test_supported_encoders_build_and_predict(encoder):
    assert build_model(classes=NYUV2_13, encoder=encoder).eval()(torch.randn(1, 4, 50, 70)).logits.shape == (
        1,
        13,
        50,
        70,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_heads_match_input_size_in_every_architecture(architecture):
    model = tiny(architecture=architecture, size=(129, 150), classes=("a", "b", "c"))
    prediction = model(torch.randn(1, 4, 129, 150))
    assert prediction.logits.shape == (1, 3, 129, 150)
    assert prediction.depth.shape == (1, 1, 129, 150)
    assert prediction.logits.std(dim=(2, 3)).min() > 0
    assert prediction.depth.std() > 0


@pytest.mark.parametrize("architecture", ["fpn", "unet", "upernet"])
def test_both_heads_share_decoder_features(architecture):
    """With the weights of one class, the depth head outputs the logits of that class."""
    model, inputs = tiny(architecture=architecture), torch.randn(2, 4, 50, 70)
    ours, theirs = model.depth_head[0], model.net.segmentation_head[0]
    ours.bias.data, width = theirs.bias.data[3:4], theirs.kernel_size[0]  # width 1 or 3
    ours.weight.data = F.pad(theirs.weight.data[3:4], [(3 - width) // 2] * 4)
    prediction = model(inputs)
    torch.testing.assert_close(prediction.depth, prediction.logits[:, 3:4])
    assert prediction.depth.std() > 0


def test_unsupported_architecture_error_lists_alternatives():
    with pytest.raises(
        ValueError, match="densenet121.* can't be used in deeplabv3plus .*architecture fpn, unet or"
    ):
        build_model(classes=NYUV2_13, encoder="densenet121")
    assert (
        build_model(classes=NYUV2_13, encoder="densenet121", architecture="fpn").config.architecture == "fpn"
    )
    with pytest.raises(
        ValueError, match="architecture: found 'deeplab', expected one of deeplabv3, deeplabv3plus, fpn, "
    ):
        build_model(classes=NYUV2_13, architecture="deeplab")
    with pytest.raises(ValueError, match="architecture: found 'dpt', expected one of "):
        build_model(classes=NYUV2_13, architecture="dpt")


def test_depth_head_is_one_linear_convolution():
    torch.manual_seed(0)
    model = tiny()
    convolution = model.depth_head[0]
    assert (convolution.in_channels, convolution.out_channels, convolution.kernel_size) == (256, 1, (3, 3))
    convolution.bias.data.fill_(-1e6)
    assert model(torch.randn(1, 4, 64, 64)).depth.max() < 0  # no final activation


def test_both_heads_train_the_encoder():
    model = tiny().train()
    for head in ("logits", "depth"):
        model.zero_grad()
        getattr(model(torch.randn(2, 4, 32, 32)), head).square().mean().backward()
        assert next(model.net.encoder.parameters()).grad.abs().sum() > 0


def test_unknown_or_unsupported_encoder_and_unknown_weights_are_refused():
    with pytest.raises(
        ValueError, match="encoder: found 'resnet81', did you mean resnet18, .* there are: resnet18, "
    ):
        build_model(classes=NYUV2_13, encoder="resnet81")
    with pytest.raises(ValueError, match="encoder: found 'tu-nonsense', did you mean tu-"):
        build_model(classes=NYUV2_13, encoder="tu-nonsense")
    with pytest.raises(
        ValueError,
        match="encoder: 'vgg11' can't be used .*dilated mode.* resnet18 works with nearly every architecture",
    ):
        build_model(classes=NYUV2_13, encoder="vgg11")
    with pytest.raises(
        ValueError,
        match="encoder_weights: found 'foo', resnet18 has imagenet, ssl, swsl; or None, or the path",
    ):
        build_model(classes=NYUV2_13, encoder_weights="foo")
    with pytest.raises(ValueError, match="encoder_weights: found 'foo', tu-resnet18 has imagenet; or None"):
        build_model(classes=NYUV2_13, encoder="tu-resnet18", encoder_weights="foo")


@pytest.mark.parametrize("encoder", ["tu-swin_tiny_patch4_window7_224", "tu-coatnet_0_rw_224"])
def test_unsupported_input_size_is_refused(encoder):
    """Otherwise a wrong size fails at the first step, after an older run of that name was moved away."""
    options = {"classes": NYUV2_13, "encoder": encoder, "architecture": "fpn"}
    message = f"encoder: '{encoder}' can't be used in fpn at 96x128 .* set image_height and image_width to it"
    with pytest.raises(ValueError, match=message):
        build_model(size=(96, 128), **options)
    if "swin" in encoder:
        assert build_model(size=(224, 224), **options).training


@pytest.mark.parametrize("architecture", ["unet", "fpn"])
def test_encoder_that_raises_an_index_error_is_refused(architecture):
    with pytest.raises(
        ValueError, match=f"encoder: 'tu-nest_tiny' can't be used in {architecture} at 96x128"
    ):
        build_model(classes=NYUV2_13, encoder="tu-nest_tiny", architecture=architecture)


def test_offline_error_explains_how_to_get_weights(monkeypatch):
    def offline(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", offline)
    with pytest.raises(
        RuntimeError, match=r"could not be fetched .*while online, .*or .*`-p encoder_weights None`"
    ):
        build_model(classes=NYUV2_13, encoder_weights="imagenet")


@pytest.mark.parametrize("inputs", INPUT_CHANNELS)
def test_pretrained_first_layer_adapts_to_input_channels(monkeypatch, tmp_path, inputs):
    pretrained = smp.encoders.get_encoder("resnet18", weights=None)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(pretrained.state_dict(), path)
    monkeypatch.setattr(smp.encoders, "hf_hub_download", lambda *arguments, **options: str(path))
    model = build_model(
        classes=NYUV2_13, inputs=inputs, encoder_weights="imagenet", rgb_normalisation="exp061"
    )
    encoder = model.net.encoder
    first, channels = pretrained.conv1.weight, INPUT_CHANNELS[inputs]
    if inputs == "depth":
        torch.testing.assert_close(encoder.conv1.weight, first.sum(1, keepdim=True))
    else:
        for channel in range(channels):
            torch.testing.assert_close(encoder.conv1.weight[:, channel], first[:, channel % 3] * 3 / channels)
    torch.testing.assert_close(encoder.layer4[1].conv2.weight, pretrained.layer4[1].conv2.weight)
    assert encoder.layer4[0].conv1.stride == (1, 1)  # dilated


def test_save_and_load_preserve_weights_and_config(tmp_path):
    config = {
        "classes": ("floor", "wall", "else"), "inputs": "rgbd_xy", "depth_encoding": "log",
        "depth_range_m": (0.3, 5.0), "size": (48, 64), "depth_head": False,
    }  # fmt: skip
    model = tiny(**config)
    save_model(model, tmp_path / "best.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    inputs, loaded = torch.randn(1, 6, 32, 32), load_model(str(tmp_path / "best.pt"))
    assert torch.equal(loaded(inputs).logits, model(inputs).logits)
    assert loaded.config == ModelConfig(encoder=TINY, **{"classes": NYUV2_13} | config)
    assert not loaded.training


UNREADABLE = (
    "can't be read ({}), expected a checkpoint that train.ipynb wrote; it is truncated or from another program: "
    "copy it again, or train again with resume False"
)
UNKNOWN = (
    "found {}, expected config, weights; it is from another version or another program: "
    "train again with resume False, or use the version that wrote it"
)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", UNREADABLE.format("no such file")),
        ("cut", UNREADABLE.format("RuntimeError")),
        ("empty", UNREADABLE.format("EOFError")),
        ("another", UNKNOWN.format("state, weights")),
        ("list", UNKNOWN.format("list")),
    ],
)
def test_unreadable_checkpoint_is_refused_with_a_remedy(tmp_path, damage, message):
    path = tmp_path / "best.pt"
    if damage != "missing":
        save_model(tiny(), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "another":
        torch.save({"weights": {}, "state": 1}, path)
    if damage == "list":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("config", [{"inputs": "rgb"}, {"classes": NYUV2_40}])
def test_checkpoint_weights_must_match_its_config(tmp_path, config):
    other = asdict(replace(tiny().config, **config))
    torch.save({"config": other, "weights": tiny().state_dict()}, tmp_path / "best.pt")
    with pytest.raises(
        CheckpointError, match=r"(?s)best.pt: its weights do not fit the network it describes .*weight"
    ):
        load_model(tmp_path / "best.pt")


def test_checkpoint_config_of_another_version_is_refused(tmp_path):
    for config in (
        asdict(tiny().config) | {"heads": 3},
        {"inputs": "smell"},
        {"input_channels": 4, "class_count": 13, "encoder": TINY, "depth_head": True},
        7,
    ):
        torch.save({"config": config, "weights": {}}, tmp_path / "best.pt")
        with pytest.raises(CheckpointError, match="its weights do not fit the network it describes"):
            load_model(tmp_path / "best.pt")

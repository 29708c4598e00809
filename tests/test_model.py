import os

import huggingface_hub.errors
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch

from lib.files import CheckpointError
from lib.model import build_model, copy_weights, load_model, save_model


@pytest.mark.parametrize("size", [(96, 128), (97, 130), (33, 47)])
def test_any_size_in_the_same_size_out(size):
    prediction = build_model().eval()(torch.randn(2, 4, *size))
    assert prediction.logits.shape == (2, 13, *size)
    assert prediction.depth.shape == (2, 1, *size)


def test_channels_and_heads():
    for channels in (3, 6):
        prediction = build_model(channels, class_count=5, depth_head=False).eval()(torch.randn(1, channels, 32, 32))
        assert prediction.logits.shape == (1, 5, 32, 32)
        assert prediction.depth is None


def test_padding_changes_nothing_where_none_is_needed():
    model = build_model().eval()
    inputs = torch.randn(1, 4, 64, 64)
    expected = model.net(inputs)
    torch.testing.assert_close(model(inputs).logits, expected)


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "efficientnet-b0", "mit_b0", "tu-resnet10t"])
def test_other_encoders(encoder):
    assert build_model(encoder=encoder).eval()(torch.randn(1, 4, 50, 70)).logits.shape == (1, 13, 50, 70)


def test_depth_head_is_linear_on_the_decoder():
    model = build_model()
    convolution = model.depth_head[0]
    assert (convolution.in_channels, convolution.out_channels, convolution.kernel_size) == (256, 1, (3, 3))
    assert model.eval()(1000 * torch.randn(1, 4, 64, 64)).depth.min() < 0  # nothing squashes it


def test_both_heads_train_the_encoder():
    model = build_model()
    for head in ("logits", "depth"):
        model.zero_grad()
        getattr(model(torch.randn(2, 4, 32, 32)), head).square().mean().backward()
        assert model.net.encoder.conv1.weight.grad.abs().sum() > 0


def test_unknown_encoder_and_weights():
    with pytest.raises(ValueError, match="encoder: found 'resnet81', did you mean resnet18, .* there are: resnet18, "):
        build_model(encoder="resnet81")
    with pytest.raises(ValueError, match="encoder: 'tu-nonsense' can't be used in DeepLabV3+"):
        build_model(encoder="tu-nonsense")
    with pytest.raises(ValueError, match="encoder: 'vgg11' can't be used .*dilated mode.* such as 'resnet18'"):
        build_model(encoder="vgg11")
    with pytest.raises(ValueError, match="encoder_weights: found 'foo', resnet18 has imagenet, ssl, swsl, or None"):
        build_model(encoder_weights="foo")
    with pytest.raises(ValueError, match="encoder_weights: found 'foo', tu-resnet18 has imagenet, or None"):
        build_model(encoder="tu-resnet18", encoder_weights="foo")


def test_offline_says_what_to_do(monkeypatch):
    def offline(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", offline)
    with pytest.raises(RuntimeError, match=r"could not be fetched .*while online, or .*`-p encoder_weights None`"):
        build_model(encoder_weights="imagenet")


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_pretrained_weights_adapt_to_the_channels(monkeypatch, tmp_path, channels):
    pretrained = smp.encoders.get_encoder("resnet18", weights=None)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(pretrained.state_dict(), path)
    monkeypatch.setattr(smp.encoders, "hf_hub_download", lambda *arguments, **options: str(path))
    encoder = build_model(channels, encoder_weights="imagenet").net.encoder
    first = pretrained.conv1.weight
    for channel in range(channels):
        torch.testing.assert_close(encoder.conv1.weight[:, channel], first[:, channel % 3] * 3 / channels)
    torch.testing.assert_close(encoder.layer4[1].conv2.weight, pretrained.layer4[1].conv2.weight)
    assert encoder.layer4[0].conv1.stride == (1, 1)  # dilated


def test_saved_and_loaded_is_the_same(tmp_path):
    model = build_model(6, class_count=4, depth_head=False).eval()
    save_model(model, tmp_path / "best.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    inputs = torch.randn(1, 6, 32, 32)
    assert torch.equal(load_model(tmp_path / "best.pt")(inputs).logits, model(inputs).logits)


UNREADABLE = (
    "can't be read ({}), expected a checkpoint that train.ipynb wrote; it was cut short or comes from elsewhere: "
    "copy it again, or train again with resume False"
)
UNKNOWN = (
    "found {}, expected config, weights; it was written by another version or comes from elsewhere: "
    "train again with resume False, or use the version that wrote it"
)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", UNREADABLE.format("no such file")),
        ("cut", UNREADABLE.format("RuntimeError")),
        ("empty", UNREADABLE.format("EOFError")),
        ("foreign", UNKNOWN.format("state, weights")),
        ("list", UNKNOWN.format("list")),
    ],
)
def test_unreadable_checkpoints(tmp_path, damage, message):
    path = tmp_path / "best.pt"
    if damage != "missing":
        save_model(build_model(), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "foreign":
        torch.save({"weights": {}, "state": 1}, path)
    if damage == "list":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert str(error.value) == f"{path}: {message}"


def test_weights_that_do_not_fit(tmp_path):
    torch.save({"config": build_model(6).config, "weights": build_model(4).state_dict()}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"(?s)best.pt: its weights do not fit the network it describes .*conv1"):
        load_model(tmp_path / "best.pt")


class Malicious:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"config": Malicious(tmp_path / "executed"), "weights": {}}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"can't be read \(UnpicklingError\)"):
        load_model(tmp_path / "best.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # so the file would have done it


def test_weights_to_begin_with(tmp_path):
    trained, model = build_model(), build_model()
    save_model(trained, tmp_path / "best.pt")
    copy_weights(model, tmp_path / "best.pt")
    assert all(
        torch.equal(first, second)
        for first, second in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError) as error:
        copy_weights(build_model(input_channels=3), tmp_path / "best.pt")
    made = "{'input_channels': %d, 'class_count': 13, 'encoder': 'resnet18', 'depth_head': True}"
    assert (
        str(error.value) == f"start_from: {tmp_path}/best.pt holds {made % 4}, this run has {made % 3}; make them equal"
    )

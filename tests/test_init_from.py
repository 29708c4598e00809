import pytest
import timm
import torch
from small_run import ENCODER
from timm.data import create_transform

from lib.batches import encode_inputs
from lib.model import (
    EXP061_MEAN,
    EXP061_STD,
    build_model,
    copy_weights,
    find_normalisation,
    load_model,
    save_model,
)

CLASSES = ("a", "b", "c")
LITE = "tu-tf_efficientnet_lite0"  # trained with mean and std 0.5


def network(seed=0, **options):
    torch.manual_seed(seed)
    return build_model(**{"classes": CLASSES, "encoder": ENCODER, "size": (48, 64)} | options)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Weights of EfficientNet-Lite0 with timm's parameter names; their values don't matter."""
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(timm.create_model(LITE.removeprefix("tu-")).state_dict(), path)
    return str(path)


def test_encoded_image_equals_timm_preprocessing(weights_file):
    from PIL import Image

    config = network(encoder=LITE, encoder_weights=weights_file, inputs="rgb").config
    assert (config.rgb_mean, config.rgb_std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8)
    settings = timm.data.resolve_data_config({}, model=timm.create_model(LITE.removeprefix("tu-")))
    transform = create_transform((3, 40, 60), mean=settings["mean"], std=settings["std"], crop_pct=1)
    seen = encode_inputs(image[None], None, config)[0]
    torch.testing.assert_close(seen, transform(Image.fromarray(image.numpy())), atol=1e-6, rtol=0)


def test_rgb_normalisation_is_from_the_weights_or_exp061(weights_file):
    usual = EXP061_MEAN, EXP061_STD

    def taken(**options):
        config = network(encoder=LITE, **options).config
        return config.rgb_mean, config.rgb_std

    assert taken() == usual  # no pretrained weights
    assert taken(encoder_weights=weights_file) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert taken(encoder_weights=weights_file, rgb_normalisation="exp061") == usual
    with pytest.raises(
        ValueError, match="rgb_normalisation: found 'imagenet', expected one of weights, exp061"
    ):
        taken(rgb_normalisation="imagenet")


@pytest.mark.parametrize(
    ("encoder", "mean"),
    [
        ("timm-tf_efficientnet_lite0", (0.5, 0.5, 0.5)),
        ("inceptionv4", (0.5, 0.5, 0.5)),
        ("inceptionresnetv2", (0.5, 0.5, 0.5)),
        ("dpn68", (124 / 255, 117 / 255, 104 / 255)),
        ("resnet18", (0.485, 0.456, 0.406)),
        ("mit_b0", (0.485, 0.456, 0.406)),  # not in timm
    ],
)
def test_weights_file_has_the_normalisation_of_its_encoder(encoder, mean):
    assert find_normalisation("weights.pth", encoder)[0] == pytest.approx(mean)


def test_the_normalisation_is_saved_with_the_network(tmp_path, weights_file):
    save_model(network(encoder=LITE, encoder_weights=weights_file), tmp_path / "best.pt")
    assert load_model(tmp_path / "best.pt").config.rgb_mean == (0.5, 0.5, 0.5)


@pytest.fixture
def trained(tmp_path):
    """Checkpoint of a network with RGB and depth inputs."""
    model = network(seed=1, inputs="rgbd", rgb_mean=(0.1, 0.2, 0.3))
    save_model(model, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def test_init_from_copies_all_weights_of_an_equal_network(trained):
    old, new = load_model(trained), network(seed=2, inputs="rgbd", init_from=trained)
    assert new.reinitialised == {}
    assert new.config == old.config
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], tensor, atol=0, rtol=0)


def test_other_classes_and_a_new_depth_head_start_anew(tmp_path):
    save_model(network(seed=1, depth_head=False), tmp_path / "best.pt")
    old = load_model(tmp_path / "best.pt")
    new = network(seed=2, classes=("a", "b", "c", "d"), init_from=tmp_path / "best.pt")
    assert new.reinitialised == {"segmentation head": 4 * 256 + 4, "depth head": 9 * 256 + 1}
    same = [name for name in old.state_dict() if "_head" not in name]
    for name in same:
        torch.testing.assert_close(new.state_dict()[name], old.state_dict()[name], atol=0, rtol=0)
    renamed = network(seed=2, classes=("a", "b", "d"), depth_head=False, init_from=tmp_path / "best.pt")
    assert list(renamed.reinitialised) == ["segmentation head"]  # same number of classes, but other names


def test_filters_of_common_channels_are_copied_and_others_are_zero(trained):
    old = next(p for p in load_model(trained).net.encoder.parameters() if p.ndim == 4)
    wide = network(seed=2, inputs="rgbd_xy", init_from=trained)
    first = next(p for p in wide.net.encoder.parameters() if p.ndim == 4)
    torch.testing.assert_close(first[:, :4], old, atol=0, rtol=0)
    assert not first[:, 4:].any()
    depth = network(seed=2, inputs="depth", init_from=trained)
    first = next(p for p in depth.net.encoder.parameters() if p.ndim == 4)
    torch.testing.assert_close(first, old[:, 3:], atol=0, rtol=0)
    otherwise = network(
        seed=2, inputs="rgbd", depth_encoding="log", init_from=trained
    )  # the fourth channel differs
    first = next(p for p in otherwise.net.encoder.parameters() if p.ndim == 4)
    torch.testing.assert_close(first[:, :3], old[:, :3], atol=0, rtol=0)
    assert not first[:, 3].any()


def test_new_input_channels_have_no_effect_at_first(trained):
    old, new = load_model(trained), network(seed=2, inputs="rgbd_xy", init_from=trained).eval()
    inputs = torch.randn(1, 6, 48, 64)
    with torch.inference_mode():
        torch.testing.assert_close(new(inputs).logits, old(inputs[:, :4]).logits)


@pytest.mark.parametrize(
    "encoder",
    [
        "mobileone_s0",  # the input goes to two branches
        "tu-repvgg_a0",
        "tu-fastvit_t8",
        "tu-hieradet_small",  # position embeddings come first
        "tu-tresnet_m",  # space-to-depth: 16 pixels are the channels of one
    ],
)
def test_every_input_layer_is_matched_by_channel(tmp_path, encoder):
    options = {"encoder": encoder, "architecture": "fpn", "classes": ("a", "b")}
    old = network(seed=1, inputs="rgbd", **options).eval()
    for name, tensor in old.named_parameters():
        tensor.data += 0.01 if "pos_embed" in name else 0  # position embeddings are zero at first
    save_model(old, tmp_path / "best.pt")
    same = network(seed=2, inputs="rgbd", init_from=tmp_path / "best.pt", **options)
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor, atol=0, rtol=0)
    wide = network(seed=2, inputs="rgbd_xy", init_from=tmp_path / "best.pt", **options).eval()
    inputs = torch.randn(1, 6, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(wide(inputs).logits, old(inputs[:, :4]).logits)
    log = network(inputs="rgbd", depth_encoding="log", init_from=tmp_path / "best.pt", **options).eval()
    changed = inputs[:, :4] + torch.tensor([0, 0, 0, 1.0]).reshape(1, 4, 1, 1)
    with torch.inference_mode():  # the two depths are different channels, so depth has no effect at first
        torch.testing.assert_close(log(changed).logits, log(inputs[:, :4]).logits)


def test_copying_weights_draws_no_random_numbers(trained):
    new, old = network(seed=2, inputs="rgbd_xy"), load_model(trained)
    state = torch.get_rng_state()
    copy_weights(new, old)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_common_channel_the_first_layer_starts_anew(tmp_path):
    save_model(network(seed=1, inputs="rgb"), tmp_path / "best.pt")
    new = network(seed=2, inputs="depth", init_from=tmp_path / "best.pt")
    fresh = network(seed=2, inputs="depth")
    first, expected = (next(p for p in m.net.encoder.parameters() if p.ndim == 4) for m in (new, fresh))
    torch.testing.assert_close(first, expected, atol=0, rtol=0)
    assert new.reinitialised == {"first layer": first.numel()}


def test_init_from_refuses_incompatible_options(trained):
    with pytest.raises(
        ValueError, match="init_from: that run has encoder tu-.*, but this network has resnet18; make them"
    ):
        network(encoder="resnet18", init_from=trained)
    with pytest.raises(
        ValueError, match="init_from: that run has architecture deeplabv3plus, but this network has fpn"
    ):
        network(architecture="fpn", init_from=trained)
    with pytest.raises(
        ValueError, match="init_from: found .* with encoder_weights 'imagenet'; use one of them"
    ):
        network(encoder_weights="imagenet", init_from=trained)

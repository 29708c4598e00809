"""DeepLabV3+ with a segmentation and a depth head, which knows what it eats and what it names."""

import difflib
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.encoders import encoders, get_encoder_names
from torch import nn

from lib.classes import NYUV2_13, check_same_classes
from lib.files import CheckpointError, load_checkpoint, read_json, save_checkpoint
from lib.parameters import check_choice

INPUT_CHANNELS = {"rgb": 3, "depth": 1, "rgbd": 4, "rgbd_xy": 6}
DEPTH_ENCODINGS = ("inverse", "linear", "log")
DEPTH_RANGE_M = (0.71, 10.0)  # Exp061's clip of the depth
OUTPUT_STRIDE = 16  # of the encoder in DeepLabV3+
DECODER_CHANNELS = 256


class Prediction(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: `(N, C, H, W)` class scores before softmax.
        depth: `(N, 1, H, W)` depth as `encode_depth` makes it `linear`, or None without a depth head.
    """

    logits: torch.Tensor
    depth: torch.Tensor | None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build a network, and to feed it.

    Attributes:
        classes: names of the classes, in the order of their indices.
        inputs: `rgb`, `depth`, `rgbd` or `rgbd_xy` (pixel coordinates too).
        depth_encoding: `inverse`, `linear` or `log`.
        depth_range_m: (nearest, farthest) that depth is clipped to.
        size: (height, width) it works at.
        encoder: of segmentation-models-pytorch.
        depth_head: whether it predicts depth, too.
    """

    classes: tuple[str, ...] = NYUV2_13
    inputs: str = "rgbd"
    depth_encoding: str = "inverse"
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    size: tuple[int, int] = (96, 128)
    encoder: str = "resnet18"
    depth_head: bool = True

    def __post_init__(self) -> None:
        check_choice("inputs", self.inputs, INPUT_CHANNELS)
        check_choice("depth_encoding", self.depth_encoding, DEPTH_ENCODINGS)

    @property
    def input_channels(self) -> int:
        """Channels of the network's first layer."""
        return INPUT_CHANNELS[self.inputs]


class SegmentationDepthNet(nn.Module):
    """A shared encoder and decoder with one or two heads, for images of any size.

    DeepLabV3+: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation", ECCV 2018, as in segmentation-models-pytorch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.net = smp.DeepLabV3Plus(
            config.encoder, encoder_weights=None, encoder_output_stride=OUTPUT_STRIDE,
            decoder_channels=DECODER_CHANNELS, in_channels=config.input_channels, classes=len(config.classes),
        )  # fmt: skip
        self.depth_head = None
        if config.depth_head:
            self.depth_head = SegmentationHead(DECODER_CHANNELS, 1, kernel_size=3, upsampling=4)

    def forward(self, inputs: torch.Tensor) -> Prediction:
        """`(N, C, H, W)` inputs to a `Prediction` of the same height and width."""
        height, width = inputs.shape[-2:]
        padding = (0, -width % OUTPUT_STRIDE, 0, -height % OUTPUT_STRIDE)
        features = self.net.decoder(self.net.encoder(nn.functional.pad(inputs, padding, mode="replicate")))
        logits = self.net.segmentation_head(features)[..., :height, :width]
        depth = None if self.depth_head is None else self.depth_head(features)[..., :height, :width]
        return Prediction(logits, depth)


def build_model(
    encoder_weights: str | None = None, start_from: Path | None = None, **config: object
) -> SegmentationDepthNet:
    """A network ready to train.

    Args:
        encoder_weights: None for random weights, or a name such as `imagenet` (fetched once, then cached);
            those of the first layer are repeated over the channels and rescaled, as
            segmentation-models-pytorch does.
        start_from: a `best.pt` whose weights to begin with; its network must be the same.
        config: see `ModelConfig`.

    Raises:
        ValueError: an unknown encoder or weights, or an encoder that can't be dilated.
        RuntimeError: the weights can't be fetched.
    """
    config = ModelConfig(**config)
    _check_encoder(config.encoder, encoder_weights)
    try:
        model = SegmentationDepthNet(config)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"encoder: {config.encoder!r} can't be used in DeepLabV3+ ({error}); choose another, such as 'resnet18'"
        ) from error
    if encoder_weights is not None:
        model.net.encoder = _pretrained_encoder(config.encoder, encoder_weights, config.input_channels)
    if start_from is not None:
        _copy_weights(model, start_from)
    return model


def _check_encoder(encoder: str, encoder_weights: str | None) -> None:
    from_timm = encoder.startswith("tu-")
    if not from_timm and encoder not in encoders:
        close = difflib.get_close_matches(encoder, get_encoder_names(), 3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"encoder: found {encoder!r}, {hint}there are: {', '.join(get_encoder_names())}, "
            "and tu-NAME for any model NAME of timm"
        )
    known = ["imagenet"] if from_timm else list(encoders[encoder]["pretrained_settings"])
    if encoder_weights is not None and encoder_weights not in known:
        raise ValueError(f"encoder_weights: found {encoder_weights!r}, {encoder} has {', '.join(known)}, or None")


def _pretrained_encoder(encoder: str, encoder_weights: str, input_channels: int) -> nn.Module:
    weights = True if encoder.startswith("tu-") else encoder_weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return smp.encoders.get_encoder(
                encoder, in_channels=input_channels, weights=weights, output_stride=OUTPUT_STRIDE
            )
    except Exception as error:  # whatever the hub, the network or the cache raise
        raise RuntimeError(
            f"encoder_weights: {encoder_weights!r} for {encoder} could not be fetched ({type(error).__name__}). "
            "They are downloaded once and then cached: run once while online, or train from scratch with "
            "`-p encoder_weights None`"
        ) from error


def save_model(model: SegmentationDepthNet, path: Path) -> None:
    """Write weights and what is needed to build the network again."""
    save_checkpoint({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SegmentationDepthNet:
    """The network that `save_model` wrote, in evaluation mode: all that evaluation and prediction need.

    Raises:
        CheckpointError: the file is missing, damaged or no model of this project.
    """
    path = Path(path)
    saved = load_checkpoint(path, device, ("config", "weights"))
    try:
        model = SegmentationDepthNet(_read_config(saved["config"], path))
        model.load_state_dict(saved["weights"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its weights do not fit the network it describes ({error}); it was written by another version "
            "or changed since: train again, or use the version that wrote it"
        ) from error
    return model.to(device).eval()


def _read_config(saved: dict, path: Path) -> ModelConfig:
    """Older files know channels alone, of NYUv2's 13 classes; the parameters of their run have the rest."""
    config = dict(saved)
    if "input_channels" in config:
        by_channels = {channels: inputs for inputs, channels in INPUT_CHANNELS.items()}
        config["inputs"] = by_channels[config.pop("input_channels")]
        config["classes"] = NYUV2_13[: config.pop("class_count")]
        trained = read_json(path.with_name("parameters.json"))
        config["size"] = trained["image_height"], trained["image_width"]
        config["depth_encoding"] = trained["depth_encoding"]
    return ModelConfig(**config)


def _copy_weights(model: SegmentationDepthNet, path: Path) -> None:
    """Copy the weights of the network in a `best.pt` into a model of the same make, at whatever size it works."""
    trained = load_model(path)
    check_same_classes(trained.config.classes, model.config.classes, f"start_from: {path}", "the data")
    if replace(trained.config, size=model.config.size) != model.config:
        raise ValueError(f"start_from: {path} holds {trained.config}, this run has {model.config}; make them equal")
    model.load_state_dict(trained.state_dict())

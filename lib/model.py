"""DeepLabV3+ with a segmentation and a depth head: build, save, load."""

import difflib
import warnings
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.encoders import encoders, get_encoder_names
from torch import nn

from lib.files import CheckpointError, load_checkpoint, save_checkpoint

OUTPUT_STRIDE = 16  # of the encoder in DeepLabV3+
DECODER_CHANNELS = 256


class Prediction(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: `(N, C, H, W)` class scores before softmax.
        depth: `(N, 1, H, W)` depth as `encode_depth(..., "linear")`, or None without a depth head.
    """

    logits: torch.Tensor
    depth: torch.Tensor | None


class SegmentationDepthNet(nn.Module):
    """A shared encoder and decoder with one or two heads, for images of any size.

    DeepLabV3+: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation", ECCV 2018, as in segmentation-models-pytorch.
    """

    def __init__(self, input_channels: int, class_count: int, encoder: str, depth_head: bool) -> None:
        super().__init__()
        self.config = {
            "input_channels": input_channels, "class_count": class_count, "encoder": encoder, "depth_head": depth_head,
        }  # fmt: skip
        self.net = smp.DeepLabV3Plus(
            encoder, encoder_weights=None, encoder_output_stride=OUTPUT_STRIDE,
            decoder_channels=DECODER_CHANNELS, in_channels=input_channels, classes=class_count,
        )  # fmt: skip
        self.depth_head = SegmentationHead(DECODER_CHANNELS, 1, kernel_size=3, upsampling=4) if depth_head else None

    def forward(self, inputs: torch.Tensor) -> Prediction:
        """`(N, C, H, W)` inputs to a `Prediction` of the same height and width."""
        height, width = inputs.shape[-2:]
        padding = (0, -width % OUTPUT_STRIDE, 0, -height % OUTPUT_STRIDE)
        features = self.net.decoder(self.net.encoder(nn.functional.pad(inputs, padding, mode="replicate")))
        logits = self.net.segmentation_head(features)[..., :height, :width]
        depth = None if self.depth_head is None else self.depth_head(features)[..., :height, :width]
        return Prediction(logits, depth)


def build_model(
    input_channels: int = 4,
    class_count: int = 13,
    encoder: str = "resnet18",
    encoder_weights: str | None = None,
    depth_head: bool = True,
) -> SegmentationDepthNet:
    """A network ready to train.

    Args:
        input_channels: 3, 4 or 6; pretrained first-layer weights are repeated over the channels and
            rescaled, as segmentation-models-pytorch does.
        class_count: number of classes.
        encoder: any encoder of segmentation-models-pytorch that can be dilated, `tu-` ones of timm too.
        encoder_weights: None for random weights, or a name such as `imagenet` (fetched once, then cached).
        depth_head: also predict depth.

    Raises:
        ValueError: an unknown encoder or weights, or an encoder that can't be dilated.
        RuntimeError: the weights can't be fetched.
    """
    _check_encoder(encoder, encoder_weights)
    try:
        model = SegmentationDepthNet(input_channels, class_count, encoder, depth_head)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"encoder: {encoder!r} can't be used in DeepLabV3+ ({error}); choose another, such as 'resnet18'"
        ) from error
    if encoder_weights is not None:
        model.net.encoder = _pretrained_encoder(encoder, encoder_weights, input_channels)
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
    save_checkpoint({"config": model.config, "weights": model.state_dict()}, path)


def load_model(path: Path, device: torch.device | str = "cpu") -> SegmentationDepthNet:
    """The network that `save_model` wrote, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged or no model of this project.
    """
    saved = load_checkpoint(path, device, ("config", "weights"))
    try:
        model = SegmentationDepthNet(**saved["config"])
        model.load_state_dict(saved["weights"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its weights do not fit the network it describes ({error}); it was written by another version "
            "or changed since: train again, or use the version that wrote it"
        ) from error
    return model.to(device).eval()


def copy_weights(model: SegmentationDepthNet, path: Path) -> None:
    """Copy the weights of the network in a `best.pt` into a model of the same make.

    Raises:
        ValueError: the two differ in channels, encoder or heads.
        CheckpointError: the file can't be used.
    """
    trained = load_model(path)
    if trained.config != model.config:
        raise ValueError(f"start_from: {path} holds {trained.config}, this run has {model.config}; make them equal")
    model.load_state_dict(trained.state_dict())

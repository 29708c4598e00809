"""A network with a segmentation and a depth head, which knows what it eats and what it names."""

import difflib
import hashlib
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.encoders import encoders, get_encoder, get_encoder_names
from timm.models import adapt_input_conv
from torch import nn

from lib.data.samples import DEPTH_RANGE_M
from lib.files import CheckpointError, load_checkpoint, save_checkpoint
from lib.options import check_choice, check_options

INPUT_CHANNELS = {"rgb": 3, "depth": 1, "rgbd": 4, "rgbd_xy": 6}
ARCHITECTURES = sorted(set(MODEL_ARCHITECTURES_MAPPING) - {"dpt"})  # its decoder takes more than features
OPTIONS = {"deeplabv3plus": {"encoder_output_stride": 16, "decoder_channels": 256}}  # as Exp061 has it
PREFIXES = ("module.", "encoder.", "backbone.", "model.")  # that a file may put before every name
INSIDE = ("state_dict", "model", "weights")  # where in a file the weights may lie


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
        architecture: of segmentation-models-pytorch.
        encoder: of segmentation-models-pytorch.
        depth_head: whether it predicts depth, too.
    """

    classes: tuple[str, ...]
    inputs: str = "rgbd"
    depth_encoding: str = "inverse"
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    size: tuple[int, int] = (96, 128)
    architecture: str = "deeplabv3plus"
    encoder: str = "resnet18"
    depth_head: bool = True

    def __post_init__(self) -> None:
        check_options(inputs=self.inputs, depth_encoding=self.depth_encoding)
        check_choice("architecture", self.architecture, ARCHITECTURES)

    @property
    def input_channels(self) -> int:
        """Channels of the network's first layer."""
        return INPUT_CHANNELS[self.inputs]


class SegmentationDepthNet(nn.Module):
    """A shared encoder and decoder with one or two heads, for images of any size.

    By default DeepLabV3+: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation", ECCV 2018, as in segmentation-models-pytorch. The depth head is like the segmentation head, on
    the same decoder output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        options, class_count = OPTIONS.get(config.architecture, {}), len(config.classes)
        channels = config.input_channels
        self.net = smp.create_model(
            config.architecture, config.encoder, None, channels, class_count, **options
        )
        self.depth_head = None
        if config.depth_head:
            channels, grown = self.net.segmentation_head[0].in_channels, self.net.segmentation_head[1]
            upsampling = int(getattr(grown, "scale_factor", 1))
            self.depth_head = SegmentationHead(channels, 1, kernel_size=3, upsampling=upsampling)

    def forward(self, inputs: torch.Tensor) -> Prediction:
        """`(N, C, H, W)` inputs to a `Prediction` of the same height and width."""
        height, width = inputs.shape[-2:]
        stride = self.net.encoder.output_stride
        padded = nn.functional.pad(inputs, (0, -width % stride, 0, -height % stride), mode="replicate")
        features = self.net.decoder(self.net.encoder(padded))
        logits = self.net.segmentation_head(features)[..., :height, :width]
        depth = None if self.depth_head is None else self.depth_head(features)[..., :height, :width]
        return Prediction(logits, depth)


def build_model(encoder_weights: str | None = None, **config: object) -> SegmentationDepthNet:
    """A network ready to train, in float32 on the CPU.

    Args:
        encoder_weights: None for random weights, a name such as `imagenet` (fetched once, then cached), or the
            path of a file, see `lib.weights`.
        config: see `ModelConfig`.

    Raises:
        ValueError: an unknown architecture, encoder or weights, or two that don't go together.
        RuntimeError: the weights can't be fetched.
        CheckpointError: a file of weights that can't be used.
    """
    config = ModelConfig(**config)
    if not config.encoder.startswith("tu-") and config.encoder not in encoders:
        close = difflib.get_close_matches(config.encoder, get_encoder_names(), 3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"encoder: found {config.encoder!r}, {hint}there are: {', '.join(get_encoder_names())}, "
            "and tu-NAME for any model NAME of timm"
        )
    try:
        model = SegmentationDepthNet(config)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"encoder: {config.encoder!r} can't be used in {config.architecture} ({error}); an encoder that can't be "
            "dilated goes with architecture fpn, unet or upernet, and resnet18 with nearly all"
        ) from error
    if encoder_weights is not None:
        load_encoder_weights(model.net.encoder, encoder_weights, config.encoder, config.input_channels)
    return model


def save_model(model: SegmentationDepthNet, path: Path) -> None:
    """Write weights and what is needed to build the network again."""
    save_checkpoint({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SegmentationDepthNet:
    """The network that `save_model` wrote, in evaluation mode: all that evaluation and prediction need.

    Raises:
        CheckpointError: the file is missing, damaged or no model of this project.
    """
    path = Path(path).expanduser()
    saved = load_checkpoint(path, device, ("config", "weights"))
    try:
        model = SegmentationDepthNet(ModelConfig(**saved["config"]))
        model.load_state_dict(saved["weights"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its weights do not fit the network it describes ({error}); it was written by another version "
            "or changed since: train again, or use the version that wrote it"
        ) from error
    return model.to(device).eval()


def is_file(encoder_weights: str | None) -> bool:
    """Whether weights are meant by a path, not by a name."""
    return encoder_weights is not None and Path(encoder_weights).suffix in (
        ".pth",
        ".pt",
        ".bin",
        ".safetensors",
    )


def weights_digest(encoder_weights: str | None) -> str | None:
    """SHA-256 of a file of weights, so that a run knows them wherever they lie; None for a name."""
    path = Path(encoder_weights).expanduser() if is_file(encoder_weights) else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.exists() else None


def load_encoder_weights(encoder: nn.Module, encoder_weights: str, name: str, input_channels: int) -> None:
    """Fill an encoder of segmentation-models-pytorch with pretrained weights.

    Those of its first layer are repeated over the input channels and rescaled, or summed for one channel, as timm
    does, whether they come by name or from a file.

    Args:
        encoder: built for `input_channels`.
        encoder_weights: `imagenet` or another name that the encoder has, or the path of a .pth or .safetensors
            file with names as timm or segmentation-models-pytorch write them. Such a file is read as data:
            nothing in it is executed.
        name: of the encoder.
        input_channels: 1, 3, 4 or 6.

    Raises:
        ValueError: an unknown name of weights.
        RuntimeError: weights that can't be fetched.
        CheckpointError: a file that is missing, damaged or does not fill all of the encoder.
    """
    if is_file(encoder_weights):
        _fill(encoder, _read_file(Path(encoder_weights).expanduser()), Path(encoder_weights), input_channels)
        return
    known = ["imagenet"] if name.startswith("tu-") else list(encoders[name]["pretrained_settings"])
    if encoder_weights not in known:
        raise ValueError(
            f"encoder_weights: found {encoder_weights!r}, {name} has {', '.join(known)}; or None, or the path of a "
            ".pth or .safetensors file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fetched = get_encoder(
                name, input_channels, weights=True if name.startswith("tu-") else encoder_weights
            )
    except Exception as error:  # whatever the hub, the network or the cache raise
        raise RuntimeError(
            f"encoder_weights: {encoder_weights!r} for {name} could not be fetched ({type(error).__name__}). They are "
            "downloaded once and then cached: run once while online, give the path of a file, or train from scratch "
            "with `-p encoder_weights None`"
        ) from error
    encoder.load_state_dict(fetched.state_dict())


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a file, whatever it wraps them in."""
    try:
        saved = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"encoder_weights: {path}: no such file") from error
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged or foreign file
        raise CheckpointError(
            f"encoder_weights: {path}: can't be read as weights ({type(error).__name__}); it was cut short, or holds "
            "code besides tensors, which is not executed here: save the state_dict alone"
        ) from error
    for key in INSIDE:
        saved = saved[key] if isinstance(saved, dict) and isinstance(saved.get(key), dict) else saved
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise CheckpointError(
            f"encoder_weights: {path}: found a {type(saved).__name__}, expected names and tensors"
        )
    return saved


def _fill(encoder: nn.Module, weights: dict[str, torch.Tensor], path: Path, input_channels: int) -> None:
    own, prefixes = encoder.state_dict(), [""]
    for prefix in PREFIXES * 2:
        prefixes += [
            known + prefix for known in prefixes if any(name.startswith(known + prefix) for name in weights)
        ]
    matched = max((_match(weights, own, prefix) for prefix in dict.fromkeys(prefixes)), key=len)
    found = {name: weights[given] for name, given in matched.items()}
    first = next(name for name, tensor in own.items() if tensor.ndim == 4)
    if first in found and found[first].shape[1] == 3:
        found[first] = adapt_input_conv(input_channels, found[first])
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(own[name].shape)}"
        for name in found
        if found[name].shape != own[name].shape
    ]
    unexpected = (
        [name for name in weights if name not in matched.values()] if missing else []
    )  # a head is no problem
    problems = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    if missing or misshapen:
        found = [
            f"{len(names)} {what}, such as {', '.join(names[:3])}"
            for what, names in problems.items()
            if names
        ]
        raise CheckpointError(
            f"encoder_weights: {path} does not fill the {len(own)} tensors of the encoder: {'; '.join(found)}; "
            "expected the weights of this very encoder, named as timm or segmentation-models-pytorch name them"
        )
    encoder.load_state_dict(own | found)


def _match(weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """The name in the file of each tensor. smp puts `model.` before timm's names; timm makes `stem_0` of `stem.0`."""
    names = {name.removeprefix("model.").replace(".", "_"): name for name in own}
    names |= {name.replace(".", "_"): name for name in own}
    bare = {name.removeprefix(prefix).replace(".", "_"): name for name in weights if name.startswith(prefix)}
    return {names[name]: given for name, given in bare.items() if name in names}

"""A network with a segmentation and a depth head; its config records inputs, normalisation and classes."""

import difflib
import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.encoders import encoders, get_encoder, get_preprocessing_params
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv, get_pretrained_cfg, load_state_dict
from torch import nn

from lib.data.samples import DEPTH_RANGE_M
from lib.files import CheckpointError, load_checkpoint, save_checkpoint
from lib.options import check_choice, check_options

EXP061_MEAN, EXP061_STD = (0.525, 0.443, 0.400), (0.281, 0.281, 0.293)
TIMM_NAMES = {"inceptionv4": "inception_v4", "inceptionresnetv2": "inception_resnet_v2"}  # for smp's
PREFIX = re.compile(r"^((module|encoder|backbone|model)\.)+")  # that a file may put before every name
ARCHITECTURES = sorted(set(MODEL_ARCHITECTURES_MAPPING) - {"dpt"})  # its decoder takes more than features
OPTIONS = {"deeplabv3plus": {"encoder_output_stride": 16, "decoder_channels": 256}}  # as Exp061 has it


class Prediction(NamedTuple):
    """The network's output for a batch.

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
        rgb_mean: subtracted from RGB in 0..1.
        rgb_std: by which RGB is then divided.
    """

    classes: tuple[str, ...]
    inputs: str = "rgbd"
    depth_encoding: str = "inverse"
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    size: tuple[int, int] = (96, 128)
    architecture: str = "deeplabv3plus"
    encoder: str = "resnet18"
    depth_head: bool = True
    rgb_mean: tuple[float, float, float] = EXP061_MEAN
    rgb_std: tuple[float, float, float] = EXP061_STD

    def __post_init__(self) -> None:
        check_options(inputs=self.inputs, depth_encoding=self.depth_encoding)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the input channels, in the order of the network's first layer."""
        rgb = ("red", "green", "blue")
        depth = (f"{self.depth_encoding} depth",)
        return {"rgb": rgb, "depth": depth, "rgbd": rgb + depth, "rgbd_xy": (*rgb, *depth, "x", "y")}[
            self.inputs
        ]


class SegmentationDepthNet(nn.Module):
    """A shared encoder and decoder with one or two heads, for images of any size.

    `started_anew` holds what `init_from` could not copy, by name the number of parameters.

    By default DeepLabV3+: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation", ECCV 2018, as in segmentation-models-pytorch. The depth head is like the segmentation head,
    on the same decoder output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.started_anew: dict[str, int] = {}
        self.net = smp.create_model(
            config.architecture,
            config.encoder,
            encoder_weights=None,
            in_channels=len(config.channels),
            classes=len(config.classes),
            **OPTIONS.get(config.architecture, {}),
        )
        self.depth_head = None
        if config.depth_head:
            last, upsampled, _ = self.net.segmentation_head
            upsampling = int(getattr(upsampled, "scale_factor", 1))
            self.depth_head = SegmentationHead(last.in_channels, 1, kernel_size=3, upsampling=upsampling)

    def forward(self, inputs: torch.Tensor) -> Prediction:
        """`(N, C, H, W)` inputs to a `Prediction` of the same height and width."""
        height, width = inputs.shape[-2:]
        stride = self.net.encoder.output_stride
        padded = nn.functional.pad(inputs, (0, -width % stride, 0, -height % stride), mode="replicate")
        features = self.net.decoder(self.net.encoder(padded))
        logits = self.net.segmentation_head(features)[..., :height, :width]
        depth = None if self.depth_head is None else self.depth_head(features)[..., :height, :width]
        return Prediction(logits, depth)


def build_model(
    encoder_weights: str | None = None,
    rgb_normalisation: str = "weights",
    init_from: Path | str | None = None,
    **config: object,
) -> SegmentationDepthNet:
    """A network ready to train, in float32 on the CPU.

    Args:
        encoder_weights: None for random weights, a name such as `imagenet` (fetched once, then cached), or
            the path of a file, see `load_encoder_weights`.
        rgb_normalisation: `weights` takes the mean and std that the pretrained weights were trained with, and
            Exp061's without pretrained weights; `exp061` takes Exp061's. With `init_from` neither counts.
        init_from: a `best.pt` whose weights and normalisation to begin with, see `copy_weights`.
        config: see `ModelConfig`.

    Raises:
        ValueError: an unknown architecture, encoder or weights, or two that don't go together.
        RuntimeError: the weights can't be fetched.
        CheckpointError: a file of weights that can't be used.
    """
    check_options(rgb_normalisation=rgb_normalisation)
    if encoder_weights is not None and init_from is not None:
        raise ValueError(
            f"init_from: found {str(init_from)!r} with encoder_weights {encoder_weights!r}; use one of them"
        )
    model = _build_network(ModelConfig(**config))
    if encoder_weights is not None:
        load_encoder_weights(model.net.encoder, encoder_weights, model.config.encoder)
        if rgb_normalisation == "weights":
            mean, std = find_normalisation(encoder_weights, model.config.encoder)
            model.config = replace(model.config, rgb_mean=mean, rgb_std=std)
    if init_from is not None:
        copy_weights(model, load_model(init_from))
    return model


def check_network(architecture: str, encoder: str) -> None:
    """Raise a ValueError that names an architecture or an encoder that does not exist."""
    check_choice("architecture", architecture, ARCHITECTURES)
    is_of_timm = encoder.startswith("tu-") and timm.is_model(encoder.removeprefix("tu-"))
    if encoder not in encoders and not is_of_timm:
        known = [*encoders, *(f"tu-{name}" for name in timm.list_models())]
        close = difflib.get_close_matches(encoder, known, 3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"encoder: found {encoder!r}, {hint}there are: {', '.join(encoders)}, "
            "and tu-NAME for any model NAME of timm"
        )


def _build_network(config: ModelConfig) -> SegmentationDepthNet:
    """A network that has seen one image of its size: some encoders are made for one size only."""
    check_network(config.architecture, config.encoder)
    try:
        model = SegmentationDepthNet(config)
        with torch.no_grad():
            model.eval()(torch.zeros(1, len(config.channels), *config.size))
    except (
        ValueError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise ValueError(
            f"encoder: {config.encoder!r} can't be used in {config.architecture} at "
            f"{'x'.join(map(str, config.size))} ({error}). If the encoder can't be dilated, use "
            "architecture fpn, unet or upernet; if it needs a fixed image size, set image_height and "
            "image_width to it. resnet18 works with nearly every architecture"
        ) from error
    return model.train()


def copy_weights(model: SegmentationDepthNet, trained: SegmentationDepthNet) -> None:
    """Copy every weight of a trained network whose name and shape fit.

    In the first layer the filters of channels that both networks take are copied, and those of other channels
    start at zero, so that the network first sees what the trained one saw; without a common channel it starts
    anew. The RGB normalisation is copied. A segmentation head for other classes and a depth head that the
    trained network lacks start anew; `started_anew` names them.

    Raises:
        ValueError: another encoder or architecture.
    """
    for name in ("architecture", "encoder"):
        found, wanted = getattr(trained.config, name), getattr(model.config, name)
        if found != wanted:
            raise ValueError(
                f"init_from: that run has {name} {found}, but this network has {wanted}; make them equal"
            )
    own = model.state_dict()
    given = trained.state_dict()
    first = next(name for name, tensor in own.items() if name.startswith("net.encoder.") and tensor.ndim == 4)
    common = set(model.config.channels) & set(trained.config.channels)
    if common:
        given[first] = _match_channels(
            own[first], given[first], model.config.channels, trained.config.channels
        )
    else:
        given[first] = own[first]
        model.started_anew["first layer"] = own[first].numel()
    if trained.config.classes != model.config.classes:
        given = {
            name: tensor for name, tensor in given.items() if not name.startswith("net.segmentation_head.")
        }
    copied = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    new = [name for name in own if name not in copied]
    if broken := [name for name in new if "_head." not in name]:
        raise ValueError(f"init_from: {', '.join(broken[:3])} of that run don't fit this network")
    model.load_state_dict(own | copied)
    model.config = replace(model.config, rgb_mean=trained.config.rgb_mean, rgb_std=trained.config.rgb_std)
    for name in new:
        part = name.removeprefix("net.").split(".")[0].replace("_", " ")
        model.started_anew[part] = model.started_anew.get(part, 0) + own[name].numel()


def _match_channels(
    own: torch.Tensor, given: torch.Tensor, channels: tuple[str, ...], trained: tuple[str, ...]
) -> torch.Tensor:
    """Filters `(F, C, h, w)` of the first layer: those of common channels, zero for others."""
    filters = torch.zeros_like(own)
    for position, channel in enumerate(channels):
        if channel in trained:
            filters[:, position] = given[:, trained.index(channel)]
    return filters


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
            f"{path}: its weights do not fit the network it describes ({error}); it was written by another "
            "version or changed since: train again, or use the version that wrote it"
        ) from error
    return model.to(device).eval()


def is_file(weights: str | None) -> bool:
    """Whether weights are meant by a path, not by a name."""
    return weights is not None and Path(weights).suffix in (".pth", ".pt", ".bin", ".safetensors")


def weights_digest(weights: str | Path | None) -> str | None:
    """SHA-256 of a weights file, so that a run knows it wherever it lies; None for a name or no such file."""
    if not is_file(weights) or not Path(weights).expanduser().exists():
        return None
    return hashlib.sha256(Path(weights).expanduser().read_bytes()).hexdigest()


def find_normalisation(encoder_weights: str, encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """RGB mean and std in 0..1 that pretrained weights were trained with, by timm's or smp's configuration.

    A file of weights has none: timm's for this encoder is taken, or ImageNet's where timm does not know it.

    Raises:
        RuntimeError: smp's configuration can't be fetched.
    """
    name = encoder.removeprefix("tu-").removeprefix("timm-")
    name = TIMM_NAMES.get(name, name)
    if encoder.startswith("tu-") or (is_file(encoder_weights) and timm.is_model(name)):
        config = get_pretrained_cfg(name)
        return tuple(config.mean), tuple(config.std)
    if is_file(encoder_weights):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    with _explain_fetching(encoder_weights, encoder):
        config = get_preprocessing_params(encoder, encoder_weights)
    highest = config["input_range"][1]  # 1, or 255 where images were not divided by it
    return tuple(tuple(value / highest for value in config[name]) for name in ("mean", "std"))


def load_encoder_weights(encoder: nn.Module, encoder_weights: str, name: str) -> None:
    """Fill an encoder of segmentation-models-pytorch with pretrained weights.

    Those of its first layer are repeated over the input channels and rescaled, or summed for one channel, as
    timm does, whether they come by name or from a file.

    Args:
        encoder: of any number of input channels.
        encoder_weights: `imagenet` or another name that the encoder has, or the path of a .pth or
            .safetensors file with names as timm or segmentation-models-pytorch write them. Such a file is
            read as data: nothing in it is executed.
        name: of the encoder.

    Raises:
        ValueError: an unknown name of weights.
        RuntimeError: weights that can't be fetched.
        CheckpointError: a file that is missing, damaged or covers only part of the encoder.
    """
    if is_file(encoder_weights):
        path = Path(encoder_weights).expanduser()
        _fill(encoder, _read_weights(path), path)
        return
    known = ["imagenet"] if name.startswith("tu-") else list(encoders[name]["pretrained_settings"])
    if encoder_weights not in known:
        raise ValueError(
            f"encoder_weights: found {encoder_weights!r}, {name} has {', '.join(known)}; or None, or the "
            "path of a .pth or .safetensors file"
        )
    channels = next(tensor.shape[1] for tensor in encoder.parameters() if tensor.ndim == 4)
    with (
        _explain_fetching(encoder_weights, name),
        warnings.catch_warnings(action="error", category=UserWarning),
    ):
        weights = True if name.startswith("tu-") else encoder_weights
        fetched = get_encoder(name, channels, weights=weights)
    encoder.load_state_dict(fetched.state_dict())


@contextmanager
def _explain_fetching(encoder_weights: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the hub, the network or the cache raise
        raise RuntimeError(
            f"encoder_weights: {encoder_weights!r} for {name} could not be fetched ({type(error).__name__}). "
            "They are downloaded once and then cached: run once while online, give the path of a file, or "
            "train from scratch with `-p encoder_weights None`"
        ) from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a file, as timm reads them, whatever wraps them; data only."""
    if not path.exists():
        raise CheckpointError(f"encoder_weights: {path}: no such file")
    try:
        return load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged or foreign file
        raise CheckpointError(
            f"encoder_weights: {path}: can't be read as weights ({type(error).__name__}); it is "
            "truncated, or contains code, which is not executed here: save only the state_dict"
        ) from error


def _fill(encoder: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy all tensors of the encoder from the file, strictly."""
    own = encoder.state_dict()
    by_name = {
        _bare_name(name): tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)
    }
    found = {name: by_name[_bare_name(name)] for name in own if _bare_name(name) in by_name}
    first = next(name for name, tensor in own.items() if tensor.ndim == 4)
    if first in found and found[first].shape[1] == 3:
        found[first] = adapt_input_conv(own[first].shape[1], found[first])
    problems = {
        "missing": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            for name, tensor in found.items()
            if tensor.shape != own[name].shape
        ],
    }
    listed = [
        f"{len(names)} {what}, such as {', '.join(names[:3])}" for what, names in problems.items() if names
    ]
    if listed:
        raise CheckpointError(
            f"encoder_weights: {path} does not fill the {len(own)} tensors of the encoder: "
            f"{'; '.join(listed)}; expected the weights of exactly this encoder, with names as in timm "
            "or segmentation-models-pytorch"
        )
    encoder.load_state_dict(own | found)


def _bare_name(name: str) -> str:
    """Without prefixes; timm writes `stem.0`, or `stem_0` where it extracts features."""
    return PREFIX.sub("", name).replace(".", "_")

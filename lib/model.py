"""A segmentation network with an optional depth head: config, pretrained weights, saving and loading."""

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

# RGB statistics of the published experiment that notebooks/experiments/exp061.yaml reproduces
EXP061_MEAN, EXP061_STD = (0.525, 0.443, 0.400), (0.281, 0.281, 0.293)
TIMM_NAMES = {"inceptionv4": "inception_v4", "inceptionresnetv2": "inception_resnet_v2"}  # by smp name
NAME_PREFIX = re.compile(r"^((module|encoder|backbone|model)\.)+")  # prefixes in weights files
NUMBER = re.compile(r"\d+")
ARCHITECTURES = sorted(set(MODEL_ARCHITECTURES_MAPPING) - {"dpt"})  # DPT also takes prefix tokens
ARCHITECTURE_OPTIONS = {"deeplabv3plus": {"encoder_output_stride": 16, "decoder_channels": 256}}  # Exp061


class Prediction(NamedTuple):
    """The network's output for a batch.

    Attributes:
        logits: `(N, C, H, W)` class scores before softmax.
        depth: `(N, 1, H, W)` depth in the `linear` encoding of `encode_depth`; None without a depth head.
    """

    logits: torch.Tensor
    depth: torch.Tensor | None


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a network and encode its inputs.

    Attributes:
        classes: names of the classes, in the order of their indices.
        inputs: `rgb`, `depth`, `rgbd` or `rgbd_xy` (with x and y coordinates in 0..1).
        depth_encoding: `inverse`, `linear` or `log`.
        depth_range_m: (nearest, farthest) in metres; depth is clipped to this range.
        size: (height, width) in pixels that images are resized to.
        architecture: name of an architecture in segmentation-models-pytorch.
        encoder: name of an encoder in segmentation-models-pytorch.
        depth_head: whether the network also predicts depth.
        rgb_mean: mean subtracted from RGB values in 0..1.
        rgb_std: standard deviation by which they are then divided.
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
        """Names of the input channels, in the order of the first layer."""
        rgb = ("red", "green", "blue")
        depth = (f"{self.depth_encoding} depth",)
        return {"rgb": rgb, "depth": depth, "rgbd": rgb + depth, "rgbd_xy": (*rgb, *depth, "x", "y")}[
            self.inputs
        ]


class SegmentationDepthNet(nn.Module):
    """A shared encoder and decoder with a segmentation head and an optional depth head, for any image size.

    The default architecture is DeepLabV3+ (Chen et al., "Encoder-Decoder with Atrous Separable Convolution
    for Semantic Image Segmentation", ECCV 2018) from segmentation-models-pytorch. The depth head is a 3x3
    convolution on the output of the decoder, upsampled like the segmentation head.

    After `build_model` with `init_from`, `reinitialised` holds the number of parameters of each layer or head
    that could not be copied, by name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.reinitialised: dict[str, int] = {}
        self.net = smp.create_model(
            config.architecture,
            config.encoder,
            encoder_weights=None,
            in_channels=len(config.channels),
            classes=len(config.classes),
            **ARCHITECTURE_OPTIONS.get(config.architecture, {}),
        )
        self.depth_head = None
        if config.depth_head:
            conv, upsample, _ = self.net.segmentation_head
            upsampling = int(getattr(upsample, "scale_factor", 1))
            self.depth_head = SegmentationHead(conv.in_channels, 1, kernel_size=3, upsampling=upsampling)

    def forward(self, inputs: torch.Tensor) -> Prediction:
        """Map `(N, C, H, W)` inputs to a `Prediction` of the same height and width."""
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
    """Build a network in training mode, in float32 on the CPU.

    Args:
        encoder_weights: name of pretrained weights such as `imagenet` (downloaded once, then cached), path of
            a weights file (see `load_encoder_weights`), or None for random weights.
        rgb_normalisation: `weights` for the mean and std of the pretrained weights, or Exp061's if there are
            none; `exp061` for Exp061's. Ignored with `init_from`.
        init_from: path of a `best.pt` whose weights and RGB normalisation are copied, see `copy_weights`.
        config: fields of `ModelConfig`.

    Raises:
        ValueError: if the architecture, encoder or weights are unknown or can't be combined.
        RuntimeError: if the weights can't be downloaded.
        CheckpointError: if a weights file can't be used.
    """
    check_options(rgb_normalisation=rgb_normalisation)
    if encoder_weights is not None and init_from is not None:
        raise ValueError(
            f"init_from: found {str(init_from)!r} with encoder_weights {encoder_weights!r}; use one of them"
        )
    model = _build_and_try(ModelConfig(**config))
    if encoder_weights is not None:
        load_encoder_weights(
            model.net.encoder, encoder_weights, model.config.encoder, len(model.config.channels)
        )
        if rgb_normalisation == "weights":
            mean, std = find_normalisation(encoder_weights, model.config.encoder)
            model.config = replace(model.config, rgb_mean=mean, rgb_std=std)
    if init_from is not None:
        copy_weights(model, load_model(init_from))
    return model


def check_network(architecture: str, encoder: str) -> None:
    """Raise a ValueError if the architecture or the encoder does not exist."""
    check_choice("architecture", architecture, ARCHITECTURES)
    is_timm_encoder = encoder.startswith("tu-") and timm.is_model(encoder.removeprefix("tu-"))
    if encoder not in encoders and not is_timm_encoder:
        known = [*encoders, *(f"tu-{name}" for name in timm.list_models())]
        matches = difflib.get_close_matches(encoder, known, 3)
        hint = f"did you mean {', '.join(matches)}? " if matches else ""
        raise ValueError(
            f"encoder: found {encoder!r}, {hint}there are: {', '.join(encoders)}, "
            "and tu-NAME for any model NAME of timm"
        )


def _build_and_try(config: ModelConfig) -> SegmentationDepthNet:
    """Build a network and test it on a blank image, because some encoders support only one image size."""
    check_network(config.architecture, config.encoder)
    try:
        model = SegmentationDepthNet(config)
        with torch.no_grad():
            model.eval()(torch.zeros(1, len(config.channels), *config.size))
    except (
        ValueError,
        NotImplementedError,
        RuntimeError,
        LookupError,
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
    """Copy all weights of a trained network that match in name and shape, and its RGB normalisation.

    In the first layer, filters of channels that both networks have are copied; depth in two encodings counts
    as two channels. Filters of new channels are set to zero, so that they have no effect at first. Some
    encoders have several first layers side by side.

    Three parts may keep their initial weights: the first layer if the networks have no channel in common, the
    segmentation head if the classes differ, and the depth head if the trained network has none. They are
    recorded in `model.reinitialised`.

    Raises:
        ValueError: if encoder or architecture differ, or other weights don't match.
    """
    for name in ("architecture", "encoder"):
        found, wanted = getattr(trained.config, name), getattr(model.config, name)
        if found != wanted:
            raise ValueError(
                f"init_from: that run has {name} {found}, but this network has {wanted}; make them equal"
            )
    target = model.state_dict()
    source = trained.state_dict()
    channels, source_channels = model.config.channels, trained.config.channels
    first_layers = [
        f"net.encoder.{name}"
        for name in _find_first_layers(model.net.encoder, model.config.encoder, len(channels))
    ]
    if set(channels) & set(source_channels):
        for name in first_layers:
            source[name] = _match_channels(target[name], source[name], channels, source_channels)
    else:
        source |= {name: target[name] for name in first_layers}
        model.reinitialised["first layer"] = sum(target[name].numel() for name in first_layers)
    if trained.config.classes != model.config.classes:
        source = {
            name: tensor for name, tensor in source.items() if not name.startswith("net.segmentation_head.")
        }
    copied = {
        name: source[name] for name in target if name in source and source[name].shape == target[name].shape
    }
    uncopied = [name for name in target if name not in copied]
    if mismatched := [name for name in uncopied if "_head." not in name]:
        raise ValueError(f"init_from: {', '.join(mismatched[:3])} of that run don't fit this network")
    model.load_state_dict(target | copied)
    model.config = replace(model.config, rgb_mean=trained.config.rgb_mean, rgb_std=trained.config.rgb_std)
    for name in uncopied:
        module_name = name.removeprefix("net.").split(".")[0].replace("_", " ")
        model.reinitialised[module_name] = model.reinitialised.get(module_name, 0) + target[name].numel()


def _find_first_layers(encoder: nn.Module, name: str, in_channels: int) -> list[str]:
    """Return the names of the encoder's tensors whose shape depends on the number of input channels.

    The first 4-D tensor may be a position embedding, and some encoders have several first layers.
    """
    with torch.random.fork_rng(devices=[]):  # the network's own weights are drawn as before
        wider = get_encoder(name, in_channels + 1).state_dict()
    return [name for name, tensor in encoder.state_dict().items() if wider[name].shape != tensor.shape]


def _match_channels(
    target: torch.Tensor,
    source: torch.Tensor,
    target_channels: tuple[str, ...],
    source_channels: tuple[str, ...],
) -> torch.Tensor:
    """Return first-layer filters `(F, P*C, h, w)`: copied for common channels, zero for the others.

    P is 1, or the number of pixels that a space-to-depth stem stacks as channels.
    """
    filters = torch.zeros_like(target).unflatten(1, (-1, len(target_channels)))
    copied = source.unflatten(1, (-1, len(source_channels)))
    for position, channel in enumerate(target_channels):
        if channel in source_channels:
            filters[:, :, position] = copied[:, :, source_channels.index(channel)]
    return filters.flatten(1, 2)


def save_model(model: SegmentationDepthNet, path: Path) -> None:
    """Save the weights and the config, from which `load_model` rebuilds the network."""
    save_checkpoint({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SegmentationDepthNet:
    """Load a network saved by `save_model`, in evaluation mode.

    Evaluation and prediction need no other file.

    Raises:
        CheckpointError: if the file is missing, damaged or not a model of this project.
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


def is_weights_file(weights: str | None) -> bool:
    """Whether weights are given as a file path, not as a name."""
    return weights is not None and Path(weights).suffix in (".pth", ".pt", ".bin", ".safetensors")


def weights_digest(weights: str | Path | None) -> str | None:
    """Return the SHA-256 of a weights file, whatever its path, or None for a name or a missing file."""
    if not is_weights_file(weights) or not Path(weights).expanduser().exists():
        return None
    return hashlib.sha256(Path(weights).expanduser().read_bytes()).hexdigest()


def find_normalisation(encoder_weights: str, encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the RGB mean and std, for values in 0..1, that pretrained weights were trained with.

    They come from the configuration of timm or smp. Weights files contain no configuration, so the mean and
    std are those of timm's model of the same name, or ImageNet's if timm has no such model.

    Raises:
        RuntimeError: if smp's configuration can't be downloaded.
    """
    name = _timm_name(encoder)
    if encoder.startswith("tu-") or (is_weights_file(encoder_weights) and timm.is_model(name)):
        config = get_pretrained_cfg(name)
        return tuple(config.mean), tuple(config.std)
    if is_weights_file(encoder_weights):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    with _explain_download_errors(encoder_weights, encoder):
        config = get_preprocessing_params(encoder, encoder_weights)
    highest = config["input_range"][1]  # 1, or 255 for weights trained on values in 0..255
    return tuple(tuple(value / highest for value in config[name]) for name in ("mean", "std"))


def load_encoder_weights(encoder: nn.Module, encoder_weights: str, name: str, in_channels: int) -> None:
    """Load pretrained weights into an encoder of segmentation-models-pytorch.

    In the first layer, the RGB weights are repeated over the input channels and rescaled, or summed for a
    single channel, as in timm. This applies to named weights and to files.

    Args:
        encoder: encoder with any number of input channels.
        encoder_weights: name of weights available for this encoder, such as `imagenet`, or path of a .pth,
            .pt, .bin or .safetensors file with the parameter names of timm or segmentation-models-pytorch.
            Code in the file is not executed.
        name: name of the encoder.
        in_channels: number of its input channels.

    Raises:
        ValueError: if there are no weights of that name.
        RuntimeError: if the weights can't be downloaded.
        CheckpointError: if the file is missing or damaged, or does not match the whole encoder.
    """
    if is_weights_file(encoder_weights):
        path = Path(encoder_weights).expanduser()
        _load_into_encoder(encoder, _read_weights(path), path, name, in_channels)
        return
    if name.startswith("tu-"):
        known = ["imagenet"] if timm.is_model_pretrained(name.removeprefix("tu-")) else []
    else:
        known = list(encoders[name]["pretrained_settings"])
    if encoder_weights not in known:
        raise ValueError(
            f"encoder_weights: found {encoder_weights!r}, {name} has {', '.join(known) or 'none'}; or None, "
            "or the path of a .pth or .safetensors file"
        )
    with (
        _explain_download_errors(encoder_weights, name),
        warnings.catch_warnings(action="error", category=UserWarning),  # smp only warns of unused weights
    ):
        weights = True if name.startswith("tu-") else encoder_weights
        pretrained = get_encoder(name, in_channels, weights=weights).state_dict()
    # the encoder has fewer stages in some architectures
    encoder.load_state_dict({tensor: pretrained[tensor] for tensor in encoder.state_dict()})


@contextmanager
def _explain_download_errors(encoder_weights: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub, network and cache raise many exception types
        raise RuntimeError(
            f"encoder_weights: {encoder_weights!r} for {name} could not be fetched ({type(error).__name__}). "
            "They are downloaded once and then cached: run once while online, give the path of a file, or "
            "train from scratch with `-p encoder_weights None`"
        ) from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the state dict of a weights file with timm, which unwraps it; no code in it is executed."""
    if not path.exists():
        raise CheckpointError(f"encoder_weights: {path}: no such file")
    try:
        return load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # torch and safetensors raise many exception types here
        raise CheckpointError(
            f"encoder_weights: {path}: can't be read as weights ({type(error).__name__}); it is "
            "truncated, or contains code, which is not executed here: save only the state_dict"
        ) from error


def _load_into_encoder(
    encoder: nn.Module, weights: dict[str, torch.Tensor], path: Path, name: str, in_channels: int
) -> None:
    """Load a file's weights into the encoder; all except `num_batches_tracked` must exist and fit.

    Other tensors of the file, such as those of a classifier, are ignored, but not further blocks.
    """
    target = encoder.state_dict()
    tensors = {
        _normalise_name(name): tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)
    }
    matched = {name: tensors[_normalise_name(name)] for name in target if _normalise_name(name) in tensors}
    for layer in _find_first_layers(encoder, name, in_channels):
        if layer in matched and matched[layer].shape[1] == 3:
            matched[layer] = adapt_input_conv(in_channels, matched[layer])
    problems = {
        "missing": [
            name for name in target if name not in matched and not name.endswith("num_batches_tracked")
        ],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(target[name].shape)}"
            for name, tensor in matched.items()
            if tensor.shape != target[name].shape
        ],
        "of further blocks": _find_further_blocks(set(tensors), set(map(_normalise_name, target)), name),
    }
    messages = [
        f"{len(names)} {kind}, such as {', '.join(names[:3])}" for kind, names in problems.items() if names
    ]
    if messages:
        raise CheckpointError(
            f"encoder_weights: {path} does not fill the {len(target)} tensors of the encoder: "
            f"{'; '.join(messages)}; expected the weights of exactly this encoder, with names as in timm "
            "or segmentation-models-pytorch"
        )
    encoder.load_state_dict(target | matched)


def _find_further_blocks(found: set[str], own: set[str], encoder: str) -> list[str]:
    """Return the tensor names of blocks that a file has beyond those of the encoder, sorted.

    They show that the file is of a deeper network, such as a ResNet-34 whose first blocks fit a ResNet-18.
    A block has two numbers in its name. timm may leave out the last blocks of an encoder.
    """
    kinds = {NUMBER.sub("#", name) for name in own}  # such as layer#_#_conv#_weight
    further = {
        name for name in found - own if len(NUMBER.findall(name)) > 1 and NUMBER.sub("#", name) in kinds
    }
    if further and timm.is_model(_timm_name(encoder)):
        with torch.random.fork_rng(devices=[]):  # the network's own weights are drawn as before
            whole = timm.create_model(_timm_name(encoder))
        further -= set(map(_normalise_name, whole.state_dict()))
    return sorted(further)


def _timm_name(encoder: str) -> str:
    """Return the name that timm has, or would have, for an encoder of segmentation-models-pytorch."""
    name = encoder.removeprefix("tu-").removeprefix("timm-")
    return TIMM_NAMES.get(name, name)


def _normalise_name(name: str) -> str:
    """Remove prefixes and replace dots: timm's feature extractors write `stem_0` instead of `stem.0`."""
    return NAME_PREFIX.sub("", name).replace(".", "_")

"""Pretrained weights of an encoder: by name, where one is online, or from a file."""

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import encoders, get_encoder
from timm.models import adapt_input_conv
from torch import nn

from lib.files import CheckpointError

PREFIXES = ("module.", "encoder.", "backbone.", "model.")  # that a file may put before every name
INSIDE = ("state_dict", "model", "weights")  # where in a file the weights may lie


def is_file(encoder_weights: str | None) -> bool:
    """Whether weights are meant by a path, not by a name."""
    return encoder_weights is not None and Path(encoder_weights).suffix in (".pth", ".pt", ".bin", ".safetensors")


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
            fetched = get_encoder(name, input_channels, weights=True if name.startswith("tu-") else encoder_weights)
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
        saved = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
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
        raise CheckpointError(f"encoder_weights: {path}: found a {type(saved).__name__}, expected names and tensors")
    return saved


def _fill(encoder: nn.Module, weights: dict[str, torch.Tensor], path: Path, input_channels: int) -> None:
    own, prefixes = encoder.state_dict(), [""]
    for prefix in PREFIXES * 2:
        prefixes += [known + prefix for known in prefixes if any(name.startswith(known + prefix) for name in weights)]
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
    unexpected = [name for name in weights if name not in matched.values()] if missing else []  # a head is no problem
    problems = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    if missing or misshapen:
        found = [f"{len(names)} {what}, such as {', '.join(names[:3])}" for what, names in problems.items() if names]
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

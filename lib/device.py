"""Where, and in which precision, it computes."""

import shutil
import subprocess
import warnings
from contextlib import AbstractContextManager

import torch

from lib.parameters import check_choice

PRECISIONS = ("auto", "fp32", "bf16")


def choose_device(device: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; anything else must be there.

    Raises:
        ValueError: no such device here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # describe_device tells of a driver that is too old
        if torch.cuda.is_available():
            available.insert(0, "cuda")
    if device == "auto":
        return torch.device(available[0])
    if device.split(":")[0] not in available:
        raise ValueError(f"device: found {device!r}, torch {torch.__version__} has auto, {', '.join(available)} here")
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` takes bf16 where the hardware computes in it, else fp32."""
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    if device.type == "cpu":  # emulated, bf16 is several times slower than fp32
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def describe_device(device: str, precision: str) -> str:
    """What `fit` will run on, and a GPU that is there but can't be used."""
    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    line = f"{chosen.type} ({name}), {choose_precision(precision, chosen)}, torch {torch.__version__}"
    if chosen.type == "cpu" and device == "auto" and _has_nvidia_gpu():
        line += (
            "\nAn NVIDIA GPU is installed, but this torch can't use it and trains on the CPU. The usual reason is a "
            f"driver older than CUDA {torch.version.cuda}: update it, or install a torch and torchvision built for it"
        )
    return line


def _has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

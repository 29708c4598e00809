"""Where, and in which precision, it computes."""

import functools
import os
import platform
import re
import shutil
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from lib.options import check_choice

PRECISIONS = ("auto", "fp32", "bf16")


def choose_device(device: str) -> torch.device:
    """`auto` takes the first GPU that torch has kernels for, else the CPU; anything else must be there.

    A GPU becomes torch's current one, so that pinned memory and the like open nothing on another.

    Raises:
        ValueError: no such device here.
    """
    gpus = [] if device == "cpu" else [gpu for gpu, usable in _gpus().items() if usable]
    there = ["auto", *["cuda"] * bool(gpus), *gpus, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if device not in there:
        raise ValueError(
            f"device: found {device!r}, torch {torch.__version__} has {', '.join(there)} here{_unused_gpu()}"
        )
    if device in ("auto", "cuda"):
        device = gpus[0] if gpus else "cpu"
    if device in gpus:
        torch.cuda.set_device(device)
    return torch.device(device)


def _gpus() -> dict[str, bool]:
    """NVIDIA's GPUs, and whether this torch has kernels for each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # _unused_gpu tells of a driver or a GPU that is too old
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return {f"cuda:{gpu}": _has_kernels(torch.cuda.get_device_capability(gpu)) for gpu in range(count)}


def _has_kernels(capability: tuple[int, int]) -> bool:
    """Those of its own generation and not newer, or such as any later GPU compiles for itself (`compute`)."""
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    return torch.version.cuda is None or any(
        (int(major), int(minor)) <= capability and (kind == "compute" or int(major) == capability[0])
        for kind, major, minor in built
    )


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
    """What `fit` will run on, and a GPU that is there but is not taken."""
    chosen = choose_device(device)
    name = (
        torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    line = f"{chosen} ({name}), {choose_precision(precision, chosen)}, torch {torch.__version__}"
    return line + (_unused_gpu() if device == "auto" and chosen.type == "cpu" else "")


def _unused_gpu() -> str:
    """Why a GPU that is there can't be taken or is not, as one more line; nothing where there is none."""
    if torch.backends.mps.is_available():
        return "\nNobody has trained on a Mac's GPU with this code yet, so auto takes the CPU: device mps tries it"
    too_old = [gpu for gpu, usable in _gpus().items() if not usable]
    if too_old:
        major, minor = torch.cuda.get_device_capability(too_old[0])
        reason = (
            f"{torch.cuda.get_device_name(too_old[0])} ({too_old[0]}) is of compute capability {major}.{minor}, and it "
            f"has kernels for {', '.join(torch.cuda.get_arch_list())}: install a torch and torchvision built for that"
        )
    elif not torch.cuda.is_available() and _has_nvidia_gpu():
        driver = f"The usual reason is a driver older than CUDA {torch.version.cuda}: update it"
        reason = f"{driver}, or install a torch and torchvision built for it"
    else:
        return ""
    return f"\nAn NVIDIA GPU is installed, but this torch can't use it. {reason}"


def _has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout


def describe_processor() -> str:
    """The CPU's name and the vector instructions that torch uses there, such as `AMD EPYC (AVX2)`."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = named[1] if named else name
    instructions = torch.backends.cpu.get_cpu_capability()
    extra = [kind for kind in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(kind)]
    return f"{name} ({', '.join([instructions, *extra])})"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def explain_out_of_memory(generate: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """A generator that says what to do where a GPU's memory does not suffice, and lets go of what it had of it.

    Jupyter keeps a traceback, and its frames the network: another try would fail, too.
    """

    @functools.wraps(generate)
    def explained(*arguments: object, **options: object) -> Iterator:
        try:
            yield from generate(*arguments, **options)
            return
        except (RuntimeError, MemoryError) as error:  # RuntimeError: from torch, of several kinds
            if not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            message = str(error) if isinstance(error, MemoryError) else _describe_memory(str(error))
            traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        raise MemoryError(message)

    return explained


def _describe_memory(error: str) -> str:
    asked, held = re.search(r"allocate ([\d.]+ \w+)", error), ""
    if torch.cuda.is_available():
        free, total, own = (
            amount / 2**30 for amount in (*torch.cuda.mem_get_info(), torch.cuda.memory_reserved())
        )
        held = (
            f"; {free:.1f} of {total:.1f} GiB were free, this program held {own:.1f}, and CUDA with other programs "
            f"(nvidia-smi lists them) {total - free - own:.1f}"
        )
    return (
        f"out of memory: {asked[1] if asked else 'more than there is'} was asked for{held}. Take precision bf16, or "
        "lower batch_size, or image_height and image_width; where that fails too, restart the kernel. The run's "
        "folder is as it was"
    )

"""Choose the device and the numeric precision."""

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

import psutil
import torch
from torch import nn

from lib.options import check_options

OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory")


def choose_device(device: str) -> torch.device:
    """Return the torch device for `auto` or a device name.

    `auto` selects the first NVIDIA GPU that torch can use, else the CPU. Any other device must be available.
    A selected GPU becomes torch's current device, so that operations such as pinning memory don't initialise
    another GPU.

    Raises:
        ValueError: if the device is not available.
    """
    usable = [] if device == "cpu" else [gpu for gpu, problem in _probe_gpus().items() if problem is None]
    available = ["auto", *usable, "cpu"]
    if usable:
        available.insert(1, "cuda")
    if torch.backends.mps.is_available():
        available.insert(-1, "mps")
    if device not in available:
        raise ValueError(
            f"device: found {device!r}, torch {torch.__version__} has {', '.join(available)} "
            f"here{_describe_unused_gpu()}"
        )
    if device in ("auto", "cuda"):
        device = usable[0] if usable else "cpu"
    if device in usable:
        torch.cuda.set_device(device)
    return torch.device(device)


@functools.cache
def _probe_gpus() -> dict[str, str | None]:
    """Try each NVIDIA GPU, and map its name to None if torch can use it, otherwise to the reason why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # _describe_unused_gpu reports a driver or a GPU that is too old
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return {f"cuda:{gpu}": _try_gpu(f"cuda:{gpu}") for gpu in range(count)}


def _try_gpu(gpu: str) -> str | None:
    try:
        torch.ones(1, device=gpu).sum().item()
    except RuntimeError as error:  # for example, torch was built without kernels for this GPU
        if not OUT_OF_MEMORY.search(str(error)):  # a GPU that is full now can be used later
            return str(error).splitlines()[0]
    return None


def choose_precision(precision: str, device: torch.device) -> str:
    """Return the numeric precision. `auto` selects bf16 if the hardware supports it natively, else fp32."""
    check_options(precision=precision)
    if precision != "auto":
        return precision
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16"
    # a CPU without these instructions emulates bf16, which is slower than fp32
    if device.type == "cpu" and _list_bf16_instructions():
        return "bf16"
    return "fp32"


def _list_bf16_instructions() -> list[str]:
    """Return the bf16 instruction sets of the CPU. Torch versions before 2.7 report none."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device. On a GPU, use channels-last memory and cuDNN benchmarking for speed."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def describe_device(device: str, precision: str) -> str:
    """Describe the device and precision of `fit`, and why `auto` does not use an installed GPU."""
    chosen = choose_device(device)
    name = ""
    if chosen.type == "cpu":
        name = f" ({torch.get_num_threads()} threads)"
    if chosen.type == "cuda":
        name = f" ({torch.cuda.get_device_name(chosen)})"
    line = f"{chosen}{name}, {choose_precision(precision, chosen)}, torch {torch.__version__}"
    return line + (_describe_unused_gpu() if device == "auto" and chosen.type == "cpu" else "")


def describe_processor() -> str:
    """Return the CPU's name and the vector instructions that torch uses, such as `AMD EPYC (AVX2)`."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = match[1] if match else name
    instructions = [torch.backends.cpu.get_cpu_capability(), *_list_bf16_instructions()]
    return f"{name} ({', '.join(instructions)})"


def _describe_unused_gpu() -> str:
    """Return a line that explains why an installed GPU is not used, or an empty string."""
    if torch.backends.mps.is_available():
        return "\nTraining on a Mac's GPU is untested, so device auto takes the CPU; device mps tries the GPU"
    unusable = [(gpu, problem) for gpu, problem in _probe_gpus().items() if problem]
    if unusable:
        gpu, problem = unusable[0]
        reason = (
            f"{torch.cuda.get_device_name(gpu)} ({gpu}): {problem}. "
            "Install a torch and torchvision built for it"
        )
    elif not torch.cuda.is_available() and _has_nvidia_gpu():
        reason = (
            f"The driver is probably older than CUDA {torch.version.cuda}: update it, or install a "
            "torch and torchvision built for it"
        )
    else:
        return ""
    return f"\nAn NVIDIA GPU is installed, but this torch can't use it. {reason}"


def _has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout


def describe_memory(device: torch.device) -> str:
    """Return the memory in use: reserved by torch on a GPU, otherwise resident memory of this process."""
    used_bytes = psutil.Process().memory_info().rss
    if device.type == "cuda":
        used_bytes = torch.cuda.memory_reserved(device)
    return f"{used_bytes / 2**30:.1f} GiB"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context manager for mixed precision with `bf16`; for `fp32`, it has no effect."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def explain_out_of_memory(remedy: str) -> Callable[[Callable[..., Iterator]], Callable[..., Iterator]]:
    """Decorate a generator to free its memory and raise an error with a remedy when memory runs out.

    Jupyter keeps the traceback, whose frames keep the network in memory. Unless the frames are cleared, the
    next attempt also fails. If decorated generators are nested, the error has the remedy of the outer one.

    Args:
        remedy: the parameters to change, such as `lower batch_size`.

    Raises:
        MemoryError: if the decorated generator runs out of memory.
    """

    def decorate(generate: Callable[..., Iterator]) -> Callable[..., Iterator]:
        @functools.wraps(generate)
        def wrapper(*arguments: object, **options: object) -> Iterator:
            try:
                yield from generate(*arguments, **options)
                return
            except (RuntimeError, MemoryError) as error:  # torch raises various RuntimeErrors
                if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                    raise
                message = str(error).partition("\n")[0].partition(" (out of memory: ")[0]
                traceback.clear_frames(error.__traceback__)
            torch.cuda.empty_cache()
            raise MemoryError(
                f"{message} (out of memory: {remedy}; if that fails too, restart the kernel. What was saved "
                "is intact)"
            )

        return wrapper

    return decorate

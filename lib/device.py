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

import psutil
import torch
from torch import nn

from lib.options import check_options

OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|can't allocate memory")
REMEDY = (
    " (out of memory: use precision bf16, or lower batch_size, or image_height and image_width; if that "
    "fails too, restart the kernel. The run's folder is unchanged)"
)


def choose_device(device: str) -> torch.device:
    """`auto` takes the first GPU that torch can use, else the CPU; anything else must be available.

    A GPU becomes torch's current one, so that pinned memory and the like open nothing on another.

    Raises:
        ValueError: no such device here.
    """
    usable = [] if device == "cpu" else [gpu for gpu, problem in _gpus().items() if problem is None]
    available = ["auto", *usable, "cpu"]
    if usable:
        available.insert(1, "cuda")
    if torch.backends.mps.is_available():
        available.insert(-1, "mps")
    if device not in available:
        raise ValueError(
            f"device: found {device!r}, torch {torch.__version__} has {', '.join(available)} "
            f"here{_unused_gpu()}"
        )
    if device in ("auto", "cuda"):
        device = usable[0] if usable else "cpu"
    if device in usable:
        torch.cuda.set_device(device)
    return torch.device(device)


@functools.cache
def _gpus() -> dict[str, str | None]:
    """NVIDIA's GPUs, and why torch can't use each; None where it can, which is tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # _unused_gpu reports a driver or a GPU that is too old
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return {f"cuda:{gpu}": _try_gpu(f"cuda:{gpu}") for gpu in range(count)}


def _try_gpu(gpu: str) -> str | None:
    try:
        torch.ones(1, device=gpu).sum().item()
    except RuntimeError as error:  # such as a build without kernels for it
        return str(error).splitlines()[0]
    return None


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` takes bf16 where the hardware computes in it, else fp32."""
    check_options(precision=precision)
    if precision != "auto":
        return precision
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16"
    # a CPU without these instructions emulates bf16, which is slower than fp32
    if device.type == "cpu" and _bf16_instructions():
        return "bf16"
    return "fp32"


def _bf16_instructions() -> list[str]:
    """Those of this CPU that torch knows; empty before torch 2.7, which does not tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in ("avx512_bf16", "amx_bf16") if known.get(name)]


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, on a GPU in the memory layout that is fastest there."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def describe_device(device: str, precision: str) -> str:
    """What `fit` will run on, and a GPU that is installed but not used."""
    chosen = choose_device(device)
    name = f"{torch.get_num_threads()} threads"
    if chosen.type == "cuda":
        name = torch.cuda.get_device_name(chosen)
    line = f"{chosen} ({name}), {choose_precision(precision, chosen)}, torch {torch.__version__}"
    return line + (_unused_gpu() if device == "auto" and chosen.type == "cpu" else "")


def describe_processor() -> str:
    """The CPU's name and the vector instructions that torch uses there, such as `AMD EPYC (AVX2)`."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = named[1] if named else name
    instructions = [torch.backends.cpu.get_cpu_capability(), *_bf16_instructions()]
    return f"{name} ({', '.join(instructions)})"


def _unused_gpu() -> str:
    """Why an installed GPU can't be used or is not, as one more line; empty without one."""
    if torch.backends.mps.is_available():
        return "\nTraining on a Mac's GPU is untested, so device auto takes the CPU; device mps tries the GPU"
    unusable = [(gpu, problem) for gpu, problem in _gpus().items() if problem]
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
    """The memory in use: what torch has reserved of a GPU, elsewhere what this process holds."""
    used = psutil.Process().memory_info().rss
    if device.type == "cuda":
        used = torch.cuda.memory_reserved(device)
    return f"{used / 2**30:.1f} GiB"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def explain_out_of_memory(generate: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """Wrap a generator so that running out of memory says what to do and frees what was allocated.

    Jupyter keeps a traceback, and its frames the network: another try would fail, too.
    """

    @functools.wraps(generate)
    def explained(*arguments: object, **options: object) -> Iterator:
        try:
            yield from generate(*arguments, **options)
            return
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError, of several kinds
            if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                raise
            message = str(error).partition("\n")[0].removesuffix(REMEDY)
            traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        raise MemoryError(message + REMEDY)

    return explained

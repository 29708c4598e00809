import gc
import re
import sys
import weakref

import pytest
import torch

from lib import device as lib_device
from lib.device import (
    autocast,
    choose_device,
    choose_precision,
    describe_device,
    describe_processor,
    explain_out_of_memory,
)

NO_KERNELS = "CUDA error: no kernel image is available for execution on the device"
NAMES = {(7, 0): "Tesla V100", (7, 5): "Tesla T4", (8, 6): "NVIDIA A10", (9, 0): "NVIDIA H100"}


@pytest.fixture
def machine(monkeypatch):
    """Function that simulates GPUs of given compute capabilities.

    It returns a list that collects the GPUs that become torch's current device.
    """

    def make(*capabilities, mps=False):
        index = lambda gpu: torch.device(gpu).index if isinstance(gpu, (str, torch.device)) else gpu  # noqa: E731
        capability = lambda gpu: capabilities[index(gpu)]  # noqa: E731
        current = []
        for name, answer in {
            "is_available": lambda: bool(capabilities), "device_count": lambda: len(capabilities),
            "get_device_capability": capability,
            "get_device_name": lambda gpu: NAMES[capability(gpu)], "set_device": current.append,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(
            lib_device, "_try_gpu", lambda gpu: NO_KERNELS if capability(gpu) == (7, 0) else None
        )
        lib_device._probe_gpus.cache_clear()
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(lib_device, "_has_nvidia_gpu", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        return current

    yield make
    lib_device._probe_gpus.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "taken", "precision"),
    [
        ([], "cpu", None),
        ([(7, 0)], "cpu", None),  # this torch has no kernels for it
        ([(7, 5)], "cuda:0", "fp32"),
        ([(8, 6)], "cuda:0", "bf16"),
        ([(9, 0), (9, 0)], "cuda:0", "bf16"),
        ([(7, 0), (8, 6)], "cuda:1", "bf16"),
    ],
)
def test_auto_takes_the_first_gpu_that_torch_can_use(machine, capabilities, taken, precision):
    current = machine(*capabilities)
    assert choose_device("auto") == torch.device(taken)
    assert current == ([] if taken == "cpu" else [taken])  # no other GPU is initialised
    assert choose_device("cpu") == torch.device("cpu")
    if precision:
        assert choose_device("cuda") == torch.device(taken)
        assert choose_precision("auto", torch.device(taken)) == precision


@pytest.mark.parametrize(
    ("capabilities", "device", "there"),
    [
        ([], "cuda", "auto, cpu"),
        ([(9, 0), (9, 0)], "cuda:2", "auto, cuda, cuda:0, cuda:1, cpu"),
        ([(9, 0)], "cuda:x", "auto, cuda, cuda:0, cpu"),
        ([(9, 0)], "cuda:", "auto, cuda, cuda:0, cpu"),
        ([(9, 0)], "mps", "auto, cuda, cuda:0, cpu"),
        ([], "gpu", "auto, cpu"),
    ],
)
def test_unavailable_devices_are_refused(machine, capabilities, device, there):
    current = machine(*capabilities)
    with pytest.raises(ValueError) as error:
        choose_device(device)
    assert str(error.value) == f"device: found {device!r}, torch {torch.__version__} has {there} here"
    assert current == []


def test_selected_gpu_becomes_the_current_one(machine):
    current = machine((9, 0), (9, 0))
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert current == ["cuda:1"]
    assert describe_device("cuda:1", "auto") == f"cuda:1 (NVIDIA H100), bf16, torch {torch.__version__}"


TOO_OLD = (
    f"\nAn NVIDIA GPU is installed, but this torch can't use it. Tesla V100 (cuda:0): {NO_KERNELS}. Install a torch and "
    "torchvision built for it"
)


def test_gpu_without_kernels_is_explained(machine):
    machine((7, 0))
    assert describe_device("auto", "fp32") == f"{describe_device('cpu', 'fp32')}{TOO_OLD}"
    with pytest.raises(ValueError) as error:
        choose_device("cuda:0")
    assert (
        str(error.value) == f"device: found 'cuda:0', torch {torch.__version__} has auto, cpu here{TOO_OLD}"
    )


def test_gpu_whose_memory_is_full_is_not_taken_for_unsuitable(monkeypatch, machine):
    try_gpu = lib_device._try_gpu
    machine((9, 0))
    monkeypatch.setattr(lib_device, "_try_gpu", try_gpu)

    def full(*arguments, **options):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(torch, "ones", full)
    assert choose_device("auto") == torch.device("cuda", 0)

    def unsuitable(*arguments, **options):
        raise RuntimeError(NO_KERNELS)

    lib_device._probe_gpus.cache_clear()
    monkeypatch.setattr(torch, "ones", unsuitable)
    assert choose_device("auto") == torch.device("cpu")


def test_auto_uses_the_cpu_on_a_mac_and_explains_why(machine):
    machine(mps=True)
    assert choose_device("auto") == torch.device("cpu")
    assert choose_device("mps") == torch.device("mps")
    assert describe_device("mps", "auto").startswith(f"mps, fp32, torch {torch.__version__}")
    assert describe_device("auto", "fp32").endswith(
        "\nTraining on a Mac's GPU is untested, so device auto takes the CPU; device mps tries the GPU"
    )
    assert "Mac" not in describe_device("cpu", "fp32")


def test_too_old_driver_is_explained(machine, monkeypatch):
    machine()
    assert describe_device("auto", "fp32") == describe_device("cpu", "fp32")
    assert describe_device("cpu", "fp32").startswith(f"cpu ({torch.get_num_threads()} threads), fp32, torch ")
    monkeypatch.setattr(lib_device, "_has_nvidia_gpu", lambda: True)
    assert describe_device("auto", "fp32").endswith(
        "\nAn NVIDIA GPU is installed, but this torch can't use it. The driver is probably older than CUDA 13.0: "
        "update it, or install a torch and torchvision built for it"
    )
    assert "NVIDIA" not in describe_device("cpu", "fp32")


def test_gpu_hidden_by_the_environment_is_not_reported(monkeypatch):
    monkeypatch.setattr(lib_device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    listing = lambda *arguments, **options: type("Result", (), {"stdout": "GPU 0: NVIDIA H100"})  # noqa: E731
    monkeypatch.setattr(lib_device.subprocess, "run", listing)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert lib_device._has_nvidia_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as in a sweep with gpus_per_run 0
    assert not lib_device._has_nvidia_gpu()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_auto_precision_on_a_cpu_is_bf16_only_if_supported(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == expected
    assert [choose_precision(precision, cpu) for precision in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(ValueError, match="precision: found 'fp16', expected one of auto, fp32, bf16"):
        choose_precision("fp16", cpu)


def test_autocast_uses_bf16_only_if_requested():
    weights = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (weights @ weights).dtype == dtype


def test_processor_description_has_name_and_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True}, raising=False
    )
    assert re.fullmatch(r".+ \(AVX512, avx512_bf16, amx_bf16\)", describe_processor())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert re.fullmatch(r".+ \(AVX512\)", describe_processor())


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 320.00 MiB. GPU 0 has a total capacity of 11.77 GiB of which ..."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_SAYS),
        RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: ..."),
    ],
)
def test_out_of_memory_is_explained_and_memory_is_freed(machine, monkeypatch, error):
    machine((8, 6))
    emptied, networks = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(networks[0]() is None))

    @explain_out_of_memory("use device cpu")
    def inner(network):
        yield 1
        raise error

    @explain_out_of_memory("lower batch_size")  # nested, as when training calls prediction
    def outer():
        network = torch.nn.Linear(1, 1)
        networks.append(weakref.ref(network))
        yield from inner(network)

    batches = outer()
    assert next(batches) == 1
    try:
        next(batches)
    except MemoryError as told:
        sys.last_exc = told  # Jupyter keeps the last exception
    gc.collect()
    told = str(sys.last_exc)
    assert told == (
        f"{error} (out of memory: lower batch_size; if that fails too, restart the kernel. What was saved is "
        "intact)"
    )
    assert networks[0]() is None
    assert emptied == [False, True]  # the outer call freed the network before it emptied the cache
    del sys.last_exc


def test_other_errors_are_raised_unchanged():
    @explain_out_of_memory("use device cpu")
    def fail():
        yield 1
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="^shapes differ$"):
        list(fail())

import pytest
import torch

from lib.device import autocast, choose_device, choose_precision, describe_device


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_devices(no_gpu, monkeypatch):
    assert choose_device("cpu") == choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: found 'cuda', torch .* has auto, cpu here"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")]
)
def test_precisions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == expected
    assert [choose_precision(precision, cpu) for precision in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(ValueError, match="precision: found 'fp16', expected one of auto, fp32, bf16"):
        choose_precision("fp16", cpu)


@pytest.mark.parametrize(("generation", "expected"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_precision_of_gpus(monkeypatch, generation, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_mixed_precision_only_where_it_is_asked_for():
    weights = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (weights @ weights).dtype == dtype


def test_an_unusable_gpu_is_told(no_gpu, monkeypatch):
    assert describe_device("cpu", "fp32").startswith(f"cpu ({torch.get_num_threads()} threads), fp32, torch ")
    monkeypatch.setattr("lib.device._has_nvidia_gpu", lambda: True)
    assert "An NVIDIA GPU is installed, but this torch can't use it" in describe_device("auto", "fp32")
    assert "NVIDIA" not in describe_device("cpu", "fp32")
    monkeypatch.setattr("lib.device._has_nvidia_gpu", lambda: False)
    assert "NVIDIA" not in describe_device("auto", "fp32")

"""GPU checks that need no GPU. They use fake tensors, which have no data, or watch torch's operations."""

import weakref

import pytest
import torch
from small_run import ENCODER, small_samples, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import losses, training
from lib.batches import RawBatch, encode_batch, training_loader
from lib.classes import NYUV2_13
from lib.device import autocast
from lib.evaluation import decide
from lib.model import build_model
from lib.training import Objective, Optimisation

INPUT_CHANNELS = {"rgb": 3, "depth": 1, "rgbd": 4, "rgbd_xy": 6}

POOLINGS = ("batch", "image", "exp061")

CUDA = torch.device("cuda")
# the host needs the result of each of these, so the GPU must first finish all earlier work
WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal")


def raw_batch(count: int, size: tuple[int, int]) -> RawBatch:
    kinds = (torch.uint8, torch.uint16, torch.uint8, torch.bool)
    image, *others = (torch.zeros((count, *size), dtype=kind) for kind in kinds)
    return RawBatch(image[..., None].expand(*image.shape, 3), *others, torch.arange(count))


def fakes_need_a_driver() -> bool:
    """Whether this version of torch (such as 2.8) opens the GPU driver to fill a fake tensor."""
    try:
        with FakeTensorMode():
            torch.empty(1, device=CUDA).uniform_()
    except RuntimeError:
        return True
    return False


@pytest.mark.skipif(fakes_need_a_driver(), reason="this torch opens a GPU's driver for fake tensors")
@pytest.mark.parametrize("inputs", INPUT_CHANNELS)
def test_inference_and_losses_stay_on_a_fake_gpu(inputs):
    """From encoding to argmax, with every pooling.

    Reading a value of a fake tensor, or combining it with a CPU tensor, is an error.
    """
    with FakeTensorMode(), torch.no_grad():
        with CUDA:
            model = build_model(encoder=ENCODER, inputs=inputs, size=(48, 64), classes=NYUV2_13).eval()
        batch = encode_batch(raw_batch(2, (48, 64)), model.config, CUDA)
        prediction = model(batch.inputs)
        for pooling in POOLINGS:
            terms = Objective(0.5, pooling, 0.1, torch.ones(13))(prediction, batch)
            assert {term.device.type for term in terms} == {"cuda"}
        decided = decide(prediction.logits)
        assert {tensor.device.type for tensor in (*batch, *prediction, decided)} == {"cuda"}
        assert decided.shape == (2, 48, 64)


class Watch(TorchDispatchMode):
    """Fails if an operation waits for a GPU or creates a float64 tensor on the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls += 1
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == self.device for tensor in tensors):
            assert not any(name in str(operation) for name in WAITS), operation
            by_mask = "index" in str(operation) and any(tensor.dtype == torch.bool for tensor in tensors[1:])
            assert not by_mask, f"{operation} by a mask"
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                assert tensor.dtype != torch.float64, operation
        return result


@pytest.mark.parametrize("options", [{}, {"precision": "bf16", "soft_iou_pooling": "exp061"}])
def test_training_step_has_no_operation_that_waits_for_a_gpu(monkeypatch, options):
    """Covers encoding, forward, loss, backward, update, schedule. Only the Lovász loss waits, within smp."""
    real, watches = training.train_epoch, []

    def with_progress(model, step, *others):
        def watched_step(raw):
            with Watch("cpu") as watch:
                watches.append(watch)
                return step(raw)

        return real(model, watched_step, *others)

    monkeypatch.setattr(training, "train_epoch", with_progress)
    monkeypatch.setattr(losses, "_check_labels", lambda *arguments: None)  # reads labels on a CPU only
    train("with_progress", small_samples()[:10], held_out=2, epochs=1, **options)
    assert len(watches) == 2
    assert min(watch.calls for watch in watches) > 500


class Memory(TorchDispatchMode):
    """Tracks the bytes of all live tensors and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = {}, 0

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata)
            self.most = max(self.most, sum(self.alive.values()))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result


def step_memory(batch_size: int, precision: str) -> float:
    """GiB of an Exp061 step up to the end of the backward pass, with weights but without optimizer state."""
    size, cpu = (480, 640), torch.device("cpu")  # autocast and backward don't support a fake GPU
    with FakeTensorMode():
        model = build_model(encoder="resnet101", size=size, classes=NYUV2_13)
        memory = Memory()
        for tensor in (*model.parameters(), *model.buffers()):
            memory.see(tensor)
        raw = raw_batch(batch_size, size)
        with memory:
            batch = encode_batch(raw, model.config, cpu)
            with autocast(cpu, precision):
                prediction = model(batch.inputs)
            Objective(0.5, "exp061", 0.1)(prediction, batch).total.backward()
    return memory.most / 2**30


@pytest.mark.parametrize(("precision", "found"), [("fp32", 8.43), ("bf16", 4.72)])
def test_exp061_step_memory_is_as_documented(monkeypatch, precision, found):
    """The values of notebooks/docs/gpu.md, which may be exceeded by at most 2 %."""
    monkeypatch.setattr(losses, "CPU_CHUNK", losses.GPU_CHUNK)
    monkeypatch.setattr(losses, "_check_labels", lambda *arguments: None)
    assert 0.9 * found < step_memory(8, precision) < 1.02 * found


def test_cpu_run_does_not_pin_memory(scenes, monkeypatch, tmp_path):
    """Pinning memory would initialise an available GPU. A run on a GPU does pin it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = training_loader(scenes, "none", 2, 0, 0)
    assert not loader.pin_memory

    def stop(model, device):
        raise StopIteration

    monkeypatch.setattr(training, "move_model", stop)
    for device, pins in (("cuda:1", True), ("cpu", False)):
        monkeypatch.setattr(training, "choose_device", lambda name: torch.device(name))
        optimisation = Optimisation(epochs=1, learning_rate=0.1, weight_decay=0.0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(
                training.fit(torch.nn.Identity, loader, scenes, tmp_path, None, optimisation, "fp32", device)
            )
        assert loader.pin_memory == pins

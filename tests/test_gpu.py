"""The first five minutes on a GPU: `pytest tests/test_gpu.py -s` says what it found. All but its size runs on a CPU, too."""

import contextlib
import copy
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import ENCODER, PARAMETERS, small_samples, train

from lib import training
from lib.batches import RawBatch, encode_batch, plain_batch, training_loader
from lib.data.samples import resize_samples
from lib.device import choose_device, describe_device
from lib.evaluation import ahead, count_predictions, predict
from lib.model import build_model
from lib.runs import runs_folder
from lib.training import _place, build_network, build_optimizer, follow, total_loss, training_step

LOSS = partial(total_loss, soft_iou_weight=0.5, soft_iou_pooling="batch", depth_weight=0.1)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return choose_device(request.param)


@pytest.fixture(scope="module")
def samples():
    return small_samples()


@contextlib.contextmanager
def waiting_is_an_error(device):
    """The GPU says itself where the host waits for it."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_epochs_with_workers_and_pinning(samples, device, precision):
    """As `train.ipynb` does it; with two workers, and on a GPU with pinned memory."""
    print(describe_device(str(device), precision))
    history = train("gpu", samples, device=str(device), precision=precision, epochs=2, num_workers=2)
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert (runs_folder() / "gpu" / "report.md").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits(samples, device, precision):
    model = _place(build_network(PARAMETERS, samples.classes), device)
    average, optimizer = copy.deepcopy(model), build_optimizer(model, 1e-3, 1.0, 1e-4)
    loader = training_loader(samples[:12], "crops", 4, 0, 0)
    loader.pin_memory = device.type == "cuda"
    for number, raw in enumerate(loader):
        with (
            waiting_is_an_error(device) if number else contextlib.nullcontext()
        ):  # the first one searches kernels
            terms = training_step(model, encode_batch(raw, model.config, device), LOSS, optimizer, precision)
            follow(average, model, 0.9)
        assert terms.isfinite().all()


def test_loss_gradient_and_counts_are_those_of_the_cpu(samples, device):
    """In fp32, where a GPU takes TF32 in convolutions unless it is told not to, as here."""
    found = {}
    with torch.backends.cudnn.flags(allow_tf32=False):
        for where in (torch.device("cpu"), device):
            model = _place(build_network(PARAMETERS, samples.classes), where).eval()  # without dropout
            batch = encode_batch(plain_batch(samples[:8]), model.config, where)
            terms = LOSS(model(batch.inputs), batch)
            terms.total.backward()
            gradients = [
                weights.grad.cpu().flatten() for weights in model.parameters() if weights.grad is not None
            ]
            counted = count_predictions(predict(model, samples[:8], 4))
            found[where] = torch.stack(terms).detach().cpu(), torch.cat(gradients), counted.counts
    (terms, gradient, counts), (others, other, their_counts) = found[torch.device("cpu")], found[device]
    torch.testing.assert_close(others, terms, rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(other, gradient, dim=0) > 0.9999
    assert np.abs(their_counts - counts).sum() <= 0.002 * counts.sum()


def test_resume_goes_on_where_it_stopped(samples, device, monkeypatch):
    """Not to the digit on a GPU, whose sums have no fixed order."""
    whole = train("whole-gpu", samples, device=str(device), epochs=2)
    steps, real = iter(range(4)), training.training_step

    def step(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train("parted-gpu", samples, device=str(device), epochs=2)
    parted = train("parted-gpu", samples, resume=True, device=str(device), epochs=2)
    assert parted[-1]["train_loss"] == pytest.approx(
        whole[-1]["train_loss"], rel=0.02 if device.type == "cuda" else 0
    )


def test_native_evaluation_with_scales(samples, device):
    """Counted beside the next batch, at twice the working size; on a GPU nearly the counts of the CPU."""
    native, found = resize_samples(samples[:6], (96, 128)), {}
    for where in (torch.device("cpu"), device):
        model = build_network(PARAMETERS, samples.classes).to(where)
        batches = ahead(predict(model, native, 2, "scales", confidence=True))
        found[where] = count_predictions(batches, thorough=True, keep=True)
    expected, result = found[torch.device("cpu")], found[device]
    assert (result.predicted != expected.predicted).mean() < 0.01
    np.testing.assert_allclose(result.depth, expected.depth, rtol=0.01)
    assert result.boundary.shape == expected.boundary.shape


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_of_exp061(device, precision, channels_last):
    """Three of them after one to search kernels, at its size on a GPU: memory, images a second, both memory formats."""
    on_gpu = device.type == "cuda"
    encoder, size, count = ("resnet101", (480, 640), 8) if on_gpu else (ENCODER, (48, 64), 2)
    model = build_model(encoder=encoder, size=size)
    model = _place(model, device) if channels_last else model.to(device)
    optimizer = build_optimizer(model, 1e-4, 1.0, 1e-4)
    shape, generator = (count, *size), torch.Generator().manual_seed(0)
    image, depth, label = (
        torch.randint(high, shape_, generator=generator)
        for high, shape_ in ((256, (*shape, 3)), (9000, shape), (13, shape))
    )
    raw = RawBatch(image.byte(), depth.to(torch.uint16), label.byte(), depth > 0, torch.arange(count))
    loss, started = partial(LOSS, soft_iou_pooling="exp061"), 0.0
    for number in range(4):
        if number == 1 and on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter() if number < 2 else started
        terms = training_step(model, encode_batch(raw, model.config, device), loss, optimizer, precision)
    assert terms.isfinite().all()  # waits for the GPU
    speed = 3 * count / (time.perf_counter() - started)
    layout = "channels_last" if channels_last else "contiguous"
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if on_gpu else ""
    print(
        f"\n{device}, {encoder}, {size[0]}x{size[1]}, {count} images, {precision}, {layout}: {speed:.1f} images/s{memory}"
    )
    if on_gpu:  # computed: 8.4 and 4.7 in the backward pass, and 0.35 of the optimizer; what convolutions borrow is not
        assert torch.cuda.max_memory_allocated() / 2**30 < (12.5 if precision == "fp32" else 7.5)


@GPU
def test_a_run_on_the_cpu_opens_no_gpu():
    code = """if True:
        import lib, torch
        from small_run import small_samples, train
        train("cpu", small_samples()[:6], held_out=2, epochs=1, device="cpu")
        assert not torch.cuda.is_initialized() or not torch._C._cuda_hasPrimaryContext(0)"""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@GPU
def test_too_large_a_batch_is_told_and_leaves_its_memory():
    """A batch of 1,000 in a hundredth of the card; then a small one on what the first one let go."""
    many = small_samples()[:12].map(lambda array: np.repeat(array, 100, 0))
    torch.cuda.set_per_process_memory_fraction(0.01)
    with pytest.raises(
        MemoryError, match="out of memory: .* was asked for; .* GiB were free, this program held "
    ):
        train("large", many, device="cuda", batch_size=1000, held_out=2, epochs=1)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() < 2**28
    assert train("small", small_samples(), device="cuda", epochs=1)

"""Checks for the first five minutes on a GPU. `pytest tests/test_gpu.py -s` prints memory use and throughput.

Most of the tests also run on a CPU, the Exp061 steps at a smaller size.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import ENCODER, PARAMETERS, small_samples, train

from lib import training
from lib.batches import RawBatch, encode_batch, plain_batch, training_loader
from lib.classes import NYUV2_13
from lib.data.samples import resize_samples
from lib.device import choose_device, describe_device, move_model
from lib.evaluation import count_predictions, predict
from lib.model import build_model
from lib.runs import checkpoints, runs_folder
from lib.training import Objective, Optimisation, build_network, training_step

LOSS = Objective(soft_iou_weight=0.5, soft_iou_pooling="batch", depth_weight=0.1)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return choose_device(request.param)


@pytest.fixture(scope="module")
def samples():
    return small_samples()


@contextlib.contextmanager
def waiting_is_an_error(device):
    """Make torch raise an error wherever the host waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_works_with_workers_and_pinned_memory(samples, device, precision):
    """Train as `train.ipynb` does, with two workers and, on a GPU, with pinned memory."""
    print(describe_device(str(device), precision))
    history = train("gpu", samples, device=str(device), precision=precision, epochs=2, num_workers=2)
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert (runs_folder() / "gpu" / "report.md").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step_never_waits_for_the_gpu(samples, device, precision):
    model = move_model(build_network(PARAMETERS, samples.classes, samples.depth_range_m), device)
    optimizer = Optimisation(1, 1e-3, 1e-4).build_optimizer(model)
    loader = training_loader(samples[:12], "crops", 4, 0, 0)
    loader.pin_memory = device.type == "cuda"
    for number, raw in enumerate(loader):
        with (
            waiting_is_an_error(device) if number else contextlib.nullcontext()
        ):  # the first one selects kernels
            terms = training_step(model, encode_batch(raw, model.config, device), LOSS, optimizer, precision)
        assert terms.isfinite().all()


def test_loss_gradient_and_counts_match_the_cpu(samples, device):
    """In fp32, with TF32 turned off: by default, GPUs use TF32 in convolutions.

    On a CPU, the two networks and their results must be the same.
    """
    results = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for where in (torch.device("cpu"), device):
            model = move_model(
                build_network(PARAMETERS, samples.classes, samples.depth_range_m), where
            ).eval()  # without dropout
            batch = encode_batch(plain_batch(samples[:8]), model.config, where)
            terms = LOSS(model(batch.inputs), batch)
            terms.total.backward()
            gradients = [
                weights.grad.cpu().flatten() for weights in model.parameters() if weights.grad is not None
            ]
            counted = count_predictions(predict(model, samples[:8], 4))
            results.append((torch.stack(terms).detach().cpu(), torch.cat(gradients), counted.counts))
    (terms, gradient, counts), (others, other, their_counts) = results
    torch.testing.assert_close(others, terms, rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(other, gradient, dim=0) > 0.9999
    assert np.abs(their_counts - counts).sum() <= 0.002 * counts.sum()


def test_resumed_run_matches_an_uninterrupted_run(samples, device, monkeypatch):
    """The losses are equal on a CPU, but only similar on a GPU, whose sums have no fixed order."""
    whole = train("whole-gpu", samples, device=str(device), epochs=2)
    steps, real = iter(range(4)), training.training_step

    def step(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train("parted-gpu", samples, device=str(device), epochs=2)
    parted = train("parted-gpu", samples, resume=True, device=str(device), epochs=2)
    assert parted[-1]["train_loss"] == pytest.approx(
        whole[-1]["train_loss"], rel=0.02 if device.type == "cuda" else 0
    )


def test_native_size_evaluation_with_tta_matches_the_cpu(samples, device):
    """Images have twice the working size. The counts on a GPU nearly equal those on the CPU."""
    native = resize_samples(samples[:6], (96, 128))
    results = []
    for where in (torch.device("cpu"), device):
        model = build_network(PARAMETERS, samples.classes, samples.depth_range_m).to(where)
        batches = predict(model, native, 2, "scales", confidence=True)
        results.append(count_predictions(batches, thorough=True, keep=True))
    expected, result = results
    assert (result.predicted != expected.predicted).mean() < 0.01
    np.testing.assert_allclose(result.depth, expected.depth, rtol=0.01)
    assert result.boundary.shape == expected.boundary.shape


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exp061_training_steps_stay_within_the_memory_limit(device, precision, channels_last):
    """Three steps after one that selects kernels, in both memory formats, on a GPU at Exp061's size.

    Prints images per second and, on a GPU, peak memory.
    """
    on_gpu = device.type == "cuda"
    encoder, size, count = ("resnet101", (480, 640), 8) if on_gpu else (ENCODER, (48, 64), 2)
    model = build_model(encoder=encoder, size=size, classes=NYUV2_13)
    model = move_model(model, device) if channels_last else model.to(device)
    optimizer = Optimisation(1, 1e-4, 1e-4).build_optimizer(model)
    shape, generator = (count, *size), torch.Generator().manual_seed(0)
    image, depth, label = (
        torch.randint(high, shape_, generator=generator)
        for high, shape_ in ((256, (*shape, 3)), (9000, shape), (13, shape))
    )
    raw = RawBatch(image.byte(), depth.to(torch.uint16), label.byte(), depth > 0, torch.arange(count))
    loss, started = Objective(0.5, "exp061", 0.1), 0.0
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
    # calculated: 8.4 and 4.7 up to the backward pass, 0.35 for the optimizer; without convolution workspace
    if on_gpu:
        assert torch.cuda.max_memory_allocated() / 2**30 < (12.5 if precision == "fp32" else 7.5)


@GPU
def test_cpu_run_does_not_initialise_a_gpu():
    code = """if True:
        import lib, torch
        from small_run import small_samples, train
        train("cpu", small_samples()[:6], held_out=2, epochs=1, device="cpu")
        assert not torch.cuda.is_initialized() or not torch._C._cuda_hasPrimaryContext(0)"""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@GPU
def test_too_large_a_batch_is_explained_and_its_memory_freed():
    """A batch of 1,000 fails in 1 % of the GPU's memory. Then a small one trains in the freed memory."""
    many = small_samples()[:12].map(lambda array: np.repeat(array, 100, 0))
    torch.cuda.set_per_process_memory_fraction(0.01)
    with pytest.raises(
        MemoryError, match="out of memory: .* was asked for; .* GiB were free, this program held "
    ):
        train("large", many, device="cuda", batch_size=1000, held_out=2, epochs=1)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() < 2**28
    assert train("small", small_samples(), device="cuda", epochs=1)

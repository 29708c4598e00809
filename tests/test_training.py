import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from lib import training
from lib.batches import encode_batch, plain_batches
from lib.data.samples import Samples
from lib.device import choose_device, choose_precision, describe_device
from lib.metrics import confusion_counts, mean_iou
from lib.model import build_model, load_model
from lib.runs import runs_folder, start_run
from lib.training import build_average, build_schedule, fit, total_loss

OPTIONS = {
    "inputs": "rgbd", "depth_encoding": "inverse", "soft_iou_weight": 0.5, "soft_iou_pooling": "batch",
    "depth_weight": 0.1, "epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 1e-4,
    "schedule": "cosine", "ema_decay": 0.0, "augment": "exp061", "workers": 0, "precision": "fp32", "device": "cpu", "seed": 0,
}  # fmt: skip


@pytest.fixture
def small(scenes):
    return Samples(scenes.names, *(array[:, ::2, ::2] for array in (scenes.image, scenes.depth, scenes.label)))


def train(small, name, **options):
    torch.manual_seed(0)
    run = start_run(name, OPTIONS | options)
    return run, list(fit(build_model(), small[:9], small[9:], run, **OPTIONS | options))


def train_on(small, name, **options):
    """Resume a run to its end."""
    options = OPTIONS | options
    return list(training.fit(build_model(), small[:9], small[9:], start_run(name, options, resume=True), **options))


def test_one_batch_can_be_learned_by_heart(small):
    torch.manual_seed(0)
    model, batch = build_model(), encode_batch(next(plain_batches(small, 4)), "rgbd", "inverse", torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    history = []
    for _ in range(50):
        losses = total_loss(*model(batch.inputs), *batch[1:], 0.5, "batch", 1.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.depth.item())
    counts = confusion_counts(model(batch.inputs).logits.argmax(1), batch.label, 13)
    assert mean_iou(counts) > 0.8
    assert min(history) < 0.6 * history[0]


def test_run_folder_holds_the_best_epoch(small):
    run, history = train(small, "best")
    assert [row["epoch"] for row in history] == [1, 2, 3]
    pd.testing.assert_frame_equal(pd.read_csv(run / "history.csv"), pd.DataFrame(history))
    best = max(history, key=lambda row: row["valid_miou"])
    scores = json.loads((run / "scores.json").read_text())
    assert scores["best_epoch"] == best["epoch"]
    assert scores["valid_miou"] == best["valid_miou"]
    with np.load(run / "counts.npz") as saved:
        assert mean_iou(saved["counts"]) == best["valid_miou"]
        assert list(saved["names"]) == list(small.names[9:])
    model = load_model(run / "best.pt")
    raw = next(plain_batches(small[9:], 3))
    logits = model(encode_batch(raw, "rgbd", "inverse", torch.device("cpu")).inputs).logits
    assert mean_iou(confusion_counts(logits.argmax(1), raw.label, 13)) == pytest.approx(best["valid_miou"])
    assert {path.name for path in run.iterdir()} == {
        "parameters.json", "history.csv", "scores.json", "counts.npz", "best.pt", "last.pt", "report.md",
    }  # fmt: skip


def test_same_seed_same_history_for_any_workers(small):
    def without_time(history):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in history]

    first = without_time(train(small, "workers", epochs=2)[1])
    assert first == without_time(train(small, "workers", epochs=2, workers=2)[1])
    assert first != without_time(train(small, "workers", epochs=2, seed=1)[1])


def test_resuming_renews_the_report_and_drops_the_evaluation(small, monkeypatch):
    real, steps = training.training_step, []

    def stop(*arguments):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return real(*arguments)

    monkeypatch.setattr(training, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(small, "renewed")
    monkeypatch.setattr(training, "training_step", real)
    run = runs_folder() / "renewed"
    (run / "report.md").write_text("of one epoch")
    (run / "evaluation").mkdir()
    train_on(small, "renewed")
    assert "## Training progression" in (run / "report.md").read_text()
    best = json.loads((run / "scores.json").read_text())["best_epoch"]
    assert (run / "evaluation").exists() == (best == 1)


def test_nothing_validates_in_the_official_split(small):
    run = start_run("official", OPTIONS)
    history = list(fit(build_model(), small, small[:0], run, **OPTIONS | {"epochs": 2}))
    assert math.isnan(history[-1]["valid_miou"])
    assert json.loads((run / "scores.json").read_text())["best_epoch"] == 2
    last = torch.load(run / "last.pt", weights_only=True)
    torch.testing.assert_close(load_model(run / "best.pt").state_dict(), last["model"])


def test_without_depth_head_and_other_poolings(small):
    for pooling in ("image", "exp061"):
        run = start_run("pooling", OPTIONS)
        options = OPTIONS | {"epochs": 1, "soft_iou_pooling": pooling, "depth_weight": 0, "schedule": "one_cycle"}
        (row,) = fit(build_model(depth_head=False), small[:4], small[4:6], run, **options)
        assert math.isfinite(row["train_loss"])
        assert row["valid_depth_l1"] == 0


def test_bf16_on_the_cpu_is_close(small):
    rows = [train(small, "precision", epochs=1, precision=precision)[1][0] for precision in ("fp32", "bf16")]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.05)
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


def test_schedules():
    def rates(schedule, epochs, steps, stepped):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1e-4)
        scheduler = build_schedule(schedule, optimizer, 1e-4, epochs, steps)
        found = []
        for _ in range(stepped):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    cosine = rates("cosine", 30, 80, 30)
    np.testing.assert_allclose(cosine, 1e-4 * (1 + np.cos(np.pi * np.arange(30) / 30)) / 2, rtol=1e-6)
    one_cycle = rates("one_cycle", 2, 50, 100)
    assert max(one_cycle) == pytest.approx(1e-4, rel=1e-2)
    assert one_cycle[0] < 1e-5
    assert one_cycle[-1] < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: found 0, expected 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate: found -1.0, expected a number between 0 and 1"),
        ({"learning_rate": math.nan}, "learning_rate: found nan, expected a number between 0 and 1"),
        ({"depth_weight": -0.1}, "depth_weight: found -0.1, expected 0 or more"),
        ({"soft_iou_weight": math.inf}, "soft_iou_weight: found inf, expected 0 or more"),
        ({"seed": -1}, "seed: found -1, expected 0 or more"),
        ({"schedule": "step"}, "schedule: found 'step', expected one of cosine, one_cycle"),
        ({"augment": "flip"}, "augment: found 'flip', expected one of none, exp061, crops"),
        ({"precision": "fp16"}, "precision: found 'fp16', expected one of auto, fp32, bf16"),
        ({"device": "gpu"}, "device: found 'gpu', torch .* has auto, .*cpu here"),
        ({"batch_size": 1}, "batch_size: found 1, expected 2 or more"),
        ({"soft_iou_pooling": "mean"}, "soft_iou_pooling: found 'mean', expected one of batch, image, exp061"),
    ],
)
def test_bad_options(small, options, message):
    with pytest.raises(ValueError, match=message):
        train(small, "bad", **options)


def test_divergence_is_an_error(small):
    torch.manual_seed(0)
    model = build_model()
    with torch.no_grad():
        model.net.segmentation_head[0].bias[0] = math.nan
    with pytest.raises(
        FloatingPointError,
        match=r"found nan, expected a number, for the batch of the images 00000\d, 00000\d, .* lower learning_rate",
    ):
        list(fit(model, small[:4], small[4:6], start_run("nan", OPTIONS), **OPTIONS))


def test_weights_that_are_not_finite_are_never_saved(small, monkeypatch):
    """A finite loss in the last step, whose gradient is not."""
    real, steps = training.training_step, []

    def step(model, *arguments):
        loss = real(model, *arguments)
        steps.append(loss)
        if len(steps) == 6:  # the last one of the second epoch
            with torch.no_grad():
                model.net.segmentation_head[0].bias[0] = math.nan
        return loss

    monkeypatch.setattr(training, "training_step", step)
    with pytest.raises(FloatingPointError, match="weights: found nan or inf, expected a number, for the batch of the"):
        train(small, "weights", batch_size=3)
    monkeypatch.setattr(training, "training_step", real)
    assert len(train_on(small, "weights", batch_size=3)) == 3


def test_device_and_precision():
    assert choose_device("cpu").type == "cpu"
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    assert describe_device("cpu", "fp32").startswith("cpu (")


def test_an_unusable_gpu_is_told(monkeypatch):
    monkeypatch.setattr("lib.device._has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "An NVIDIA GPU is installed, but this torch can't use it" in describe_device("auto", "fp32")
    assert "NVIDIA" not in describe_device("cpu", "fp32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu(small, precision):
    _, history = train(small, "gpu", device="cuda", precision=precision, epochs=2)
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_averaged_weights_are_validated_and_kept(small):
    run, _ = train(small, "averaged", epochs=1, ema_decay=0.5)
    kept = load_model(run / "best.pt").state_dict()
    trained = torch.load(run / "last.pt", weights_only=True)
    average = {name.removeprefix("module."): tensor for name, tensor in trained["average"].items()}
    assert all(torch.equal(tensor, average[name]) for name, tensor in kept.items())
    assert not all(torch.equal(tensor, trained["model"][name]) for name, tensor in kept.items())
    with pytest.raises(ValueError, match="ema_decay: found 1.0, expected a number below 1 such as 0.99, or 0 for no"):
        train(small, "averaged", ema_decay=1.0)


def test_an_average_follows_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = build_average(model, 0.75)
    for value in (1.0, 5.0, 9.0):
        model.weight.data.fill_(value)
        average.update_parameters(model)
    assert average.module.weight.item() == 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9
    assert build_average(model, 0) is None

import io
import json
import math
import re
import traceback
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from small_run import PARAMETERS, small_samples, train
from tqdm import tqdm

from lib import training
from lib.batches import encode_batch, plain_batch, training_loader
from lib.evaluation import evaluate
from lib.metrics import confusion_counts, iou, mean_iou
from lib.model import Prediction, load_model
from lib.runs import checkpoints, open_run, read_counts, read_history, read_scores, runs_folder
from lib.runs.checkpoints import Checkpoint, fingerprint
from lib.training import Losses, Objective, Optimisation, build_network, fit

CPU = torch.device("cpu")
LOSS = Objective(soft_iou_weight=0.5, soft_iou_pooling="batch", depth_weight=0.1)
OPTIMISATION = Optimisation.of(PARAMETERS)


@pytest.fixture(scope="module")
def samples():
    return small_samples()


@pytest.fixture(scope="module")
def usual(samples):
    """The folder of a run of three epochs, and its history."""
    return runs_folder() / "usual", train("usual", samples)


def test_network_overfits_one_batch(samples):
    model = build_network(PARAMETERS, samples.classes, samples.depth_range_m)
    batch = encode_batch(plain_batch(samples[:4]), model.config, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    history = []
    for _ in range(80):
        losses = Objective(0.5, "batch", 1.0)(model(batch.inputs), batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.depth_l1.item())
    counts = confusion_counts(model(batch.inputs).logits.argmax(1), batch.label, 13)
    assert mean_iou(counts) > 0.8
    assert min(history) < 0.6 * history[0]


def test_run_folder_holds_the_best_epoch(samples, usual):
    run, history = usual
    assert [row["epoch"] for row in history] == [1, 2, 3]
    pd.testing.assert_frame_equal(read_history(run).drop(columns="seconds"), pd.DataFrame(history))
    best = max(history, key=lambda row: row["valid_miou"])
    scores = json.loads((run / "scores.json").read_text())
    assert scores["best_epoch"] == best["epoch"]
    assert scores["valid_miou"] == best["valid_miou"]
    saved = read_counts(run / "counts.npz")
    assert mean_iou(saved.counts) == best["valid_miou"]
    assert saved.classes == samples.classes
    assert list(saved.names) == list(samples.names[13:])
    assert list(saved.scene) == list(samples.scene[13:])
    again = evaluate(load_model(run / "best.pt"), samples[13:], batch_size=4, loss=LOSS)
    np.testing.assert_array_equal(again.counts, saved.counts)
    assert again.losses[0] == best["valid_loss"]
    assert {path.name for path in run.iterdir()} == {
        "parameters.json", "history.csv", "scores.json", "counts.npz", "best.pt", "report.md",
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_fit_equals_a_plain_training_loop(samples, schedule):
    """Losses and scores equal those of the simplest loop one could write."""
    rows = train("plain", samples, schedule=schedule, epochs=2)
    model, loader = (
        build_network(PARAMETERS, samples.classes, samples.depth_range_m),
        training_loader(samples[:13], "crops", 4, 0, seed=0),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4, fused=True)
    if schedule == "one_cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=2 * 3)
    for row in rows:
        loader.batch_sampler.epoch, losses = row["epoch"], []
        model.train()
        for raw in loader:
            if schedule == "cosine":
                optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * (row["epoch"] - 1) / 2)) / 2
            batch = encode_batch(raw, model.config, CPU)
            loss = LOSS(model(batch.inputs), batch).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if schedule == "one_cycle":
                scheduler.step()
        assert len(losses) == 3
        assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        scored = evaluate(model, samples[13:], batch_size=4, loss=LOSS)
        assert row["valid_loss"] == pytest.approx(scored.losses[0], rel=1e-6)
        assert row["valid_miou"] == pytest.approx(mean_iou(scored.counts), rel=1e-6)


def test_checkpoint_config_records_training_parameters(usual):
    config = load_model(usual[0] / "best.pt").config
    for name in ("inputs", "depth_encoding", "encoder"):
        assert getattr(config, name) == PARAMETERS[name]
    assert config.size == (48, 64)
    assert config.depth_head


def test_checkpoint_last_saves_the_last_epoch(samples, usual):
    history = train("kept", samples, checkpoint="last")
    assert history == usual[1]  # `checkpoint` does not affect training
    run = runs_folder() / "kept"
    scores = json.loads((run / "scores.json").read_text())
    assert scores["best_epoch"] == 3
    assert scores["valid_miou"] == history[-1]["valid_miou"]
    assert "Epoch 3 of 3 is the last: validation" in (run / "report.md").read_text()


def test_checkpoint_best_and_last_differ_if_scores_fall(samples, monkeypatch):
    falling = iter((0.3, 0.2, 0.1) * 2)
    described = training.describe_validation
    monkeypatch.setattr(
        training, "describe_validation", lambda scored: described(scored) | {"valid_miou": next(falling)}
    )
    for checkpoint, epoch in (("best", 1), ("last", 3)):
        train(f"falling-{checkpoint}", samples, checkpoint=checkpoint)
        assert (
            json.loads((runs_folder() / f"falling-{checkpoint}" / "scores.json").read_text())["best_epoch"]
            == epoch
        )


def test_history_depends_on_seed_but_not_on_num_workers(samples, usual):
    assert train("workers", samples, num_workers=2) == usual[1]
    assert train("seeded", samples, seed=1) != usual[1]


def test_training_cell_gives_the_same_result_twice(samples, usual):
    """Like a notebook, both runs share `build` and the loader. Each equals a run in a fresh kernel."""
    loader = training_loader(samples[:13], "crops", 4, 0, seed=0)
    build = partial(build_network, PARAMETERS, samples.classes, samples.depth_range_m)
    for _ in range(2):
        with open_run(PARAMETERS | {"run_name": "twice"}) as run:
            rows = list(fit(build, loader, samples[13:], run, LOSS, OPTIMISATION, "fp32", "cpu"))
        assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in usual[1]]
        assert [row["valid_miou"] for row in rows] == [row["valid_miou"] for row in usual[1]]


def test_seed_determines_the_initial_weights(samples):
    one, again, other = (
        build_network(PARAMETERS | {"seed": seed}, samples.classes, samples.depth_range_m)
        for seed in (3, 3, 4)
    )
    torch.testing.assert_close(one.state_dict(), again.state_dict(), rtol=0, atol=0)
    name = "net.segmentation_head.0.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_network_config_follows_data_and_parameters(samples):
    config = build_network(PARAMETERS | {"image_height": 96}, ("a", "b"), (0.4, 8.0)).config
    assert (config.classes, config.depth_range_m, config.size) == (("a", "b"), (0.4, 8.0), (96, 64))


@pytest.mark.parametrize("inputs", ["depth", "rgb", "rgbd_xy"])
def test_other_inputs_train_and_predict(samples, inputs):
    blind = replace(samples, image=np.zeros_like(samples.image)) if inputs == "depth" else samples
    history = train(inputs, samples, inputs=inputs, epochs=2)
    assert history[1]["train_loss"] < history[0]["train_loss"]
    model = load_model(runs_folder() / inputs / "best.pt")
    predicted = evaluate(model, samples[13:])
    assert max(row["valid_miou"] for row in history) == mean_iou(predicted.counts)
    np.testing.assert_array_equal(evaluate(model, blind[13:]).predicted, predicted.predicted)


def test_samples_without_depth_train_on_rgb(samples):
    flat = replace(samples, depth=None)
    (row,) = train("flat", flat, inputs="rgb", depth_weight=0.0, epochs=1)
    assert row["valid_depth_l1"] == 0
    scored = evaluate(load_model(runs_folder() / "flat" / "best.pt"), flat[13:])
    assert mean_iou(scored.counts) == row["valid_miou"]


def test_classes_of_the_data_are_saved_with_the_run(samples):
    classes = ("floor", "wall", "else")
    three = replace(
        samples,
        label=np.where(samples.label == 255, 255, samples.label % 3).astype(np.uint8),
        classes=classes,
    )
    train("three", three, epochs=1)
    run = runs_folder() / "three"
    model, saved = load_model(run / "best.pt"), read_counts(run / "counts.npz")
    assert model.config.classes == saved.classes == classes
    assert saved.counts.shape == (3, 3, 3)
    assert list(json.loads((run / "scores.json").read_text())["class_iou"]) == list(classes)
    np.testing.assert_allclose(
        list(json.loads((run / "scores.json").read_text())["class_iou"].values()),
        iou(saved.counts),
        atol=1e-6,
    )
    with pytest.raises(
        ValueError, match=r"classes: the network has 3 \(the last is 'else'\), the data has 13 \(the"
    ):
        evaluate(model, samples[13:])


def test_last_epoch_is_saved_without_validation(samples):
    history = train("none", samples[:9], held_out=0, epochs=2)
    assert math.isnan(history[-1]["valid_miou"])
    run = runs_folder() / "none"
    scores = json.loads((run / "scores.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert scores["best_epoch"] == 2
    assert scores["valid_loss"] is None
    assert load_model(run / "best.pt").config.classes == samples.classes


@pytest.mark.parametrize("pooling", ["image", "exp061"])
def test_other_poolings_train_without_a_depth_head(samples, pooling):
    (row,) = train("pooling", samples[:6], held_out=2, epochs=1, soft_iou_pooling=pooling, depth_weight=0.0)
    assert math.isfinite(row["train_loss"])
    assert row["valid_depth_l1"] == 0
    assert load_model(runs_folder() / "pooling" / "best.pt").depth_head is None


def test_bf16_loss_on_cpu_is_close_to_fp32(samples):
    (row,) = train("precise", samples, epochs=1, schedule="cosine", precision="bf16")
    (exact,) = train("precise", samples, epochs=1, schedule="cosine")
    assert row["train_loss"] == pytest.approx(exact["train_loss"], rel=0.05)
    assert row["train_loss"] != exact["train_loss"]


def test_learning_rates_follow_the_schedule():
    def rates(schedule, epochs, steps, stepped):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1e-4)
        scheduler = Optimisation(epochs, 1e-4, 0.0, schedule).build_schedule(optimizer, steps)
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


BAD_OPTIONS = [
    ({"epochs": 0}, "epochs: found 0, expected a whole number of 1 or more"),
    ({"learning_rate": math.nan}, "learning_rate: found nan, expected a number above 0 and below 1"),
    ({"schedule": "step"}, "schedule: found 'step', expected one of one_cycle, cosine"),
    ({"checkpoint": "first"}, "checkpoint: found 'first', expected one of best, last"),
    ({"soft_iou_pooling": "mean"}, "soft_iou_pooling: found 'mean', expected one of batch, image, exp061"),
    ({"augment": "flip"}, "augment: found 'flip', expected one of none, exp061, crops"),
    ({"batch_size": 1}, "batch_size: found 1 with 13 training images; DeepLabV3"),
    ({"precision": "fp16"}, "precision: found 'fp16', expected one of auto, fp32, bf16"),
    ({"device": "gpu"}, "device: found 'gpu', torch .* has auto, .*cpu here"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(samples, options, message):
    with pytest.raises(ValueError, match=message):
        train("bad", samples, **options)
    assert not (runs_folder() / "bad" / "best.pt").exists()


def test_nan_loss_raises_an_error_with_the_batch_images(samples, monkeypatch):
    def spoiled(*arguments):
        model = build_network(*arguments)
        model.net.segmentation_head[0].bias.data[0] = math.nan
        return model

    monkeypatch.setattr("small_run.build_network", spoiled)
    with pytest.raises(
        FloatingPointError,
        match=r"found nan, expected a number, for the batch of the images 00000\d, 00000\d, .* lower learning_rate",
    ):
        train("nan", samples[:6], held_out=2)
    assert not (runs_folder() / "nan" / "last.pt").exists()


def test_non_finite_weights_are_never_saved(samples, usual, monkeypatch):
    """The loss of an epoch's last step is finite, but its gradient is not."""
    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL_SECONDS", -1)
    real, steps = training.training_step, []

    def step(model, *arguments):
        loss = real(model, *arguments)
        steps.append(loss)
        if len(steps) == 6:  # the last one of the second epoch
            model.net.segmentation_head[0].bias.data[0] = math.nan
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", step)
        with pytest.raises(
            FloatingPointError, match="weights: found nan or inf, expected a number, for the batch of"
        ):
            train("weights", samples)
    assert train("weights", samples, resume=True) == usual[1]


def test_checkpoint_is_saved_every_30_seconds_and_at_the_end(samples, usual, monkeypatch):
    """Nine steps of 4 seconds in three epochs: everything is saved together after step 8 and at the end."""
    clock, saves, real = [0.0], [], (training.training_step, Checkpoint.save)

    def step(*arguments):
        clock[0] += 4
        return real[0](*arguments)

    def save(state):
        real[1](state)
        saves.append((len(state.history), len(state.losses)))
        assert len(read_history(state.run)) == len(state.history)
        best = max(state.history, key=lambda row: row["valid_miou"])["epoch"]
        assert read_scores(state.run)["best_epoch"] == best

    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "training_step", step)
    monkeypatch.setattr(Checkpoint, "save", save)
    assert train("clocked", samples) == usual[1]
    assert saves == [(2, 2), (3, 0)]


def test_run_can_be_resumed_after_out_of_memory(samples, usual, monkeypatch):
    """Simulates a full GPU at step 3. The lock is released, last.pt loads and the run resumes."""
    steps, real = iter(range(9)), training.training_step

    def step(*arguments):
        if next(steps) == 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."
            )
        return real(*arguments)

    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", step)
        with pytest.raises(MemoryError) as error:
            train("full", samples)
    assert "out of memory" in str(error.value)
    assert str(error.value).endswith(
        "image_width; if that fails too, restart the kernel. What was saved is intact)"
    )
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.tb)]
    assert "wrapper" in frames
    assert "fit" not in frames  # its locals hold the network and its gradients
    saved = torch.load(runs_folder() / "full" / "last.pt", weights_only=True)
    assert len(saved["progress"]["losses"]) == 2
    assert train("full", samples, resume=True) == usual[1]


def test_fit_accepts_any_loss_function(samples):
    """The loss receives the whole prediction and batch. Only its total is minimised."""

    def only_depth(prediction: Prediction, batch) -> Losses:
        depth = (prediction.depth - batch.depth).square().mean()
        return Losses(depth, *torch.zeros(3), depth)

    parameters = PARAMETERS | {"run_name": "handed"}
    with open_run(parameters) as run:
        loader = training_loader(samples[:13], "none", 4, 0, seed=0)
        build = partial(build_network, parameters, samples.classes, samples.depth_range_m)
        optimisation = Optimisation(epochs=1, learning_rate=1e-3, weight_decay=0.0)
        (row,) = fit(build, loader, samples[13:], run, only_depth, optimisation, "fp32", "cpu")
    assert row["valid_depth_l1"] == row["valid_loss"]
    head = load_model(run / "best.pt").state_dict()["net.segmentation_head.0.weight"]
    assert torch.equal(head, build().net.segmentation_head[0].weight)


def data_of(samples):
    """Checksums of samples used for validation."""
    nothing = samples[:0]
    return fingerprint("cpu in fp32", nothing, samples)["data"]


def test_fingerprint_detects_a_change_in_any_array(samples):
    filled = replace(samples[:3], measured=samples.depth[:3] > 900)
    before = data_of(filled)
    assert list(before) == [f"valid/{name}" for name in samples.names[:3]]
    assert before == data_of(filled[np.array([0, 1, 2])])  # a copy
    for kind in ("image", "depth", "label", "measured"):
        array = getattr(filled, kind).copy()
        array[1, 5, 5] ^= 1
        after = data_of(replace(filled, **{kind: array}))
        assert [name for name in before if before[name] != after[name]] == [f"valid/{samples.names[1]}"]
    assert data_of(replace(filled, depth=None, label=None, measured=None)) != before


def test_progress_bar_shows_batch_loss_memory_and_validation(samples, monkeypatch):
    said, postfixes = [], []

    def with_progress(*arguments):
        bar = tqdm(total=arguments[1], file=io.StringIO())
        describe = bar.set_description
        monkeypatch.setattr(
            bar, "set_description", lambda text, **more: (said.append(text), describe(text, **more))
        )
        return bar

    monkeypatch.setattr(training, "progress_bar", with_progress)
    monkeypatch.setattr(training, "FINITE_CHECK_INTERVAL", 2)
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text, **_: postfixes.append((bar.n, text)))
    (row,) = train("with_progress", samples, epochs=1)
    batches = [f"epoch 1 of 1, batch {batch} of 3" for batch in (1, 2, 3)]
    assert said == ["epoch 1 of 1", *batches, "epoch 1 of 1, validating", "epoch 1 of 1"]
    assert [step for step, _ in postfixes] == [1, 3]
    loss, memory = re.fullmatch(r"loss (\d\.\d{3}), (\d+\.\d) GiB", postfixes[-1][1]).groups()
    assert float(loss) == pytest.approx(row["train_loss"], rel=0.5)
    assert float(memory) == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.5)

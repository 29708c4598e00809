import errno
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import MOMENTS, PARAMETERS, fit_run, small_samples, train

from lib import training
from lib.files import CheckpointError
from lib.model import load_model
from lib.runs import checkpoints, read_parameters, run_state, runs_folder
from lib.runs.checkpoints import Checkpoint


@pytest.fixture(scope="module")
def samples():
    return small_samples()


@pytest.fixture(scope="module")
def whole(samples):
    """History and weights of an uninterrupted run."""
    history = train("whole", samples)
    return history, last_weights("whole")


def last_weights(name):
    return load_model(runs_folder() / name / "best.pt").state_dict()


def interrupt(samples, name, monkeypatch, after_steps, **options):
    """Interrupt a run after that many of its nine steps (three per epoch), as a user would."""
    steps, real = iter(range(after_steps)), training.training_step

    def step(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(name, samples, **options)


@pytest.fixture
def often(monkeypatch):
    """Save a checkpoint after every step and every epoch."""
    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL_SECONDS", -1)


# -1 saves after every step and epoch, 30 only at the end of this short run
@pytest.mark.parametrize(("after_steps", "seconds"), [(0, 30), (4, 30), (2, -1), (3, -1), (4, -1), (8, -1)])
def test_resumed_run_equals_the_uninterrupted_one(samples, whole, monkeypatch, after_steps, seconds):
    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL_SECONDS", seconds)
    interrupt(samples, "resumed", monkeypatch, after_steps)
    assert (runs_folder() / "resumed" / "last.pt").exists() == (seconds == -1)
    assert train("resumed", samples, resume=True, num_workers=0 if seconds == 30 else 2) == whole[0]
    torch.testing.assert_close(last_weights("resumed"), whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"schedule": "cosine"}, {"checkpoint": "last"}])
def test_resume_works_with_cosine_schedule_or_last_checkpoint(samples, whole, monkeypatch, often, options):
    expected = train("other", samples, **options)
    assert (expected == whole[0]) == ("checkpoint" in options)
    interrupt(samples, "other", monkeypatch, 4, **options)
    assert train("other", samples, resume=True, **options) == expected


def test_new_best_epoch_rewrites_report_and_deletes_evaluation(samples, whole, monkeypatch, often):
    assert max(whole[0], key=lambda row: row["valid_miou"])["epoch"] > 1
    interrupt(samples, "renewed", monkeypatch, 4)
    run = runs_folder() / "renewed"
    (run / "report.md").write_text("of one epoch")
    (run / "evaluation").mkdir()
    train("renewed", samples, resume=True)
    assert "## Training progression" in (run / "report.md").read_text()
    assert not (run / "evaluation").exists()


def killed(names_writes_moments):
    """Start runs that kill themselves during a write, each in its own process; return their exit statuses."""
    arguments = [str(value) for case in names_writes_moments for value in case]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "small_run.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {name: int(status) for name, status in map(str.split, result.stdout.splitlines())}


# The terms: parameters; best.pt, counts and scores of at least one best epoch, before its history and
# last.pt; history and last.pt after each step and epoch from the end of the first epoch on; last.pt alone
# after each step of the first epoch; the report.
FEWEST_WRITES = 1 + 3 + 9 * 2 + 3 + 1


@pytest.mark.parametrize(
    "writes",
    [
        pytest.param([(1, "half"), (6, "half"), (6, "after"), (9, "after")], id="some"),
        pytest.param(
            [(w, m) for w in range(1, 1 + FEWEST_WRITES + 2 * 3) for m in MOMENTS],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_run_resumed_after_a_kill_equals_the_uninterrupted_one(samples, whole, writes):
    cases = [(f"killed-{write}-{moment}", write, moment) for write, moment in writes]
    for name, status in killed(cases).items():
        run = runs_folder() / name
        assert status == 9 or int(name.split("-")[1]) > FEWEST_WRITES
        assert train(name, samples, resume=(run / "parameters.json").exists()) == whole[0], name
        torch.testing.assert_close(last_weights(name), whole[1], rtol=0, atol=0)
        assert load_model(run / "best.pt")
        assert run_state(run).trained
        assert not list(run.glob(".*unfinished")), name
        shutil.rmtree(run)


def test_resuming_a_finished_run_changes_nothing(samples, whole):
    run = runs_folder() / "whole"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    assert train("whole", samples, resume=True) == whole[0]
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()} == before


def test_resume_compares_resolved_device_and_precision(samples, whole, monkeypatch, often):
    """Another machine resolves `auto` for itself, and another GPU may have another number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    interrupt(samples, "spelled", monkeypatch, 4, device="auto", precision="auto")
    assert train("spelled", samples, resume=True) == whole[0]
    saved = read_parameters(runs_folder() / "spelled")
    assert (saved["device"], saved["precision"]) == ("auto", "auto")


def test_resume_before_first_checkpoint_records_new_parameters(samples, whole, monkeypatch):
    interrupt(samples, "barely", monkeypatch, 2, precision="bf16")
    assert train("barely", samples, resume=True) == whole[0]
    assert read_parameters(runs_folder() / "barely")["precision"] == "fp32"


def test_checkpoint_saves_only_the_rng_state_of_its_own_gpu(tmp_path, monkeypatch):
    """The state can be restored on another GPU."""
    touched = []
    made_of = {"computed": "cuda in bf16", "data": {}}
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda gpu: touched.append(("get", gpu)) or torch.ones(16).byte()
    )
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, gpu: touched.append(("set", gpu, int(state[0])))
    )
    first, second = (Checkpoint(run, {}, torch.device("cuda", number)) for number in (1, 0))
    first.restore(made_of)
    first.save()
    second.restore(made_of)
    assert touched == [("get", torch.device("cuda", 1)), ("set", torch.device("cuda", 0), 1)]
    with pytest.raises(ValueError) as error:
        second.restore(made_of | {"computed": "cpu in fp32"})
    assert str(error.value) == (
        "resume: 'run' was trained on cuda in bf16, but here it would continue on cpu in fp32; use the same device and "
        "precision as before, on a machine that has them, or start another run_name with resume False"
    )


@pytest.fixture
def begun(samples, monkeypatch, often):
    """The folder of a run that was interrupted in its second epoch."""
    interrupt(samples, "begun", monkeypatch, 4)
    return runs_folder() / "begun"


def test_resume_with_another_precision_is_rejected(samples, begun):
    """With equal parameters, `auto` may still select another precision on another machine."""
    with pytest.raises(
        ValueError,
        match="resume: 'begun' was trained on cpu in fp32, but here it would continue on cpu in bf16; use the same device and",
    ):
        fit_run(begun, PARAMETERS | {"precision": "bf16"}, samples[:13], samples[13:])


def changed(array, position):
    array = array.copy()
    array[position, 9, 9] ^= 1
    return array


CHANGES = {
    "image": (lambda s: replace(s, image=changed(s.image, 3)), 3, "is not the same"),
    "depth": (lambda s: replace(s, depth=changed(s.depth, 4)), 4, "is not the same"),
    "label": (lambda s: replace(s, label=changed(s.label, 15)), 15, "is not the same"),
    "missing": (lambda s: s[np.delete(np.arange(16), 2)], 2, "is missing now"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_resume_error_names_the_first_changed_image(samples, begun, case):
    change, position, how = CHANGES[case]
    before = (begun / "last.pt").read_bytes()
    name = f"{'valid' if case == 'label' else 'train'}/{samples.names[position]}"
    with pytest.raises(ValueError) as error:
        train("begun", change(samples), resume=True)
    assert str(error.value) == (
        f"resume: the data of 'begun' changed since it was started: 1 images, the first is '{name}', "
        f"which {how}; restore the data, or start another run_name with resume False"
    )
    assert (begun / "last.pt").read_bytes() == before


def test_resume_with_a_new_image_is_rejected(samples, monkeypatch, often):
    interrupt(samples[1:], "grown", monkeypatch, 4)
    with pytest.raises(
        ValueError,
        match=f"1 images, the first is 'train/{samples.names[0]}', which is new; restore the data",
    ):
        train("grown", samples, resume=True)


def test_resume_is_rejected_if_an_image_changes_split(samples, begun):
    """Editing the list of validation images changes the splits but not the images."""
    with pytest.raises(
        ValueError, match=f"2 images, the first is 'train/{samples.names[12]}', which is missing now"
    ):
        train("begun", samples, resume=True, held_out=4)


@pytest.mark.parametrize("damage", ["cut", "older layout"])
def test_resume_error_names_an_unusable_checkpoint(samples, monkeypatch, often, damage):
    interrupt(samples, "unusable", monkeypatch, 4)
    path = runs_folder() / "unusable" / "last.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        torch.save({"epoch": 3, "model": {}}, path)
    problem = (
        "can't be read"
        if damage == "cut"
        else "found epoch, model, expected model, optimizer, scheduler, rng"
    )
    with pytest.raises(CheckpointError, match=f"unusable/last.pt: {problem}.* train again with resume False"):
        train("unusable", samples, resume=True)


def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(samples, whole, monkeypatch, often):
    """From the second epoch on, no file may become as large as last.pt, so torch gets a real system error."""
    run, real = runs_folder() / "full", checkpoints.save_checkpoint
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    saves = iter(range(1, 99))

    def save(state, path):
        if next(saves) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, unlimited[1]))
        real(state, path)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    try:
        with pytest.raises(
            OSError, match=r"full/last.pt: could not be written .*an earlier file of that name is intact"
        ):
            train("full", samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert len(torch.load(run / "last.pt", weights_only=True)["progress"]["history"]) == 1
    assert not list(run.glob(".*unfinished"))
    assert train("full", samples, resume=True) == whole[0]


def test_run_resumes_after_disk_fills_up_while_saving_best_weights(samples, whole, monkeypatch, often):
    sync, syncs = os.fsync, iter(range(1, 99))

    def fail(file):
        if next(syncs) == 16:  # best.pt of the second epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(
            OSError, match=r"full/best.pt: could not be written \(.*No space left on device\)"
        ):
            train("full", samples)
    assert train("full", samples, resume=True) == whole[0]

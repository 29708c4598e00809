import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import OPTIONS, small_samples, train

from lib import training
from lib.files import CheckpointError, write_atomically
from lib.model import build_model, load_model
from lib.runs import describe_progress, release_run, runs_folder, start_run

KILLS = int(os.environ.get("KILLS", "3"))  # random kills; 20 were run once by hand


@pytest.fixture(scope="module")
def samples():
    return small_samples()


@pytest.fixture(scope="module")
def whole(samples):
    """The history of a run that nothing interrupts, and its last weights."""
    history = train("whole", False, samples)
    return history, torch.load(runs_folder() / "whole" / "last.pt", weights_only=True)["model"]


def interrupt(samples, name, monkeypatch, after_steps, error=KeyboardInterrupt, **options):
    """Stop a run after that many steps, as a user or a crash in this process would."""
    steps = iter(range(after_steps))
    real = training.training_step

    def step(*arguments):
        if next(steps, None) is None:
            raise error("interrupted")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", step)
        with pytest.raises(error, match="interrupted"):
            train(name, False, samples, **options)


@pytest.mark.parametrize("after_steps", [0, 2, 4, 6])
@pytest.mark.parametrize("seconds", [0, 300])
def test_resumed_run_equals_the_uninterrupted_one(samples, whole, monkeypatch, after_steps, seconds):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)  # 0: after each batch; 300: after each epoch here
    interrupt(samples, "resumed", monkeypatch, after_steps)
    assert train("resumed", True, samples, workers=0 if seconds else 2) == whole[0]
    weights = torch.load(runs_folder() / "resumed" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole[1].items())


def test_cosine_resumes_too(samples, monkeypatch):
    expected = train("cosine", False, samples, schedule="cosine")
    interrupt(samples, "cosine", monkeypatch, 4, schedule="cosine")
    assert train("cosine", True, samples, schedule="cosine") == expected


def test_killed_runs_equal_the_uninterrupted_one(samples, whole):
    interrupted = 0
    for trial in range(KILLS):
        name = f"killed-{trial}"
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "small_run.py"), name],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "training\n"
        wait = random.uniform(0.2, 6)
        time.sleep(wait)
        process.kill()
        process.wait()
        run = runs_folder() / name
        found = sorted(path.name for path in run.iterdir()) if run.exists() else []
        interrupted += bool(found) and "report.md" not in found
        print(f"{name}: killed after {wait:.1f} s, found {found}", flush=True)
        history = train(name, "parameters.json" in found, samples)
        assert history == whole[0]
        assert load_model(run / "best.pt")
        shutil.rmtree(run)
    assert interrupted  # else the kills missed the training


def test_a_finished_run_is_left_alone(samples, whole):
    run = runs_folder() / "whole"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    assert train("whole", True, samples) == whole[0]
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()} == before
    assert describe_progress(run, 3) == "whole: is finished, all 3 epochs are there; nothing changes"


def test_another_precision_is_refused(samples, monkeypatch):
    interrupt(samples, "precise", monkeypatch, 4)
    release_run(start_run("precise", OPTIONS, resume=True))
    with pytest.raises(
        ValueError, match="resume: 'precise' was trained on cpu in fp32, found cpu in bf16; pass the same"
    ):
        train_as("precise", samples, precision="bf16")


def train_as(name, samples, **options):
    return list(training.fit(build_model(), samples[:13], samples[13:], runs_folder() / name, **OPTIONS | options))


def test_progress_is_described(samples, monkeypatch):
    interrupt(samples, "described", monkeypatch, 4)
    run = runs_folder() / "described"
    assert describe_progress(run, 3) == "described: resumes, 1 of 3 epochs are there"
    (run / "last.pt").unlink()
    assert describe_progress(run, 3) == "described: starts from the beginning"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"learning_rate": 0.01, "seed": 7},
            "resume: 'whole' was started with learning_rate = 0.001 (found 0.01), seed = 0 (found 7); resume it with "
            "its own parameters, or start another run_name with resume False",
        ),
        (
            {"epochs": 5},
            "resume: 'whole' was started with epochs = 3 (found 5); resume it with its own parameters, or start another "
            "run_name with resume False; epochs can't change because the schedule has spread the learning rate over "
            "them from the start",
        ),
        (
            {"novelty": 1},
            "resume: 'whole' was started with novelty = 'unknown' (found 1); resume it with its own parameters, or "
            "start another run_name with resume False",
        ),
    ],
)
def test_other_parameters_are_refused_and_named(whole, changed, message):
    with pytest.raises(ValueError) as error:
        start_run("whole", OPTIONS | changed, resume=True)
    assert str(error.value) == message


def test_nothing_to_resume():
    with pytest.raises(ValueError, match=r"resume: no run 'nowhere' in .*, there are: .*; start it with resume False"):
        start_run("nowhere", OPTIONS, resume=True)


def test_damaged_parameters():
    run = start_run("damaged", OPTIONS)
    release_run(run)
    (run / "parameters.json").write_text('{"epochs": ')
    with pytest.raises(ValueError, match=r"damaged/parameters.json: can't be read .* it is no complete run"):
        start_run("damaged", OPTIONS, resume=True)


@pytest.mark.parametrize("damage", ["cut", "older layout"])
def test_unusable_last_checkpoint(samples, whole, damage):
    release_run(start_run("unusable", OPTIONS))
    path = runs_folder() / "unusable" / "last.pt"
    shutil.copyfile(runs_folder() / "whole" / "last.pt", path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        torch.save({"epoch": 3, "model": {}}, path)
    problem = "can't be read" if damage == "cut" else "found epoch, model, expected model, optimizer, scheduler, rng"
    with pytest.raises(CheckpointError, match=f"unusable/last.pt: {problem}.* train again with resume False"):
        train("unusable", True, samples)


def test_the_second_process_is_refused(samples):
    run = start_run("contended", OPTIONS)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from lib.runs import start_run; start_run('contended', {})"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1] == (
        "RuntimeError: run_name: 'contended' is being trained by another process; wait for it, or choose another run_name"
    )
    assert run.exists()
    release_run(run)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"earlier")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"last.pt: could not be written \(.*No space.*\); an earlier file .* is intact"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder of runs on a file system with room for one checkpoint."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=210m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system can't be mounted here")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(samples, whole, full_disk):
    """Room for best.pt and last.pt, but not for the next last.pt beside it."""
    with pytest.raises(OSError, match=r"could not be written .*an earlier file of that name is intact"):
        train("full", False, samples)
    run = full_disk / "full"
    done = (
        len(torch.load(run / "last.pt", weights_only=True)["progress"]["history"]) if (run / "last.pt").exists() else 0
    )
    assert done < 3
    assert not list(run.glob(".*unfinished"))
    subprocess.run(["mount", "-o", "remount,size=1g", str(full_disk)], check=True)
    assert train("full", True, samples) == whole[0]


def test_averaged_weights_resume_too(samples, monkeypatch):
    expected = train("averaged", False, samples, ema_decay=0.9)
    assert expected != train("plain", False, samples)
    interrupt(samples, "averaged", monkeypatch, 4, ema_decay=0.9)
    assert train("averaged", True, samples, ema_decay=0.9) == expected

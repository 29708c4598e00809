import json
import math
import os
import threading

import pytest
import torch

from lib.files import (
    CheckpointError,
    load_checkpoint,
    lock_run,
    read_json,
    save_checkpoint,
    write_atomically,
    write_json,
    write_text,
)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0: No space")]
)
def test_a_failed_write_keeps_the_earlier_file(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"earlier")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(
        OSError, match=r"last.pt: could not be written \(.*No space.*\); an earlier file .* is intact"
    ):
        write_atomically(path, fail)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    write_atomically(path, lambda file: file.write(b"later"))
    assert path.read_bytes() == b"later"


def test_interrupted_write_leaves_no_temporary_file(tmp_path):
    def interrupt(file):
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "last.pt").write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "last.pt", interrupt)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("last.pt", b"earlier")]


def test_readers_never_see_a_partial_file(tmp_path):
    path = tmp_path / "history.csv"
    write_text("one", path)

    def slow(file):
        for part in (b"t", b"wo"):
            file.write(part)
            file.flush()
            assert path.read_text() == "one"

    write_atomically(path, slow)
    assert path.read_text() == "two"


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """Each waits until both have begun, so that the one that ends last renames after the other."""
    path, both, errors = tmp_path / "runs.jsonl", threading.Barrier(2, timeout=60), []

    def write(text):
        try:
            write_atomically(path, lambda file: (file.write(text), both.wait()))
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in (b"one", b"three")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    assert path.read_bytes() in (b"one", b"three")
    assert [file.name for file in tmp_path.iterdir()] == ["runs.jsonl"]


def test_locking_a_run_removes_what_a_killed_process_left_there(tmp_path):
    run = tmp_path / "demo"
    (run / "evaluation").mkdir(parents=True)
    (run / "last.pt").write_bytes(b"whole")

    def leave_another(file):
        (leftover,) = run.glob(".last.pt.*unfinished")
        leftover.with_name(leftover.name.replace("last", "best")).write_bytes(b"half")

    write_atomically(run / "last.pt", leave_another)
    assert len(list(run.glob(".*unfinished"))) == 1
    with lock_run(run):
        assert sorted(path.name for path in run.iterdir()) == ["evaluation", "last.pt"]


def test_write_to_a_missing_folder_fails_with_a_remedy(tmp_path):
    with pytest.raises(
        OSError, match=r"gone/a.txt: could not be written .* check the permissions, then resume the run"
    ):
        write_text("a", tmp_path / "gone" / "a.txt")


def test_text_is_utf8_with_unchanged_line_ends(tmp_path):
    write_text("µ\n", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"\xc2\xb5\n"


def test_json_has_null_for_nan_and_infinity(tmp_path):
    content = {"a": math.nan, "b": [1, -math.inf, {"c": math.inf}], "d": (0.5, None, True), "e": "nan"}
    write_json(content, tmp_path / "a.json")
    strict = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert strict == {"a": None, "b": [1, None, {"c": None}], "d": [0.5, None, True], "e": "nan"}
    assert read_json(tmp_path / "a.json") == strict
    assert math.isnan(content["a"])  # the argument is not modified


@pytest.mark.parametrize("text", ["", '{"a": ', None])
def test_error_for_missing_or_damaged_json_shows_the_file(tmp_path, text):
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(
        ValueError, match=r"scores.json: can't be read \(.*\); the run is incomplete, train it again"
    ):
        read_json(path)


def test_checkpoint_is_restored_and_must_have_expected_keys(tmp_path):
    state = {"weights": torch.arange(3), "progress": {"losses": [torch.tensor(0.5)]}}
    save_checkpoint(state, tmp_path / "last.pt")
    torch.testing.assert_close(load_checkpoint(tmp_path / "last.pt", "cpu", ("weights",)), state)
    with pytest.raises(
        CheckpointError, match="last.pt: found progress, weights, expected config, weights; it is from"
    ):
        load_checkpoint(tmp_path / "last.pt", "cpu", ("config", "weights"))


class Malicious:
    """Creates a folder when it is unpickled without restrictions."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_loading_a_checkpoint_executes_no_code(tmp_path):
    torch.save({"weights": Malicious(tmp_path / "executed")}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"can't be read \(UnpicklingError\)"):
        load_checkpoint(tmp_path / "best.pt", "cpu", ("weights",))
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # an unsafe load does execute it

"""Parameter sweeps: each grid point and seed is a Ray task that executes train.ipynb with papermill."""

import hashlib
import itertools
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import of ray, which would access the network
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise ray warns of a future change

import pandas as pd
import papermill
import ray
import yaml
from filelock import FileLock, Timeout

from lib.files import ROOT, lock_run, read_json
from lib.model import is_weights_file
from lib.notebooks.conclusions import read_defaults
from lib.options import FOLDS, check_choice, check_options, explain_unknown
from lib.runs import (
    MAX_NAME_BYTES,
    PATH_PARAMETERS,
    WEIGHTS_PARAMETERS,
    read_history,
    read_parameters,
    run_state,
    runs_folder,
)
from lib.runs.results import (
    NOTEBOOKS,
    RUNS_FILE,
    ScoredRun,
    identity,
    read_results,
    read_scored,
    scored_folders,
    write_results,
)
from lib.runs.scoring import check_labelled, iterate_split, score_run

LOCK_TIMEOUT_SECONDS = 60  # to wait for the run lock of a process that was just killed
START_ATTEMPTS = 3  # attempts to start Ray


def plan_runs(
    experiment: str | None, fixed: dict, grid: dict[str, list], seeds: list[int]
) -> dict[str, dict]:
    """Plan a run for every grid combination and seed, without duplicates.

    A run name lists the varied parameters and ends in a digest of all parameters that affect the result. The
    digest does not depend on the order of parameters, on other runs of the sweep, or on the location of data
    and weights.

    Args:
        experiment: name of a file in `notebooks/experiments` without `.yaml`; None uses the defaults.
        fixed: parameters of every run; they override the experiment.
        grid: list of values of each varied parameter; they override both.
        seeds: seeds for each combination.

    Returns:
        The parameters of `train.ipynb` by run name.

    Raises:
        ValueError: an unknown experiment or parameter, an empty list in `grid` or `seeds`, or two data sets
            with the same name.
    """
    if not seeds or not all(isinstance(values, list) and values for values in (seeds, *grid.values())):
        raise ValueError(f"grid, seeds: found {grid} and {seeds}, expected non-empty lists")
    base = _read_experiment(experiment, (*fixed, *grid)) | fixed
    runs = {}
    # the seed varies slowest, so that all combinations can be compared early
    for seed, *values in itertools.product(seeds, *grid.values()):
        varied = dict(zip(grid, values, strict=True))
        if (base | varied)["soft_iou_weight"] == 0:  # without this loss, the pooling has no effect
            varied["soft_iou_pooling"] = base["soft_iou_pooling"]
        parameters = _with_absolute_paths(base | varied | {"seed": seed})
        name = _run_name(experiment or "sweep", {name: parameters[name] for name in grid}, parameters)
        existing = runs.setdefault(name, parameters | {"run_name": name})
        if existing["data"] != parameters["data"]:
            raise ValueError(
                f"data: found {existing['data']} and {parameters['data']}, which give runs the same name; "
                "rename one folder"
            )
    return runs


def _read_experiment(experiment: str | None, names: Iterable[str]) -> dict[str, object]:
    """Return the default parameters of `train.ipynb`, overridden by the experiment.

    Raises:
        ValueError: an unknown experiment or parameter, or one of `names` that a sweep can't set.
    """
    defaults = read_defaults()
    content = {}
    if experiment is not None:
        files = {path.stem: path for path in (NOTEBOOKS / "experiments").glob("*.yaml")}
        check_choice("experiment", experiment, sorted(files))
        content = yaml.safe_load(files[experiment].read_text())
    known = [name for name in defaults if name not in ("run_name", "seed", "resume")]
    errors = [f"fixed, grid: {explain_unknown(name, known)}" for name in names if name not in known]
    errors += [
        f"experiment {experiment}: {explain_unknown(name, known)}" for name in content if name not in defaults
    ]
    if errors:
        raise ValueError("\n".join(errors))
    return defaults | content


def _with_absolute_paths(parameters: dict) -> dict:
    """Make paths absolute, because workers have another working directory."""
    paths = [name for name in WEIGHTS_PARAMETERS if is_weights_file(parameters[name])]
    if parameters["data"] != "synthetic":
        paths.append("data")
    return parameters | {name: str(Path(parameters[name]).expanduser().resolve()) for name in paths}


def _run_name(prefix: str, varied: dict, parameters: dict) -> str:
    digest = hashlib.sha256(json.dumps(identity(parameters)).encode()).hexdigest()[:6]
    texts = {
        name: Path(str(value)).name if name in PATH_PARAMETERS else str(value)
        for name, value in varied.items()
    }
    pairs = "".join(f"-{name}={text.replace('/', '_')}" for name, text in texts.items())
    suffix = f"-seed={parameters['seed']}-{digest}"
    stem = os.fsencode(prefix + pairs)[: MAX_NAME_BYTES - len(os.fsencode(suffix))].decode(errors="ignore")
    return stem + suffix


def execute_run(parameters: dict, split: str) -> None:
    """Train a run and score it on a split, resuming an unfinished run and skipping finished steps.

    The executed notebook is written to `notebooks/` in the runs folder.

    Raises:
        PapermillExecutionError: the notebook failed; the message contains its error.
        RuntimeError: another process is using the run.
    """
    run = runs_folder() / parameters["run_name"]
    with lock_run(run, LOCK_TIMEOUT_SECONDS):
        is_trained = run_state(run).trained
    if not is_trained:
        papermill.execute_notebook(
            NOTEBOOKS / "train.ipynb", executed_notebook(run.name),
            parameters | {"resume": (run / "parameters.json").exists()},
            cwd=str(NOTEBOOKS), kernel_name="python3", progress_bar=False,
        )  # fmt: skip
    if not _is_scored(run, split):
        images = iterate_split(read_parameters(run), split, parameters["data"], run=run)
        score_run(run, split, images, "none", parameters["device"])


def _is_scored(run: Path, split: str) -> bool:
    """Whether a run is scored on a split of the data it was trained on, not of another data set."""
    if split not in run_state(run).evaluated:
        return False
    return _is_own_data(read_json(run / "evaluation" / f"{split}.json")["data"], read_parameters(run))


def _is_own_data(data: str, parameters: dict) -> bool:
    return Path(data).name == Path(parameters["data"]).name


def executed_notebook(run_name: str) -> Path:
    """Return the path of the executed `train.ipynb` of a run."""
    return runs_folder() / "notebooks" / f"{run_name}.train.ipynb"


class FinishedRuns:
    """The trained and scored runs of a sweep, identified by their parameters.

    Scores on other data than that of the run do not count.

    Args:
        runs: planned runs, from `plan_runs`.
        split: split on which the runs are scored.
        results: folder to which finished runs are added without their weights, see `write_results`. Runs that
            it already contains count as finished.
    """

    def __init__(self, runs: dict[str, dict], split: str, results: str | None = None) -> None:
        self.planned = {name: identity(parameters) for name, parameters in runs.items()}
        self.split = split
        self.folder = None if results is None else _find_results(results)
        self.update()

    def update(self) -> None:
        """Find finished runs and add new ones to the results folder.

        The folder is read again each time, because another sweep may also write to it.
        """
        own = [
            read_scored(folder, self.split)
            for folder in scored_folders(self.split)
            if run_state(folder).trained and _is_scored(folder, self.split)
        ]
        known = self._index(self._read_stored())
        scored = self._index(own) | known
        self.runs = {name: scored[key] for name, key in self.planned.items() if key in scored}
        is_new = [identity(run.parameters) not in known for run in self.runs.values()]
        if self.folder is not None and any(is_new):
            self._add_to_results()

    def _read_stored(self) -> list[ScoredRun]:
        """Read the runs in the results folder."""
        has_results = self.folder is not None and (self.folder / RUNS_FILE).exists()
        return read_results(self.folder) if has_results else []

    def _index(self, runs: list[ScoredRun]) -> dict[tuple, ScoredRun]:
        """Return the runs that are scored on the split of their own data, by identity."""
        return {
            identity(run.parameters): run
            for run in runs
            if run.split == self.split and _is_own_data(run.data, run.parameters)
        }

    def _add_to_results(self) -> None:
        """Add the finished runs that are not in the results folder, which another sweep may be changing."""
        with _lock_results(self.folder):
            stored = self._read_stored()
            known = self._index(stored)
            new = [run for run in self.runs.values() if identity(run.parameters) not in known]
            if new:
                write_results(self.folder, [*stored, *new])


@contextmanager
def _lock_results(folder: Path) -> Iterator[None]:
    """Lock a results folder until the block ends.

    Raises:
        RuntimeError: another sweep holds the lock for too long, or the disk does not support locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{RUNS_FILE}.lock"
    try:
        lock = FileLock(path).acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except (Timeout, OSError) as error:
        raise RuntimeError(
            f"results: {path} can't be locked ({error}); wait until no other sweep writes to {folder}, or "
            "pass another folder, on a disk that supports locks"
        ) from error
    with lock:
        yield


def _find_results(results: str) -> Path:
    """Resolve the results folder, which may be relative to `notebooks/` if it exists there."""
    folder = Path(results).expanduser()
    return NOTEBOOKS / folder if (NOTEBOOKS / folder).is_dir() and not folder.is_dir() else folder.resolve()


def sweep(
    runs: dict[str, dict],
    split: str,
    cluster: str = "local",
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
    results: str | None = None,
) -> Iterator[pd.DataFrame]:
    """Train and score all unfinished runs, as many in parallel as the machines allow.

    A failed run does not stop the others. If a machine is lost, its runs resume on another one from their
    last checkpoint. On a cluster, every machine needs this repository, its Python packages, the data and the
    runs folder at the same paths.

    Args:
        runs: planned runs, from `plan_runs`.
        split: split on which the runs are scored.
        cluster: `local`, or the address of a Ray cluster such as `auto` or `10.0.0.1:6379`.
        cpus_per_run: CPU cores per run. A run computes with one thread per core that its data-loading workers
            do not use, and at least one. None uses one core plus one per worker.
        gpus_per_run: GPUs per run. With 0.5, two runs share a GPU and each can use half of its memory. With
            0, runs train on the CPU. None uses one GPU if any machine has one.
        results: see `FinishedRuns`.

    Yields:
        The current `progress_table`, about every two seconds.

    Raises:
        ValueError: an unknown split, a split without labels, folds that can't be pooled, an unreachable
            cluster, or more resources per run than any machine has.
    """
    check_options(split=split)
    _check_folds(runs, split)
    executed_notebook("").parent.mkdir(parents=True, exist_ok=True)
    finished, errors, tasks = FinishedRuns(runs, split, results), {}, {}
    for parameters in {planned["data"]: planned for planned in runs.values()}.values():
        check_labelled(parameters, split)
    with ray_session(cluster):
        gpus = min(1, _max_per_machine("GPU")) if gpus_per_run is None else gpus_per_run
        workers = max((parameters["num_workers"] for parameters in runs.values()), default=0)
        cpus = min(1 + workers, int(_max_per_machine("CPU"))) if cpus_per_run is None else cpus_per_run
        check_resources(cpus, gpus)
        task = _remote_task().options(num_cpus=cpus, num_gpus=gpus)
        settings = worker_environment(cpus - workers, gpus) | {"RUNS_DIR": str(runs_folder())}
        for name, parameters in runs.items():
            if name not in finished.runs:
                executed_notebook(name).unlink(missing_ok=True)  # its existence marks a run as running
                tasks[task.remote(str(ROOT), settings, parameters, split)] = name
        while tasks:
            ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=2)
            errors |= {tasks.pop(reference): _task_error(reference) for reference in ended}
            if ended:
                finished.update()
            yield progress_table(runs, finished.runs, errors)
    yield progress_table(runs, finished.runs, errors)


def _check_folds(runs: dict[str, dict], split: str) -> None:
    """Raise a ValueError if the runs are of several folds whose scores can't be pooled."""
    folds = sorted({parameters["fold"] for parameters in runs.values()})
    if len(folds) > 1 and (split != "valid" or folds != list(range(FOLDS))):
        raise ValueError(
            f"grid: found fold {folds} with split {split}, expected one fold, or all five with split valid; "
            "pass `fold: [0, 1, 2, 3, 4]` and `split: valid`, or start one sweep for each fold"
        )


@contextmanager
def ray_session(cluster: str) -> Iterator[None]:
    init_options = {"address": cluster}
    if cluster == "local":
        # results are written to disk, so Ray needs little shared memory
        init_options |= {"include_dashboard": False, "object_store_memory": 100_000_000}
        # Ray creates sockets there, and socket paths are limited to 107 characters
        if os.name == "posix" and len(tempfile.gettempdir()) > 40:
            init_options["_temp_dir"] = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        if ":" in cluster:  # otherwise Ray would retry for two minutes
            socket.create_connection(cluster.rsplit(":", 1), timeout=10).close()
        _start_ray(init_options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cluster: found {cluster!r}, but no Ray cluster answers there ({error}); expected local, or the "
            "address that `ray start --head` printed"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(init_options: dict) -> None:
    """Call `ray.init`, and retry if a busy machine exceeds Ray's startup timeout of 30 seconds."""
    for _ in range(START_ATTEMPTS):
        try:
            return ray.init(**init_options, logging_level="error", log_to_driver=False)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise RuntimeError(
        f"cluster: Ray did not start within 30 seconds, {START_ATTEMPTS} times, because this machine is too "
        "busy; wait until its other jobs end, or start Ray first with `ray start --head` and pass "
        "`-p cluster auto`"
    )


def _max_per_machine(resource: str) -> float:
    """Return the largest amount of a resource that any single machine has."""
    return max(node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"])


def check_resources(cpus: int, gpus: float) -> None:
    limits = (("cpus_per_run", cpus, 1, "CPU"), ("gpus_per_run", gpus, 0, "GPU"))
    for name, requested, least, resource in limits:
        most = _max_per_machine(resource)
        if not least <= requested <= most:
            raise ValueError(
                f"{name}: found {requested}, expected from {least} to {most:g} (the largest machine)"
            )


def worker_environment(threads: int, gpus: float) -> dict[str, str]:
    """Return the environment variables of a run's processes.

    They set the number of threads, hide all GPUs from CPU runs and limit the memory of runs that share a GPU.
    """
    gpu_variables = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    if 0 < gpus < 1:
        gpu_variables = {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{gpus}"}
    return {"OMP_NUM_THREADS": str(max(1, threads))} | gpu_variables


def _remote_task():
    """Return the Ray task of one run.

    The task is serialised by value, so that a machine without the repository can run it and report the error.
    """

    # max_retries: a machine may be lost; max_calls: the process ends after a run and frees its GPU memory
    @ray.remote(max_retries=10, max_calls=1)
    def run_on_worker(root: str, settings: dict, parameters: dict, split: str) -> str | None:
        needed = [f"{root}/lib", f"{settings['RUNS_DIR']}/notebooks", parameters["data"]]
        missing = [path for path in needed if path != "synthetic" and not Path(path).exists()]
        if missing:
            return (
                f"{socket.gethostname()} has no {', '.join(missing)}; every machine needs the repository, "
                "the data and the folder of runs at the same paths, on a shared disk"
            )
        os.environ |= settings  # before torch is imported
        sys.path.insert(0, root)
        from lib.notebooks.sweep import try_run

        return try_run(parameters, split)

    return run_on_worker


def try_run(parameters: dict, split: str) -> str | None:
    """Call `execute_run` and return its error as text, or None on success."""
    try:
        return execute_run(parameters, split)
    except Exception as error:  # PapermillExecutionError stores the notebook's error in ename and evalue
        return f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"


def _task_error(task: ray.ObjectRef) -> str | None:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def progress_table(
    runs: dict[str, dict], finished: dict[str, ScoredRun], errors: dict[str, str | None]
) -> pd.DataFrame:
    """Tabulate the state, finished epochs, best validation mIoU, minutes left and error of each run."""
    rows = {}
    for name, parameters in runs.items():
        history = finished[name].history if name in finished else _read_partial_history(name)
        state = "running" if executed_notebook(name).exists() else "waiting"
        if name in finished:
            state = "done"
        elif errors.get(name):
            state = "failed"
        epochs_left = 0 if state == "done" else parameters["epochs"] - len(history)
        rows[name] = {
            "state": state,
            "epochs": f"{len(history)} of {parameters['epochs']}",
            "valid_miou": history.valid_miou.max(),
            "minutes_left": epochs_left * history.seconds.mean() / 60 if epochs_left else 0,
            "error": errors.get(name) or "",
        }
    return pd.DataFrame(list(rows.values()), list(rows))


def _read_partial_history(name: str) -> pd.DataFrame:
    """Read the history of an unfinished run; it is empty until the first epoch ends."""
    if not (runs_folder() / name / "history.csv").exists():
        return pd.DataFrame(columns=["valid_miou", "seconds"], dtype=float)
    return read_history(runs_folder() / name)

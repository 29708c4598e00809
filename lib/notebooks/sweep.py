"""Many runs: a grid of parameters times seeds, each run a Ray task that executes train.ipynb with papermill."""

import ast
import hashlib
import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray loads: it would look for the network
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns that this will change

import pandas as pd
import papermill
import ray
import yaml
from papermill.exceptions import PapermillExecutionError

from lib.data import PARTS
from lib.files import ROOT
from lib.model import is_file, weights_digest
from lib.options import check_choice
from lib.runs import MAY_CHANGE, PLACES, hold_run, read_history, read_parameters, run_state, runs_folder
from lib.runs.scoring import iterate_part, score_run

NOTEBOOKS = ROOT / "notebooks"
NO_IDENTITY = (*MAY_CHANGE, "run_name", "resume", "device")  # a run is the same whatever these are
SLIM = ("parameters.json", "history.csv", "scores.json", "evaluation/*.npz", "evaluation/*.json")
WAIT_SECONDS = 60  # for a process that was just killed to let go of a run
LOST_MACHINES = 10  # how often a run is started elsewhere
OBJECT_STORE_BYTES = 100_000_000  # results travel over the disk, so Ray needs little shared memory


def plan_runs(experiment: str | None, fixed: dict, grid: dict[str, list], seeds: list[int]) -> dict[str, dict]:
    """Parameters of `train.ipynb` for every combination and seed, by run name; equal ones are planned once.

    A name tells what varies and ends in a digest of all that differs from the notebook's defaults: it
    depends on the parameters alone, not on their order or on what else is swept.

    Args:
        experiment: name of a file in `notebooks/experiments`, or None for the notebook's defaults.
        fixed: parameters of every run, over those of the experiment.
        grid: the values of each parameter that varies, over both.
        seeds: of each combination.

    Raises:
        ValueError: no such experiment or parameter, nothing to run, or two data sets of one name.
    """
    if not seeds or not all(isinstance(values, list) and values for values in (seeds, *grid.values())):
        raise ValueError(f"grid, seeds: found {grid} and {seeds}, expected lists of one value or more")
    declared = papermill.inspect_notebook(str(NOTEBOOKS / "train.ipynb"))
    defaults = {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()}
    for name in (*fixed, *grid):
        check_choice("fixed, grid", name, [known for known in defaults if known not in ("run_name", "seed", "resume")])
    base, runs = defaults | fixed, {}
    if experiment is not None:
        files = {path.stem: path for path in (NOTEBOOKS / "experiments").glob("*.yaml")}
        check_choice("experiment", experiment, sorted(files))
        base = defaults | yaml.safe_load(files[experiment].read_text()) | fixed
    for seed, *values in itertools.product(seeds, *grid.values()):  # seed by seed: a first comparison comes early
        varied = dict(zip(grid, values, strict=True))
        if (base | varied)["soft_iou_weight"] == 0:  # without the term, its form is no difference
            varied |= {"soft_iou_pooling": defaults["soft_iou_pooling"]}
        parameters = _with_whole_paths(base | varied | {"seed": seed})
        name = _name(experiment or "sweep", {name: parameters[name] for name in grid}, parameters, defaults)
        there = runs.setdefault(name, parameters | {"run_name": name})
        if there["data"] != parameters["data"]:
            raise ValueError(
                f"data: found {there['data']} and {parameters['data']}, which make runs of one name; rename one folder"
            )
    return runs


def _with_whole_paths(parameters: dict) -> dict:
    """Workers have another working directory."""
    paths = ["data"] * (parameters["data"] != "synthetic")
    paths += ["encoder_weights"] * is_file(parameters["encoder_weights"])
    return parameters | {name: str(Path(parameters[name]).expanduser().resolve()) for name in paths}


def _name(prefix: str, varied: dict, parameters: dict, defaults: dict) -> str:
    digest = hashlib.sha256(json.dumps(_identity(parameters, defaults)).encode()).hexdigest()[:6]
    varied = varied | {name: Path(str(varied[name])).name for name in PLACES if name in varied}
    shown = "".join(f"-{name}={str(value).replace('/', '_')}" for name, value in varied.items())
    return f"{prefix}{shown}-seed={parameters['seed']}-{digest}"


def _identity(parameters: dict, defaults: dict) -> dict:
    """What makes a run that run, wherever its data lies: all that differs from the notebook's defaults."""
    digest = weights_digest(parameters["encoder_weights"])
    named = parameters | {"data": Path(parameters["data"]).name}
    named |= {"encoder_weights": digest} if digest else {}
    return {
        name: float(value) if type(defaults[name]) is float else value  # 1 and 1.0 are the same
        for name, value in sorted(named.items())
        if name in defaults and name not in NO_IDENTITY and value != defaults[name]
    }


def execute_run(parameters: dict, part: str, results: Path | None = None) -> None:
    """Train and score one run on a part, going on from whatever there is of it; nothing is done twice.

    The executed notebook goes into `notebooks/` in the folder of runs; what a comparison needs, which are no weights,
    goes into the folder `results`, too.

    Raises:
        PapermillExecutionError: the notebook failed; the message holds its error.
        RuntimeError: another process has the run.
    """
    run = runs_folder() / parameters["run_name"]
    output = executed_notebook(run.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    with hold_run(run, WAIT_SECONDS):
        pass
    if not run_state(run).trained:
        papermill.execute_notebook(
            NOTEBOOKS / "train.ipynb", output, parameters | {"resume": (run / "parameters.json").exists()},
            cwd=str(NOTEBOOKS), kernel_name="python3", progress_bar=False,
        )  # fmt: skip
    if part not in run_state(run).evaluated:
        score_run(run, part, iterate_part(run, part, parameters["data"]), "none", parameters["device"])
    if results is not None:
        copy_slim(run, results / run.name)


def copy_slim(run: Path, to: Path) -> None:
    """Copy what a comparison needs of a run: no weights, no predictions."""
    for pattern in SLIM:
        for path in run.glob(pattern):
            copy = to / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def executed_notebook(run_name: str) -> Path:
    """Where a run of a sweep leaves its executed `train.ipynb`."""
    return runs_folder() / "notebooks" / f"{run_name}.train.ipynb"


def sweep(
    runs: dict[str, dict],
    part: str,
    where: str = "local",
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
    results: str | None = None,
) -> Iterator[pd.DataFrame]:
    """Train and score all runs that are not there yet, as many at a time as fit; yield their table as it fills.

    A run that fails fails alone, and one whose machine is lost goes on elsewhere from its last checkpoint.
    On a cluster, every machine needs this repository, its Python packages, the data and the folder of
    runs at the same paths.

    Args:
        runs: from `plan_runs`.
        part: to score them on.
        where: `local`, or the address of a Ray cluster such as `auto` or `10.0.0.1:6379`.
        cpus_per_run: cores of each run, a thread for each that its workers leave; None takes one and one a worker.
        gpus_per_run: GPUs of each run; 0.5 lets two share one, each with half of its memory; 0 trains on the CPU;
            None takes 1 where there are GPUs.
        results: folder in which each finished run is left without its weights; one that is there is done.

    Raises:
        ValueError: no such part or place, or more asked for each run than any machine has.
    """
    check_choice("part", part, PARTS)
    errors, tasks = {}, {}
    kept = None if results is None else Path(results).expanduser().resolve()
    executed_notebook("").parent.mkdir(parents=True, exist_ok=True)
    with _connected(where):
        gpus = min(1, _most("GPU")) if gpus_per_run is None else gpus_per_run
        workers = max((parameters["workers"] for parameters in runs.values()), default=0)
        cpus = min(1 + workers, int(_most("CPU"))) if cpus_per_run is None else cpus_per_run
        _check_share(cpus, gpus)
        task = _remote_task().options(num_cpus=cpus, num_gpus=gpus)
        settings = _environment(cpus - workers, gpus) | {"RUNS_DIR": str(runs_folder())}
        for name, parameters in runs.items():
            done = [folder for folder in _homes(name, kept) if _is_done(folder, parameters, part)]
            if not done:
                executed_notebook(name).unlink(missing_ok=True)  # its presence says: running
                tasks[task.remote(str(ROOT), settings, parameters, part, kept)] = name
            elif kept and kept / name not in done:
                copy_slim(done[0], kept / name)
        while tasks:
            finished, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=2)
            errors |= {tasks.pop(reference): _error(reference) for reference in finished}
            yield progress_table(runs, part, errors, kept)
    yield progress_table(runs, part, errors, kept)


def _homes(name: str, kept: Path | str | None) -> list[Path]:
    return [runs_folder() / name] + ([Path(kept).expanduser().resolve() / name] if kept else [])


def scored_folders(names: list[str], results: str | None = None) -> str:
    """These scored runs for `read_runs`: their paths in the folder of runs, or in that of results."""
    return ",".join(str(next(home for home in _homes(name, results) if run_state(home).evaluated)) for name in names)


def _is_done(run: Path, parameters: dict, part: str) -> bool:
    state = run_state(run)
    if state.done < parameters["epochs"] or part not in state.evaluated:
        return False
    saved = read_parameters(run)  # a parameter that came later is not in it
    fixed = saved.keys() - {*NO_IDENTITY, *PLACES}
    differing = [key for key in saved if key in fixed and saved[key] != parameters.get(key, saved[key])]
    if differing:
        raise ValueError(
            f"{run}: found another {', '.join(differing)} than its name says, so a default has changed since; "
            "rename or delete that folder"
        )
    return True


@contextmanager
def _connected(where: str) -> Iterator[None]:
    here = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        if ":" in where:  # Ray would try for two minutes
            socket.create_connection(where.rsplit(":", 1), timeout=10).close()
        ray.init(**(here if where == "local" else {"address": where}), logging_level="error", log_to_driver=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"where: found {where!r}, where no Ray cluster answers ({error}); expected local, or the address that "
            "`ray start --head` printed"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _most(resource: str) -> float:
    """What the machine with most of it has of a resource."""
    return max(node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"])


def _check_share(cpus: int, gpus: float) -> None:
    for name, asked, resource in (("cpus_per_run", cpus, "CPU"), ("gpus_per_run", gpus, "GPU")):
        if not 0 <= asked <= _most(resource) or (resource == "CPU" and asked < 1):
            raise ValueError(f"{name}: found {asked}, the largest machine has {_most(resource):g} of them")


def _environment(threads: int, gpus: float) -> dict[str, str]:
    """Of a run's processes, which else see every GPU where they ask for none, and take all memory of a shared one."""
    share = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    if 0 < gpus < 1:
        share = {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{gpus}"}
    return {"OMP_NUM_THREADS": str(max(1, threads))} | share


def _remote_task():
    """The Ray task of one run. It travels as code, so that it can say when a machine lacks the repository."""

    @ray.remote(max_retries=LOST_MACHINES, max_calls=1)  # a process that has ended holds no GPU memory
    def run_on_worker(root: str, settings: dict, parameters: dict, part: str, kept: Path | None) -> str | None:
        data, notebooks = parameters["data"], settings["RUNS_DIR"] + "/notebooks"
        needed = [root + "/lib", notebooks, *[data] * (data != "synthetic")]
        missing = [path for path in needed if not Path(path).exists()]
        if missing:
            return (
                f"{socket.gethostname()} has no {', '.join(missing)}; every machine needs the repository, the data "
                "and the folder of runs at the same paths, on a shared disk"
            )
        os.environ |= settings  # before torch
        sys.path.insert(0, root)
        from lib.notebooks.sweep import try_run

        return try_run(parameters, part, kept)

    return run_on_worker


def try_run(parameters: dict, part: str, results: Path | None) -> str | None:
    """`execute_run`; returns its error in one line instead of raising it."""
    try:
        return execute_run(parameters, part, results)
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _error(task: ray.ObjectRef) -> str | None:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def progress_table(runs: dict[str, dict], part: str, errors: dict[str, str], kept: Path | None = None) -> pd.DataFrame:
    """One row for each run: its state, epochs so far, the best validation mIoU so far, minutes left, error."""
    rows = {}
    for name, parameters in runs.items():
        run = max(_homes(name, kept), key=lambda folder: run_state(folder).done)
        done, epochs, error = run_state(run).done, parameters["epochs"], errors.get(name)
        history = read_history(run) if done else pd.DataFrame(columns=["valid_miou", "seconds"], dtype=float)
        state = "running" if executed_notebook(name).exists() else "waiting"
        if done >= epochs and part in run_state(run).evaluated:
            state = "done"
        rows[name] = {
            "state": "failed" if error else state,
            "epochs": f"{done} of {epochs}",
            "valid_miou": history.valid_miou.max(),
            "minutes_left": 0 if state == "done" else (epochs - done) * history.seconds.mean() / 60,
            "error": error or "",
        }
    return pd.DataFrame(list(rows.values()), list(rows))

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIB = ROOT / "lib"

GROUND = {"", "classes", "files", "options", "progress"}
ON_THE_GROUND = {"losses", "metrics", "significance"}
FOR_NOTEBOOKS = {"IPython", "ipywidgets", "matplotlib", "seaborn"}
MODULES = {
    ".".join(path.relative_to(LIB).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in LIB.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Imported modules, also inside functions: those of lib without `lib.`, others as top-level packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("lib.") in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {
        name.removeprefix("lib.") if name.split(".")[0] == "lib" else name.split(".")[0] for name in found
    }


IMPORTS = {module: imported(path) for module, path in MODULES.items()}


def test_imports_are_acyclic():
    graph = {module: (found & MODULES.keys()) - {module} for module, found in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_lower_layers(module):
    found = IMPORTS[module] & MODULES.keys()
    if module in GROUND:
        assert not found
    if module in ON_THE_GROUND:
        assert found <= GROUND
    if not module.startswith("notebooks"):
        assert not any(name.startswith("notebooks") for name in found)
        assert not IMPORTS[module] & FOR_NOTEBOOKS


@pytest.mark.parametrize(
    "command", [["git", "check-ignore", "-q"], [sys.executable, "-m", "ruff", "check", "--force-exclude"]]
)
def test_git_and_ruff_do_not_ignore_lib_runs(command):
    done = subprocess.run([*command, "lib/runs/__init__.py"], cwd=ROOT, capture_output=True, text=True)
    if command[0] == "git":
        assert done.returncode == 1  # not ignored
    else:
        assert (done.returncode, done.stderr) == (0, "")  # "No Python files found" if it is excluded


def test_ci_constraints_satisfy_requirements():
    pinned = [line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()[1:]]
    versions = {canonicalize_name(name): version for name, version in pinned}
    required = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    for requirement in map(Requirement, required):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def blocks_of_readme():
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_ci_runs_the_readme_test_command():
    (command,) = [block for block in blocks_of_readme() if "pytest" in block]
    assert (ROOT / ".ci" / "run").read_text().endswith(f"\n{command}")


def test_readme_command_lines_are_short():
    assert max(len(line) for block in blocks_of_readme() for line in block.splitlines()) < 100


def test_readme_installs_into_the_project_environment(tmp_path):
    """Another environment is active. A tiny local package stands in for the requirements."""
    if shutil.which("uv", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("uv is not installed beside this Python")
    for name in (".venv", "foreign"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / name)], check=True)
    (tmp_path / ".venv" / "bin" / "uv").symlink_to(Path(sys.executable).parent / "uv")
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    (tmp_path / "requirements.txt").write_text("./tiny-1.0-py3-none-any.whl\n")
    (install,) = re.findall(r"&& (.venv/bin/uv pip install .*)\n", blocks_of_readme()[0])
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "foreign"), "UV_OFFLINE": "1"}
    subprocess.run(["/bin/sh", "-c", install], cwd=tmp_path, env=environment, check=True)
    assert [path.parents[3].name for path in tmp_path.glob("*/lib/*/site-packages/tiny.py")] == [".venv"]


@pytest.mark.parametrize(
    ("script", "tables"),
    [("benchmark.py --only epochs --epochs 1 --limit 20", 2), ("simulate_tests.py --draws 2", 3)],
)
def test_benchmark_scripts_run(script, tables):
    name, *options = script.split()
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / name), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| ---") >= tables


def test_tests_leave_no_files_behind(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "test_files.py"),
    ]
    result = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    assert not list(tmp_path.glob("*-of-tests-*"))


def test_code_passes_ruff():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout

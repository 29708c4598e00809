import ast
import graphlib
import os
import subprocess
import sys
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
    """Modules that a file imports, also within functions: those of lib without `lib.`, of others the package."""
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


def test_imports_have_no_circles():
    graph = {module: (found & MODULES.keys()) - {module} for module, found in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_is_below_them(module):
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
def test_git_and_ruff_see_the_package_runs(command):
    done = subprocess.run([*command, "lib/runs/__init__.py"], cwd=ROOT, capture_output=True, text=True)
    if command[0] == "git":
        assert done.returncode == 1  # nothing there is ignored
    else:
        assert (done.returncode, done.stderr) == (0, "")  # "No Python files found" where it is excluded


def test_the_tested_versions_are_those_required():
    pinned = [line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()[1:]]
    versions = {canonicalize_name(name): version for name, version in pinned}
    required = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    for requirement in map(Requirement, required):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert "pytest" in command
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", ["benchmark", "simulate_verdicts"])
def test_what_is_measured_by_hand_still_starts(script):
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / f"{script}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


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


def test_style():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout

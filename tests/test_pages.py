"""Run every command block of every page in a fresh clone, with an empty HOME and no active environment."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_folder

from lib.data import load_samples

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for folder in (".", "lib", "notebooks", "tests") for path in ROOT.glob(f"{folder}/**/*.md")
)
PAGES = [path for path in dict.fromkeys(map(Path.resolve, PAGES)) if ".venv" not in path.parts]
SMALL = "-p limit 40 -p epochs 1 -p image_height 48 -p image_width 64 -p encoder tu-test_resnet.r160_in1k"
PAPERMILL = f"""#!/bin/sh
# train.ipynb makes a small network in one epoch, without a download
case "$1" in train.ipynb) set -- "$@" {SMALL} -p encoder_weights None ;; esac
exec "{sys.executable}" -m papermill "$@"
"""


def blocks_of(page):
    """A page's command blocks without installation and pytest, which need the network or would recurse."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    without_installing = [re.sub(r"python3 -m venv(.*\\\n)*.*\n", "", block) for block in blocks]
    return [block for block in without_installing if block.strip()]


def test_command_blocks_have_short_lines_and_a_starting_folder():
    blocks = {page: blocks_of(page) for page in PAGES}
    assert sum(map(len, blocks.values())) >= 6
    for page, found in blocks.items():
        for block in found:
            assert max(map(len, block.splitlines())) < 100, page
            assert "cd notebooks" in block or page.name == "README.md"


@pytest.mark.slow
def test_every_command_block_runs_as_written(tmp_path):
    clone = tmp_path / "a clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    scenes = load_samples("synthetic", "train", "none", limit=40)
    data = tmp_path / "my data"
    write_folder(data, scenes)
    write_folder(data, scenes[:3], "test", labels=False)
    places = {
        "/path/to/mine": data,
        "/path/to/NYUv2": data,
        "/path/to/images": data / "test" / "image",
        "/path/to/depths": data / "test" / "depth",
        "/path/to/masks": clone / "runs" / "mine" / "evaluation" / "valid",
    }
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "papermill").write_text(PAPERMILL)
    (clone / ".venv" / "bin" / "papermill").chmod(0o755)
    (tmp_path / "home").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    pages = [ROOT / "README.md", *(page for page in PAGES if page != ROOT / "README.md")]
    for page in pages:
        for block in blocks_of(page):
            for place, path in places.items():
                block = re.sub(re.escape(place) + r"(?=[\s,])", f"'{path}'", block)
            if "export PATH" not in block:
                block = f'export PATH="$PWD/.venv/bin:$PATH"\n{block}'
            if "cd notebooks" not in block:
                block = block.replace("\n", "\ncd notebooks\n", 1)
            done = subprocess.run(
                ["/bin/sh", "-e", "-c", block],
                cwd=clone,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{page}\n{block}\n{done.stderr[-3000:]}"
    assert (clone / "runs" / "demo" / "best.pt").exists()

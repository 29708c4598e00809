"""The image browser of the notebooks, operated in JupyterLab.

`pytest tests/test_browser.py --basetemp DIR -o tmp_path_retention_policy=all` keeps screenshots in DIR.

Needs `pip install playwright` and Chromium, on the path or installed by `playwright install chromium`.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from small_run import PARAMETERS, fit_run, small_samples

from lib.data import load_samples
from lib.runs import open_run

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
THEMES = ("JupyterLab Light", "JupyterLab Dark")
SETTINGS = {
    # otherwise cells out of view are not in the page
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false"}',
}


@contextmanager
def jupyter_lab(folder, disabled=()):
    """Serve a folder with JupyterLab and yield its address.

    It has its own settings, and the `disabled` extensions are off.
    """
    settings = folder / "settings"
    for name, content in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(content)
    page_config = folder / "config" / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    page_config.write_text(json.dumps({"disabledExtensions": dict.fromkeys(disabled, True)}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        "--expose-app-in-browser",
    ]
    environment = {
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
    }
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", *options],
            env=os.environ | environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            wait_for(lambda: responds(f"http://127.0.0.1:{port}/api"), 60, folder / "lab.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


def responds(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for(condition, seconds, message):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (
            f"not within {seconds} s: {message() if callable(message) else message}"
        )
        time.sleep(0.2)


@contextmanager
def browser_page():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield browser.new_page(viewport={"width": 1100, "height": 900})
        browser.close()


def copy_project(folder, notebook, **parameters):
    """Copy lib and one notebook, without its outputs and with other values for some parameters.

    train.ipynb is copied too, for its defaults.
    """
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for kept in ("experiments", "studies"):
        shutil.copytree(ROOT / "notebooks" / kept, folder / "notebooks" / kept)
    shutil.copy(ROOT / "notebooks" / "train.ipynb", folder / "notebooks")
    content = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    declared = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    declared.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(content, folder / "notebooks" / f"{notebook}.ipynb")


def run_all(page, address, notebook, seconds):
    """Open a notebook, run all its cells, and return the texts of errors and stderr."""
    page.goto(f"{address}/lab/tree/notebooks/{notebook}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    idle = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'"
    page.wait_for_function(idle, timeout=60_000)
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    red = page.locator('[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type*="error"]')

    def finished():  # a hidden cell has no execution number
        return red.count() or all(
            re.fullmatch(r"(\[\d+\]:)?", text.strip()) for text in prompts.all_inner_texts()
        )

    wait_for(finished, seconds, lambda: f"{notebook} has run; prompts: {prompts.all_inner_texts()}")
    return red.all_inner_texts()


def photograph(page, folder, name):
    """Save screenshots of the whole notebook in both themes."""
    for theme in THEMES:
        page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
        is_light = str(theme == THEMES[0]).lower()
        page.wait_for_selector(f'body[data-jp-theme-light="{is_light}"]', state="attached")
        page.wait_for_timeout(1000)
        cells = page.locator(".jp-Notebook .jp-CodeCell")
        for number in range(0, cells.count(), 2):
            cells.nth(number).evaluate("cell => cell.scrollIntoView()")
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{name}_{theme.split()[1].lower()}_{number:02d}.png")


class Panels:
    """The image browser in a page: its drawings, readout and caption."""

    def __init__(self, page):
        self.page = page
        self.root = page.locator(".browse [data-drawn]")
        self.root.wait_for(timeout=20_000)
        self.root.scroll_into_view_if_needed()
        self.readout = page.locator(".browse-readout")
        self.caption = page.locator(".browse .widget-hbox").nth(1).locator(".widget-label").last

    def drawn(self):
        return int(self.root.get_attribute("data-drawn"))

    def one_drawing(self, act, *arguments):
        """Perform an action, which must draw exactly one new image and change the caption."""
        before, caption = self.drawn(), self.caption.inner_text()
        act(*arguments)
        wait_for(lambda: self.drawn() > before, 15, "the next drawing")
        self.page.wait_for_timeout(500)
        assert self.drawn() == before + 1
        assert self.caption.inner_text() != caption

    def canvas(self, title):
        return self.page.locator(f'.browse canvas[data-title="{title}"]')

    def hover(self, title, x, y, size=(128, 96)):
        """Move the pointer to the centre of a pixel of the unzoomed image."""
        box = self.canvas(title).bounding_box()
        place = (x + 0.5) / size[0] * box["width"], (y + 0.5) / size[1] * box["height"]
        self.page.mouse.move(box["x"] + place[0], box["y"] + place[1])


def saved_outputs(page, path):
    """Save the notebook and return its metadata and the outputs with a widget."""
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    wait_for(lambda: "widget-view" in path.read_text(), 20, f"{path} is saved")
    content = nbformat.read(path, 4)
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    return content.metadata, [
        output.data for output in outputs if "widget-view" in str(output.get("data", {}).keys())
    ]


def test_samples_can_be_browsed_in_jupyterlab(tmp_path):
    samples = load_samples("synthetic", "train", "none", limit=40)
    copy_project(tmp_path, "explore", limit=40)
    with browser_page() as page, jupyter_lab(tmp_path) as address:
        assert run_all(page, address, "explore", 240) == []
        panels = Panels(page)
        assert panels.drawn() == 1
        panels.one_drawing(page.locator("button", has_text="Next").click)
        for focus in ("button", "select", "[role=slider], .noUi-handle"):
            page.locator(f".browse {focus}").first.focus()
            panels.one_drawing(page.keyboard.press, "ArrowRight")
        page.locator(".browse").locator("xpath=ancestor::div[contains(@class, 'jp-Cell')][1]").press("Escape")
        panels.one_drawing(page.keyboard.press, "ArrowLeft")
        name = page.locator(".browse input[type=text]")
        assert (name.input_value(), name.get_attribute("placeholder")) == ("", "name of an image")
        name.fill("nowhere")
        name.press("ArrowLeft")  # moves only the text cursor
        name.press("Enter")
        page.locator(".browse .widget-label", has_text="no image is called nowhere here").wait_for(
            timeout=5000
        )
        name.fill(str(samples.names[0]))
        panels.one_drawing(name.press, "Enter")
        x, y = 20, 80
        panels.hover("RGB", x, y)
        class_name = (*samples.classes, "unlabelled")[min(samples.label[0, y, x], 13)]
        assert panels.readout.inner_text() == (
            f"x {x}, y {y} · labels: {class_name} · depth: {samples.depth[0, y, x] / 1000:.2f} m"
        )
        before = [panels.canvas(title).screenshot() for title in ("RGB", "labels")]
        page.mouse.wheel(0, -100)
        page.wait_for_timeout(300)
        after = [panels.canvas(title).screenshot() for title in ("RGB", "labels")]
        assert all(one != other for one, other in zip(before, after, strict=True))
        assert float(panels.root.get_attribute("data-scale")) == 1.25
        assert f"x {x}, y {y} · " in panels.readout.inner_text()  # the pixel under the pointer stays
        page.mouse.wheel(100, 0)  # a horizontal swipe
        page.wait_for_timeout(300)
        assert float(panels.root.get_attribute("data-scale")) == 1.25
        panels.canvas("RGB").dblclick()
        panels.canvas("RGB").evaluate(  # the corner of a canvas at a fractional place
            """canvas => {
                const { left, top } = canvas.getBoundingClientRect();
                const place = { clientX: left - 0.4, clientY: top - 0.4 };
                canvas.dispatchEvent(new PointerEvent("pointermove", place));
            }"""
        )
        assert panels.readout.inner_text().startswith("x 0, y 0 · labels: ")
        panels.one_drawing(page.locator(".browse select").first.select_option, "ceiling")
        metadata, outputs = saved_outputs(page, tmp_path / "notebooks" / "explore.ipynb")
        assert "widgets" not in metadata
        assert [sorted(output).count("image/png") for output in outputs] == [1]
        photograph(page, tmp_path, "explore")
    assert len(list(tmp_path.glob("explore_*.png"))) >= 4


@pytest.mark.parametrize("notebook", ["evaluate", "error_analysis"])
def test_results_can_be_browsed_in_jupyterlab(tmp_path, notebook):
    run = trained(f"seen_{notebook}")
    copy_project(tmp_path, notebook, run=run.name, split="test")
    with browser_page() as page, jupyter_lab(tmp_path) as address:
        assert run_all(page, address, notebook, 240) == []
        panels, choice = Panels(page), page.locator(".browse select").first
        panels.one_drawing(page.locator("button", has_text="Next").click)
        options = [text.replace("\xa0", " ") for text in choice.locator("option").all_text_contents()]
        confused = next(text for text in options if " confused with " in text)
        panels.one_drawing(choice.select_option, confused)
        assert confused in panels.caption.inner_text()
        panels.one_drawing(page.locator("button", has_text="Next").click)
        panels.hover("prediction", 64, 48)
        assert ("confidence" in panels.readout.inner_text()) == (notebook == "error_analysis")
        page.locator(".browse label", has_text="RGB").locator("input").check()
        panels.canvas("RGB").wait_for(timeout=5000)
        page.screenshot(path=tmp_path / f"{notebook}_browser.png")
        photograph(page, tmp_path, notebook)


def test_two_runs_can_be_browsed_in_jupyterlab(tmp_path):
    copy_project(tmp_path, "compare")
    with browser_page() as page, jupyter_lab(tmp_path) as address:
        assert run_all(page, address, "compare", 240) == []
        panels = Panels(page)
        assert panels.canvas("B fixes (blue), breaks (red)").count() == 1
        panels.canvas("B fixes (blue), breaks (red)").hover()
        panels.one_drawing(page.keyboard.press, "ArrowRight")
        panels.one_drawing(page.locator(".browse select").nth(1).select_option, "loss of B")
        page.screenshot(path=tmp_path / "compare_browser.png")


def test_browser_without_anywidget_shows_an_image_and_controls(tmp_path):
    copy_project(tmp_path, "explore", limit=40)
    with browser_page() as page, jupyter_lab(tmp_path, disabled=["anywidget"]) as address:
        assert run_all(page, address, "explore", 240) == []
        picture = page.locator(".browse img.widget-image")
        picture.scroll_into_view_if_needed()
        assert page.locator(".browse canvas").count() == 0
        before = picture.screenshot()
        page.locator("button", has_text="Next").click()
        wait_for(lambda: picture.screenshot() != before, 15, "another picture")
        page.screenshot(path=tmp_path / "explore_plain.png")


def trained(name):
    """Train a run on built-in synthetic scenes, which takes about a second."""
    parameters = PARAMETERS | {"run_name": name, "data": "synthetic", "validation": "none", "fold": 4}
    with open_run(parameters) as run:
        fit_run(run, parameters, load_samples("synthetic", "train", "none", limit=40), small_samples()[:0])
    return run

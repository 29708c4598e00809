"""Widgets, then JupyterLab as a person sees it: `pytest tests/test_browser.py --basetemp DIR` keeps screenshots in DIR.

The latter needs `pip install playwright` and a Chromium, found on the path or installed by `playwright install chromium`.
"""

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from small_run import PARAMETERS, fit_run, small_samples

from figures import SETS, draw, relabel
from lib.data import iterate_samples, load_samples
from lib.metrics import confusion_counts
from lib.notebooks.browse import browse_results, browse_samples, plot_sample
from lib.notebooks.plots import FADED, shorten
from lib.runs import open_run

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
THEMES = ("JupyterLab Light", "JupyterLab Dark")
SETTINGS = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',  # else cells out of sight are not in the page
    "apputils-extension/notification": '{"fetchNews": "false"}',
}


def test_of_one_class_all_else_is_faded(scenes):
    figure = plot_sample(scenes[[3]], {}, only="wall")
    assert {scenes.names[3], "RGB", "depth (m)", "labels"} <= set(draw(figure))
    wall = scenes.label[3] == scenes.classes.index("wall")
    for axes in figure.axes[1:3]:
        shown = axes.images[0].get_array()
        assert (np.ptp(shown[~wall], axis=1) == 0).all()
        assert shown[~wall].min() >= FADED[0]
    assert len(np.unique(shown[wall], axis=0)) == 1


def test_nobody_gets_widgets_where_nobody_can_move_them(scenes):
    assert {scenes.names[0], "labels"} <= set(draw(browse_samples(scenes)))


def controls(browser):
    """slider, Previous, Next, name, group, count, picture"""
    slider, row, picture = browser.children
    return slider, *row.children, picture


def test_browsing(scenes):
    slider, *_, name, group, count, picture = controls(browse_samples(scenes, interactive=True))
    seen = {picture.value}
    for control, value in ((slider, 5), (group, "wall")):
        control.value = value
        assert picture.value not in seen, value
        seen.add(picture.value)
    assert (slider.value, name.value) == (5, scenes.names[5])  # it has a wall
    images = {each: (scenes.label == index).any((1, 2)).sum() for index, each in enumerate(scenes.classes)}
    assert set(group.options) == {"all", *(each for each, found in images.items() if found)}
    rare = min(group.options[1:], key=images.get)
    group.value = rare
    assert count.value == f"{images[rare]} of 12 images with {rare}"
    assert len(slider.options) == images[rare] < 12
    group.value = "all"
    assert (len(slider.options), count.value) == (12, "12 of 12 images")


def test_stepping_and_naming(scenes):
    slider, previous, following, name, *_ = controls(browse_samples(scenes, interactive=True))
    previous.click()
    assert slider.value == 0
    following.click()
    following.click()
    previous.click()
    assert (slider.value, name.value) == (1, scenes.names[1])
    name.value = str(scenes.names[11])
    following.click()
    assert slider.value == 11
    name.value = "no such name"
    assert (slider.value, name.value) == (11, scenes.names[11])


def test_what_is_saved_of_widgets_keeps_the_picture(scenes):
    browser = browse_samples(scenes, interactive=True)
    saved = browser._repr_mimebundle_()
    assert base64.b64decode(saved["image/png"]) == browser.children[-1].value
    assert "application/vnd.jupyter.widget-view+json" in saved


def test_results_are_browsed_from_the_worst_on_and_by_confusion(scenes):
    """In image 7 half is wrong, in image 2 a bit; walls are confused with beds."""
    pieces = iterate_samples("synthetic", "train", "none", limit=12)
    masks = np.where(scenes.label == 255, 0, scenes.label)
    wall, wrong = scenes.classes.index("wall"), np.zeros(masks.shape, bool)
    wrong[7], wrong[2, :20] = True, True
    masks[wrong & (scenes.label == wall)] = 0
    counts = confusion_counts(masks, scenes.label, 13)
    look = {"run": lambda samples: masks[np.isin(scenes.names, samples.names)]}
    slider, _, following, name, group, count, picture = controls(browse_results(pieces, counts, look, True))
    assert [slider.value, name.value[:6], slider.options[1][1]] == [7, scenes.names[7], 2]
    group.value = "wall confused with bed"
    assert [at for _, at in slider.options] == [7, 2]
    assert count.value == "2 of 12 images with wall confused with bed"
    first = picture.value
    following.click()
    assert picture.value != first
    texts = draw(browse_results(pieces, counts, look))
    assert {"RGB", "ground truth", "run", "errors, run"} <= set(texts)


def test_a_confusion_is_outlined_and_all_else_faded(scenes):
    mask, bed = np.where(scenes.label[3] == 255, 0, scenes.label[3]), scenes.classes.index("bed")
    mask[:, :40] = bed
    figure = plot_sample(scenes[[3]], {"run": mask}, "wall confused with bed")
    confused = (scenes.label[3] == scenes.classes.index("wall")) & (mask == bed)
    assert 0 < confused.sum() < confused.size
    for axes in figure.axes[2:5]:
        shown = axes.images[0].get_array()
        assert len(np.unique(shown[confused], axis=0)) == 1
        assert (np.ptp(shown[~confused], axis=1) == 0).all()
    figure = plot_sample(scenes[[3]], {"run": mask}, "bed")
    of_truth, of_run = (figure.axes[column].images[0].get_array() for column in (2, 3))
    assert (np.ptp(of_truth[scenes.label[3] != bed], axis=1) == 0).all()
    assert (np.ptp(of_run[mask != bed], axis=1) == 0).all()
    assert len(np.unique(of_run[mask == bed], axis=0)) == 1


@pytest.mark.parametrize("count", SETS)
def test_a_result_has_room_for_any_class_set(scenes, count):
    samples = relabel(scenes, count)
    mask = samples.label[0] % count
    texts = draw(plot_sample(samples[[0]], {"the long name of a run that a sweep has made": mask}))
    assert {shorten(samples.classes[index]) for index in np.unique(samples.label[0]) if index != 255} <= set(
        texts
    )
    draw(plot_sample(replace(samples[[0]], depth=None), {"a": mask, "b": mask}, samples.classes[-1]))


@contextmanager
def jupyter_lab(folder):
    """The address of a JupyterLab that serves a folder, with settings of its own."""
    settings = folder / "settings"
    for name, content in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(content)
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
        assert time.monotonic() < end, f"not within {seconds} s: {message}"
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
    """A copy of lib and of one notebook without its outputs, with other values for some parameters."""
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks" / "experiments", folder / "notebooks" / "experiments")
    content = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    declared = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    declared.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(content, folder / "notebooks" / f"{notebook}.ipynb")


def run_all(page, address, notebook, seconds):
    """Open a notebook, run all its cells, and return the text of what is red."""
    page.goto(f"{address}/lab/tree/notebooks/{notebook}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    idle = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'"
    page.wait_for_function(idle, timeout=60_000)
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    red = page.locator('[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type*="error"]')

    def finished():
        return red.count() or all(text.strip("[]: ").isdigit() for text in prompts.all_inner_texts())

    wait_for(finished, seconds, f"{notebook} has run")
    return red.all_inner_texts()


def photograph(page, folder, name):
    """Screenshots of the whole notebook in both themes."""
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


def changing(page, picture):
    """A function that does something and waits until the picture is one that was not seen yet."""
    seen = [picture.screenshot()]

    def change(act, *arguments):
        act(*arguments)
        wait_for(lambda: picture.screenshot() not in seen, 15, "the picture changes")
        page.wait_for_timeout(500)  # of a class both the image and its labels may change
        seen.append(picture.screenshot())

    return change


@pytest.mark.browser
def test_a_person_browses_samples_in_jupyterlab(tmp_path):
    copy_project(tmp_path, "explore", limit=40, read_test=False)
    with browser_page() as page, jupyter_lab(tmp_path) as address:
        assert run_all(page, address, "explore", 120) == []
        picture = page.locator("img.widget-image")
        picture.scroll_into_view_if_needed()
        change = changing(page, picture)
        change(page.locator("button", has_text="Next").click)
        change(page.locator("button", has_text="Next").click)
        change(page.locator(".widget-hslider .noUi-handle").press, "ArrowRight")
        change(page.locator(".widget-dropdown select").select_option, "ceiling")
        photograph(page, tmp_path, "explore")
    assert len(list(tmp_path.glob("explore_*.png"))) >= 4


@pytest.mark.browser
@pytest.mark.parametrize("notebook", ["evaluate", "error_analysis"])
def test_a_person_browses_results_in_jupyterlab(tmp_path, notebook):
    parameters = PARAMETERS | {
        "run_name": f"seen_{notebook}",
        "data": "synthetic",
        "validation": "none",
        "fold": 4,
    }
    with open_run(parameters) as run:
        fit_run(run, parameters, load_samples("synthetic", "train", "none", limit=40), small_samples()[:0])
    copy_project(tmp_path, notebook, run=run.name, split="test")
    with browser_page() as page, jupyter_lab(tmp_path) as address:
        assert run_all(page, address, notebook, 120) == []
        picture, count = (
            page.locator("img.widget-image"),
            page.locator(".widget-label", has_text=" of 100 images"),
        )
        picture.scroll_into_view_if_needed()
        change, group = changing(page, picture), page.locator(".widget-dropdown select")
        change(page.locator("button", has_text="Next").click)
        options = [text.replace("\xa0", " ") for text in group.locator("option").all_text_contents()]
        confused = next(text for text in options if " confused with " in text)
        change(group.select_option, confused)
        assert count.inner_text().replace("\xa0", " ").endswith(f"images with {confused}")
        change(group.select_option, "ceiling")
        change(page.locator("button", has_text="Next").click)
        page.screenshot(path=tmp_path / f"{notebook}_browser.png")
        photograph(page, tmp_path, notebook)

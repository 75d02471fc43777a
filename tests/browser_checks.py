"""Notebooks and report in a real browser: make test-browser.

Not collected by `make test`: JupyterLab, two kernels and a browser take about a minute.
"""

import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
REPORT = REPOSITORY / "docs" / "report"
PATIENCE_MS = 240_000  # a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGES = sorted(path.name for path in REPORT.glob("*.html")) + ["knees/index.html"]
PAGES += sorted(f"knees/{path.name}" for path in REPORT.glob("knees/k*.html"))[:1]

# What makes a page hard to read: wider than the window, a box that leaves it without a scroll bar,
# or a first column so narrow that a cell takes more than five lines.
DEFECTS = """() => {
  const found = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    found.push(`page ${document.documentElement.scrollWidth} px in ${width}`);
  const scrolls = (e) => { for (; e; e = e.parentElement)
    if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return true; return false; };
  for (const e of document.querySelectorAll('table, img, pre, figure')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(e)) found.push(`${e.tagName} ${box.right}`);
  }
  for (const e of document.querySelectorAll('tr > :first-child')) {
    const text = document.createRange();
    text.selectNodeContents(e);
    const lines = text.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight);
    if (lines > 5 && e.parentElement.children.length > 1)
      found.push(`${lines.toFixed(0)} lines: ${e.textContent.trim().slice(0, 40)}`);
  }
  return found;
}"""

# The notebook in front has a kernel, which waits for work. Without one, running cells asks for it.
IDLE = """() => {
  const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
  const kernel = context?.session?.kernel;
  return context?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle' &&
    window.jupyterapp.commands.isEnabled('notebook:run-all-cells');
}"""

# As a browser looks for the place of a link: as it stands, then decoded.
HAS_ANCHOR = """(name) => !!document.getElementById(name) ||
  !!document.getElementById(decodeURIComponent(name))"""

# The picture is there, and neither its pixels nor its alternative text are what they were before.
DRAWN = """([box, before]) => {
  const image = box.querySelector('img');
  return image?.alt && image.complete && image.naturalWidth > 0 &&
    image.src !== before?.src && image.alt !== before?.alt;
}"""


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a screen."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install -e .[browser]"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL
        yield driver.chromium.launch(executable_path=program, args=flags)


@pytest.fixture
def screenshots(tmp_path):
    """Where pictures go: CTSMA_SCREENSHOTS, or a folder that pytest removes in time."""
    folder = Path(os.environ.get("CTSMA_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a log."""

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture(scope="module")
def site():
    """Address of the published report on localhost."""
    handler = functools.partial(Quiet, directory=str(REPORT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of JupyterLab on localhost, with a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(REPOSITORY / "notebooks", folder / "notebooks")
    settings = {
        "notebook-extension/tracker": '{"windowingMode": "none"}',  # every cell is in the page
        "apputils-extension/notification": '{"fetchNews": "false"}',  # and no question lies over it
    }
    for name, text in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    command += ["--LabApp.extension_manager=readonly", f"--ServerApp.root_dir={folder}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    address = f"http://127.0.0.1:{port}/"
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"{address}api/status", server, folder / "lab.log")
            yield address
        finally:
            server.terminate()
            server.wait(60)


def _wait_for(address, server, log):
    for _ in range(PATIENCE_MS // 1000):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise AssertionError(log.read_text())


def opened(browser, address, width):
    """A page of the site; console errors, failed requests and foreign hosts are in `problems`."""
    page, problems = browser.new_page(viewport={"width": width, "height": 900}), []
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    home = urlsplit(address).netloc
    foreign = ("http", "ws")
    page.on(
        "request",
        lambda request: (
            problems.append(request.url)
            if request.url.startswith(foreign) and urlsplit(request.url).netloc != home
            else None
        ),
    )
    page.goto(address)
    return page, problems


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_report_fits_and_its_links_lead_somewhere(
    browser, site, screenshots, name, width
):
    page, problems = opened(browser, site + name, width)
    page.screenshot(path=screenshots / f"{name.replace('/', '_')}_{width}.png", full_page=True)
    assert page.evaluate(DEFECTS) == []
    assert page.evaluate("[...document.images].filter((i) => !i.naturalWidth).length") == 0
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map((a) => a.href)")
    inside = {link for link in links if link.startswith(site)}
    for link in sorted(inside):
        file, _, anchor = link.partition("#")
        assert page.request.get(file).ok, link
        if anchor and file == site + name:
            assert page.evaluate(HAS_ANCHOR, anchor), link
    assert not problems
    page.close()


@pytest.mark.parametrize(
    ("notebook", "label", "key"),
    [
        ("explore.ipynb", "registration stage", "Home"),  # the first stage
        ("T2_registration.ipynb", "turn about x, flexion", "PageUp"),
    ],
)
def test_picture_and_number_follow_a_slider(browser, lab, screenshots, notebook, label, key):
    page, problems = opened(browser, f"{lab}lab/tree/notebooks/tutorials/{notebook}?reset", 1400)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(IDLE)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    slider = page.locator(".widget-slider", has_text=label)
    box = page.locator(".widget-vbox").filter(has=slider)
    picture, readout = box.locator("img"), slider.locator(".widget-readout")
    page.wait_for_function(DRAWN, arg=[box.element_handle(), None])
    before = picture.evaluate("(i) => ({src: i.src, alt: i.alt})")
    value, pixels = readout.inner_text(), picture.screenshot()
    box.screenshot(path=screenshots / f"{Path(notebook).stem}_before.png")
    slider.locator(".noUi-handle").press(key)
    page.wait_for_function(DRAWN, arg=[box.element_handle(), before])
    box.screenshot(path=screenshots / f"{Path(notebook).stem}_after.png")
    assert readout.inner_text() != value
    assert picture.screenshot() != pixels
    assert errors_mm(picture.get_attribute("alt")) != errors_mm(before["alt"])
    page.wait_for_function(IDLE)
    if notebook == "explore.ipynb" and find_spec("ipyniivue"):
        canvas = page.locator(".jp-Notebook canvas")
        canvas.scroll_into_view_if_needed()
        wait_for_colours(canvas, screenshots / "explore_viewer.png")
    assert page.locator(".jp-Notebook [data-mime-type*='stderr']").count() == 0
    assert not problems
    page.close()


def wait_for_colours(canvas, file):
    """Until a screenshot shows an image: WebGL tells nobody when it has drawn."""
    for _ in range(PATIENCE_MS // 1000):
        canvas.screenshot(path=file)
        if len(Image.open(file).convert("RGB").getcolors(2**24)) > 1000:
            return
        canvas.page.wait_for_timeout(1000)
    raise AssertionError("the 3D viewer shows no image")


def errors_mm(text):
    """The registration errors (mm) that the titles of a figure state."""
    found = re.search(r"TRE\b.* mm", text)
    return re.findall(r"\d+\.\d+", found[0]) if found else pytest.fail(f"no TRE in {text!r}")


def test_the_start_page_leads_to_explore_tutorials_and_study(browser, lab, screenshots):
    page, _ = opened(browser, f"{lab}lab/tree/notebooks/index.ipynb?reset", 1400)
    page.get_by_role("link", name="explore", exact=True).wait_for()
    page.screenshot(path=screenshots / "start.png")
    for name in ("T1 Resolution", "T5 Diagnosis", "Cohort", "Diagnosis"):
        assert page.get_by_role("link", name=name, exact=True).count() == 1
    page.get_by_role("link", name="explore", exact=True).click()
    page.locator(".jp-Notebook h1", has_text="Explore a study").wait_for()
    page.close()

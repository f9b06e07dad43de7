"""The page in a real browser: dropped adapters, errors, the report, the curve, the download, and where requests go."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from test_app_server import SPACE, free_port

import eigenlorax as ex

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
MINUTES = 2 * 60_000
"""Time limit of a job in milliseconds, far above what it needs."""


@pytest.fixture(scope="module", params=["command", "space"])
def url(request, tmp_path_factory):
    """URL of the page, served by the command, or by the file that a Space runs."""
    port = free_port()
    words = {"command": ["-m", "eigenlorax", "app", "--port", str(port)], "space": [str(SPACE / "app.py")]}
    extra = {"SPACE_ID": "org/space", "GRADIO_SERVER_PORT": str(port)} if request.param == "space" else {}
    folder = tmp_path_factory.mktemp("served")
    with subprocess.Popen(
        [sys.executable, *words[request.param]],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(folder), **extra},
        cwd=folder,
    ) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process)
        yield address
        process.terminate()


def wait_for(address, process):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")


@pytest.fixture
def tab(url):
    """A tab with the page. At the end, no request may have gone to another server, and no script may have failed."""
    requests, failures = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1000})
        tab.set_default_timeout(MINUTES)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: failures.append(str(error)))
        tab.goto(url)
        tab.wait_for_selector("#analyse")
        yield tab
        browser.close()
    assert len(requests) > 5
    assert [address for address in requests if not address.startswith((f"{url}/", "data:", "blob:"))] == []
    assert failures == []


def upload(tab, *paths):
    tab.set_input_files("input[type=file]", [str(path) for path in paths])
    for path in paths:
        tab.get_by_text(path.stem, exact=False).first.wait_for()


def error_of(tab):
    toast = tab.locator(".toast-body").first
    toast.wait_for()
    return " ".join(toast.inner_text().split())


def test_from_dropped_adapters_to_a_downloaded_pack(tab, archive, tmp_path):
    upload(tab, archive)
    tab.click("#analyse")
    # a stage of the fit or of the report
    tab.get_by_text(re.compile(r"(\d+/\d+ steps|%)")).first.wait_for()
    tab.wait_for_selector("#report iframe")
    report = tab.frame_locator("#report iframe")
    assert report.locator("p.headline").inner_text().startswith("These 4 adapters take")
    assert report.locator("svg").count() >= 4
    # the report's own script runs, under both policies
    report.locator("button.theme").click()
    assert report.locator("html").get_attribute("data-theme") == "light"
    assert "0.1:" in tab.locator("#sizes label.selected").inner_text()

    tab.locator("g[data-point='4'] circle").last.click()
    tab.wait_for_selector("g[data-point='4'].chosen")
    assert "0.2:" in tab.locator("#sizes label.selected").inner_text()
    tab.click("#make")
    tab.wait_for_selector("#pack")
    assert "The pack of 4 adapters takes" in tab.locator("#summary").inner_text()
    with tab.expect_download() as download:
        tab.click("#pack")
    assert download.value.suggested_filename == "pack-0.2.zip"
    download.value.save_as(tmp_path / "pack.zip")
    shutil.unpack_archive(tmp_path / "pack.zip", tmp_path)
    pack = ex.Pack.open(tmp_path / "pack")
    assert sorted(pack.names) == ["alpha", "beta", "delta", "gamma"]
    assert max(record.delta_error for record in pack.records.values()) <= 0.2


def test_bad_input_is_a_sentence_and_the_page_goes_on(tab, archive, tmp_path):
    tab.click("#analyse")
    assert "No adapter was passed." in error_of(tab)
    tab.locator(".toast-body button").first.click()
    tab.locator(".toast-body").first.wait_for(state="detached")

    broken = tmp_path / "broken.zip"
    broken.write_bytes(archive.read_bytes()[:-40])
    upload(tab, broken)
    tab.click("#analyse")
    assert "broken.zip is damaged, or no zip file" in error_of(tab)
    assert "Traceback" not in tab.content()
    assert str(tmp_path) not in tab.content()


def test_folders_are_read_for_users_of_this_machine_only(tab, url, adapters, request):
    is_space = "space" in request.node.callspec.id
    tab.locator("#names textarea").fill(str(adapters))
    tab.click("#analyse")
    if is_space:
        assert "reads no folders" in error_of(tab)
    else:
        tab.wait_for_selector("#report iframe")

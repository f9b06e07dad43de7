"""A real browser in the tests: headless Chromium, spoken to by its DevTools protocol over two pipes."""

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find():
    """Where Chromium is, or None. The environment's CHROME goes first."""
    found = (shutil.which(name) for name in (os.environ.get("CHROME", ""), *NAMES) if name)
    return next((path for path in found if path), None)


class Tab:
    """One tab. events: what the browser reported since, each a dict with "method" and "params"."""

    def __init__(self, read, write):
        self.events = []
        self._read, self._write, self._rest = read, write, b""
        self._numbers = itertools.count(1)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The answer to one command."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": params, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)

    def open(self, path):
        """Loads the file; `events` are those since then."""
        self.events = []
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def value(self, script):
        """What the expression is worth in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def emulate(self, width=1200, height=900, media="", scheme="light", touch=False):
        """The screen that the page is shown on."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def _message(self, seconds=60):
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium said nothing for {seconds} seconds"
            found = os.read(self._read, 1 << 20)
            assert found, "Chromium ended"
            self._rest += found
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextlib.contextmanager
def tab(chromium, profile):
    """A tab of a browser of its own, which finds no host by name. profile: a folder that it may write to."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # above the numbers that they shall get, so that neither overwrites the other
    high_in, high_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out))

    def connect():
        os.dup2(high_in, 3)
        os.dup2(high_out, 4)

    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    browser = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=connect
    )
    for fd in (theirs_in, theirs_out, high_in, high_out):
        os.close(fd)
    try:
        yield Tab(ours_in, ours_out)
    finally:
        browser.terminate()
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        os.close(ours_in)
        os.close(ours_out)

"""A headless Chromium for the tests, driven through a pipe by the standard library alone.

with Chromium(path) as browser:
    page = browser.open("file:///tmp/report.html")
    page.run("document.title")

Speaks the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) over ``--remote-debugging-pipe``:
no port, no driver, no package.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The browser reads file descriptor 3 and writes 4.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""
TIMEOUT = 300.0  # seconds for one answer; a loaded machine is slow to start


def find_chromium() -> str | None:
    """``$CHROMIUM`` or the first Chromium on the path; None where there is none, or no pipes for it (Windows)."""
    if os.name == "nt":
        return None
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser process without any network of its own beyond what its pages ask for."""

    def __init__(self, executable: str, size: tuple[int, int] = (1440, 1000)):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = [
            "--headless=new",
            "--no-sandbox",  # it has none for root, which containers use
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--disable-features=Translate,OptimizationHints,MediaRouter",
            "--no-first-run",
            "--force-device-scale-factor=1",
            f"--window-size={size[0]},{size[1]}",
            f"--user-data-dir={self._profile.name}",
            "--remote-debugging-pipe",
        ]
        launcher = [sys.executable, "-S", "-E", "-c", LAUNCH, str(theirs_in), str(theirs_out), executable, *options]
        self._process = subprocess.Popen(
            launcher, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count = b"", 0
        self.events: list[dict] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(30)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        """Send one command and wait for its answer; events that come meanwhile are kept in ``events``."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(method)
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, waiting_for: str) -> dict:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"Chromium gave no answer to {waiting_for} in {TIMEOUT:g} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError(f"Chromium ended during {waiting_for} (exit status {self._process.poll()})")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, url: str) -> Page:
        """A page in a new tab, watched from before it loads."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters) -> dict:
        """A command to this tab."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited. An exception raises ``RuntimeError``."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + TIMEOUT
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise RuntimeError(f"never came true: {condition}")
            time.sleep(0.05)

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """A real mouse click at a point of the element, given as shares of its width and height."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            f" return [b.left + {across} * b.width, b.top + {down} * b.height]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def press(self, key: str) -> None:
        """One key on the focused element, by its DOM name (``ArrowDown``)."""
        codes = {"PageUp": 33, "PageDown": 34, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, path, width: int = 1440) -> None:
        """The whole page as PNG, at a given width of the window."""
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Console errors and warnings, uncaught exceptions and log entries (policy violations, failed loads)."""
        self.run("0")  # what came before it has arrived now
        found = []
        for event in self._browser.events:
            parameters = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(str(parameters["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(parameters["entry"]["text"])
        return found

    def requests(self) -> dict[str, str | None]:
        """URLs of everything the page asked for, itself included; with the reason where that was refused."""
        self.run("0")
        events = [(event["method"], event["params"]) for event in self._browser.events]
        refused = {p["requestId"]: p.get("blockedReason") for method, p in events if method == "Network.loadingFailed"}
        asked = (p for method, p in events if method == "Network.requestWillBeSent")
        return {p["request"]["url"]: refused.get(p["requestId"]) for p in asked}

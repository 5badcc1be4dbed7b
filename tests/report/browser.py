"""Headless Chromium through its debugging pipe: as much of the protocol as looking at a page needs, and nothing else.

Commands go in by file descriptor 3, answers and events come by 4, each a JSON object that ends with a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--disable-sync", "--force-device-scale-factor=1", "--remote-debugging-pipe", "about:blank"),
)


def binary():
    """Where a Chromium is, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page, in a browser of its own; a context manager. ``events`` is all that the page has reported."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="octavo-browser-")
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        ends = to_browser, from_browser

        def pipes():
            kept = os.dup(ends[0]), os.dup(ends[1])  # neither may be overwritten before it is used
            for end, wanted in zip(kept, (3, 4), strict=True):
                os.dup2(end, wanted)
                os.set_inheritable(wanted, True)  # dup2 onto itself would not

        self.process = subprocess.Popen(
            [binary(), *FLAGS, f"--user-data-dir={self.profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=pipes,
            start_new_session=True,
        )
        for end in ends:
            os.close(end)
        self.events, self._buffer, self._number, self._session = [], b"", 0, None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *failure):
        try:
            self._session = None
            self.call("Browser.close")
            self.process.wait(timeout=20)
        except (TimeoutError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        for end in (self._commands, self._answers):
            os.close(end)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, timeout=60, **arguments):
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        until = time.monotonic() + timeout
        while (answer := self._read(until)).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, path, width, height, scheme="light", scripts=True):
        """Load a file in a window of that size, as somebody with that colour scheme sees it."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def wait(self, event, timeout=60):
        """Wait until the page has reported this."""
        until = time.monotonic() + timeout
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._read(until))

    def ask(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key, number):
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number, **text)

    def picture(self, path, whole=True):
        """Save a PNG of the whole page, or of what the window shows."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, timeout=120)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self, until):
        while b"\0" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            if not (data := os.read(self._answers, 1 << 20)):
                raise OSError("the browser has gone")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

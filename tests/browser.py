"""A headless Chromium driven through its DevTools pipe: real clicks, the console, every request. Needs no package.

`python tests/browser.py PAGE FOLDER` photographs the top of a page, light and dark into
FOLDER/report-light.png and report-dark.png.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage",
         "--disable-background-networking", "--force-color-profile=srgb", "--remote-debugging-pipe")  # fmt: skip


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `problems` are console errors, exceptions and policy violations; `requests` all addresses asked for."""

    def __init__(self, program: str, seconds: float = 60.0):
        self.seconds, self.problems, self.requests = seconds, [], []
        self._left, self._answers, self._events, self._number = b"", {}, [], 0
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        there, self._out = os.pipe()
        self._in, here = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there, here)]

        def attach() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [program, *FLAGS, *root, f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=attach, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        for end in (there, here, *high):
            os.close(end)
        self._session = None
        target = self._wait_for_page()
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _wait_for_page(self) -> str:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            for target in self.call("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return target["targetId"]
            time.sleep(0.05)
        raise TimeoutError("browser: no page opened")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self._until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"browser: {method}: {answer['error']}")
        return answer["result"]

    def _until(self, done, what: str) -> None:
        until = time.monotonic() + self.seconds
        while not done():
            left = until - time.monotonic()
            if left < 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"browser: {what} has not ended within {self.seconds:.0f} s")
            got = os.read(self._in, 1 << 16)
            if not got:
                raise RuntimeError(f"browser: it closed during {what}")
            *whole, self._left = (self._left + got).split(b"\0")
            for each in whole:
                self._hear(json.loads(each))

    def _hear(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        method, params = message["method"], message.get("params", {})
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(params["entry"])[:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.problems.clear()
        self.requests.clear()
        self.look(width, height, dark)
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda: "Page.loadEventFired" in self._events, "loading")

    def look(self, width: int, height: int = 900, dark: bool = False, media: str = "") -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"browser: {script[:80]}: {json.dumps(got['exceptionDetails'])[:400]}")
        return got["result"].get("value")

    def _place(self, selector: str) -> tuple[float, float]:
        box = self.run(
            f"(e=>{{e.scrollIntoView({{block:'center',behavior:'instant'}});const b=e.getBoundingClientRect();"
            f"return [b.x+b.width/2,b.y+b.height/2]}})(document.querySelector({json.dumps(selector)}))"
        )
        return box[0], box[1]

    def click(self, selector: str) -> None:
        """A real one: the pointer goes to the middle of the first match and presses."""
        x, y = self._place(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, selector: str) -> None:
        x, y = self._place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, selector: str | None = None, height: float | None = None) -> Path:
        """The whole page, or the first match, or the upper part of it."""
        found = f"document.querySelector({json.dumps(selector)})" if selector else "document.documentElement"
        x, y, width, whole = self.run(
            f"(b=>[b.x+scrollX,b.y+scrollY,b.width,b.height])({found}.getBoundingClientRect())"
        )
        clip = {"x": x, "y": y, "width": width, "height": height or whole, "scale": 1}
        got = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))
        return path

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self._session = None
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(5)
        for end in (self._in, self._out):
            with contextlib.suppress(OSError):
                os.close(end)
        self._folder.cleanup()


def photograph(page: Path, folder: Path, width: int = 1160, height: int = 1530) -> None:
    browser = Browser(find() or "chromium")
    for theme in ("light", "dark"):
        browser.open(page, width, height, dark=theme == "dark")
        print(browser.screenshot(folder / f"report-{theme}.png", height=height))
    browser.close()


if __name__ == "__main__":
    photograph(Path(sys.argv[1]), Path(sys.argv[2]))

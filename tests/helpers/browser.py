"""A headless Chromium that is driven through its debugging pipe: no package, no port."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--remote-debugging-pipe --window-size=1400,1000"
)


class Browser:
    """One page; `said` is what its console has said, errors that nobody caught included."""

    def __init__(self, profile: Path):
        theirs, self.send_fd = os.pipe()
        self.read_fd, ours = os.pipe()
        hand_over = f'exec 3<&{theirs} 4>&{ours}; exec "$@"'
        command = ["bash", "-c", hand_over, "bash", CHROMIUM, *FLAGS.split()]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs, ours),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs), os.close(ours)
        self.number, self.buffer, self.said, self.events = 0, b"", [], []
        self.session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_fd, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next(60)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def _next(self, timeout_s: float) -> dict:
        """The next message; events are kept."""
        until = time.monotonic() + timeout_s
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_fd], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser says nothing"
            self.buffer += os.read(self.read_fd, 1 << 20)
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.said.append(message["params"]["exceptionDetails"]["exception"]["description"])
            case "Log.entryAdded":
                self.said.append(message["params"]["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.said.append(str(message["params"]["args"]))
        self.events.append(message)
        return message

    def open(self, url: str) -> None:
        """Load a page, and all that it asks for at once."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self._next(60)

    def value(self, script: str):
        """What a JavaScript expression gives."""
        reply = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as a user does."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def asked_for(self) -> list[str]:
        """The addresses that the page has loaded since it was opened."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        os.close(self.send_fd), os.close(self.read_fd)

"""Opens pages in headless Chromium over its DevTools protocol and reports what went wrong in them."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1280,1600"
).split()


class Browser:
    """A browser without a network: every request that is not for a local file counts as a problem."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp()
        command = [shutil.which("chromium"), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        port_file = Path(self.profile) / "DevToolsActivePort"
        deadline = time.time() + 60
        while not port_file.exists() or not port_file.read_text():
            assert time.time() < deadline, "Chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        address = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.number, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def open(self, page: Path, settle: float = 1.0) -> list[str]:
        """Load a page; returns console errors, exceptions, failed requests and requests to the network."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        deadline = time.time() + 60
        while self.evaluate("document.readyState") != "complete" and time.time() < deadline:
            time.sleep(0.1)
        time.sleep(settle)
        self.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 1) : 1")
        return [p for event in self.events if (p := _problem(event["method"], event["params"]))]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def _problem(method: str, p: dict) -> str:
    if method == "Runtime.exceptionThrown":
        return "exception: " + str(p["exceptionDetails"])[:600]
    if method == "Runtime.consoleAPICalled" and p["type"] == "error":
        return "console: " + str(p["args"])[:300]
    if method == "Log.entryAdded" and p["entry"]["level"] == "error":
        return f"log: {p['entry']['text']} {p['entry'].get('url', '')}"
    if method == "Network.loadingFailed" and not p.get("canceled"):
        return f"failed: {p['errorText']}"
    if method == "Network.requestWillBeSent" and p["request"]["url"].split(":")[0] not in ("file", "data", "blob"):
        return f"network: {p['request']['url'][:200]}"
    return ""

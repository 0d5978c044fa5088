"""ComfyUI's page in a real browser without a ComfyUI: its files, the few answers it asks for, a socket."""

from __future__ import annotations

import json
import mimetypes
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLDER = "ComfyUI-WanTrim"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
READY_MS = 60_000

_PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
# two of the pack's nodes and two of ComfyUI's, as /object_info describes them
NODES = {
    "WanTrimTokens": {
        "model": ["MODEL", {}],
        "prune_ratio": ["FLOAT", {"default": 0.3, **_PERCENT}],
        "preset": [
            "COMFY_DYNAMICCOMBO_V3",
            {
                "options": [
                    {"key": "auto", "inputs": {"required": {}}},
                    {
                        "key": "custom",
                        "inputs": {"required": {"alpha": ["FLOAT", {"default": 0.5, **_PERCENT}]}},
                    },
                ]
            },
        ],
        "start_percent": ["FLOAT", {"default": 0.0, **_PERCENT}],
        "end_percent": ["FLOAT", {"default": 1.0, **_PERCENT}],
    },
    "WanTrimHeads": {
        "model": ["MODEL", {}],
        "prune_ratio": ["FLOAT", {"default": 0.3, **_PERCENT}],
        "method": [["demote", "paper"], {"default": "demote"}],
    },
    "TakesModel": {"model": ["MODEL", {}], "seed": ["INT", {"default": 1, "min": 0, "max": 9}]},
}


def missing() -> str | None:
    """What this needs and is not there, in words, or None."""
    if find_spec("playwright") is None:
        return "playwright is not installed; make test installs it with the dev extra"
    if find_spec("comfyui_frontend_package") is None:
        return "comfyui-frontend-package is not installed; make test installs it with the dev extra"
    if browser() is None:
        return f"no browser: looked for {', '.join(BROWSERS)} (Debian: apt-get install chromium)"
    return None


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def object_info() -> dict:
    """/object_info of NODES."""
    return {
        name: {
            "input": {"required": inputs},
            "input_order": {"required": list(inputs)},
            "output": ["MODEL"],
            "output_is_list": [False],
            "output_name": ["MODEL"],
            "name": name,
            "display_name": name,
            "description": "",
            "python_module": f"custom_nodes.{FOLDER}",
            "category": "test",
            "output_node": False,
        }
        for name, inputs in NODES.items()
    }


class _Answer(BaseHTTPRequestHandler):
    """The frontend's files, the pack's web/ as ComfyUI serves it, and ComfyUI's answers."""

    def __init__(self, *args, web: Path | None, settings: dict, **kwargs):
        self.web, self.settings = web, settings
        super().__init__(*args, **kwargs)

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        route = path.removeprefix("/api")
        if route.startswith(f"/extensions/{FOLDER}/"):
            self._file(self.web, route.removeprefix(f"/extensions/{FOLDER}/"))
        elif route == "/extensions":
            self._json(self._scripts())
        elif route in (answers := self._answers()):
            self._json(answers[route])
        elif path.startswith("/api/"):
            self.send_error(404)
        else:
            self._file(_static(), path.strip("/") or "index.html")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._json({})

    def _answers(self) -> dict:
        system = {"os": "posix", "comfyui_version": "0.33.0", "argv": [], "embedded_python": False}
        return {
            "/object_info": object_info(),
            "/system_stats": {"system": system, "devices": []},
            "/settings": self.settings,
            "/users": {"storage": "server", "migrated": True},
            "/userdata": [],
            "/i18n": {},
            "/features": {},
            "/embeddings": [],
            "/workflow_templates": {},
            "/queue": {"queue_running": [], "queue_pending": []},
            "/history": {},
            "/experiment/models": [],
            "/global_subgraphs": {},
            "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 0, "total": 0}},
        }

    def _scripts(self) -> list[str]:
        if self.web is None:
            return []
        files = sorted(self.web.glob("**/*.js"))
        return [f"/extensions/{FOLDER}/{file.relative_to(self.web).as_posix()}" for file in files]

    def _json(self, data) -> None:
        self._send(json.dumps(data).encode(), "application/json")

    def _file(self, root: Path | None, name: str) -> None:
        file = root / name if root is not None else None
        if file is None or not file.resolve().is_relative_to(root.resolve()) or not file.is_file():
            self.send_error(404)
            return
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._send(file.read_bytes(), "text/javascript" if name.endswith(".js") else kind)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _static() -> Path:
    return Path(find_spec("comfyui_frontend_package").origin).parent / "static"


@contextmanager
def serving(web: Path | None, settings: dict):
    """Address of a server that gives out the page; `web` None is a ComfyUI without the extension."""
    handler = partial(_Answer, web=web, settings=settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class Page:
    """ComfyUI's page; `tell` is what the server would say."""

    def __init__(self, page, errors: list[str]):
        self.page, self.errors = page, errors
        self._socket = None
        # names what is told
        self.prompt = "prompt"

    def open(self, address: str) -> None:
        self.page.route_web_socket("**/ws*", self._connected)
        self.page.goto(address)
        self.page.wait_for_function(
            "() => window.app?.canvas && window.LiteGraph?.registered_node_types['WanTrimTokens']",
            timeout=READY_MS,
        )

    def _connected(self, socket) -> None:
        self._socket = socket
        status = {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "test"}
        socket.send(json.dumps({"type": "status", "data": status}))

    def tell(self, event: str, **data) -> None:
        """A message of the server, taken in by the page before this returns."""
        self._socket.send(json.dumps({"type": event, "data": data}))
        self.page.wait_for_timeout(50)

    def run(self, script: str, argument=None):
        """What a JavaScript function of the page gives back."""
        return self.page.evaluate(script, argument)


@contextmanager
def open_page(playwright, address: str):
    """The page in a new browser that may speak to `address` alone."""
    process = playwright.chromium.launch(executable_path=browser(), args=FLAGS)
    try:
        page = process.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=1)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: route.abort(),
        )
        opened = Page(page, errors)
        opened.open(address)
        yield opened
    finally:
        process.close()

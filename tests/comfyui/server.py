"""A real ComfyUI server with the pack in its custom_nodes, driven over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FOLDER = "ComfyUI-WanTrim"
START_SECONDS = 120
RUN_SECONDS = 240


class Server:
    """A running server and its folder."""

    def __init__(self, base: Path, port: int, process: subprocess.Popen):
        self.base, self.port, self.process = base, port, process

    @property
    def log(self) -> str:
        return (self.base / "server.log").read_text("utf-8", "replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read()

    def json(self, path: str):
        return json.loads(self.get(path))

    def post(self, path: str, data: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def run(self, prompt: dict) -> dict:
        """Queue a prompt in API form and wait for its entry in the history."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, json.dumps(answer, indent=1)
        number = answer["prompt_id"]
        until = time.monotonic() + RUN_SECONDS
        while time.monotonic() < until:
            history = self.json(f"/history/{number}")
            if number in history:
                return history[number]
            assert self.process.poll() is None, self.log[-3000:]
            time.sleep(0.2)
        raise AssertionError(f"not done after {RUN_SECONDS} s:\n{self.log[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(comfyui: Path, pack: Path, base: Path):
    """Start a server with an own base folder in which the pack is a link; stop it at the end."""
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / FOLDER).symlink_to(pack, target_is_directory=True)
    port = _free_port()
    options = ["--cpu", "--use-pytorch-cross-attention", "--disable-api-nodes"]
    options += ["--disable-auto-launch", "--listen", "127.0.0.1", "--port", str(port)]
    options += ["--base-directory", str(base)]
    options += ["--database-url", f"sqlite:///{base}/user/comfyui.db"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (base / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(comfyui / "main.py"), *options],
            cwd=comfyui,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Server(base, port, process)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log[-3000:]
        try:
            server.get("/system_stats")
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise AssertionError(f"no answer after {START_SECONDS} s:\n{server.log[-3000:]}")

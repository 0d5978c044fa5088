"""What the Comfy registry gets: metadata, pictures, dependencies, and nothing that must not ship."""

import re
import struct
from pathlib import Path

import pytest

from wantrim.tests.test_house import project
from wantrim.tests.test_layering import git_files, left_out_files

FRONTEND = "comfyui-frontend-package"
# ComfyUI needs them itself, so that an install changes nothing
REQUIRED = {"einops", "numpy", "safetensors"}
# what the registry reads as a version: operator and three numbers
VERSION = re.compile(r"(==|>=|<=|!=|~=|>|<)\d+\.\d+\.\d+(-[a-zA-Z0-9]+)?")
RAW = "https://raw.githubusercontent.com/"
TOP = {
    "assets", "engine", "hosts", "kernels", "locales", "methods", "nodes", "profiles", "report",
    "slim", "solve", "subgraphs", "toy", "web", "workflows", "__init__.py", "__main__.py",
    "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "requirements.txt",
}  # fmt: skip
# a method called eval and a word that ends in one of these are something else
FORBIDDEN = re.compile(
    r"\b(subprocess|socket|requests|urllib|httpx|aiohttp|ftplib|pickle|marshal|ctypes)\b"
    r"|(?<![.\w])(eval|exec|__import__|compile)\(|\bos\.(system|popen|exec\w*|spawn\w*)\b"
    r"|\bpip install\b|\bXMLHttpRequest\b|\bnew (WebSocket|Function)\b|\bsendBeacon\b|\bimportScripts\b"
)
CODE = {".py", ".js", ".mjs", ".html", ".sh"}


def shipped(root: Path) -> list[Path]:
    """Files of the registry's archive, relative to `root`."""
    return sorted(git_files(root, "--exclude-standard") - left_out_files(root))


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def png_size(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n", f"{file.name} is no PNG"
    return struct.unpack(">II", head[16:24])


def test_the_archive_holds_what_an_artist_needs_and_nothing_else(root):
    files = shipped(root)
    assert {file.parts[0] for file in files} <= TOP
    for needed in ("__init__.py", "nodes/__init__.py", "toy/tiny_wan.safetensors", "LICENSE"):
        assert Path(needed) in files
    names = {part for file in files for part in file.parts}
    assert not names & {"tests", "training", "demo", "benchmarks", "diffusers", "conftest.py"}
    assert not [file for file in files if file.name.startswith("test_")]


def offences(text: str) -> list[str]:
    return [match[0] for match in FORBIDDEN.finditer(text)]


def test_nothing_that_ships_starts_a_program_or_opens_a_connection(root):
    sources = [file for file in shipped(root) if file.suffix in CODE]
    assert len(sources) > 50
    found = {str(file): offences((root / file).read_text("utf-8")) for file in sources}
    assert not {file: bad for file, bad in found.items() if bad}


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from urllib.request import urlopen",
        "import requests as r",
        "s = socket.socket()",
        "eval('1')",
        "x = exec(y)",
        "import pickle",
        "os.system('x')",
        "# pip install triton",
        "new WebSocket(url)",
    ],
)
def test_an_offence_is_caught(source):
    assert offences(source)


def test_what_is_no_offence():
    text = "model.eval()\nProfileSocket.Input()\nre.compile('x')\ntorch.compile(m)\nretrieval(x)"
    assert not offences(text)


def test_dependencies_are_those_of_the_requirements(root):
    listed = project(root)["project"]["dependencies"]
    ours = [line for line in listed if name_of(line) != FRONTEND]
    lines = (root / "requirements.txt").read_text("utf-8").splitlines()
    assert ours == lines == sorted(REQUIRED)


def test_what_every_install_gets_can_be_had_everywhere(root):
    """Bare names only: no version that moves what is there, no marker, no address."""
    for line in (root / "requirements.txt").read_text("utf-8").splitlines():
        assert re.fullmatch(r"[a-z]+", line), line
    assert "dynamic" not in project(root)["project"], "the registry reads no dynamic dependencies"


def test_the_frontend_range_can_be_read_by_the_registry(root):
    listed = project(root)["project"]["dependencies"]
    (line,) = [line for line in listed if name_of(line) == FRONTEND]
    parts = line.removeprefix(FRONTEND).split(",")
    assert parts[0].startswith(">=")
    assert all(VERSION.fullmatch(part) for part in parts)


def test_torch_is_never_and_triton_only_a_linux_extra(root):
    extras = project(root)["project"]["optional-dependencies"]
    assert extras["triton"]
    asked = [line for lines in extras.values() for line in lines]
    asked += project(root)["project"]["dependencies"]
    assert not [line for line in asked if re.match(r"(torch|nvidia|xformers|cuda)", name_of(line))]
    for line in asked:
        if name_of(line).startswith("triton"):
            assert line.endswith("; platform_system == 'Linux'"), line


@pytest.mark.parametrize(("key", "wide", "high"), [("Icon", 1, 1), ("Banner", 21, 9)])
def test_pictures_of_the_registry(root, key, wide, high):
    data = project(root)
    owner = data["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    base = f"{RAW}{owner}/main/"
    url = data["tool"]["comfy"][key]
    assert url.startswith(base)
    file = Path(url.removeprefix(base))
    assert file in shipped(root)
    width, height = png_size(root / file)
    assert width * high == height * wide
    if key == "Icon":
        assert width <= 400
    # what it was drawn as, to be drawn again
    assert (root / file).with_suffix(".svg").is_file()

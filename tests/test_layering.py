"""The import arrow, and no circle between two files, read from the syntax tree.

kernels <- methods <- engine <- solve, profiles, slim, report <- hosts <- nodes
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACK = "wantrim"
ENTRY = "__init__"
ABOVE = ".."
# the folders that each may import from; "__init__" is the root __init__.py
BELOW = {"kernels", "methods", "engine", "solve", "profiles", "slim", "report", "toy"}
FEATURES = {"solve", "profiles", "slim", "report"}
ARROW = {
    "toy": set(),
    "kernels": set(),
    "methods": {"kernels"},
    "engine": {"kernels", "methods"},
    **{name: {"kernels", "methods", "engine", *FEATURES} for name in sorted(FEATURES)},
    "hosts": BELOW,
    "nodes": {*BELOW, "hosts"},
    ENTRY: {*BELOW, "hosts", "nodes"},
    "demo": {*BELOW, "hosts"},
    "training": {*BELOW, "hosts"},
    "benchmarks": {*BELOW, "hosts"},
}
# what every ComfyUI has; all but torch are in requirements.txt (PIL below is ComfyUI's too)
EVERYWHERE = {"torch", "numpy", "safetensors", "einops"}
# where any other package may be named; a place is a path or the beginning of one
COMFYUI = ("__init__.py", "nodes/", "hosts/comfyui", "benchmarks/speed/timing.py")
OFFLINE = ("demo/", "training/", "benchmarks/")
PLACES = {
    "comfy": COMFYUI,
    "comfy_api": COMFYUI,
    "comfy_extras": COMFYUI,
    "comfy_execution": COMFYUI,
    "comfyui_version": COMFYUI,
    "folder_paths": COMFYUI,
    "server": COMFYUI,
    "execution": COMFYUI,
    "triton": ("kernels/", "benchmarks/"),
    "diffusers": ("hosts/diffusers", *OFFLINE),
    "accelerate": ("training/",),
    "transformers": ("training/",),
    # moments in 8 bits, where a recipe asks for them
    "torchao": ("training/",),
    # what Python 3.11 has as tomllib
    "tomli": ("training/",),
    "matplotlib": OFFLINE,
    "av": OFFLINE,
    "rich": OFFLINE,
    "PIL": ("report/", "profiles/", "hosts/", "nodes/", *OFFLINE),
    "skimage": ("benchmarks/",),
    # attention kernels, timed where they are installed
    "sageattention": ("benchmarks/",),
    "flash_attn": ("benchmarks/",),
}


def source_files(root: Path) -> list[Path]:
    """Our Python files but the tests, relative to `root`."""
    top = [root / "__init__.py"] if (root / "__init__.py").exists() else []
    files = top + [file for folder in ARROW for file in sorted((root / folder).rglob("*.py"))]
    return [file.relative_to(root) for file in files]


def imports(root: Path, file: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file; ours as "wantrim.folder...", relative or not."""
    package = [PACK, *file.parent.parts]
    found = []
    for node in ast.walk(ast.parse((root / file).read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(package):
                found.append((node.lineno, ABOVE))
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def complaint(file: Path, module: str) -> str | None:
    """Why `file` may not import `module`, or None."""
    if module == ABOVE:
        return "it reaches above the pack"
    top, _, rest = module.partition(".")
    mine = file.parts[0] if len(file.parts) > 1 else ENTRY
    if top == PACK:
        theirs = rest.partition(".")[0]
        if theirs not in ARROW:
            return "the root __init__.py is ComfyUI's entry, not a library"
        if theirs != mine and theirs not in ARROW[mine]:
            return f"{mine} may import {', '.join(sorted(ARROW[mine])) or 'nothing of ours'}"
    elif top in PLACES:
        if not file.as_posix().startswith(PLACES[top]):
            return f"only {', '.join(PLACES[top])} may name {top}"
    elif top not in EVERYWHERE and top not in sys.stdlib_module_names:
        return f"{top} is in no table of tests/test_layering.py"
    return None


def complaints(root: Path) -> list[str]:
    found = []
    for file in source_files(root):
        for line, module in imports(root, file):
            why = complaint(file, module)
            if why:
                found.append(f"{file}:{line} imports {module}: {why}")
    return found


def absolute_imports_of_ours(root: Path) -> list[str]:
    found = []
    for file in source_files(root):
        for node in ast.walk(ast.parse((root / file).read_text("utf-8"), str(file))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found += [f"{file}:{node.lineno}" for name in names if name.split(".")[0] == PACK]
    return found


def test_arrow(root):
    assert not complaints(root)


def circles(root: Path) -> list[tuple[str, ...]]:
    """Files of ours that import each other, directly or on a way around."""
    names = {file: ".".join([PACK, *file.with_suffix("").parts]) for file in source_files(root)}
    modules = {name.removesuffix(".__init__"): name for name in names.values()}
    graph = {}
    for file, name in names.items():
        found = set()
        for _, module in imports(root, file):
            # "package.module.name" or "package.module"
            target = modules.get(module) or modules.get(module.rpartition(".")[0])
            found |= {target} - {None, name}
        graph[name] = found
    return [tuple(one) for one in strongly_connected(graph) if len(one) > 1]


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for after in graph[todo.pop()] - seen:
                seen.add(after)
                todo.append(after)
        return seen

    reached = {name: reach(name) for name in graph}
    groups, done = [], set()
    for name in graph:
        if name not in done:
            group = [other for other in graph if other in reached[name] and name in reached[other]]
            groups.append(sorted({name, *group}))
            done |= {name, *group}
    return groups


def test_no_circles(root):
    assert not circles(root)


def test_a_circle_is_found(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/a.py").write_text("from .b import x\n")
    (tmp_path / "engine/b.py").write_text("from .c import x\n")
    (tmp_path / "engine/c.py").write_text("from typing import TYPE_CHECKING\nfrom . import a\n")
    (tmp_path / "engine/d.py").write_text("from .a import x\n")
    assert circles(tmp_path) == [("wantrim.engine.a", "wantrim.engine.b", "wantrim.engine.c")]


def test_imports_of_ours_are_relative(root):
    # the folder's name in custom_nodes is the user's, so there is no package of our name there
    assert not absolute_imports_of_ours(root)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("methods/a.py", "from ..nodes import tape", "methods may import kernels"),
        ("methods/a.py", "from .. import hosts", "methods may import kernels"),
        ("methods/deep/a.py", "from ...hosts.comfyui import x", "methods may import kernels"),
        ("methods/a.py", "def f():\n    from ..toy import world", "methods may import kernels"),
        ("methods/a.py", "import wantrim.nodes.tape", "methods may import kernels"),
        ("methods/a.py", "from .. import VERSION", "ComfyUI's entry"),
        ("methods/a.py", "from ...elsewhere import x", "above the pack"),
        ("kernels/a.py", "from ..methods.tokens import keep", "nothing of ours"),
        ("toy/a.py", "from ..kernels import x", "nothing of ours"),
        ("nodes/a.py", "from ..demo.sample import sample", "nodes may import"),
        ("demo/a.py", "from ..training import x", "demo may import"),
        ("benchmarks/a.py", "from ..demo import x", "benchmarks may import"),
        ("training/a.py", "from ..benchmarks import x", "training may import"),
        ("hosts/diffusers/a.py", "import comfy.samplers", "may name comfy"),
        ("hosts/comfyui/a.py", "from diffusers import X", "may name diffusers"),
        ("hosts/session.py", "import comfy_api.latest", "may name comfy_api"),
        ("methods/a.py", "import importlib\nimportlib.import_module('comfy')", "may name comfy"),
        ("nodes/a.py", "import matplotlib.pyplot as plt", "may name matplotlib"),
        ("methods/a.py", "import triton", "may name triton"),
        ("hosts/a.py", "import requests", "requests is in no table"),
    ],
)
def test_a_planted_import_is_caught(tmp_path, file, text, said):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    found = complaints(tmp_path)
    assert len(found) == 1
    assert file in found[0]
    assert said in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("__init__.py", "from .nodes import tape\nfrom comfy_api.latest import io"),
        ("nodes/a.py", "from ..hosts.comfyui import attach\nfrom ..toy.vae import ToyVAE"),
        ("hosts/comfyui/a.py", "from . import b\nfrom .. import session\nimport comfy.utils"),
        ("hosts/a.py", "from ..methods import tokens\nfrom ..toy import world\nimport torch"),
        ("demo/a.py", "from ..hosts.diffusers import weights\nimport diffusers, av, rich"),
        ("kernels/a.py", "import triton.language as tl"),
        ("methods/a.py", "from __future__ import annotations\nimport json, math"),
    ],
)
def test_an_import_down_the_arrow_is_not(tmp_path, file, text):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert not complaints(tmp_path)


def test_a_planted_absolute_import_is_caught(tmp_path):
    (tmp_path / "hosts").mkdir()
    (tmp_path / "hosts/a.py").write_text("from wantrim.methods import tokens\nimport wantrim.toy\n")
    assert absolute_imports_of_ours(tmp_path) == ["hosts/a.py:1", "hosts/a.py:2"]


def git_files(root: Path, *options: str) -> set[Path]:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "ls-files", "-z", "--cached", "--others", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return {Path(name) for name in done.stdout.split("\0") if name}


def left_out_files(root: Path) -> set[Path]:
    """Files that .comfyignore keeps out of the registry's archive, as git reads its patterns."""
    ours = git_files(root, "--exclude-standard")
    return ours & git_files(root, "--ignored", "--exclude-from=.comfyignore")


def test_what_ships_imports_nothing_that_does_not(root):
    left_out = left_out_files(root)
    assert Path("tests/test_layering.py") in left_out
    assert Path("toy/toy_vae.safetensors") not in left_out
    gone = {".".join([PACK, *file.with_suffix("").parts]) for file in left_out}
    gone |= {name.removesuffix(".__init__") for name in gone}
    broken = [
        f"{file}:{line} imports {module}"
        for file in source_files(root)
        if file not in left_out
        for line, module in imports(root, file)
        if module in gone or module.rpartition(".")[0] in gone
    ]
    assert not broken


def test_what_ships_is_reached_from_the_nodes(root):
    ships = set(source_files(root)) - left_out_files(root)
    modules = {file: ".".join([PACK, *file.with_suffix("").parts]) for file in ships}
    names = {module.removesuffix(".__init__"): file for file, module in modules.items()}
    todo = {Path("__init__.py"), *(file for file in ships if file.parts[0] == "nodes")}
    reached = set()
    while todo:
        reached |= todo
        named = {module for file in todo for _, module in imports(root, file)}
        found = {names.get(name) or names.get(name.rpartition(".")[0]) for name in named}
        todo = found - reached - {None}
    assert not {file for file in ships - reached if file.name != "__init__.py"}

"""What the pack promises about itself: it loads under any name, stays small, and ships clean."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

FOLDERS = (
    "toy", "kernels", "methods", "engine", "profiles", "slim", "solve", "report", "hosts", "nodes",
    "demo", "training", "benchmarks",
)  # fmt: skip
MAX_LINES = 400
# not shipped: demo's scripts talk to a terminal and may call ffmpeg, a bench asks git for the commit
ALLOWED_IN_DEMO = {"print", "subprocess"}
ALLOWED = {"demo": ALLOWED_IN_DEMO, "benchmarks": {"subprocess"}}
FORBIDDEN_MODULES = {
    "pickle", "marshal", "shelve", "dill", "joblib", "subprocess", "socket", "socketserver", "ssl",
    "urllib", "http", "ftplib", "smtplib", "requests", "httpx", "ctypes", "code", "pty",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "breakpoint", "print"}
FORBIDDEN_ATTRIBUTES = {("torch", "save"), ("torch", "load"), ("os", "system"), ("os", "popen")}
LOAD_AS_COMFYUI_DOES = """
import importlib.util, logging, sys
from pathlib import Path

folder = Path(sys.argv[1])
name = str(folder).replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint), "no comfy_entrypoint"
assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "ComfyUI would ignore comfy_entrypoint"
assert (folder / module.WEB_DIRECTORY).is_dir(), module.WEB_DIRECTORY
heavy = {"comfy", "comfy_api", "diffusers", "matplotlib", "triton"} & set(sys.modules)
assert not heavy, heavy
assert not logging.getLogger().handlers, "changed the root logger"
"""


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def packages(root: Path) -> dict[str, Path]:
    """Package name -> folder, as pyproject.toml lists them."""
    names = project(root)["tool"]["setuptools"]["packages"]
    return {name: root.joinpath(*name.split(".")[1:]) for name in names}


def package_files(root: Path) -> list[Path]:
    return [file for folder in packages(root).values() for file in sorted(folder.glob("*.py"))]


def tracked(root: Path, pattern: str) -> set[str]:
    """Tracked files that match a git pattern; without git, the files that are there."""
    if shutil.which("git"):
        command = ["git", "ls-files", "--", pattern]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if not done.returncode:
            return set(done.stdout.splitlines())
    return {file.relative_to(root).as_posix() for file in root.glob(pattern)}


def load(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", "-c", LOAD_AS_COMFYUI_DOES, str(folder)]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)


# dashes and dots are not an identifier; ComfyUI loads by path under a mangled name
@pytest.mark.parametrize("how", ["link", "copy"])
def test_root_imports_without_comfyui_under_any_name(root, tmp_path, how):
    folder = tmp_path / "ComfyUI-WanTrim.v1-x"
    if how == "link":
        folder.symlink_to(root, target_is_directory=True)
    else:
        leave = shutil.ignore_patterns(".*", "out", "tests", "__pycache__", "*.egg-info")
        shutil.copytree(root, folder, ignore=leave)
    done = load(folder)
    assert done.returncode == 0, done.stderr
    assert not done.stdout


def test_pyproject_lists_the_packages_that_are_there(root):
    inits = [init for folder in FOLDERS for init in (root / folder).rglob("__init__.py")]
    there = {".".join(["wantrim", *init.parent.relative_to(root).parts]) for init in inits}
    there.add("wantrim")
    assert set(packages(root)) == there


def test_files_are_short(root):
    long = {
        str(file.relative_to(root)): lines
        for file in package_files(root)
        if (lines := len(file.read_text("utf-8").splitlines())) > MAX_LINES
    }
    assert not long


def offences(source: str, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """Lines of a source that the house or the registry forbids."""
    found = []
    for node in ast.walk(ast.parse(source)):
        said = None
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            said = "bare except"
        elif isinstance(node, ast.Global):
            said = "global"
        elif isinstance(node, ast.Import):
            said = FORBIDDEN_MODULES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            said = FORBIDDEN_MODULES & {node.module.split(".")[0]}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            said = FORBIDDEN_CALLS & {node.func.id}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            said = FORBIDDEN_ATTRIBUTES & {(node.value.id, node.attr)}
        if said and not (isinstance(said, set) and said <= allowed):
            found.append(f"line {node.lineno}: {said}")
    return found


def test_nothing_forbidden_is_in_the_packages(root):
    found = {}
    for file in package_files(root):
        name = file.relative_to(root).as_posix()
        allowed = ALLOWED.get(file.relative_to(root).parts[0], set())
        if bad := offences(file.read_text("utf-8"), allowed):
            found[name] = bad
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    x = 1\nexcept:\n    pass",
        "print(1)",
        "import pickle",
        "from urllib.request import urlopen",
        "import torch\ntorch.save({}, 'x')",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec('1')",
        "import subprocess as s",
        "import os\nos.system('x')",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_an_offence_is_caught(source):
    assert len(offences(source)) == 1


def test_what_is_no_offence():
    assert not offences("import subprocess\nprint(1)", ALLOWED_IN_DEMO)
    assert not offences("model.eval()\nre.compile('x')\ntorch.compile(model)")


def test_requirements_leave_torch_alone(root):
    lines = (root / "requirements.txt").read_text("utf-8").split()
    assert lines
    assert not [line for line in lines if re.match(r"(torch|triton|nvidia|xformers)", line)]


def test_version_is_the_changelogs(root):
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    top = re.search(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)$", changelog, re.MULTILINE)
    assert top, "CHANGELOG.md has no '## X.Y.Z (YYYY-MM-DD)' line"
    assert project(root)["project"]["version"] == top[1]


def test_registry_metadata(root):
    data = project(root)
    assert "comfyui" not in data["project"]["name"].lower()
    assert data["project"]["license"] == {"file": "LICENSE"}
    assert (root / "LICENSE").read_text("utf-8").lstrip().startswith("Apache License")
    assert "Repository" in data["project"]["urls"]
    comfy = data["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(comfy)
    # WEB_DIRECTORY already serves web/; both together load the script twice
    assert "web" not in comfy
    accelerators = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}
    known = {f"Environment :: GPU :: {name}" for name in accelerators}
    environments = {c for c in data["project"]["classifiers"] if c.startswith("Environment")}
    assert environments <= known


def test_every_workflow_has_its_picture(root):
    graphs = tracked(root, "workflows/*.json")
    if not graphs:
        pytest.skip("no workflow is tracked yet")
    pictures = tracked(root, "workflows/*.jpg")
    missing = {name for name in graphs if name.removesuffix(".json") + ".jpg" not in pictures}
    assert not missing


@pytest.fixture
def planted(tmp_path):
    """run(**environment) -> (exit status, output) of the ComfyUI script in a pack without ComfyUI."""
    shell = shutil.which("sh")
    if shell is None:
        pytest.skip("no POSIX shell")
    pack = tmp_path / "host" / "custom_nodes" / "My-Pack.v1"
    (pack / "tests" / "comfyui").mkdir(parents=True)
    (pack / "nodes").mkdir()
    (pack / "nodes" / "__init__.py").write_text("raise AssertionError('the pack hides ComfyUI')")
    (pack / "tests" / "comfyui" / "test_one.py").write_text(
        "import os\nimport comfy\nimport nodes\n\n"
        "def test_one():\n    assert nodes.NAME == comfy.NAME == os.environ['EXPECTED']\n"
    )
    # runs in a process of its own
    (pack / "tests" / "comfyui" / "test_matrix.py").write_text(
        "import os\n\ndef test_two():\n    assert os.environ.get('MATRIX') != 'red'\n"
    )
    here = Path(__file__).parent / "run_comfyui.sh"
    script = shutil.copy(here, pack / "tests" / "run_comfyui.sh")

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [shell, script, *arguments],
            env={**kept, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return run


def plant_comfyui(folder: Path, name: str) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "nodes.py").write_text(f"NAME = {name!r}")
    (folder / "comfy" / "__init__.py").write_text(f"NAME = {name!r}")
    return folder


def test_comfyui_suite_says_that_there_is_no_comfyui(planted, tmp_path):
    status, said = planted()
    assert (status, said) == (
        0,
        "not run: tests/comfyui (no ComfyUI found; set COMFYUI_PATH to its folder)\n",
    )
    status, said = planted("--required")
    assert status == 1
    assert "no ComfyUI found; set COMFYUI_PATH" in said


def test_comfyui_suite_refuses_wrong_settings(planted, tmp_path):
    status, said = planted(COMFYUI_PATH=str(tmp_path))
    assert status == 1
    assert f"COMFYUI_PATH={tmp_path} has no main.py" in said
    plant_comfyui(tmp_path / "host", "parent")
    status, said = planted()
    assert status == 0
    assert "neither .venv nor venv; set COMFYUI_PYTHON" in said
    status, said = planted(COMFYUI_PYTHON="/nowhere/python")
    assert status == 1
    assert "COMFYUI_PYTHON=/nowhere/python cannot be run" in said
    assert planted("--what")[0] == 2


def test_comfyui_suite_needs_pytest_there(planted, tmp_path):
    folder = plant_comfyui(tmp_path / "host", "parent")
    (folder / "venv" / "bin").mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    status, said = planted()
    assert status == 0
    assert f"pytest is not installed there; run: {python} -m pip install pytest" in said
    assert planted("--required")[0] == 1


def test_comfyui_suite_is_found_in_order(planted, tmp_path):
    home = plant_comfyui(tmp_path / "home" / "comfy" / "ComfyUI", "home")
    (home / ".venv" / "bin").mkdir(parents=True)
    python = home / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    status, said = planted("--required", EXPECTED="home")
    assert status == 0, said
    plant_comfyui(tmp_path / "host", "parent")
    status, said = planted("--required", EXPECTED="parent", COMFYUI_PYTHON=sys.executable)
    assert status == 0, said
    named = str(plant_comfyui(tmp_path / "named one", "named"))
    settings = {"COMFYUI_PATH": named, "COMFYUI_PYTHON": sys.executable}
    status, said = planted("--required", EXPECTED="named", **settings)
    assert status == 0, said
    # a red suite is a red command
    assert planted(EXPECTED="other", **settings)[0] == 1
    status, said = planted(EXPECTED="named", MATRIX="red", **settings)
    assert status == 1 and said.count("1 passed") == 1 and said.count("1 failed") == 1

"""An older ComfyUI: the artist is told which one is needed, in one line."""

import asyncio
import importlib.util
import re
import sys
from types import ModuleType

import pytest

from wantrim.hosts.comfyui.version import OLDEST, TooOld, check_comfyui
from wantrim.tests.test_house import project


@pytest.fixture
def says(monkeypatch):
    """says(version): what this ComfyUI calls itself."""
    host = ModuleType("comfyui_version")
    monkeypatch.setitem(sys.modules, host.__name__, host)

    def set_version(version: str) -> None:
        host.__version__ = version

    return set_version


def test_the_registry_is_told_the_same(root):
    assert project(root)["tool"]["comfy"]["requires-comfyui"] == f">={OLDEST}"


def test_the_page_says_what_was_tried(root, says):
    """The oldest one was tried, and the line that it shows is the one that is logged."""
    page = (root / "docs" / "versions.md").read_text("utf-8")
    assert page.startswith(f"# Which ComfyUI\n\nComfyUI {OLDEST} ")
    for files in ("core", "wide"):
        assert re.search(rf"\| {re.escape(OLDEST)} \| \d+ November \| {files}", page), files
    says("0.8.0")
    with pytest.raises(TooOld) as error:
        check_comfyui()
    assert f": {error.value}\n" in page


@pytest.mark.parametrize("version", ["0.3.40", "0.8.0", "0.15.1", "0.15.99", "v0.9", "0"])
def test_an_older_one_is_refused_in_one_line(version, says):
    says(version)
    with pytest.raises(TooOld) as error:
        check_comfyui()
    said = str(error.value)
    assert f"needs ComfyUI {OLDEST} or newer" in said and f"this is ComfyUI {version}." in said
    assert "Update ComfyUI" in said and "\n" not in said and len(said) < 200


@pytest.mark.parametrize(
    "version",
    [OLDEST, f"v{OLDEST}-dev", "0.16.1", "0.33.0", "0.100.0", "1.0", "", "unknown", "git"],
)
def test_one_that_is_new_enough_or_says_nothing_is_not(version, says):
    says(version)
    check_comfyui()


def test_the_entry_asks_before_it_imports_anything(root, says, monkeypatch):
    """As ComfyUI calls it, with none of ComfyUI's own modules to be had."""
    says("0.8.0")
    spec = importlib.util.spec_from_file_location(
        "old_pack", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "old_pack", pack)
    spec.loader.exec_module(pack)
    before = set(sys.modules)
    with pytest.raises(Exception, match="needs ComfyUI .* and this is ComfyUI 0.8.0"):
        asyncio.run(pack.comfy_entrypoint())
    assert not {name for name in set(sys.modules) - before if "nodes" in name or "torch" in name}
    for name in set(sys.modules) - before:
        monkeypatch.delitem(sys.modules, name)

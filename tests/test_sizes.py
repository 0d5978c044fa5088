"""The sizes that CONTRIBUTING states are the code's: it is to stay small, and to say where it did not."""

import re
from pathlib import Path

import pytest

from wantrim.tests.test_layering import git_files, left_out_files

# lines by which a stated number may be too large
SLACK = 300
STATED = (
    r"(?P<files>\d+) files of ours, (?P<path>[\d,]+) lines at most",
    r"(?P<more>\d+) more, (?P<longer>[\d,]+) lines at most",
    r"(?P<whole>[\d,]+) lines of Python at most, (?P<shipped>[\d,]+) of them without `toy/`",
)


@pytest.fixture(scope="module")
def contributing(root) -> str:
    return (root / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture(scope="module")
def stated(contributing) -> dict[str, int]:
    found: dict[str, int] = {}
    for pattern in STATED:
        match = re.search(pattern, contributing)
        assert match, f"CONTRIBUTING.md does not say '{pattern}'"
        found |= {name: int(said.replace(",", "")) for name, said in match.groupdict().items()}
    return found


def lines(root: Path, files) -> int:
    return sum(len((root / file).read_text("utf-8").splitlines()) for file in files)


WAY, DECIDES = "### The way of a hidden state\n", "### Who decides, and who tells\n"


def files_on_the_way(contributing: str, title: str) -> set[str]:
    """Files that the numbered steps of one of the newcomer's paths name."""
    way = contributing.partition(title)[2].partition("\n#")[0]
    steps = re.findall(r"^\d+\. .*$", way, re.MULTILINE)
    assert len(steps) >= 3
    return {name for step in steps for name in re.findall(r"`([\w/]+\.py)`", step)}


@pytest.mark.parametrize(
    ("title", "count", "length"), [(WAY, "files", "path"), (DECIDES, "more", "longer")]
)
def test_the_newcomers_path_is_as_long_as_is_said(root, contributing, stated, title, count, length):
    found = files_on_the_way(contributing, title)
    assert len(found) == stated[count]
    assert stated[length] - SLACK < lines(root, found) <= stated[length]


def test_what_ships_is_as_large_as_is_said(root, stated):
    ships = git_files(root, "--exclude-standard", "--", "*.py") - left_out_files(root)
    assert stated["whole"] - SLACK < lines(root, ships) <= stated["whole"]
    ours = {file for file in ships if file.parts[0] != "toy"}
    assert stated["shipped"] - SLACK < lines(root, ours) <= stated["shipped"]

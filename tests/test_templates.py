"""The templates as they open: nothing too small to read, nothing on top of something else."""

import itertools
import json
import re

import pytest

# at 1920x1080 a graph of this size opens at a zoom at which the canvas draws text
WIDE, HIGH, READABLE = 2900, 1340, 0.6
SCREEN = (1920, 1080)
# a node's title stands above its position
TITLE = 30
WORDS = 120


@pytest.fixture(scope="module")
def templates(root) -> dict[str, dict]:
    files = sorted((root / "workflows").glob("*.json"))
    assert files
    return {file.stem: json.loads(file.read_text("utf-8")) for file in files}


def rectangle(node: dict) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, the title included."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def box(group: dict) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def bounds(graph: dict) -> tuple[float, float, float, float]:
    parts = [*map(rectangle, graph["nodes"]), *map(box, graph["groups"])]
    lefts, tops, rights, bottoms = zip(*parts, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a, b) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def prose(note: str) -> str:
    """A note without its table and its list of models."""
    note = note.partition("**Models**")[0]
    return "\n".join(line for line in note.splitlines() if not line.startswith("|"))


def test_every_template_opens_as_large_as_it_can_be_read(templates):
    for name, graph in templates.items():
        left, top, right, bottom = bounds(graph)
        assert right - left <= WIDE and bottom - top <= HIGH, (
            f"{name}: {right - left} x {bottom - top}"
        )
        view = graph["extra"]["ds"]
        scale, (x, y) = view["scale"], view["offset"]
        assert scale >= READABLE, name
        assert (left + x) * scale >= 60 and (top + y) * scale >= 100, f"{name}: under the menus"
        assert (right + x) * scale <= SCREEN[0] and (bottom + y) * scale <= SCREEN[1], name


def test_no_node_hides_another_or_leaves_its_group(templates):
    for name, graph in templates.items():
        nodes = graph["nodes"]
        for a, b in itertools.combinations(nodes, 2):
            assert not overlap(rectangle(a), rectangle(b)), f"{name}: {a['type']} and {b['type']}"
        for a, b in itertools.combinations(map(box, graph["groups"]), 2):
            assert not overlap(a, b), f"{name}: groups {a} and {b}"
        for node in nodes:
            around = [g for g in graph["groups"] if inside(rectangle(node), box(g))]
            assert len(around) == (node["type"] != "MarkdownNote"), f"{name}: {node['type']}"


def test_every_template_has_one_short_note(templates):
    for name, graph in templates.items():
        [note] = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
        [text] = note["widgets_values"]
        assert len(prose(text).split()) <= WORDS, name
        assert re.match(r"## .+\n", text), name

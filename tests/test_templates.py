"""The templates as they open: nothing too small to read, nothing on top of something else."""

import itertools
import json
import re

import pytest
from PIL import Image

# the page fits a template into three quarters of its window, and below this zoom the classic canvas
# draws boxes without text (8 of 14 pixels)
SCREEN, PART, READABLE = (1920, 1080), 0.75, 8 / 14
HIGH = 1340
# a node's title stands above its position
TITLE = 30
WORDS = 120
MOST = 10


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
        wide, high = right - left, bottom - top
        zoom = min(PART * SCREEN[0] / wide, PART * SCREEN[1] / high)
        assert zoom >= READABLE and high <= HIGH, f"{name}: {wide} x {high}"
        # where the page opens it as it was saved
        view = graph["extra"]["ds"]
        middle = [at * view["scale"] for at in view["offset"]]
        middle[0] += (left + right) / 2 * view["scale"]
        middle[1] += (top + bottom) / 2 * view["scale"]
        assert view["scale"] == pytest.approx(zoom, abs=0.002), name
        assert middle == pytest.approx([SCREEN[0] / 2, SCREEN[1] / 2], abs=2), name


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


def test_there_are_few_and_each_is_for_something_else(templates):
    assert len(templates) <= MOST
    purposes = [
        text.splitlines()[0]
        for graph in templates.values()
        for node in graph["nodes"]
        if node["type"] == "MarkdownNote"
        for text in node["widgets_values"]
    ]
    assert len(set(purposes)) == len(templates)


def test_every_picture_fits_the_list_and_is_no_copy_of_another(root, templates):
    pictures = {name: Image.open(root / "workflows" / f"{name}.jpg") for name in templates}
    for name, picture in pictures.items():
        # the list shows them at about 264 x 256 pixels
        assert picture.width == 640 and 0.75 <= picture.height / picture.width <= 1, name
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)


def test_the_one_that_runs_anywhere_is_the_first_by_name(templates):
    """ComfyUI lists them as the file system does: on Windows by name."""
    first = min(templates)
    assert first == "start_here"
    kinds = {node["type"] for node in templates[first]["nodes"]}
    assert {"WanTrimDemoModel", "WanTrim", "WanTrimCompare", "WanTrimReport"} <= kinds
    assert not [kind for kind in kinds if kind.endswith("Loader")]

"""What the pack's pages say: in every language, with its own errors, and with tests that are there."""

import ast
import json
import re
from pathlib import Path

import pytest

from wantrim.tests.comfyui import matrix
from wantrim.tests.test_house import packages

PAGES = {"en.md", "zh.md", "ja.md"}
SHIPPED = (
    "kernels", "methods", "engine", "profiles", "slim", "solve", "report", "hosts", "nodes",
)  # fmt: skip
# a variable part of a message
GAP = "…"
# words that are the same in every language
NAMES = {"VAE", "JSON", "LoRA"}
KANA = re.compile(r"[ぁ-ゖァ-ヺ]")
HAN = re.compile(r"[\u4e00-\u9fff]")
SCRIPTS = {"zh": HAN, "ja": re.compile(rf"{KANA.pattern}|{HAN.pattern}")}
# what a translation keeps as it is: code, addresses, options in italics, the toy world's grammar
KEPT = re.compile(
    r"`[^`]*`|\]\([^)]*\)|(?<!\*)\*[^*\n]+\*(?!\*)|"
    r"a COLOUR SHAPE moving DIRECTION SPEED on a GROUND background"
)
SENTENCE = re.compile(r"[A-Za-z']+(?: [a-z']+){3,}")
MANY_HAN = 14


def strings(root: Path, language: str) -> dict:
    return json.loads((root / "locales" / language / "nodeDefs.json").read_text("utf-8"))


def leaves(tree: dict, place: str = "") -> dict[str, str]:
    """Place -> text, for every string of a locale."""
    found = {}
    for name, value in tree.items():
        here = f"{place}/{name}"
        found |= leaves(value, here) if isinstance(value, dict) else {here: value}
    return found


def untranslated(text: str, language: str) -> bool:
    """Whether a line or a string is in another language than it should be."""
    text = KEPT.sub("", text).strip("# ")
    if not re.search(r"[^\W\d_]", text) or text in NAMES:
        return False
    if SENTENCE.search(text) or not SCRIPTS[language].search(text):
        return True
    if language == "zh":
        return KANA.search(text) is not None
    return len(HAN.findall(text)) >= MANY_HAN and KANA.search(text) is None


def prose(page: str) -> list[str]:
    """The lines of a page outside of its diagrams."""
    return [line for part in page.split("```")[::2] for line in part.splitlines()]


def test_every_node_has_its_pages_in_every_language(root):
    nodes = set(strings(root, "zh"))
    folders = {folder.name: folder for folder in (root / "web" / "docs").iterdir()}
    assert set(folders) == nodes
    there = {name: {page.name for page in folder.iterdir()} for name, folder in folders.items()}
    assert there == dict.fromkeys(nodes, PAGES)


def test_every_locale_has_the_same_places(root):
    languages = {folder.name for folder in (root / "locales").iterdir()}
    assert languages == set(SCRIPTS)
    places = {language: set(leaves(strings(root, language))) for language in languages}
    assert places["ja"] == places["zh"]


@pytest.mark.parametrize("language", sorted(SCRIPTS))
def test_nothing_is_left_in_another_language(root, language):
    found = {
        place: text
        for place, text in leaves(strings(root, language)).items()
        if untranslated(text, language)
    }
    for page in sorted((root / "web" / "docs").glob(f"*/{language}.md")):
        lines = prose(page.read_text("utf-8"))
        found |= {
            f"{page.parent.name}: {line}": "" for line in lines if untranslated(line, language)
        }
    assert not found


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The video will change.", "ja"),
        ("**動画は変わります。** Look at it before you trust it.", "ja"),
        ("视频会变化。请先看效果，再决定是否使用这个节点。", "ja"),
        ("動画は変わります。", "zh"),
        ("- Weaker motion", "zh"),
        ("Reports what ran", "zh"),
    ],
)
def test_another_language_is_caught(text, language):
    assert untranslated(text, language)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("*a red circle moving right slowly on a black background*", "ja"),
        ("## 限界", "ja"),
        ("VAE", "zh"),
        ("|---|---|", "zh"),
        ("Wan 2.1 と 2.2、Fun control と inpaint、TI2V 5B", "ja"),
        ("`python -m wantrim slim FULL.safetensors` を実行", "ja"),
    ],
)
def test_what_is_translated_is_not_caught(text, language):
    assert not untranslated(text, language)


def section(page: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section '{title}'"
    return found[1]


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def messages(root: Path) -> list[str]:
    """The texts in the code that ships, with a gap for every value in them."""
    found = []
    for name, folder in packages(root).items():
        if name.split(".")[1:2] and name.split(".")[1] in SHIPPED:
            for file in sorted(folder.glob("*.py")):
                found += texts(file.read_text("utf-8"))
    return found


def texts(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            found.append("".join(parts))
    return found


def says(message: str, quote: str) -> bool:
    """Whether a message of the code holds a quoted text, gap for gap."""
    return quote in message


def test_every_error_on_its_page_is_the_codes(root):
    table = rows((root / "docs" / "troubleshooting.md").read_text("utf-8"))
    assert len(table) >= 15
    found = messages(root)
    for cells in table:
        quotes = re.findall(r"`([^`]+)`", cells[0])
        assert quotes and len(cells) == 3 and all(cells), cells
        for quote in quotes:
            assert len(quote.replace(GAP, "")) >= 20, f"too short to be found: {quote}"
            assert any(says(message, quote) for message in found), f"no message says: {quote}"


def test_a_quote_that_is_not_the_codes_is_caught():
    found = texts("raise ValueError(f'{NAME}: the input has ' f'no {kind} on it')\nx = 'a b'")
    assert any(says(message, "the input has no … on it") for message in found)
    assert not any(says(message, "the input had no … on it") for message in found)
    assert not any(says(message, "the input has no plan on it") for message in found)


def test_no_message_shows_the_name_of_a_value(root):
    """A string without its `f`; what is filled in later stays out of the nodes."""
    for file in sorted((root / "nodes").glob("*.py")):
        for text in texts(file.read_text("utf-8")):
            assert not re.search(r"\{\w+\}", text), f"{file.name}: {text}"


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_pain_names_a_test_that_is_there(root):
    table = rows((root / "docs" / "pains.md").read_text("utf-8"))
    assert [cells[0] for cells in table] == [str(number) for number in range(1, 21)]
    missing = []
    for number, pain, answer, held in table:
        assert pain and answer, number
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held)
        assert named or held.startswith("nothing yet"), f"{number}: no test is named"
        assert len(named) == held.count("::"), f"{number}: a name that cannot be read"
        for file, function in named:
            if not (root / file).is_file() or function not in functions(root / file):
                missing.append(f"{number}: {file}::{function}")
    assert not missing


def test_the_first_page_is_short_and_begins_with_what_an_artist_needs(root):
    page = (root / "README.md").read_text("utf-8")
    assert len(page.split()) <= 2500
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    first = ["Your first trimmed video", "What it saves", "Which node when", "Five questions"]
    assert titles[:5] == [*first, "Limits, plainly"]
    steps, saves, questions = (section(page, first[at]) for at in (0, 1, 3))
    # a figure is never read without what it is
    assert saves.index("**Predicted, not measured**") < saves.index("<!-- table predicted -->")
    assert saves.index("no promise about the 14B model") < saves.index("<!-- table headline -->")
    assert len(re.findall(r"^\d\. \*\*", steps, re.MULTILINE)) == 3
    assert "**To turn it off**" in steps
    assert len(re.findall(r"^\*\*.*\?\*\*", questions, re.MULTILINE)) == 5


def test_the_first_page_names_every_node_and_every_template(root):
    told = section((root / "README.md").read_text("utf-8"), "Which node when")
    for node in strings(root, "zh"):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", node).replace("Wan Trim", "WanTrim")
        assert "Demo" in node or f"**{words}**" in told, f"{node} is not told of"
    named = [name for cells in rows(told) for name in re.findall(r"`([\w.]+)`", cells[0])]
    assert sorted(named) == sorted(path.stem for path in (root / "workflows").glob("*.json"))


def pages(root: Path) -> list[Path]:
    return [*root.glob("*.md"), root / "benchmarks" / "README.md", *(root / "docs").glob("*.md")]


def anchors(page: str) -> set[str]:
    """Names that GitHub gives the titles of a page."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_pages_leads_somewhere(root):
    linked, broken = set(), []
    for page in pages(root):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if re.match(r"\w+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            linked.add(file)
            there = file.exists()
            if not there or anchor and anchor not in anchors(file.read_text("utf-8")):
                broken.append(f"{page.relative_to(root)}: {target}")
    assert not broken
    alone = {file for file in (root / "docs").iterdir() if file.resolve() not in linked}
    assert not alone, "no page links to these"


def test_the_page_of_the_matrix_is_what_its_promises_give(root):
    """`python -m wantrim.tests.comfyui.matrix` writes it anew."""
    page = (root / "docs" / "compatibility.md").read_text("utf-8")
    assert page == matrix.table()
    front = (root / "README.md").read_text("utf-8")
    assert front == matrix.fill(front) and matrix.summary() in front
    told = [rows(section(page, title)) for title in ("Models", "Neighbours")]
    assert [len(lines) for lines in told] == [len(matrix.KINDS), len(matrix.NEIGHBOURS)]


# one word for one thing; what stood for it before and may not come back
WORDS = {
    "whole (video, run, step)": r"\bdense (video|one|run|render|step|model)",
    "left out (tokens), off (heads)": r"\b(dropped|dropping|drops?|pruned|prunes?) tokens|tokens are dropped",
    "computed (tokens)": r"\bkept tokens",
    "share, work": r"\btoken work",
    "repeated (steps), skipped (blocks)": r"\b(skipped|skips?|reused|cached) steps?\b|\brepeated blocks?\b",
    "goes on in its direction": r"\bvelocit",
    "faster": r"\b(x|times) as fast",
    "remark": r"\bcaveats?\b|\bwarnings? in WanTrim",
    "help page": r"\(i\) button|[Pp]ress \W?i\b",
}


def sentences(source: str) -> list[str]:
    """The strings of a file that are no docstring."""
    tree = ast.parse(source)
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr):
                skipped.add(id(first.value))
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [n.value for n in strings if isinstance(n.value, str) and id(n) not in skipped]


def told(root: Path) -> dict[str, str]:
    """What artists read in English, by its file."""
    found = {}
    for folder in ("nodes", "report", "hosts/comfyui", "engine", "solve"):
        for file in sorted((root / folder).glob("*.py")):
            found[f"{folder}/{file.name}"] = "\n".join(sentences(file.read_text("utf-8")))
    others = [*root.glob("web/*.js"), *root.glob("web/docs/*/en.md"), *root.glob("docs/*.md")]
    # training has words of its own
    for file in {root / "README.md", *others} - {root / "docs" / "training.md"}:
        found[file.relative_to(root).as_posix()] = file.read_text("utf-8")
    for file in root.glob("workflows/*.json"):
        notes = re.findall(r'"## (?:[^"\\]|\\.)*"', file.read_text("utf-8"))
        found[file.relative_to(root).as_posix()] = "\n".join(notes)
    return found


def test_a_thing_has_one_word(root):
    back = [
        f"{name}: {found.group()!r}, say {word}"
        for name, text in told(root).items()
        for word, old in WORDS.items()
        for found in re.finditer(old, text)
    ]
    assert not back


@pytest.mark.parametrize(
    "old",
    ["the dense video", "dropped tokens", "12 kept tokens", "token work done", "two skipped steps",
     "repeats its velocity", "1.3 times as fast", "press i for help"],
)  # fmt: skip
def test_an_old_word_is_caught(old):
    assert sum(bool(re.search(pattern, old)) for pattern in WORDS.values()) == 1

"""The live map on the nodes, in ComfyUI's own page in a real browser, without a ComfyUI."""

from itertools import count

import pytest

from wantrim.tests import browser

pytestmark = pytest.mark.skipif(
    browser.missing() is not None, reason=f"the page was not tested: {browser.missing()}"
)

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False}
MODES = {"canvas": False, "nodes 2.0": True}
STEPS, BLOCKS = 4, 6
SKIPPED, WHOLE = [30, 33, 41], [116, 214, 146]

NUMBERS = count()

# a new id with every one: the page remembers widgets by graph and node
EMPTY = """async () => {
    const sizes = {version: 0.4, last_node_id: 0, last_link_id: 0}
    const graph = {nodes: [], links: [], groups: [], config: {}, extra: {}}
    await app.loadGraphData({id: crypto.randomUUID(), ...sizes, ...graph})
}"""
ADD = """({type, values}) => {
    const node = LiteGraph.createNode(type)
    app.rootGraph.add(node)
    node.pos = [120, 160]
    for (const [name, value] of Object.entries(values ?? {}))
        node.widgets.find((widget) => widget.name === name).value = value
    return node.id
}"""
FIND = "(id) => app.rootGraph.getNodeById(id)"
SERIALISED = """() => JSON.parse(JSON.stringify(app.rootGraph.serialize().nodes))"""
# colours at the middle of every block (down) of every column (across)
COLOURS = """({id, columns, blocks}) => {
    let graph = app.rootGraph, node
    for (const part of String(id).split(":")) { node = graph.getNodeById(part); graph = node.subgraph }
    const canvas = node.wantrimLive.parts.canvas
    const context = canvas.getContext("2d")
    return [...Array(blocks).keys()].map((row) => [...Array(columns).keys()].map((column) => {
        const x = Math.floor((column + 0.6) * canvas.width / columns)
        const y = Math.floor((row + 0.5) * canvas.height / blocks)
        return [...context.getImageData(x, y, 1, 1).data]
    }))
}"""
LINE = """(id) => app.rootGraph.getNodeById(id).wantrimLive?.parts.line.textContent ?? null"""
KEY = """(id) => [...app.rootGraph.getNodeById(id).wantrimLive.parts.key.children].map(
    (item) => item.textContent)"""
SIZE = """(id) => [...app.rootGraph.getNodeById(id).size]"""
# whether the map is on the screen, inside of the window
SEEN = """() => [...document.querySelectorAll(".wantrim-live")].map((element) => {
    const box = element.getBoundingClientRect()
    return element.checkVisibility() && box.width > 80 && box.height > 60 && box.top >= 0
})"""


@pytest.fixture(scope="module")
def playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES)
def opened(request, playwright, root):
    settings = {**SETTINGS, "Comfy.VueNodes.Enabled": request.param}
    with (
        browser.serving(root / "web", settings) as address,
        browser.open_page(playwright, address) as page,
    ):
        assert page.run("() => LiteGraph.vueNodesMode") is request.param
        yield page


@pytest.fixture
def page(opened):
    """An empty graph; nothing may have gone wrong at the end."""
    opened.run(EMPTY)
    opened.errors.clear()
    opened.prompt = f"prompt {next(NUMBERS)}"
    yield opened
    assert not opened.errors


OUTCOME = {
    "steps": 20, "whole": 12, "part": 6, "patterned": 0, "repeated": 2, "answered": 0,
    "least": [1, 7], "most": [1, 5], "less": 1.52, "faster": 1.36, "asked": None, "starved": False,
}  # fmt: skip
SAID = (
    "12 of 20 steps whole, 6 at a seventh to a fifth, 2 repeated: 1.5x less work, 1.4x faster here"
)


def step(page, node, number: int, kept=None, prompt=None, run="one", **fields) -> None:
    kept = [100, 60, 0, 60, 60, 100] if kept is None else kept
    told = {
        "patterned": [],
        "work": sum(kept) / 100 / len(kept),
        "line": SAID,
        "outcome": OUTCOME,
        **fields,
    }
    about = {"nodes": [str(node)], "prompt": prompt or page.prompt, "run": run, "steps": STEPS}
    page.tell("wantrim.step", **about, step=number, kept=kept, **told)


def end(page, node, prompt=None, run="one", finished=True, remarks=0, **fields) -> None:
    about = {"nodes": [str(node)], "prompt": prompt or page.prompt, "run": run, "steps": STEPS}
    page.tell("wantrim.step", **about, done=True, finished=finished, remarks=remarks, **fields)


def add(page, kind="WanTrimTokens", **values):
    return page.run(ADD, {"type": kind, "values": values})


def colours(page, node, columns=STEPS, blocks=BLOCKS):
    return page.run(COLOURS, {"id": node, "columns": columns, "blocks": blocks})


def test_the_map_shows_each_step_as_it_is_done(page):
    node = add(page)
    assert page.run(LINE, node) is None
    step(page, node, 1, [100] * BLOCKS)
    step(page, node, 2)
    drawn = colours(page, node)
    assert all(row[0] == [*WHOLE, 255] for row in drawn)
    second = [row[1][:3] for row in drawn]
    assert second[0] == second[5] == WHOLE and second[2] == SKIPPED
    assert second[1] == second[3] not in (WHOLE, SKIPPED)
    # what is still to come is but a shade
    assert all(row[2][3] < 100 and row[3][3] < 100 for row in drawn)
    assert page.run(LINE, node) == f"step 2 of 4 · {SAID}"
    assert page.run(KEY, node) == ["all", "a part", "nothing"]
    page.page.wait_for_timeout(300)
    assert page.run(SEEN) == [True]


def test_heads_in_their_patterns_have_a_blue_edge(page):
    node = add(page, "WanTrimHeads")
    for number in range(1, STEPS + 1):
        step(page, node, number, [100] * BLOCKS, patterned=[1])
    edge = """(id) => {
        const canvas = app.rootGraph.getNodeById(id).wantrimLive.parts.canvas
        return [0.5, 1.5].map((row) => [...canvas.getContext("2d").getImageData(
            1, Math.floor(row * canvas.height / 6), 1, 1).data].slice(0, 3))
    }"""
    assert page.run(edge, node) == [WHOLE, [98, 150, 232]]
    assert page.run(KEY, node)[-1] == "heads in patterns"


def test_the_line_is_said_in_the_pages_language(page):
    said = """({module, locale, outcome}) => import(module).then(({RunMap, words}) => {
        const map = new RunMap("one")
        const about = {run: "one", steps: 20, line: "in English", outcome}
        map.add({...about, step: 5, kept: [100], patterned: [], work: 1})
        return map.text(words(locale))
    })"""
    module = f"/extensions/{browser.FOLDER}/live_map.js"

    def line(locale: str, **changed) -> str:
        outcome = {**OUTCOME, **changed}
        return page.run(said, {"module": module, "locale": locale, "outcome": outcome})

    assert line("fr") == "step 5 of 20 · in English"
    assert line("zh-TW") == (
        "第 5 步，共 20 步 · 20 步中 12 步完整、6 步算 7 分之 1到5 分之 1、2 步重复："
        "工作量为原来的 66%，这里的速度为 1.4 倍"
    )
    assert line("zh", calls=True).endswith(
        "20 次模型调用中 12 次完整、6 次算 7 分之 1到5 分之 1、2 次重复："
        "工作量为原来的 66%，这里的速度为 1.4 倍"
    )
    assert "20 回のモデル呼び出しのうち 12 は完全" in line("ja", calls=True)
    told = line("ja", part=0, least=None, most=None, repeated=8, faster=None, asked=4, starved=True)
    assert told.endswith(
        "20 ステップのうち 12 は完全、8 は繰り返し：計算量は元の 66%、指定は 4 倍、動画には少なすぎます"
    )


def test_the_end_of_a_run_is_said(page):
    node = add(page)
    step(page, node, 1)
    end(page, node, remarks=2, line="all 1 steps whole", outcome=OUTCOME)
    assert page.run(LINE, node) == "all 1 steps whole · 2 remarks in WanTrim Report"
    # a run that ended has nothing to come: its columns fill the map
    assert colours(page, node, columns=1)[0][0] == [*WHOLE, 255]
    step(page, node, 1, prompt="another", run="two")
    end(page, node, prompt="another", run="two", finished=False)
    assert page.run(LINE, node) == f"stopped in step 1 of 4 · {SAID}"


def test_a_run_without_a_step_has_a_line_and_no_map(page):
    drawn = """(id) => {
        const {canvas, inner} = app.rootGraph.getNodeById(id).wantrimLive.parts
        return [canvas.checkVisibility(), inner.offsetHeight]
    }"""
    node = add(page)
    end(page, node, untouched=True)
    page.page.wait_for_timeout(300)
    assert page.run(LINE, node) == "untouched: nothing was left out"
    seen, tall = page.run(drawn, node)
    assert not seen and 0 < tall < 40
    end(page, node, run="two", finished=False, untouched=False)
    assert page.run(LINE, node) == "stopped before its first step"
    step(page, node, 1, run="three")
    page.page.wait_for_timeout(300)
    assert page.run(LINE, node) == f"step 1 of 4 · {SAID}" and page.run(SEEN) == [True]


@pytest.mark.parametrize("width", [220, 300, 460])
def test_nothing_of_the_line_is_cut(page, width):
    node = add(page)
    page.run("([id, width]) => app.rootGraph.getNodeById(id).setSize([width, 200])", [node, width])
    step(page, node, 1, line="1 of 4 steps whole", outcome=OUTCOME)
    page.page.wait_for_timeout(300)
    end(page, node, line=f"{SAID}, and more of it than there is room for", remarks=3)
    page.page.wait_for_timeout(500)
    # on the screen: the text ends inside of the node
    line, bottom, cut = page.run(
        """(id) => {
            const node = app.rootGraph.getNodeById(id), {line} = node.wantrimLive.parts
            const {scale, offset} = app.canvas.ds
            const vue = document.querySelector(`[data-node-id="${id}"]`)
            const top = app.canvas.canvas.getBoundingClientRect().top
            const low = vue?.getBoundingClientRect().bottom
                ?? top + (node.pos[1] + offset[1] + node.size[1]) * scale
            return [line.getBoundingClientRect().bottom, low, line.scrollWidth - line.clientWidth]
        }""",
        node,
    )
    assert 0 <= bottom - line < 80 and cut == 0


def test_the_panel_leaves_the_map_on_its_node(page):
    node = add(page)
    step(page, node, 1)
    title = """(id) => {
        const [left, top] = app.rootGraph.getNodeById(id).pos, {scale, offset} = app.canvas.ds
        const box = app.canvas.canvas.getBoundingClientRect()
        const at = [left + offset[0] + 70, top + offset[1] - 15]
        return [box.left + at[0] * scale, box.top + at[1] * scale]
    }"""
    page.page.mouse.click(*page.run(title, node))
    page.page.get_by_role("button", name="Toggle properties panel").first.click()
    page.page.wait_for_timeout(500)
    step(page, node, 2)
    page.page.wait_for_timeout(300)
    panel = page.page.get_by_test_id("properties-panel")
    # of this node, and neither lists the map nor makes it as wide as the panel
    assert panel.get_by_text("prune_ratio").first.is_visible()
    assert not panel.get_by_text("wantrim_live").count() + panel.locator(".wantrim-live").count()
    wide = """(id) => {
        const node = app.rootGraph.getNodeById(id), {root} = node.wantrimLive.parts
        return [root.getBoundingClientRect().width / app.canvas.ds.scale, node.size[0]]
    }"""
    map_wide, node_wide = page.run(wide, node)
    assert map_wide == pytest.approx(node_wide - 22, abs=4)
    assert page.run(SEEN) == [True]
    panel.get_by_role("button", name="Toggle properties panel").first.click()


@pytest.mark.parametrize("mode", [2, 4])
def test_a_node_that_is_turned_off_forgets_its_map(page, mode):
    node = add(page)
    page.page.wait_for_timeout(200)
    before = page.run(SIZE, node)
    step(page, node, 1)
    page.page.wait_for_timeout(300)
    assert page.run(SEEN) == [True]
    page.run("([id, mode]) => { app.rootGraph.getNodeById(id).mode = mode }", [node, mode])
    page.run("() => app.canvas.draw(true, true)")
    page.page.wait_for_timeout(300)
    assert not page.run(SEEN) and page.run(LINE, node) is None
    assert page.run(SIZE, node) == pytest.approx(before, abs=2)
    page.run("([id, mode]) => { app.rootGraph.getNodeById(id).mode = mode }", [node, 0])
    step(page, node, 1, prompt="another", run="two")
    page.page.wait_for_timeout(300)
    assert page.run(SEEN) == [True]
    widgets = "(id) => app.rootGraph.getNodeById(id).widgets.map((widget) => widget.name)"
    assert page.run(widgets, node).count("wantrim_live") == 1


def test_a_new_prompt_begins_anew_and_runs_of_one_prompt_stand_side_by_side(page):
    columns = "(id) => app.rootGraph.getNodeById(id).wantrimLive.map.columns.length"
    node = add(page)
    for prompt in ("one", "two"):
        for run in ("high", "low"):
            for number in (1, 2):
                step(page, node, number, prompt=prompt, run=prompt + run)
            end(page, node, prompt=prompt, run=prompt + run)
        assert page.run(columns, node) == 4
        assert page.run(LINE, node).startswith("12 of 20 steps whole")
    widgets = "(id) => app.rootGraph.getNodeById(id).widgets.map((widget) => widget.name)"
    assert page.run(widgets, node).count("wantrim_live") == 1


def test_a_size_that_is_changed_beside_the_map_stays(page):
    node = add(page)
    page.page.wait_for_timeout(600)
    sizes = [page.run(SIZE, node)]
    for number, line in ((1, SAID), (2, f"{SAID} {SAID}"), (3, "short")):
        step(page, node, number, line=line)
        page.page.wait_for_timeout(300)
        # not by a pixel: it would be a step to undo
        assert page.run(SERIALISED)[0]["size"] == sizes[0]
    higher = "(id) => { const n = app.rootGraph.getNodeById(id); n.setSize([n.size[0], n.size[1] + 90]) }"
    page.run(higher, node)
    page.page.wait_for_timeout(300)
    wide, tall = page.run(SERIALISED)[0]["size"]
    assert [wide, tall - 90] == pytest.approx(sizes[0], abs=1)
    page.run(
        "(id) => { app.rootGraph.getNodeById(id).mode = 4; app.canvas.draw(true, true) }", node
    )
    page.page.wait_for_timeout(300)
    assert page.run(SIZE, node) == pytest.approx([wide, tall], abs=1)


@pytest.mark.parametrize("preset", ["auto", "custom"])
def test_nothing_of_it_goes_into_the_workflow(page, preset):
    node = add(page, prune_ratio=0.4, preset=preset)
    page.page.wait_for_timeout(200)
    before = page.run(SERIALISED)
    step(page, node, 1)
    page.page.wait_for_timeout(200)
    after = page.run(SERIALISED)
    assert before[0].pop("size") == pytest.approx(after[0].pop("size"), abs=2)
    assert after == before
    assert after[0]["widgets_values"] == [0.4, preset, *[0.5] * (preset == "custom"), 0, 1]
    prompt = page.run("async () => (await app.graphToPrompt()).output")
    assert "wantrim_live" not in str(prompt)
    assert prompt[str(node)]["inputs"]["end_percent"] == 1


def test_a_choice_made_after_a_run_keeps_the_values_in_place(page):
    node = add(page, prune_ratio=0.4)
    step(page, node, 1)
    set_widget = """({id, name, value}) => {
        app.rootGraph.getNodeById(id).widgets.find((w) => w.name === name).value = value
    }"""
    page.run(set_widget, {"id": node, "name": "preset", "value": "custom"})
    page.run(set_widget, {"id": node, "name": "end_percent", "value": 0.75})
    saved = page.run("() => JSON.parse(JSON.stringify(app.rootGraph.serialize()))")
    assert saved["nodes"][0]["widgets_values"] == [0.4, "custom", 0.5, 0, 0.75]
    page.run("async (saved) => { await app.loadGraphData(saved) }", saved)
    read = "(id) => app.rootGraph.getNodeById(id).widgets.map((widget) => widget.value)"
    assert page.run(read, node) == [0.4, "custom", 0.5, 0, 0.75]
    # the run goes on in a page that has loaded its workflow again
    step(page, node, 2)
    assert page.run(LINE, node).startswith("step 2 of 4 ·")
    assert "wantrim_live" not in str(page.run(SERIALISED))


def test_a_folded_node_goes_on_and_shows_the_map_when_it_opens(page):
    node = add(page)
    step(page, node, 1)
    page.run(f"(id) => ({FIND})(id).collapse()", node)
    page.page.wait_for_timeout(300)
    assert not any(page.run(SEEN))
    step(page, node, 2)
    # beneath it, by a hook of the canvas: that draws no folded node in Nodes 2.0
    beneath = """(id) => {
        const node = app.rootGraph.getNodeById(id), bars = [], texts = []
        app.canvas.onDrawForeground({
            fillRect: (...box) => bars.push(box), fillText: (...text) => texts.push(text),
            measureText: (text) => ({width: 6 * text.length}),
        })
        return {bars, texts, low: node.pos[1], wide: node.size[0]}
    }"""
    drawn = page.run(beneath, node)
    # a ground, the strip and two steps
    assert len(drawn["bars"]) == 4 and all(box[1] > drawn["low"] for box in drawn["bars"])
    told = [text[0] for text in drawn["texts"]]
    assert " ".join(told) == f"step 2 of 4 · {SAID}" and max(map(len, told)) * 6 <= drawn["wide"]
    page.run(f"(id) => ({FIND})(id).collapse()", node)
    page.page.wait_for_timeout(300)
    assert page.run(SEEN) == [True]
    assert page.run(LINE, node).startswith("step 2 of 4 ·")
    assert colours(page, node)[2][1] == [*SKIPPED, 255]


def test_a_node_in_a_subgraph_shows_its_map_on_both(page):
    node = add(page)
    packed = """(id) => {
        const made = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(id)]))
        return [made.node.id, made.subgraph.nodes[0].id]
    }"""
    outer, inner = page.run(packed, node)
    page.page.wait_for_timeout(300)
    before = page.run(SERIALISED)
    step(page, f"{outer}:{inner}", 1)
    page.page.wait_for_timeout(300)
    assert page.run(SEEN).count(True) == 1
    assert page.run(LINE, outer) == f"step 1 of 4 · {SAID}"
    after = page.run(SERIALISED)
    assert before[0].pop("size") == pytest.approx(after[0].pop("size"), abs=2)
    # the page writes values by name for a node that has any widget
    assert after[0].pop("widgets_values_named", {}) == {}
    assert after == before
    page.run(
        "(id) => app.canvas.openSubgraph(app.rootGraph.getNodeById(id).subgraph, "
        "app.rootGraph.getNodeById(id))",
        outer,
    )
    page.page.wait_for_timeout(500)
    step(page, f"{outer}:{inner}", 2)
    page.page.wait_for_timeout(300)
    assert page.run(SEEN).count(True) == 1
    assert colours(page, f"{outer}:{inner}")[2][1] == [*SKIPPED, 255]
    # one that is bypassed takes the maps of both
    page.run("(id) => { app.rootGraph.getNodeById(id).mode = 4 }", outer)
    page.run("() => app.canvas.draw(true, true)")
    page.page.wait_for_timeout(300)
    assert not any(page.run(SEEN)) and page.run(LINE, outer) is None


def test_a_map_stays_with_its_workflow(page):
    workflow = "() => app.rootGraph.id"
    node = add(page)
    own = page.run(workflow)
    step(page, node, 1, workflow=own)
    saved = page.run("() => JSON.parse(JSON.stringify(app.rootGraph.serialize()))")
    # as an undo does it
    page.run("async (saved) => { await app.loadGraphData(saved) }", saved)
    page.page.wait_for_timeout(300)
    assert page.run(LINE, node) == f"step 1 of 4 · {SAID}" and page.run(SEEN) == [True]
    # a node of the same id on another one
    page.run(EMPTY)
    assert add(page, "WanTrimHeads") == node and page.run(workflow) != own
    step(page, node, 2, workflow=own)
    assert page.run(LINE, node) is None
    step(page, node, 3)
    assert page.run(LINE, node).startswith("step 3 of 4")
    page.run("async (saved) => { await app.loadGraphData(saved) }", saved)
    page.page.wait_for_timeout(300)
    assert page.run(LINE, node) == f"step 2 of 4 · {SAID}"
    columns = "(id) => app.rootGraph.getNodeById(id).wantrimLive.map.columns.length"
    assert page.run(columns, node) == 2


def test_what_is_not_on_the_page_is_left_alone(page):
    node, stranger = add(page), add(page, "TakesModel")
    before = page.run(SERIALISED)
    for gone in (stranger, 4711, "4711:3", f"{node}:1"):
        step(page, gone, 1)
    assert page.run(SERIALISED) == before
    assert page.run(LINE, node) is None
    step(page, node, 1)
    # a node that is gone takes its map along
    page.run(f"(id) => app.rootGraph.remove(({FIND})(id))", node)
    step(page, node, 2)


def test_a_page_without_the_extension_opens_the_same_workflow(page, playwright):
    node = add(page, prune_ratio=0.4)
    step(page, node, 1)
    saved = page.run("() => JSON.parse(JSON.stringify(app.rootGraph.serialize()))")
    with (
        browser.serving(None, SETTINGS) as address,
        browser.open_page(playwright, address) as plain,
    ):
        plain.run("async (saved) => { await app.loadGraphData(saved) }", saved)
        step(plain, node, 2)
        values = "(id) => app.rootGraph.getNodeById(id).widgets.map((widget) => widget.value)"
        assert plain.run(values, node) == [0.4, "auto", 0, 1]
        assert not plain.errors

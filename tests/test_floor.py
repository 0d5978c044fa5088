"""Floors of a step's time: published figures, and FLOPs by hand of Wan's layers."""

from dataclasses import replace

import pytest

from wantrim.benchmarks import predicted
from wantrim.benchmarks.flops import forward_flops, plan_work
from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.benchmarks.predicted import WAN, predicted_table, step_seconds, video_grid
from wantrim.engine.plan import TrimPlan
from wantrim.engine.program import KEPT, READ, WRITE, expected_programs
from wantrim.engine.work import program_work
from wantrim.methods.cost import WanShape, Width, Work, block_work
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FULL, OFF, HeadPlan
from wantrim.methods.importance import query_count
from wantrim.methods.routers import FixedRouter
from wantrim.methods.schedule import Schedule
from wantrim.methods.shares import Shares
from wantrim.methods.tokens import TokenPlan
from wantrim.solve.floor import DEVICES, Rates, device_rates


def depth(**options) -> BlockPlan:
    return BlockPlan(RandomRouter(), BlockBudget(0.5, 0.8), **options)


def one_step(shape, grid, plan=None, width=None, sigma=0.5) -> Work:
    """A step of one prompt."""
    plan = plan or TrimPlan()
    programs = expected_programs(plan, [sigma], 1.0, grid, shape.num_blocks)
    return plan_work(shape, programs, plan, 1, width=width)


# TFLOPs of a dense forward over 81 pixel frames, published as counted on ComfyUI's WanModel
PUBLISHED = [
    ("1.3B", (832, 480), 32760, 283.00),
    ("1.3B", (1280, 720), 75600, 1249.84),
    ("5B", (832, 480), 8190, 98.00),
    ("5B", (1280, 704), 18480, 290.48),
    ("14B", (832, 480), 32760, 1678.37),
    ("14B", (1280, 720), 75600, 6523.44),
    ("14B I2V", (832, 480), 32760, 1686.38),
    ("14B I2V", (1280, 720), 75600, 6540.50),
]
# and another attention kernel's FLOP/s: FA3 between its paper and the charts, Sage by the charts
RATES = {
    "H200/FA2": ("NVIDIA H200", None),
    "H200/FA3": ("NVIDIA H200", 600e12),
    "H200/Sage2": ("NVIDIA H200", 880e12),
    "H100/FA2": ("NVIDIA H100 80GB HBM3", None),
    "A100/FA2": ("NVIDIA A100-SXM4-80GB", None),
    "4090/FA2": ("NVIDIA GeForce RTX 4090", None),
    "4090/Sage2": ("NVIDIA GeForce RTX 4090", 431e12),
    "5090/FA2": ("NVIDIA GeForce RTX 5090", None),
    "5090/Sage2": ("NVIDIA GeForce RTX 5090", 554e12),
}


def published_rates(name: str) -> Rates:
    device, attention = RATES[name]
    rates = device_rates(device)
    return rates if attention is None else replace(rates, attention=attention)


@pytest.mark.parametrize(("name", "pixels", "tokens", "tera"), PUBLISHED)
def test_real_models_cost_what_was_published(name, pixels, tokens, tera):
    grid = video_grid(WAN[name], *pixels, 81)
    assert grid.tokens == tokens
    assert forward_flops(WAN[name], tokens) / 1e12 == pytest.approx(tera, abs=0.005)


@pytest.mark.parametrize(
    ("name", "pixels", "device", "seconds"),
    [
        ("14B", (1280, 720), "H200/FA3", 10.40),
        ("14B", (832, 480), "H200/FA2", 3.74),
        ("1.3B", (832, 480), "H200/Sage2", 0.361),
        ("14B", (1280, 720), "4090/Sage2", 24.0),
        ("1.3B", (832, 480), "4090/FA2", 1.90),
        ("14B", (832, 480), "5090/Sage2", 5.93),
    ],
)
def test_floors_are_those_published(name, pixels, device, seconds):
    shape, rates = WAN[name], published_rates(device)
    grid = video_grid(shape, *pixels, 81)
    assert rates.seconds(one_step(shape, grid)) == pytest.approx(seconds, rel=0.005)


def test_the_first_pages_predictions_are_floors_of_the_runs():
    # two prompts cost twice the published floor of one; the default asks for 1.5
    def whole_and_mean(*run):
        found = step_seconds(*run)
        return found["whole"], found["default"]

    whole, mean = whole_and_mean("NVIDIA H200", "480p", 20, 2)
    assert whole == pytest.approx(2 * 3.74, rel=0.005)
    # 13 of 20 steps: what is nearer to the wish would take a part of the tokens, and memory
    assert mean / whole == pytest.approx(13 / 20, rel=0.001)
    # attention of 720p at its own rate, by the published FLOPs; what is copied comes on top
    whole, mean = whole_and_mean("NVIDIA H200", "720p", 4, 1)
    attention = 4 * 40 * 5120 * 75600 * (75600 + 512)
    hand = attention / 339e12 + (6523.44e12 - attention) / 790e12
    assert hand < whole < 1.05 * hand
    assert whole / mean == pytest.approx(1.5, rel=0.01)
    # copying the context hides behind a partial step, in and out
    whole, mean = whole_and_mean("NVIDIA GeForce RTX 4090", "480p", 4, 1)
    assert whole / mean == pytest.approx(1.5, rel=0.01)
    assert f"| RTX 4090, 480p, context in RAM | 22.2 → 14.4 s | {whole:.1f} → {mean:.1f} s |" in (
        predicted_table()
    )


def test_predictions_with_heads_leave_half_of_self_attention():
    found = step_seconds("NVIDIA H200", "720p", 20, 2)
    attention = 2 * 4 * 40 * 5120 * 75600 * 75600 / 339e12
    # every step measures, of one prompt, and from the second on both are corrected: eight queries of
    # each latent frame see everything, and in measuring their frame and a quarter of everything
    few = 40 * 4 * 5120 * 21 * 8 * 75600 / 339e12
    spent = (1 + 1 / 21 + 1 / 4) * few + 19 / 20 * 2 * few
    gain = 19 / 20 * attention / 2
    assert found["whole"] - found["heads"] == pytest.approx(gain - spent, rel=0.01)
    assert found["both"] < found["heads"] < found["default"]


def test_a_slow_bus_makes_partial_steps_as_long_as_their_copies(monkeypatch):
    device = "NVIDIA GeForce RTX 4090"
    found = step_seconds(device, "480p", 4, 1)
    slow = 1e9
    monkeypatch.setitem(predicted.CARDS, device, ("slow", slow))
    copies = 2 * 2 * 40 * 32760 * 40 * (128 + 2) / slow
    assert step_seconds(device, "480p", 4, 1)["default"] > found["default"] + copies / 4 / 2


# dim, FFN channels and blocks, by Wan's configurations; latent channels in and out, of patches of 1x2x2
SIZES = {"1.3B": (1536, 8960, 30, 16, 16), "14B": (5120, 13824, 40, 16, 16)}


def block_by_hand(d: int, ffn: int, s: int, inner: int) -> int:
    """FLOPs of a block on `s` tokens, two for each product: layer by layer, as in Wan's model."""
    linears = [
        # q, k, v and o of self-attention; q and o of cross-attention; its k and v of 512 words
        *4 * [(s, d, inner)], *2 * [(s, d, d)], *2 * [(512, d, d)],
        (s, d, ffn), (s, ffn, d),
    ]  # fmt: skip
    pairs = s * s * inner + s * 512 * d
    # scores, and values by them
    return sum(2 * rows * into * out for rows, into, out in linears) + 2 * 2 * pairs


@pytest.mark.parametrize("name", SIZES)
def test_flops_of_plans_are_those_of_wans_layers(name):
    d, ffn, n, into, out = SIZES[name]
    shape, grid = WAN[name], TokenGrid(21, 30, 52)
    s, heads = grid.tokens, d // 128
    outside = 2 * s * 4 * (into + out) * d + 2 * 512 * (4096 * d + d * d)
    outside += 2 * (256 * d + d * d + d * 6 * d)
    assert one_step(shape, grid).flops == outside + n * block_by_hand(d, ffn, s, d)
    # half of the middle blocks; the first and the last always run
    budget = BlockBudget(0.5, 0.5, "constant")
    work = one_step(shape, grid, TrimPlan(blocks=BlockPlan(RandomRouter(), budget)))
    assert work.flops == outside + n // 2 * block_by_hand(d, ffn, s, d)
    # three quarters of self-attention's heads and of the FFN channels
    cut, channels = 3 * heads // 4, 3 * ffn // 4
    width = Width(*[(tuple(range(size)),) * n for size in (cut, heads, channels)])
    work = one_step(shape, grid, width=width)
    assert work.flops == outside + n * block_by_hand(d, channels, s, cut * 128)
    # every tenth block scores the tokens and chooses, the others run on half of them
    tape = TokenPlan(Schedule(0.5, "constant"), reselect_every=10)
    scores = 2 * query_count(grid, 1 / 64) * s * d
    choosing = n // 10 * (block_by_hand(d, ffn, s, d) + scores)
    kept = (n - n // 10) * block_by_hand(d, ffn, s // 2, d)
    assert one_step(shape, grid, TrimPlan(tape)).flops == outside + choosing + kept


def test_every_rate_is_that_of_a_large_card():
    for rates in DEVICES.values():
        assert rates.products > 1e14 and rates.attention > 1e14 and rates.bandwidth > 1e11


@pytest.mark.parametrize(
    "device", ["", "cpu", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "AMD MI300X"]
)
def test_rates_of_other_devices_are_not_made_up(device):
    assert device_rates(device) is None


def test_blocks_keep_their_value_everywhere_and_heads_less_where_attention_is_fast():
    shape, grid = WAN["14B"], TokenGrid(21, 45, 80)
    heads = HeadPlan(((OFF,) * 10 + (FULL,) * 30,) * 40, ((FULL,) * 40,) * 40)
    gains = {}
    for kernel in ("FA2", "Sage2"):
        rates = published_rates(f"H200/{kernel}")
        whole, fewer, less = (
            rates.seconds(one_step(shape, grid, plan))
            for plan in (TrimPlan(), TrimPlan(blocks=depth()), TrimPlan(heads=heads))
        )
        gains[kernel] = (whole / fewer, whole / less)
        if kernel == "FA2":
            assert whole == pytest.approx(16.4, rel=0.01)
    assert gains["FA2"][0] == pytest.approx(gains["Sage2"][0], rel=0.01)
    assert gains["FA2"][1] > gains["Sage2"][1] > 1.05


def test_no_plan_leaves_all_the_work():
    shape, grid = WAN["1.3B"], TokenGrid(5, 30, 52)
    parts = {
        "tokens": TokenPlan(Schedule(1.0)),
        "heads": HeadPlan.full(30, 12),
        "blocks": BlockPlan(FixedRouter(())),
        "shares": Shares((0.9, 0.5), (1, 1)),
    }
    whole = one_step(shape, grid)
    for plan in (TrimPlan(**parts), *(TrimPlan(**{name: part}) for name, part in parts.items())):
        assert one_step(shape, grid, plan) == whole
    width = Width(*[(tuple(range(n)),) * 30 for n in (12, 12, 8960)])
    assert one_step(shape, grid, width=width) == whole


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize("pixels", [(832, 480), (1280, 720)])
def test_context_costs_little_of_a_step_on_half_of_the_tokens(pixels, device):
    """Keeping and fetching keys and values of a large model: under 2 % of the partial step."""
    shape, rates = WAN["14B"], device_rates(device)
    grid = video_grid(shape, *pixels, 81)
    plan = TrimPlan(shares=Shares((0.9, 0.8, 0.7, 0.6), (1, 1, 0.5, 0.5)))
    program = expected_programs(plan, [0.9, 0.8, 0.7], 1.0, grid, 40)[2]
    (row,) = set(program.rows)
    assert (row.run, row.context) == (KEPT, "update")
    alone = replace(program, rows=(replace(row, context=""),) * 40)
    both, bare = (rates.seconds(plan_work(shape, [one], plan, 1)) for one in (program, alone))
    # to attend to the others beside one's own is no overhead
    attention = 40 * 4 * row.tokens * (grid.tokens - row.tokens) * 5120 / rates.attention
    assert 0 < both - bare - attention < 0.02 * both


def test_a_floor_is_the_sum_of_its_parts():
    rates = Rates(10.0, 5.0, 2.0)
    # 1 s of products, 2 s of attention, 4 numbers of 2 bytes at 2 bytes/s
    assert rates.seconds(Work(10, 10, 4)) == 1 + 2 + 4
    assert rates.seconds(Work(10, 10, 4) * 2 + Work(10)) == 3 + 4 + 8


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize(
    "grid", [TokenGrid(21, 30, 52), TokenGrid(21, 45, 80)], ids=["480p", "720p"]
)
@pytest.mark.parametrize("share", [0.25, 0.4, 0.8])
def test_what_a_part_costs_beside_its_blocks_is_under_two_percent(device, grid, share):
    """14B with guidance: gathering, remembering and joining keys and values, on ideal hardware."""
    shape, sigmas = WanShape(5120, 13824, 40), (1.0, 0.9, 0.8)
    plan = TrimPlan(shares=Shares(sigmas, (1.0, 1.0, share)))
    *_, writing, partial = expected_programs(plan, sigmas, 5.0, grid, shape.num_blocks)
    assert {row.context for row in writing.rows} == {WRITE}
    assert {row.context for row in partial.rows} == {READ}
    rates = device_rates(device)
    for program in (writing, partial):
        tokens = program.rows[0].tokens
        step = program_work(shape, program, plan, 2)
        blocks = block_work(shape, tokens, grid.tokens - tokens).moved * 2 * shape.num_blocks
        ours = rates.seconds(Work(moved=step.moved - blocks))
        assert 0 < ours < 0.02 * rates.seconds(step)

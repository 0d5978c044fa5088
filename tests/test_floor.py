"""The cost model of whole plans: against torch's counter, and against an independent copy of it."""

import importlib.util
import sys

import pytest
import torch

from wantrim.benchmarks.flops import count_flops
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.hosts.diffusers.shape import wan_shape
from wantrim.hosts.diffusers.weights import load_original, new_transformer
from wantrim.methods.cost import Work, block_work, forward_flops
from wantrim.methods.depth import BlockBudget, BlockPlan, blocks_per_step
from wantrim.methods.grid import TokenGrid
from wantrim.methods.heads import FRAME, FULL, OFF, HeadPlan
from wantrim.methods.presets import preset_plan
from wantrim.methods.routers import FixedRouter, RandomRouter
from wantrim.methods.schedule import Schedule
from wantrim.methods.tokens import TokenPlan
from wantrim.methods.width import Width
from wantrim.solve.floor import (
    DEVICES,
    WAN,
    Rates,
    device_rates,
    run_seconds,
    run_work,
    video_grid,
)
from wantrim.toy import CHECKPOINT

SIZE, GRID = (5, 12, 12), TokenGrid(5, 6, 6)
SHIFT, STEPS = 3.0, 4
SIGMAS = [float(sigma) for sigma in sigmas_for(STEPS, SHIFT)[:-1]]


@pytest.fixture(scope="module")
def tiny():
    return load_original(CHECKPOINT)


def same_heads(blocks=16, heads=8) -> HeadPlan:
    """Every block alike, so that it does not matter which of them are skipped."""
    own = (OFF, OFF, FRAME, "tile2", "tile3", FULL, FULL, FULL)
    cross = (OFF, *[FULL] * (heads - 1))
    return HeadPlan((own,) * blocks, (cross,) * blocks)


def depth(skipped="identity", **options) -> BlockPlan:
    return BlockPlan(RandomRouter(), BlockBudget(0.5, 0.8), skipped, **options)


PLANS = {
    "identity": {"blocks": depth()},
    "reuse": {"blocks": depth("reuse")},
    "fixed": {"blocks": BlockPlan(FixedRouter((0, 2, 3, 9)))},
    "late": {"blocks": depth(start=0.5)},
    "blocks and heads": {"blocks": depth(), "heads": same_heads()},
    "blocks and refresh": {"blocks": depth("reuse"), "tokens": preset_plan("refresh", 0.6)},
    # a choosing block that is skipped leaves the choice, and the full run, to the next
    "blocks and choosing blocks": {
        "blocks": depth(),
        "tokens": TokenPlan(Schedule(0.6), reselect_every=4, importance="random"),
    },
    "all": {
        "blocks": depth("reuse"),
        "tokens": preset_plan("refresh", 0.7),
        "heads": same_heads(),
    },
    "all, keys kept": {
        "blocks": depth(),
        "tokens": TokenPlan(Schedule(0.6), reselect_every=6, dropped_kv="keep"),
        "heads": same_heads(),
    },
}


def counted(model, parts: dict, prompts: int) -> int:
    roles = (COND, UNCOND)[:prompts]
    text = torch.randn(1, 24, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    options = {"steps": STEPS, "shift": SHIFT, "guidance": 4.0 if prompts == 2 else 1.0}
    with attach(
        model, TrimPlan(**parts), cond_or_uncond=roles, shift=SHIFT, sigmas=SIGMAS
    ) as attachment:
        total = count_flops(lambda: sample(model, text, SIZE, **options))
        report = attachment.finish()
    if "blocks" in parts:
        planned = blocks_per_step(parts["blocks"], SIGMAS, SHIFT, 16)
        assert [step.blocks_run for step in report.steps] == planned
    return total


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("prompts", [1, 2])
def test_plans_of_every_part_cost_what_torch_counts(tiny, name, prompts):
    parts, shape = PLANS[name], wan_shape(tiny, 24)
    total = counted(tiny, parts, prompts)
    run = {"shift": SHIFT, "prompts": prompts}
    assert run_work(shape, GRID, SIGMAS, **run, **parts).flops == pytest.approx(total, rel=0.01)
    # the agreement would prove nothing if a part of the plan hardly mattered
    for part in parts:
        others = {key: value for key, value in parts.items() if key != part}
        assert run_work(shape, GRID, SIGMAS, **run, **others).flops > 1.05 * total


def test_the_same_blocks_off_by_name_and_by_number(tiny):
    """Four blocks that are named, the first of which runs all the same, are three."""
    shape = wan_shape(tiny, 24)
    named = run_work(shape, GRID, SIGMAS, blocks=BlockPlan(FixedRouter((0, 2, 3, 9)))).flops
    dense = run_work(shape, GRID, SIGMAS).flops
    one = block_work(shape, GRID.tokens).flops
    assert dense - named == pytest.approx(3 * one * STEPS * 2)


def test_a_narrow_model_of_few_tokens_costs_what_torch_counts():
    """Widths of a slim model, in a model that has them throughout, with dropped tokens and blocks."""
    model = new_transformer(
        dim=64, num_heads=4, num_layers=6, ffn_dim=96, in_dim=16, out_dim=16, text_dim=24
    )
    shape = wan_shape(model, 7)
    width = Width(*[(tuple(range(n)),) * 6 for n in (4, 4, 96)])
    wide = type(shape)(**{**vars(shape), "ffn_dim": 200})
    parts = {"tokens": preset_plan("refresh", 0.5), "blocks": depth()}
    text, size, grid = torch.randn(1, 7, 24), (3, 8, 8), TokenGrid(3, 4, 4)
    with attach(model, TrimPlan(**parts), shift=SHIFT, sigmas=SIGMAS):
        options = {"steps": STEPS, "shift": SHIFT, "guidance": 1.0}
        total = count_flops(lambda: sample(model, text, size, **options))
    options = {"shift": SHIFT, "prompts": 1, **parts}
    slim = run_work(wide, grid, SIGMAS, width=width, **options).flops
    assert slim == pytest.approx(total, rel=0.01)
    assert run_work(wide, grid, SIGMAS, **options).flops > 1.05 * slim


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
RATES = {
    "H200/FA2": ("NVIDIA H200", "flash"),
    "H200/FA3": ("NVIDIA H200", "flash3"),
    "H200/Sage2": ("NVIDIA H200", "sage"),
    "H100/FA2": ("NVIDIA H100 80GB HBM3", "flash"),
    "A100/FA2": ("NVIDIA A100-SXM4-80GB", "flash"),
    "4090/FA2": ("NVIDIA GeForce RTX 4090", "flash"),
    "4090/Sage2": ("NVIDIA GeForce RTX 4090", "sage"),
    "5090/FA2": ("NVIDIA GeForce RTX 5090", "flash"),
    "5090/Sage2": ("NVIDIA GeForce RTX 5090", "sage"),
}


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
    shape, rates = WAN[name], device_rates(*RATES[device])
    grid = video_grid(shape, *pixels, 81)
    assert run_seconds(shape, grid, [0.5], rates, prompts=1) == pytest.approx(seconds, rel=0.005)


@pytest.fixture(scope="module")
def other(root):
    """The independent copy of the cost model that CI lays beside the checkout."""
    path = root / "../shared/tools/costmodel.py"
    if not path.exists():
        pytest.skip(f"no independent cost model to check against: {path.name} is not beside us")
    spec = importlib.util.spec_from_file_location("other_costmodel", path)
    module = importlib.util.module_from_spec(spec)
    # its dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


THEIRS = {
    "1.3B": "wan21_1.3b",
    "5B": "wan22_5b",
    "14B": "wan21_14b",
    "14B I2V": "wan21_14b_i2v",
    "A14B I2V": "wan22_a14b_i2v",
}


@pytest.mark.parametrize("resolution", ["480p", "720p"])
@pytest.mark.parametrize("name", THEIRS)
def test_flops_and_floors_agree_with_the_independent_copy(other, name, resolution):
    shape, theirs = WAN[name], THEIRS[name]
    rows, columns = (other.RES_5B if name == "5B" else other.RES)[resolution]
    grid = video_grid(shape, columns, rows, 81)
    assert grid.tokens == other.tokens(theirs, resolution)
    dense = other.forward_flops(theirs, grid.tokens)["total"]
    assert forward_flops(shape, grid.tokens) == pytest.approx(dense, rel=1e-9)
    n, heads = shape.num_blocks, shape.dim // shape.head_dim
    budget = BlockBudget(0.75, 0.75, "constant")
    skip = 1 - budget.blocks(0.5, n) / n
    cut, channels = 3 * heads // 4, 3 * shape.ffn_dim // 4
    width = Width(*[(tuple(range(size)),) * n for size in (cut, heads, channels)])
    tokens = TokenPlan(
        Schedule(0.7, "constant"), reselect_every=10, importance="update_norm", dropped_kv="leave"
    )
    kept = tokens.budget(0.5, grid) * grid.frames / grid.tokens
    few = round(kept * grid.tokens)
    trimmed = n - -(-n // tokens.reselect_every)
    moved = block_work(shape, few, trimmed=True).moved - block_work(shape, few).moved
    plans = [
        ({}, {}),
        ({"blocks": BlockPlan(RandomRouter(), budget)}, {"d": skip}),
        ({"width": width}, {"p": 0.25, "f": 0.25}),
        ({"tokens": tokens}, {"k": kept, "every": 10, "sample": 0}),
        ({"tokens": tokens, "width": width}, {"k": kept, "every": 10, "sample": 0, "p": 0.25, "f": 0.25}),
    ]  # fmt: skip
    for device, which in RATES.items():
        rates = device_rates(*which)
        for ours, knobs in plans:
            floor = run_seconds(shape, grid, [0.5], rates, prompts=1, **ours)
            told = other.step_time(theirs, grid.tokens, device, other.Plan(**knobs))
            # the copy hands short sequences on from block to block, ours are full between blocks
            told += knobs.get("k", 0) and trimmed * moved * 2 / rates.bandwidth
            assert floor == pytest.approx(told, rel=0.002), (device, knobs)


def test_every_rate_says_where_it_is_from():
    for kernels in DEVICES.values():
        for rates in kernels.values():
            assert rates.source and rates.products > 1e14 and rates.bandwidth > 1e11


@pytest.mark.parametrize(
    "device", ["", "cpu", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "AMD MI300X"]
)
def test_rates_of_other_devices_are_not_made_up(device):
    assert device_rates(device) is None


def test_blocks_keep_their_value_everywhere_and_heads_less_where_attention_is_fast():
    shape, grid = WAN["14B"], TokenGrid(21, 45, 80)
    heads = HeadPlan(((OFF,) * 10 + (FULL,) * 30,) * 40, ((FULL,) * 40,) * 40)
    gains = {}
    for kernel in ("flash", "sage"):
        rates = device_rates("NVIDIA H200", kernel)

        def seconds(rates=rates, **plan):
            return run_seconds(shape, grid, [0.5], rates, prompts=1, **plan)

        gains[kernel] = (seconds() / seconds(blocks=depth()), seconds() / seconds(heads=heads))
        if kernel == "flash":
            assert seconds() == pytest.approx(16.4, rel=0.01)
    assert gains["flash"][0] == pytest.approx(gains["sage"][0], rel=0.01)
    assert gains["flash"][1] > gains["sage"][1] > 1.05


def test_no_plan_leaves_all_the_work():
    shape, grid = WAN["1.3B"], TokenGrid(5, 30, 52)
    nothing = {
        "tokens": preset_plan("refresh", 1.0),
        "heads": HeadPlan.full(30, 12),
        "blocks": BlockPlan(FixedRouter(())),
        "width": Width(*[(tuple(range(n)),) * 30 for n in (12, 12, 8960)]),
    }
    whole = run_work(shape, grid, SIGMAS)
    for plan in (nothing, *({name: part} for name, part in nothing.items())):
        assert run_work(shape, grid, SIGMAS, **plan) == whole


def test_a_floor_is_the_sum_of_its_parts():
    rates = Rates(10.0, 5.0, 2.0, "by hand")
    # 1 s of products, 2 s of attention, 4 numbers of 2 bytes at 2 bytes/s
    assert rates.seconds(Work(10, 10, 4)) == 1 + 2 + 4
    assert rates.seconds(Work(10, 10, 4) * 2 + Work(10), itemsize=4) == 3 + 4 + 16


def test_bytes_follow_tokens_and_widths():
    shape = WAN["1.3B"]
    whole, half = block_work(shape, 1000), block_work(shape, 500)
    assert half.moved == whole.moved / 2
    # 19 + 8 + 2 times over the hidden state, and twice over the channels
    assert whole.moved == 1000 * (29 * 1536 + 2 * 8960)
    slim = block_work(shape, 1000, width=(6, 12, 4480))
    assert whole.moved - slim.moved == 1000 * (8 * 768 + 2 * 4480)
    # taken out and put back: each row read and written twice, rotary rows once
    moved = block_work(shape, 1000, trimmed=True).moved - whole.moved
    assert moved == 1000 * (4 * 1536 + 2 * 4 * 128)

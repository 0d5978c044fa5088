"""The speed bench on a model that takes milliseconds."""

from dataclasses import replace

import pytest
import torch

from wantrim.benchmarks.flops import count_flops
from wantrim.benchmarks.plots import plot_speed
from wantrim.benchmarks.speed import __main__ as speed
from wantrim.benchmarks.speed import gpu as speed_gpu
from wantrim.benchmarks.speed import kernels as speed_kernels
from wantrim.benchmarks.speed.gpu import COMMAND, gpu_rows, real_sizes, rows_to_fill
from wantrim.benchmarks.speed.kernels import ATTENTION_PLAN, KERNELS, differs, kernel_cases
from wantrim.benchmarks.speed.models import Runner, build, sharing
from wantrim.benchmarks.speed.plans import (
    ATTACHED,
    COMPILED_PLANS,
    PAPER,
    PINNED,
    PLANS,
    REPEATED,
    WHOLE,
    Size,
    plans,
    steady_work,
)
from wantrim.benchmarks.speed.probes import (
    overhead,
    take_turns,
    trimmed_blocks,
)
from wantrim.benchmarks.speed.rows import interval
from wantrim.benchmarks.speed.scale import DRY, GPU
from wantrim.benchmarks.speed.traffic import Traffic, count_traffic, peak_bytes
from wantrim.benchmarks.summary import speed_table
from wantrim.benchmarks.table import read_rows
from wantrim.engine.plan import TrimPlan
from wantrim.kernels import reference
from wantrim.methods.tokens import paper_plan

SMALL = Size("small", 48, 4, 64, 8, (3, 16, 16))


@pytest.fixture(scope="module")
def model():
    return build(SMALL)


@pytest.mark.parametrize("name", [*plans(SMALL), "dense"])
def test_a_timed_forward_does_what_the_prediction_is_for(model, name):
    """Each forward after the whole ones, by torch's counter, within the router's luck."""
    plan = plans(SMALL).get(name)
    runner = Runner(model, SMALL, plan)
    for _ in range(WHOLE):
        runner.step()
    counted = [count_flops(runner.step) for _ in range(3)]
    runner.close()
    work = steady_work(SMALL, plan or TrimPlan())
    assert sum(counted) / 3 == pytest.approx(work.flops, rel=0.01)
    whole = steady_work(SMALL, TrimPlan()).flops
    assert (work.flops < whole) == (plan is not None)


def test_every_share_is_the_one_that_the_row_names():
    for size in (SMALL, *real_sizes()):
        heads = plans(size)["heads 0.7, others off"].heads
        off = sum(row.count("off") for row in heads.self_attention)
        assert off == round(0.3 * size.heads * size.blocks)
        assert max(row.count("off") for row in heads.self_attention) <= size.heads // 2
    # three of four blocks, and six of eight
    for blocks in (4, 8):
        size = Size("", 48, 4, 64, blocks, (3, 8, 8))
        plan = plans(size)["blocks 0.75, identity"]
        assert plan.blocks.count(0.5, 0.5, blocks) == 3 * blocks // 4


def test_copies_share_their_weights_and_not_their_plans(model):
    other = sharing(model)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.data_ptr() == two.data_ptr()
    runner = Runner(model, SMALL, ATTACHED)
    assert not hasattr(model.blocks[0], "_diffusers_hook")
    assert hasattr(runner.model.blocks[0], "_diffusers_hook")
    dense = Runner(model, SMALL)
    # outside its percents an attached plan computes everything, and the same
    assert torch.equal(runner.step(), dense.step())
    assert torch.equal(runner.step(), dense.step())
    runner.close()


def test_dense_and_trimmed_take_turns(model):
    told = []

    class Told(Runner):
        def __init__(self, name):
            super().__init__(model, SMALL)
            self.name = name

        def forward(self):
            told.append(self.name)
            return super().forward()

    others = {name: Told(name) for name in "abc"}
    taken = take_turns(Told("dense"), others, 2)
    assert told == ["dense", *(2 * ["a", "b", "dense", "c", "dense"])]
    assert all(len(pairs) == 2 for pairs in taken.values())
    told.clear()
    overhead(Told("dense"), others["a"], 2)
    assert told == ["dense", "a", "a", "dense"]


def test_a_row_has_every_column_and_the_median_ratio():
    made = speed.row(SMALL, "a plan", [(10.0, 5.0), (12.0, 4.0), (9.0, 6.0)], predicted=2.5)
    assert set(made) == set(speed.COLUMNS)
    assert (made["speedup"], made["efficiency"], made["tokens"]) == (2.0, 0.8, 192)
    assert (made["speedup_lo"], made["speedup_hi"]) == (1.5, 3.0)


def test_the_interval_of_a_median():
    assert interval([2.0] * 9) == (2.0, 2.0)
    low, high = interval([1 + 0.01 * (i % 7 - 3) for i in range(70)])
    assert 0.98 < low <= 1.0 <= high < 1.02


def test_the_peak_of_memory_is_what_was_held_at_once():
    kilobytes = 400

    def work() -> None:
        one = torch.ones(kilobytes, 256)
        two = one + 1
        del one
        (two * 2).sum()

    assert peak_bytes(work) == pytest.approx(2 * kilobytes * 1024, rel=0.01)


def test_traffic_by_hand():
    """In bytes: an expanded tensor is stored once, of a gathered one only what is taken is read."""
    rows, index = torch.zeros(100, 8), torch.arange(3)

    def of(work) -> tuple[float, ...]:
        cost = count_traffic(work)
        return cost.launches, cost.moved, cost.allocated

    wide = index[:, None].expand(-1, 8)
    # 3 rows read and written, and 3 positions read
    assert of(lambda: rows.gather(0, wide)) == (1, 2 * 96 + 24, 96)
    # and into a copy of all
    taken = rows[:3].clone()
    assert of(lambda: rows.scatter(0, wide, taken)) == (1, 2 * 3200 + 24 + 2 * 96, 3200)
    assert of(lambda: rows.scatter_(0, wide, taken)) == (1, 24 + 2 * 96, 0)
    assert of(lambda: rows.add_(1.0)) == (1, 2 * 3200, 0)
    assert of(lambda: torch.cat([rows, rows])) == (1, 2 * 6400, 6400)
    assert of(lambda: rows.view(50, 16).transpose(0, 1)[3:]) == (0, 0, 0)
    q = torch.zeros(1, 2, 5, 4)
    assert of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == (0, 0, 0)


# as wide beside its heads' rotary tables as a small Wan is, and as many blocks
WIDE = Size("", 480, 10, 64, 30, (2, 8, 8))


@pytest.fixture(scope="module")
def wide():
    return build(WIDE)


def test_kept_tokens_go_short_from_block_to_block(wide):
    """Law of the house: 2 launches, 1.6 hidden states and 0.1 allocated a trimmed block at most."""
    found = trimmed_blocks(wide, WIDE, TrimPlan(paper_plan(0.7, reselect_every=40)))
    assert len(found) == 29
    mean = sum(found, Traffic()) * (1 / len(found))
    assert mean.launches <= 2 and mean.moved <= 1.6 and mean.allocated <= 0.1
    # all of it where a stretch begins and ends
    assert found[0].moved > 0 and found[-1].moved > 0
    assert all(cost == Traffic() for cost in found[1:-1])
    every_ten = trimmed_blocks(wide, WIDE, plans(WIDE)[PAPER])
    mean = sum(every_ten, Traffic()) * (1 / len(every_ten))
    assert len(every_ten) == 27 and mean.launches <= 2 and mean.moved <= 1.6


# the same on a larger video, of which a few queries are few
LARGE = replace(WIDE, latent=(2, 48, 48))


@pytest.mark.parametrize("others", ["off", "demoted"])
def test_heads_move_eight_hidden_states_at_most(wide, others):
    plan = plans(WIDE)[f"heads 0.7, others {others}"]
    bare = replace(plan, heads=replace(plan.heads, corrected=False))
    found = trimmed_blocks(wide, WIDE, bare)
    assert len(found) == WIDE.blocks
    # and a token's positions, 8 bytes beside its 1,920, made and read
    assert 0 < sum(cost.moved for cost in found) / len(found) <= 8 + 8 * 8 / 1920


def test_what_heads_lack_is_given_back_in_two_more(wide):
    """Beside ten times over what a few queries give, 16 of 1,152 tokens."""
    plan = plans(LARGE)["heads 0.7, others demoted"]
    bare = replace(plan, heads=replace(plan.heads, corrected=False))
    with_it, without = (
        sum(cost.moved for cost in trimmed_blocks(wide, LARGE, one)) for one in (plan, bare)
    )
    assert plan.heads.corrected and 2 < (with_it - without) / LARGE.blocks <= 2 + 10 * 16 / 1152


def test_only_the_small_size_can_be_timed_from_end_to_end(tmp_path, monkeypatch):
    """The command itself, with the tests already passed and at a size of milliseconds."""
    asked = []
    monkeypatch.setattr(speed, "check_tests", lambda tests, seconds: asked.append(tests))
    monkeypatch.setattr(speed, "SMALL", SMALL)
    monkeypatch.setattr(speed, "HOLLOW", SMALL)
    monkeypatch.setattr(speed, "COMPILED_PLANS", (PAPER,))
    monkeypatch.setattr(speed, "backend", lambda: "eager")
    speed.main(["--small", "--pairs", "3", "--results", str(tmp_path)])
    assert [path.name for path in asked[0]] == list(speed.TESTS)
    assert all(path.exists() for path in asked[0])
    rows = read_rows(tmp_path / "speed.csv")
    assert [r["plan"] for r in rows if r["compiled"] == "eager"] == [PAPER]
    mine = {r["plan"]: r for r in rows if (r["device"], r["compiled"]) == ("cpu", "no")}
    assert set(mine) == {*plans(SMALL), speed.NEUTRAL, speed.ATTACHED_NAME}
    for name in plans(SMALL):
        r = mine[name]
        assert float(r["peak_mb"]) > 0
        if name == REPEATED:
            # nothing is left to predict the time of
            assert r["predicted"] == r["efficiency"] == "" and float(r["speedup"]) > 1
            continue
        assert float(r["predicted"]) > 1
        assert float(r["efficiency"]) == pytest.approx(
            float(r["speedup"]) / float(r["predicted"]), abs=1e-3
        )
    # what needs a GPU stands there with its command
    waiting = [r for r in rows if r["device"] == "GPU"]
    assert {r["tokens"] for r in waiting} == {"32760", "75600"}
    assert all(not r["dense_ms"] and "--gpu" in r["note"] for r in waiting)
    plot_speed(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    table = speed_table(rows)
    assert f"`{COMMAND}`" in table and "not measured" in table


def test_red_tests_are_not_timed(tmp_path, monkeypatch):
    red = tmp_path / "test_red.py"
    red.write_text("def test_it():\n    assert 1 == 2\n")
    green = tmp_path / "test_green.py"
    green.write_text("def test_it():\n    assert 1 == 1\n")
    speed.check_tests([green])
    for tests in ([red], [green, red], [tmp_path / "test_missing.py"]):
        with pytest.raises(SystemExit, match="not timed, because the tests are red"):
            speed.check_tests(tests)
    # the command does not get as far as a row, whatever it is asked
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    red.rename(tmp_path / "tests" / "test_red.py")
    monkeypatch.setattr(speed, "TESTS", ("test_red.py",))
    results = tmp_path / "results"
    with pytest.raises(SystemExit, match="red"):
        speed.main(["--small", "--results", str(results)])
    assert not results.exists()
    with pytest.raises(SystemExit):
        speed.main(["--skip-tests"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_its_bench_says_so():
    with pytest.raises(SystemExit, match="expected a GPU"):
        speed.main(["--gpu"])


@pytest.mark.filterwarnings("error")
def test_a_dry_run_goes_the_gpus_way_and_fills_its_rows(tmp_path, monkeypatch, caplog):
    """One size is enough: the others are the same code. ComfyUI's part is timed in its own tests."""
    monkeypatch.setattr(speed, "find_comfyui", lambda given: None)
    monkeypatch.setattr(speed_gpu, "SIZES", (("14B", "480p"),))
    seen = {"twice": lambda q: q + q}
    monkeypatch.setattr("wantrim.benchmarks.speed.kernels.installed_attention", lambda: seen)
    with caplog.at_level("WARNING"):
        speed.main(["--dry", "--results", str(tmp_path)])
    assert "no ComfyUI found" in caplog.text
    rows = read_rows(tmp_path / "speed.csv")
    size = DRY.size("14B", "480p")
    assert size.name == "14B, 480p, 4 of 40 blocks"
    of_size = [r for r in rows if r["case"] == size.name]
    assert [r["plan"] for r in of_size if r["compiled"] == "eager"] == [*COMPILED_PLANS]
    mine = {r["plan"]: r for r in of_size if r["compiled"] == "no"}
    chooses = [f"{speed_gpu.SELECTION}, {p}" for p in speed_gpu.TOKEN_PLANS]
    assert set(mine) == {*PLANS, *chooses, *speed_gpu.OVERHEAD}
    for name in speed_gpu.OVERHEAD:
        assert "% of it" in mine[name]["note"] and mine[name]["predicted"] == "1"
    for name in PLANS:
        assert float(mine[name]["trimmed_ms"]) > 0 and float(mine[name]["peak_mb"]) > 0
        assert "floor" in mine[name]["note"] and mine[name]["dtype"] == "float32"
    kernels = [r for r in rows if r["case"].startswith("kernel ")]
    assert len(kernels) == 2 * len(KERNELS)
    assert all("of it reached" in r["note"] for r in kernels)
    assert [r["case"] for r in rows if r["plan"] == ATTENTION_PLAN] == ["attention twice"]


def test_what_was_measured_is_kept_when_the_time_is_used_up(monkeypatch, caplog):
    now = iter(range(100))

    def part(*names):
        return lambda: ([{"plan": name}] for name in names)

    def broken():
        raise RuntimeError("no memory")
        yield

    parts = [
        ("a", part("a1", "a2")),
        ("b", broken),
        ("c", part("c1", "c2", "c3")),
        ("d", part("d1")),
    ]
    monkeypatch.setattr(speed_gpu, "_parts", lambda *given: iter(parts))
    rows = list(gpu_rows(speed.row, None, DRY, 6.5, lambda: next(now)))
    # looked at before every part and after every row: at 7 the time is used up
    assert [made["plan"] for (made,) in rows] == ["a1", "a2", "c1", "c2"]
    told = [record.message for record in caplog.records]
    assert told == [
        "b: RuntimeError: no memory",
        "c: not to its end, the time is used up",
        "d: not measured, the time is used up",
    ]


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    good = torch.rand(2, 50)
    assert not differs(good, good) and not differs(good * 1.001, good)
    assert "off" in differs(good * 1.1, good) and "off" in differs(good * float("nan"), good)
    monkeypatch.setattr(speed_kernels.kernels, "frame_mass", lambda *a, **o: torch.zeros(3))
    rows = [row for (row,) in speed_kernels.kernel_rows(speed.row, DRY, [(2, 8, 8)])]
    assert [made["case"] for made in rows if made["dense_ms"] == ""] == ["kernel frame_mass"]
    assert all("not timed" in made["note"] for made in rows if made["dense_ms"] == "")


def test_the_kernels_calls_fit_their_references():
    cases = list(kernel_cases(DRY, [(2, 8, 8)]))
    assert {case.name for case in cases} == set(KERNELS)
    for case in cases:
        assert all(torch.isfinite(t.float()).all() for t in case.result(reference))
        assert case.work.flops + case.work.moved > 0


def test_real_sizes_are_waited_for_once():
    rows = list(rows_to_fill())
    names = ("case", "host", "plan", "tokens", "compiled")
    assert len({tuple(row[name] for name in names) for row in rows}) == len(rows)
    first = real_sizes()[0].name
    for host in ("diffusers", "comfyui"):
        mine = [row for row in rows if (row["case"], row["host"]) == (first, host)]
        compiled = [row["plan"] for row in mine if row["compiled"] == GPU.compiled]
        assert compiled == [*COMPILED_PLANS] and PINNED in {row["plan"] for row in mine}
    assert {size.name for size in real_sizes()} <= {row["case"] for row in rows}


def test_tests_that_take_too_long_are_no_longer_waited_for(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\n\ndef test_it():\n    time.sleep(60)\n")
    with pytest.raises(SystemExit, match="not timed: its tests alone took 1 seconds"):
        speed.check_tests([slow], 1.0)


def test_the_tests_are_part_of_the_time(tmp_path, monkeypatch):
    """Of ten seconds the tests take four."""
    now, asked = [0.0], []

    def tests(paths, seconds):
        asked.append(seconds)
        now[0] += 4.0

    monkeypatch.setattr(speed, "check_tests", tests)
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(speed, "ask_for_gpu", lambda: None)
    monkeypatch.setattr(speed, "find_comfyui", lambda given: None)
    monkeypatch.setattr(speed, "gpu_rows", lambda *given: asked.append(given[-1]) or ())
    speed.main(["--gpu", "--limit", "10", "--results", str(tmp_path)])
    assert asked == [10.0, 6.0]

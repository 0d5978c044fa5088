import csv
import json
import subprocess

import numpy as np
import pytest
import torch

from wantrim.benchmarks import confirm, quality
from wantrim.benchmarks.bench import Bench
from wantrim.benchmarks.cases import (
    DEFAULT,
    OURS,
    PAPER,
    POINTS,
    SKIP,
    STUDY_TARGET,
    TAPE,
    TARGETS,
    TOLERANCE,
    Case,
    Point,
    all_cases,
    dial_case,
    setting_of,
    solve_plan,
    token_plan,
    tokens_case,
)
from wantrim.benchmarks.headline import TEMPLATES, fill_templates
from wantrim.benchmarks.peers import PEERS
from wantrim.benchmarks.plots import draw, full_rows, guidance_rows
from wantrim.benchmarks.subjects import toy_subject
from wantrim.benchmarks.summary import (
    READMES,
    calibration_table,
    confirm_table,
    fill,
    guidance_table,
    overview_table,
    tables,
)
from wantrim.benchmarks.table import COLUMNS, RESULTS, commit, merge_rows, read_rows
from wantrim.methods.tokens import paper_plan
from wantrim.solve import dial
from wantrim.tests.tiny_pipeline import ASKED, parts, transformer

FEW = Point(4, 1.0, shift=5.0)
GUIDED = Point(3, 4.0)
STEPS = Case("methods", "fewer_steps", "", 0.67)


@pytest.fixture(scope="module")
def toy():
    return toy_subject()


@pytest.fixture
def bench(toy, tmp_path):
    return lambda task="t2v", point=FEW, prompts=1: Bench(toy, task, point, prompts, 1, tmp_path)


def test_the_issue_is_covered():
    """Ours and every peer at every budget, every part of TAPE at 0.67."""
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for target in TARGETS:
        names = {case.method for case in cases if case.target == target}
        assert {"fewer_steps", *OURS, *PEERS} <= names
    assert {case.dial.speedup for case in cases if case.method == DEFAULT} == {
        1 / target for target in TARGETS
    }
    assert all(case.context == (case.method != SKIP) for case in cases)
    plans = [case.tokens for case in cases if case.tokens and case.target == STUDY_TARGET]
    assert {plan.get("alpha", 0.5) for plan in plans} == {0.5, 1.0}
    assert {plan.get("query_ratio") for plan in plans} >= {1 / 4, 1 / 16, 1 / 64}
    assert {plan["every"] for plan in plans} >= {5, 10, 15}
    assert {plan["schedule"] for plan in plans} == {"falling", "constant", "rising"}


def test_the_papers_plan_is_the_one_that_artists_get():
    """But for the depth that it is scaled to."""
    assert token_plan(TAPE, 0.6, 40) == paper_plan(0.6)
    assert token_plan(TAPE, 0.6, 16) == paper_plan(0.6, reselect_every=4)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("point", POINTS)
def test_plans_are_solved_for_equal_compute(bench, task, point):
    it = bench(task, point)
    given = (True, False, False, False, False) if task == "i2v" else None
    assert it.sampling.anchored == given and it.sampling.starts_given == (task == "i2v")
    asked = [c for c in all_cases() if c.tokens and {"methods", "reselection"} & {*c.groups}]
    missing = [c for c in asked if not solve_plan(c, it.sampling)]
    # only what chooses on all tokens too often cannot come down
    assert all(c.tokens["every"] == 5 or c.target == 0.4 for c in missing)
    assert len(missing) <= 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_default_meets_its_share_where_there_are_steps_enough(bench, task, target):
    it = bench(task, POINTS[1])
    for name in (DEFAULT, SKIP):
        plan = solve_plan(dial_case("methods", target, name), it.sampling)
        # without context in whole steps, of 20
        off = TOLERANCE * target if name == DEFAULT else 0.025 + 1e-6
        assert 1 / it.sampling.speedup(plan) == pytest.approx(target, abs=off)
        # the solver may find whole and repeated steps best with context, too
        assert name == DEFAULT or not plan.shares.partial


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_counted_flops_are_the_cost_models_within_two_percent(bench, name, task):
    it = bench(task, Point(5, 4.0) if task == "t2v" else FEW)
    case = tokens_case("methods", 0.67, TAPE) if name == PAPER else dial_case("", 0.67, name)
    row = it.run(case)["row"]
    assert row["flops_ratio"] == pytest.approx(row["predicted_ratio"], rel=0.02)
    if name != SKIP:
        assert row["flops_ratio"] == pytest.approx(0.67, abs=TOLERANCE)
    # the model is as it was
    assert it.run(quality.DENSE)["row"]["psnr_db"] == 100


def test_dense_is_exact_and_fewer_steps_cost_their_share(bench):
    it = bench(prompts=2)
    dense = it.run(quality.DENSE)["row"]
    assert (dense["psnr_db"], dense["ssim"], dense["flops_ratio"]) == (100, 1, 1)
    assert dense["motion_ratio"] == 1
    fewer = it.run(STEPS)
    assert fewer["row"]["flops_ratio"] == 0.75
    assert fewer["row"]["knob"] == "3 steps"
    assert 15 < fewer["row"]["psnr_db"] < 60
    assert len(fewer["psnr"]) == 2
    assert set(fewer["row"]) >= {"colour_ok", "shape_ok", "direction_ok", "speed_error"}


def test_image_to_video_is_measured_against_its_image(bench):
    row = bench("i2v").run(STEPS)["row"]
    assert row["first_frame_db"] > 20


def test_methods_that_cannot_reach_the_budget_say_so(bench):
    result = bench().run(Case("methods", "faster_cache", "", 0.5))
    assert "row" not in result
    assert "unconditional" in result["unreachable"]


@pytest.mark.parametrize("name", ["static_blocks", "mag_cache"])
def test_peers_are_tuned_to_the_budget_and_leave_the_model_alone(bench, toy, name):
    it = bench()
    before = it.sample(it.items[0])
    row = it.run(Case("methods", name, "", 0.67))["row"]
    assert 0.4 < row["flops_ratio"] <= 0.70
    assert row["psnr_db"] < 60
    assert torch.equal(it.sample(it.items[0]), before)
    assert all(
        not getattr(b, "_diffusers_hook", None) or not b._diffusers_hook.hooks
        for b in toy.model.blocks
    )


ARGUMENTS = ["--jobs", "1", "--prompts", "1", "--seeds", "1", "--steps", "4", "--tasks", "t2v"]


def run_main(monkeypatch, tmp_path, *more: str) -> list[dict[str, str]]:
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["quality", *ARGUMENTS, *folders, *more])
    quality.main()
    return read_rows(tmp_path / "results" / "quality.csv")


def test_a_finished_case_is_not_run_again_and_an_interrupted_one_is(monkeypatch, tmp_path):
    only = ("--only", "fewer_steps", "default", "--targets", "0.67")
    first = run_main(monkeypatch, tmp_path, *only)
    assert [row["method"] for row in first] == ["dense", "fewer_steps", "default"]
    issue = (
        "method setting task steps prompts seeds flops_ratio time_ratio psnr_db psnr_lo psnr_hi ssim "
        "motion_ratio flicker colour_ok shape_ok direction_ok model commit torch"
    )
    assert set(issue.split()) <= set(first[0])
    ran = []
    run = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, case: ran.append(case.method) or run(self, case))
    again = run_main(monkeypatch, tmp_path, *only)
    assert (again, ran) == (first, [])
    next(iter((tmp_path / "work").glob("*default*.json"))).unlink()
    run_main(monkeypatch, tmp_path, *only)
    assert ran == ["default"]
    assert not list(tmp_path.rglob("*.partial"))


def test_another_solver_makes_the_default_anew_and_nothing_else(monkeypatch, tmp_path):
    only = ("--only", "fewer_steps", "default", "--targets", "0.67")
    first = run_main(monkeypatch, tmp_path, *only)
    solve, ran, run = dial.solve_nearest, [], Bench.run
    monkeypatch.setattr(dial, "solve_nearest", lambda *given: tuple(0.9 * s for s in solve(*given)))
    monkeypatch.setattr(Bench, "run", lambda self, case: ran.append(case.method) or run(self, case))
    again = run_main(monkeypatch, tmp_path, *only)
    assert ran == ["default"]
    assert again[:2] == first[:2] and again[2]["knob"] != first[2]["knob"]


def test_real_weights_take_the_same_way(monkeypatch, tmp_path):
    """A diffusers folder: no truth metrics, and the row names the model."""
    from diffusers import WanPipeline

    folder = tmp_path / "my-wan"
    WanPipeline(**parts(), transformer=transformer()).save_pretrained(folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(ASKED))
    rows = run_main(
        monkeypatch, tmp_path, "--weights", str(folder), "--prompt-file", str(prompts), "--width",
        "160", "--height", "160", "--pixel-frames", "9", "--device", "cpu", "--dtype", "float32",
        "--only", "fewer_steps", "default", "--targets", "0.75", "--prompts", "2",
    )  # fmt: skip
    assert {row["model"] for row in rows} == {"my-wan"}
    assert [row["method"] for row in rows] == ["dense", "fewer_steps", "default"]
    predicted = float(rows[2]["predicted_ratio"])
    assert float(rows[2]["flops_ratio"]) == pytest.approx(predicted, rel=0.02)
    assert rows[2]["shape_ok"] == ""
    assert float(rows[2]["psnr_db"]) < 100
    assert str(tmp_path) not in (tmp_path / "results" / "quality.csv").read_text()


def result(values, method="paper", target=0.67, flops=0.67):
    row = {"method": method, "target": target, "flops_ratio": flops, "psnr_db": np.mean(values)}
    return {"case": method, "row": row, "psnr": list(values), "clusters": list(range(len(values)))}


@pytest.mark.parametrize(("shift", "verdict"), [(3.0, "better"), (-3.0, "worse"), (0.0, "tie")])
def test_a_difference_inside_the_interval_is_a_tie(shift, verdict):
    rng = np.random.default_rng(0)
    steps = rng.normal(20, 2, 24)
    mine = steps + rng.normal(0, 1, 24) - 0.02 + shift
    case = tokens_case("methods", 0.67, TAPE)
    results = {
        ("t2v", FEW, case): result(mine),
        ("t2v", FEW, STEPS): result(steps, "fewer_steps", flops=0.65),
        ("t2v", FEW, Case("methods", "fewer_steps", "", 0.5)): result(
            steps - 9, "fewer_steps", 0.5, 0.5
        ),
        ("i2v", FEW, STEPS): result(steps - 9, "fewer_steps", flops=0.67),
    }
    rows = quality.paired_rows(results)
    assert [row.get("vs_steps") for row in rows] == [verdict, None, None, None]
    assert rows[0]["vs_steps_lo"] < rows[0]["vs_steps_db"] < rows[0]["vs_steps_hi"]


def test_rows_that_cost_something_else_are_not_compared():
    """3 of 4 steps are 0.75 of the FLOPs, whatever was asked for."""
    case = tokens_case("methods", 0.67, TAPE)
    results = {
        ("t2v", FEW, case): result([20.0, 21.0]),
        ("t2v", FEW, STEPS): result([30.0, 31.0], "fewer_steps", flops=0.75),
    }
    assert "vs_steps" not in quality.paired_rows(results)[0]


def test_rows_are_added_and_newer_ones_replace_older(tmp_path):
    path = tmp_path / "some" / "quality.csv"
    row = {
        "method": "tome",
        "model": "a",
        "task": "t2v",
        "steps": 4,
        "target": 0.5,
        "psnr_db": 20.0,
    }
    merge_rows(path, [row, row | {"model": "b"}])
    merge_rows(path, [row | {"psnr_db": 1 / 3}])
    rows = read_rows(path)
    assert [(r["model"], r["psnr_db"]) for r in rows] == [("a", "0.3333"), ("b", "20")]
    with path.open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    with pytest.raises(AttributeError):
        merge_rows(path, [row, None])
    assert read_rows(path) == rows


def test_an_old_row_has_todays_name_and_is_replaced_by_todays_row(tmp_path):
    path = tmp_path / "quality.csv"
    row = dict.fromkeys(COLUMNS, "") | {"method": "tape", "target": "0.5", "psnr_db": "20"}
    merge_rows(path, [row])
    assert [r["method"] for r in read_rows(path)] == ["paper"]
    merge_rows(path, [row | {"method": "paper", "psnr_db": "21"}, row | {"method": "auto"}])
    assert [(r["method"], r["psnr_db"]) for r in read_rows(path)] == [
        ("paper", "21"),
        ("auto", "20"),
    ]


def test_rows_name_the_code_that_made_them_and_rows_are_no_code(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *words], check=True, cwd=tmp_path, capture_output=True)

    code, rows = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "quality.csv"
    rows.parent.mkdir(parents=True)
    for file in (code, rows):
        file.write_text("1\n")
    assert commit.__wrapped__(tmp_path) == ""
    for words in (("init",), ("add", "-A"), ("commit", "-m", "one")):
        git(*words)

    head = commit.__wrapped__(tmp_path)
    rows.write_text("2\n")
    assert commit.__wrapped__(tmp_path) == head and len(head) == 7
    code.write_text("2\n")
    assert commit.__wrapped__(tmp_path) == f"{head}-dirty"


def test_plots_show_every_method_that_has_a_row(tmp_path):
    rows = []
    for steps in (4, 20):
        for number, name in enumerate(["fewer_steps", "default", "tome"]):
            for target in TARGETS:
                rows.append(
                    {
                        "group": "methods",
                        "method": name,
                        "setting": "",
                        "model": "tiny_wan",
                        "task": "t2v",
                        "steps": steps,
                        "guidance": 8,
                        "prompts": 4,
                        "seeds": 1,
                        "target": target,
                        "flops_ratio": target,
                        "psnr_db": 20.0 + number,
                        "psnr_lo": 19.0,
                        "psnr_hi": 25.0,
                        "motion_ratio": 1.0,
                    }  # fmt: skip
                )
    setting = setting_of(TAPE)
    rows.append(
        {**rows[0], "group": "importance", "method": "paper", "setting": setting, "target": 0.67}
    )
    merge_rows(tmp_path / "quality.csv", rows)
    small, large = {**rows[0], "prompts": 2}, {**rows[0], "prompts": 32}
    kept = full_rows([{k: str(v) for k, v in row.items()} for row in (small, large)])
    assert [row["prompts"] for row in kept] == ["32"]
    paths = [path for path in draw(tmp_path) if path.exists()]
    names = ["quality.png", "headline.png", "study_importance.png"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_plan_that_answers_two_questions_is_run_once_and_counted_twice():
    tape = next(c for c in all_cases() if c.method == PAPER and c.target == STUDY_TARGET)
    assert {"methods", "ablation", "schedule", "reselection"} == {*tape.groups}


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_tables_are_those_of_the_rows(readme):
    text = readme.read_text("utf-8")
    assert "<!-- table " in text
    assert fill(text, tables(RESULTS)) == text


def test_the_templates_tables_are_those_of_the_rows():
    filled = fill_templates(TEMPLATES, tables(RESULTS))
    assert len(filled) == 7
    for path, text in filled.items():
        assert text == path.read_text("utf-8"), f"{path.name}: run wantrim.benchmarks.summary"


def test_a_templates_table_is_made_anew_and_nothing_else(tmp_path):
    head = "| on the tiny Wan, text to video, 4 steps | FLOPs |"
    note = f"before {head}\n|---|---|\n| old | 0.90 |\n\nafter | kept | too"
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"note": note, "other": 1}), "utf-8")
    (tmp_path / "none.json").write_text("{}", "utf-8")
    table = f'{head}\n|---|---|\n| "new" | 0.67 |'

    filled = fill_templates(tmp_path, {"template t2v 4": table, "other": "no"})

    expected = f"before {table}\n\nafter | kept | too"
    assert {path.name: json.loads(text) for path, text in filled.items()} == {
        "graph.json": {"note": expected, "other": 1}
    }
    with pytest.raises(ValueError, match="graph.json: expected one of"):
        fill_templates(tmp_path, {})


def test_the_overview_says_where_a_method_met_another_share():
    def row(method, task, psnr, flops, target="0.67", group="methods"):
        return {
            "group": group, "method": method, "task": task, "steps": "4", "target": target,
            "psnr_db": psnr, "motion_ratio": "1.25", "flops_ratio": flops,
        }  # fmt: skip

    rows = [
        row("tape", "t2v", "15.24", "0.66"),
        row("mag_cache", "t2v", "21.9", "0.5"),
        row("easycache", "i2v", "50.0", "0.67"),
        row("mag_cache", "i2v", "41.0", "0.69"),
        row("tape", "t2v", "99", "0.75", target="0.75"),
        row("tokens", "t2v", "99", "0.67", group="importance"),
        row("dense", "t2v", "99", "1", target="1"),
    ]

    assert overview_table(rows, [("t2v", "4"), ("i2v", "4")]).splitlines() == [
        "| method | text to video, 4 steps | image to video, 4 steps |",
        "|---|---|---|",
        "| mag cache | 21.9 dB, 1.25 (at 0.50) | 41.0 dB, 1.25 |",
        "| tape | 15.2 dB, 1.25 |  |",
        "| easycache |  | 50.0 dB, 1.25 |",
    ]


def test_the_calibration_says_how_far_the_toy_is_off():
    def row(name, speedup, there, here, guidance="8", prompts="32"):
        return {
            "published": name, "speedup": speedup, "published_psnr_db": there, "method": "tape",
            "steps": "20", "guidance": guidance, "prompts": prompts, "psnr_db": here,
            "flops_ratio": "0.5",
        }  # fmt: skip

    rows = [
        row("a", "2", "20-22", "24"),
        row("a", "2", "20-22", "99", prompts="8"),
        row("b", "3", "15 (14B)", "11"),
        row("c", "4", "", "30"),
        row("b", "3", "15 (14B)", "", guidance="14"),
        row("a", "2", "20-22", "20", guidance="14"),
    ]

    assert calibration_table(rows).splitlines()[2:] == [
        "| a | 2x | 20-22 | tape | 24.0 (2.00x) | 20.0 (2.00x) |",
        "| b | 3x | 15 (14B) | tape | 11.0 (2.00x) | not reached |",
        "| c | 4x |  | tape | 30.0 (2.00x) |  |",
        # the differences are 3 and -4; -1
        "| all, root mean square of the differences | | | | 3.5 | 1.0 |",
    ]


def test_guidance_is_shown_beside_what_the_bench_measured(tmp_path):
    def row(method, guidance, psnr, **more):
        return {
            "group": "guidance", "method": method, "setting": "", "model": "tiny_wan",
            "task": "t2v", "steps": 20, "guidance": guidance, "prompts": 32, "seeds": 2,
            "target": 0.67, "flops_ratio": 0.67, "psnr_db": psnr, "psnr_lo": psnr - 1,
            "psnr_hi": psnr + 1, "vs_steps_db": 1.5, "vs_steps": "better",
        } | more  # fmt: skip

    merge_rows(
        tmp_path / "quality.csv",
        [
            row("tape", 8, 15.0),
            row("auto", 8, 29.0),
            row("evit", 8, 99.0),
            row("tape", 8, 99.0, target=0.5),
            row("tape", 8, 99.0, steps=4),
            row("tape", 8, 99.0, model="other"),
        ],
    )
    merge_rows(
        tmp_path / "guidance.csv",
        [row("paper", 11, 14.0), row("auto", 11, 21.0), row("dense", 11, 100.0)],
    )

    rows = guidance_rows(tmp_path)

    assert guidance_table(rows).splitlines() == [
        "| method | guidance 8 | guidance 11 |",
        "|---|---|---|",
        "| paper | 15.0 dB, better (+1.5) | 14.0 dB, better (+1.5) |",
        "| auto | 29.0 dB, better (+1.5) | 21.0 dB, better (+1.5) |",
    ]
    assert tmp_path / "guidance.png" in [path for path in draw(tmp_path) if path.exists()]


def test_the_verdict_is_confirmed_on_other_videos(toy, tmp_path):
    known = {case.key for case in all_cases()}
    asked = confirm.all_cases()
    assert {case.key for case in asked} <= known
    assert {*OURS, "fewer_steps"} <= {case.method for case in asked}

    for task in ("t2v", "i2v"):
        mine = Bench(toy, task, POINTS[0], 32, 2, tmp_path)
        others = confirm.OtherPrompts(toy, task, POINTS[0], 32, 2, tmp_path)
        tuned_on = {item.prompt for item in mine._items_to_tune_on()}
        assert len({item.prompt for item in others.items}) == 32 and len(others.items) == 64
        used = tuned_on | {item.prompt for item in mine.items}
        assert not used.intersection(item.prompt for item in others.items)
        further = {item.prompt for item in others._items_to_tune_on()}
        assert not further.intersection(used | {item.prompt for item in others.items})


def test_what_is_confirmed_stands_beside_what_the_bench_says():
    def row(method, psnr, **more):
        return {
            "method": method, "setting": "", "task": "t2v", "steps": "4", "target": "0.67",
            "psnr_db": psnr, "psnr_lo": psnr - 1, "psnr_hi": psnr + 1, "motion_ratio": 1,
            "shape_ok": 0.5, "direction_ok": 1, "vs_steps": "tie", "vs_steps_db": 0.25,
        } | more  # fmt: skip

    others = [row("dense", 100), row("tape", 20), row("auto", 30), row("auto", 9, task="i2v")]
    bench = [row("auto", 31), row("auto", 99, target="0.5"), row("evit", 50)]

    assert confirm_table(others, bench, [("t2v", "4")]).splitlines()[2:] == [
        "| text to video, 4 steps | auto | 31.0 (30.0 to 32.0) | 30.0 (29.0 to 31.0) "
        "| tie (+0.2) |  | 1.00 | 50% / 100% |",
        "|  | tape |  | 20.0 (19.0 to 21.0) | tie (+0.2) |  | 1.00 | 50% / 100% |",
    ]


def test_a_table_without_rows_is_refused():
    with pytest.raises(ValueError, match="expected one of a, closed; got 'b'"):
        fill("<!-- table b -->\n<!-- end -->", {"a": ""})
    with pytest.raises(ValueError, match="closed"):
        fill("<!-- table a -->", {"a": ""})
    assert fill("x <!-- table a -->old<!-- end --> y", {"a": "new"}) == (
        "x <!-- table a -->\nnew\n<!-- end --> y"
    )

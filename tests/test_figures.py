"""Figures in sentences: each is that of a row of the results."""

import csv
import math
import re
from itertools import product
from statistics import mean

import pytest
import torch

from wantrim.benchmarks import predicted
from wantrim.benchmarks.calibration import middle
from wantrim.benchmarks.table import RESULTS, read_rows
from wantrim.demo.anatomy import NEAR, SPATIAL, TEMPORAL
from wantrim.engine.context import context_bytes
from wantrim.hosts.diffusers.sample import sigmas_for
from wantrim.solve.dial import Dial, Run
from wantrim.solve.floor import device_rates
from wantrim.training.draws import shifted
from wantrim.training.losses import timestep_weights
from wantrim.training.recipe import SHIPPED

VELOCITY = "velocity_change, unsmoothed, falling, every 10 of 40, identity"
RANDOM = "random, unsmoothed, falling, every 10 of 40, identity"
STUDY = {"target": "0.67", "task": "t2v", "steps": "20"}
HALF = {"task": "t2v", "steps": "20", "target": "0.5", "model": "tiny_wan_2", "prompts": "12"}
BLOCKS = {"setting": "falling, identity", "target": "0.75", "steps": "20"}
FORCING = "self-forcing, 4 steps"
# PSNR, motion and shape of what samples in four steps
FORCED, DISTILLED, FULL = (
    [
        ("students", {"setting": setting}, column, factor)
        for column, factor in (("psnr_db", 1), ("motion_ratio", 1), ("shape_ok", 100))
    ]
    for setting in (FORCING, "stage III, 4 steps", "full model, 4 steps")
)


FOUR = {
    "model": "tiny_wan_2_4_steps_lora", "steps": "4", "target": "0.75", "prompts": "12",
}  # fmt: skip
TWENTY = {"model": "tiny_wan_2", "steps": "20", "prompts": "12"}
HEADS = (
    "heads", "heads_bare", "heads_shuffled", "heads_uniform", "heads_profiled", "pare_heads",
)  # fmt: skip
BESIDE = [
    *(("t2v", method) for method in ("default", "mag_cache", "fewer_steps")),
    *(("i2v", method) for method in ("default", "easycache", "fewer_steps")),
]

ROUTED = "stage II's student, random blocks"
# settings of the student by how samples are weighed: alike, by their noise
WEIGHED = ("", ", weighting log")

# page, words with a gap for every figure; for every gap the results, the row, column and factor
FIGURES = [
    (
        "README.md",
        "2 keeps visibly less ({:.0f} dB in place of {:.0f} on our toy)",
        [
            ("quality", HALF | {"method": "default", "target": target}, "psnr_db", 1)
            for target in ("0.5", "0.67")
        ],
    ),
    (
        "README.md",
        "(there {:.1f} dB, the best of them {:.1f})",
        [("quality", HALF | {"method": name}, "psnr_db", 1) for name in ("default", "sea_cache")],
    ),
    (
        "README.md",
        "in text to video {:.1f} dB (MagCache {:.1f}, three steps {:.1f}), in image to video {:.1f} "
        "(EasyCache {:.1f}, three steps {:.1f})",
        [("quality", FOUR | {"task": task, "method": m}, "psnr_db", 1) for task, m in BESIDE],
    ),
    (
        "README.md",
        "First Block Cache leaves {:.0f} of {:.0f} videos whole in text to video",
        [
            ("quality", FOUR | {"task": "t2v", "method": "first_block_cache"}, column, 1)
            for column in ("exact", "prompts")
        ],
    ),
    *(
        (
            "README.md",
            "at 0.67 it is about {:.0f} in both, so stay at 1.3",
            [("quality", FOUR | {"target": "0.67", "task": task, "method": "default"}, "psnr_db", 1)],
        )
        for task in ("t2v", "i2v")
    ),
    (
        "benchmarks/README.md",
        "keeps {:.1f} dB (MagCache {:.1f}, EasyCache {:.1f}, three steps {:.1f}) in text to video, "
        "{:.1f} (EasyCache {:.1f}, three steps {:.1f}) in image to video",
        [
            ("quality", FOUR | {"task": task, "method": m}, "psnr_db", 1)
            for task, m in (*BESIDE[:2], ("t2v", "easycache"), *BESIDE[2:])
        ],
    ),
    (
        "benchmarks/README.md",
        "a part of the tokens is worth little: {:.1f} and {:.1f}, with motion {:.2f} and {:.2f}",
        [
            ("quality", FOUR | {"method": "default", "target": "0.67", "task": task}, column, 1)
            for column in ("psnr_db", "motion_ratio")
            for task in ("t2v", "i2v")
        ],
    ),
    (
        "benchmarks/README.md",
        "Motion at 4 steps and 1.3x, whole and repeated: {:.2f} and {:.2f}",
        [
            ("quality", FOUR | {"method": "skip", "task": task}, "motion_ratio", 1)
            for task in ("t2v", "i2v")
        ],
    ),
    (
        "benchmarks/README.md",
        "to take always the plan by the own whole run is right in all {:.0f}",
        [("verdicts", {"candidate": "own", "first": "32"}, "best", 1)],
    ),
    (
        "benchmarks/README.md",
        "from {:.1f} to {:.1f} dB (15 of 20 steps keep {:.1f}); with a router it keeps {:.1f} at {:.2f} "
        "(10 steps {:.1f})",
        [
            ("students", {"setting": "cut, not trained"}, "psnr_db", 1),
            ("students", {"setting": "stage I"}, "psnr_db", 1),
            ("students", {"method": "fewer_steps", "target": "0.75"}, "psnr_db", 1),
            ("students", {"setting": "stage II"}, "psnr_db", 1),
            ("students", {"setting": "stage II"}, "flops_ratio", 1),
            ("students", {"method": "fewer_steps", "target": "0.5"}, "psnr_db", 1),
        ],
    ),
    (
        "benchmarks/README.md",
        "keep {:.1f} dB in text to video and {:.1f} in image to video at 0.75 in 4 steps ({:.1f} and {:.1f} "
        "uncorrected, shuffled {:.1f} and {:.1f}, uniform {:.1f} and {:.1f}, by a profile {:.1f} and {:.1f}, PARE's {:.1f} and {:.1f}), "
        "at 0.67 in 20 steps {:.1f} and {:.1f} (shuffled {:.1f} and {:.1f})",
        [
            *(
                ("quality", FOUR | {"target": "0.75", "task": task, "method": name}, "psnr_db", 1)
                for name in HEADS
                for task in ("t2v", "i2v")
            ),
            *(
                ("quality", TWENTY | {"target": "0.67", "task": task, "method": name}, "psnr_db", 1)
                for name in ("heads", "heads_shuffled")
                for task in ("t2v", "i2v")
            ),
        ],
    ),
    (
        "benchmarks/README.md",
        "at half of the work, {:.1f} and {:.1f} are no more than its {:.1f} and {:.1f} alone",
        [
            ("quality", FOUR | {"target": "0.5", "task": task, "method": name}, "psnr_db", 1)
            for name in ("default_and_heads", "default")
            for task in ("t2v", "i2v")
        ],
    ),
    (
        "benchmarks/README.md",
        "the default leads text to video in 20 steps ({:.1f} dB at 0.67, {:.1f} at 0.5; the best peer "
        "{:.1f} and {:.1f})",
        [
            ("quality", HALF | {"method": name, "target": target}, "psnr_db", 1)
            for name in ("default", "sea_cache")
            for target in ("0.67", "0.5")
        ],
    ),
    (
        "benchmarks/README.md",
        "(*skip*), which in text to video keep {:.1f} for {:.1f}",
        [
            ("quality", HALF | {"method": name, "target": "0.67"}, "psnr_db", 1)
            for name in ("skip", "default")
        ],
    ),
    (
        "README.md",
        "bring text to video in 20 steps 1.4 dB ({:.1f}; {:.1f} without, as with `context` off",
        [
            ("quality", HALF | {"method": name, "target": "0.67"}, "psnr_db", 1)
            for name in ("default", "skip")
        ],
    ),
    (
        "benchmarks/README.md",
        "windows and decay would keep {:.0f} % of the attention, our patterns {:.0f} (the best keys {:.0f}",
        [
            ("patterns", {"keys": "0.2500"}, column, 100)
            for column in ("with_windows_and_decay", "shipped", "best_keys")
        ],
    ),
    (
        "benchmarks/README.md",
        "chose the bench's best of seven candidates in {:.0f} of {:.0f} prompts",
        [
            ("verdicts", {"candidate": "verdict", "first": "32"}, column, 1)
            for column in ("agrees", "chosen")
        ],
    ),
    (
        "docs/training.md",
        "colour stays right, the direction in {:.0f} % and the shape in {:.0f} % (the full model {:.0f} and "
        "{:.0f} %)",
        [
            ("students", row, name, 100)
            for row in ({"setting": "stage II"}, {"method": "dense"})
            for name in ("direction_ok", "shape_ok")
        ],
    ),
    (
        "docs/training.md",
        "its student of four steps keeps {:.1f} dB, less than the full model in four steps ({:.1f}), "
        "moves a little less than the full model of twenty guided steps ({:.2f}) and gets the shape "
        "right in {:.0f} % (the full model in four steps {:.0f} %)",
        [FORCED[0], FULL[0], *FORCED[1:], FULL[2]],
    ),
    (
        "docs/training.md",
        "moves nearly as much as the full model of twenty guided steps ({:.2f}), keeps less than the full "
        "model in four steps in PSNR ({:.1f} against {:.1f} dB), and gets the shape right less often ({:.0f} "
        "against {:.0f} %)",
        [DISTILLED[1], DISTILLED[0], FULL[0], DISTILLED[2], FULL[2]],
    ),
    (
        "docs/training.md",
        "300 steps keep {:.1f} dB alike and {:.1f} by `log`",
        [("students", {"setting": f"stage I, 300 steps{s}"}, "psnr_db", 1) for s in WEIGHED],
    ),
    (
        "benchmarks/README.md",
        "(300 steps of stage I: {:.1f} by it, {:.1f} alike)",
        [("students", {"setting": f"stage I, 300 steps{s}"}, "psnr_db", 1) for s in WEIGHED[::-1]],
    ),
    (
        "benchmarks/README.md",
        "makes one of {:.1f} dB, motion {:.2f}, shape {:.0f} %",
        FORCED,
    ),
    (
        "README.md",
        "a slim model cut to 0.75 of its weights goes from {:.1f} to {:.1f} dB by training",
        [("students", {"setting": s}, "psnr_db", 1) for s in ("cut, not trained", "stage I")],
    ),
    (
        "README.md",
        "by training, on the toy, where 15 of 20 steps keep {:.1f}",
        [("students", {"method": "fewer_steps", "target": "0.75"}, "psnr_db", 1)],
    ),
    (
        "README.md",
        "One trained for four steps keeps {:.1f} dB, {:.2f} of the motion and the right shape in "
        "{:.0f} % of the videos, the full model in four steps {:.1f}, {:.2f} and {:.0f} %",
        [*FORCED, *FULL],
    ),
    (
        "docs/training.md",
        "The full model in four steps moves {:.2f} as much as in twenty",
        [FULL[1]],
    ),
    (
        "docs/training.md",
        "random blocks keep as many dB ({:.1f} against {:.1f}) and the shape in {:.0f} % (",
        [
            ("students", {"setting": ROUTED}, "psnr_db", 1),
            ("students", {"setting": "stage II"}, "psnr_db", 1),
            ("students", {"setting": ROUTED}, "shape_ok", 100),
        ],
    ),
    (
        "docs/training.md",
        "an earlier training of uncommitted code kept {:.1f} dB, and {:.1f} after `steps`, {:.1f} after "
        "`self_forcing`",
        [
            ("old/students", {"setting": f"{stage}, weighting log"}, "psnr_db", 1)
            for stage in ("stage II", "stage III, 4 steps", "self-forcing, 4 steps")
        ],
    ),
    (
        "benchmarks/README.md",
        "choosing by change ({:.1f} dB) beats random ({:.1f})",
        [("old/tokens", STUDY | {"setting": name}, "psnr_db", 1) for name in (VELOCITY, RANDOM)],
    ),
    (
        "benchmarks/README.md",
        "skipped blocks chosen by the profile keep {:.1f} dB and random ones {:.1f}",
        [("old/depth", BLOCKS | {"method": m}, "psnr_db", 1) for m in ("profiled", "random")],
    ),
    (
        "benchmarks/README.md",
        "a slim checkpoint at {:.2f} of the FLOPs keeps {:.1f} dB at 4 steps",
        [
            ("old/width", {"method": "slim_budget_flops", "target": "0.7", "steps": "4"}, name, 1)
            for name in ("flops_ratio", "psnr_db")
        ],
    ),
    (
        "benchmarks/README.md",
        "four distilled steps keep {:.1f} dB (the full model in four steps {:.1f}), motion {:.2f}, the "
        "shape in {:.0f} %",
        [
            ("students", {"setting": "stage III, 4 steps"}, "psnr_db", 1),
            ("students", {"setting": "full model, 4 steps"}, "psnr_db", 1),
            ("students", {"setting": "stage III, 4 steps"}, "motion_ratio", 1),
            ("students", {"setting": "stage III, 4 steps"}, "shape_ok", 100),
        ],
    ),
]  # fmt: skip


def value(root, results: str, row: dict[str, str], column: str) -> float:
    """A number of the one row that is like this."""
    with (root / "benchmarks" / "results" / f"{results}.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if all(r[k] == v for k, v in row.items())]
    assert len(rows) == 1, f"{results}: {len(rows)} rows are like {row}"
    return float(rows[0][column])


@pytest.mark.parametrize(("page", "words", "figures"), FIGURES)
def test_a_figure_in_a_sentence_is_that_of_its_row(root, page, words, figures):
    assert len(re.findall(r"\{[^}]*\}", words)) == len(figures)
    said = words.format(*(factor * value(root, *found) for *found, factor in figures))
    assert said in (root / page).read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "setting", "verdict"),
    [
        ("random blocks keep as many dB", ROUTED, "tie"),
        ("keeps less than the full model in four steps in PSNR", "stage III, 4 steps", "worse"),
        ("less than the full model in four steps", FORCING, "worse"),
    ],
)
def test_what_is_said_of_a_student_is_its_rows_verdict(root, words, setting, verdict):
    (row,) = (r for r in read_rows(RESULTS / "students.csv") if r["setting"] == setting)
    assert row["vs"] == verdict and words in (root / "docs/training.md").read_text("utf-8")


def test_what_the_log_kept_more_is_that_of_the_older_students(root):
    kept = ("stage II", "stage III, 4 steps", "self-forcing, 4 steps")
    more = [
        value(root, "old/students", {"setting": f"{name}, weighting log"}, "psnr_db")
        - value(root, "students", {"setting": name}, "psnr_db")
        for name in kept
    ]
    said = f"older ones kept {math.floor(min(more))} to {math.ceil(max(more))} dB more"
    assert said in (root / "benchmarks/README.md").read_text("utf-8")


def test_what_a_student_leaves_out_and_what_the_log_leaves_to_low_noise_are_computed(root):
    page = (root / "docs/training.md").read_text("utf-8")
    gone = 1 - value(root, "students", {"setting": "stage II"}, "parameter_ratio")
    assert f"at {100 * gone:.0f} % fewer active parameters than the full model" in page
    recipe = (SHIPPED / "tiny.toml").read_text("utf-8")
    assert f"leaves {100 * gone:.0f}% fewer active parameters" in recipe
    sigma = shifted((torch.arange(100_000) + 0.5) / 100_000, 5.0)
    weights = timestep_weights(sigma)
    low = float(weights[sigma < 0.5].sum() / weights.sum())
    assert f"with shift 5 leaves {100 * low:.0f} % of the loss to the half with less noise" in page


def test_how_far_the_toys_are_off_is_that_of_the_calibration(root):
    """Over the caches of the second one, and over fewer steps of both."""
    page = (root / "benchmarks" / "README.md").read_text("utf-8")
    off = {}
    with (root / "benchmarks/results/calibration.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["psnr_db"] and row["published_psnr_db"]:
                apart = float(row["psnr_db"]) - middle(row["published_psnr_db"])
                off.setdefault((row["model"], row["method"]), []).append(apart)
    caches = [
        one
        for (model, method), found in off.items()
        if model == "tiny_wan_2" and method not in ("default", "fewer_steps")
        for one in found
    ]
    root_mean_square = (sum(one**2 for one in caches) / len(caches)) ** 0.5
    said = f"({min(caches):.1f} to {max(caches):.1f} dB above, root mean square {root_mean_square:.1f})"
    assert len(caches) == 6 and said in page
    steps = [one for (_, method), found in off.items() if method == "fewer_steps" for one in found]
    assert len(steps) == 4 and f"({min(steps):.0f} to {max(steps):.0f} dB above:" in page


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_what_the_page_of_heads_says_of_the_bench_is_in_the_rows(root, language):
    rows = read_rows(RESULTS / "quality.csv")
    made = {
        (r["method"], r["task"], r["steps"], r["target"]): float(r["psnr_db"])
        for r in rows
        if r["model"].startswith("tiny_wan_2") and "heads" in r["method"]
    }

    def apart(other: str) -> list[float]:
        pairs = [
            (made.get(("heads", *key)), value) for (m, *key), value in made.items() if m == other
        ]
        return [ours - value for ours, value in pairs if ours is not None]

    page = (root / f"web/docs/WanTrimHeads/{language}.md").read_text("utf-8")
    said = re.findall(r"(\d+) (?:(?:to|到|から) (\d+) )?dB", page)
    numbers = [int(number) for pair in said for number in pair if number]
    given_back, by_profile = apart("heads_bare"), apart("heads_profiled")
    assert len(given_back) == 2 and len(by_profile) == 3
    wanted = [math.floor(min(by_profile)), math.ceil(max(by_profile)), round(mean(given_back))]
    assert numbers == wanted, (numbers, by_profile, given_back)


@pytest.mark.parametrize(
    ("folder", "page", "said"),
    [
        (
            "tiny_wan_2",
            "benchmarks/README.md",
            "Of its {all} heads {spatial} are spatial, {uniform} nearly uniform "
            "([roles](../demo/tiny_wan_2/head_roles.png)), {temporal} temporal by PARE's edge of 0.3, "
            "{low} of them more than uniform attention",
        ),
        (
            "tiny_wan",
            "docs/without_comfyui.md",
            "{above} of {all} above 0.3, {spatial} above 0.7, {low} below 0.15; {uniform} are still "
            "within 0.05 of uniform",
        ),
    ],
)
def test_the_heads_of_the_tiny_wans_are_counted_and_labelled(root, folder, page, said):
    rows = read_rows(root / "demo" / folder / "heads.csv")
    found = [(float(row["intra_slice_ratio"]), row["role"]) for row in rows]
    wanted = {
        "uniform": lambda ratio: abs(ratio - 1 / 5) < NEAR,
        "spatial": lambda ratio: ratio > SPATIAL,
        "mixed": lambda ratio: TEMPORAL <= ratio <= SPATIAL,
        "temporal": lambda ratio: ratio <= 1 / 5 - NEAR or 1 / 5 + NEAR <= ratio < TEMPORAL,
    }
    for ratio, role in found:
        assert [name for name, fits in wanted.items() if fits(ratio)] == [role]
    counts = {name: sum(role == name for _, role in found) for name in wanted}
    counts["low"] = sum(ratio <= 1 / 5 - NEAR for ratio, _ in found)
    counts["above"] = counts["mixed"] + counts["spatial"]
    assert said.format(all=len(found), **counts) in (root / page).read_text("utf-8")


# blocks, heads, and latent frames times tokens a frame of the sizes that the page names
HELD = {
    ("1.3B", 30, 12): (("480p", 21 * 1560), ("720p", 21 * 3600)),
    ("5B", 30, 24): (("832x480", 31 * 390), ("1280x704", 31 * 880)),
    ("14B", 40, 40): (("480p", 21 * 1560), ("720p", 21 * 3600)),
}


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_what_the_context_takes_is_what_the_code_says(root, language):
    page = (root / f"web/docs/WanTrim/{language}.md").read_text("utf-8")
    for (model, blocks, heads), sizes in HELD.items():
        for size, tokens in sizes:
            (line,) = (row for row in page.splitlines() if re.match(rf"\| {model}\W+{size}\W", row))
            said = [float(number) for number in re.findall(r"(\d+\.\d)(?= /| GB)", line)]
            one = [context_bytes(blocks, tokens, heads, 128, bits) / 1e9 for bits in (8, 4)]
            wanted = [number * prompts for number in one for prompts in (1, 2)]
            assert said == pytest.approx(wanted, abs=0.05 + 1e-9)


def test_what_has_to_be_remembered_is_what_the_plans_of_14b_need(root):
    page = (root / "README.md").read_text("utf-8")
    assert "in 4 steps of one model two steps compute a part" in page
    assert "20 steps at 1.5x and 2 + 2 steps need none" in page
    for device, size in product(predicted.CARDS, predicted.SIZES):
        cost = device_rates(device).seconds
        for (steps, prompts), parts in zip(predicted.SAMPLINGS.values(), (0, 2), strict=True):
            grid = predicted.video_grid(predicted.SHAPE, *predicted.SIZES[size], 81)
            sigmas = tuple(sigmas_for(steps, predicted.SHIFT).tolist())
            run = Run(predicted.SHAPE, grid, sigmas, predicted.SHIFT, prompts)
            shares = Dial(dense_first_steps=1).solve(run, cost=cost).plan.shares.shares
            assert sum(0.0 < share < 1.0 for share in shares) == parts

"""Figures in sentences: each is that of a row of the results."""

import csv
import re

import pytest

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


FOUR = {"model": "tiny_wan_2_4_steps_lora", "steps": "4", "target": "0.75"}

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
        "it keeps {:.1f} dB at 0.75 in text to video (three steps {:.1f}), and {:.1f} in image to video "
        "(three steps {:.1f})",
        [
            ("quality", FOUR | {"task": task, "method": method}, "psnr_db", 1)
            for task in ("t2v", "i2v")
            for method in ("default", "fewer_steps")
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
        "{:.1f} dB at {:.2f} of the FLOPs in text to video in 20 steps",
        [
            ("quality", HALF | {"method": "heads", "target": "0.67"}, column, 1)
            for column in ("psnr_db", "flops_ratio")
        ],
    ),
    (
        "benchmarks/README.md",
        "chose the bench's best of seven candidates in {:.0f} of {:.0f} prompts",
        [("verdicts", {"candidate": "verdict"}, column, 1) for column in ("agrees", "chosen")],
    ),
    (
        "docs/training.md",
        "colour and direction stay right and the shape in {:.0f} % (the full model {:.0f} %)",
        [
            ("students", row, "shape_ok", 100)
            for row in ({"setting": "stage II"}, {"group": "methods", "method": "dense"})
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
        "moves as the full model of twenty guided steps does ({:.2f}), ties with the full model in "
        "four steps in PSNR ({:.1f} against {:.1f} dB), and gets the shape right less often ({:.0f} "
        "against {:.0f} %)",
        [DISTILLED[1], DISTILLED[0], FULL[0], DISTILLED[2], FULL[2]],
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
        "a model cut to 0.75 of its weights from {:.1f} to {:.1f} dB",
        [("students", {"setting": s}, "psnr_db", 1) for s in ("cut, not trained", "stage I")],
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

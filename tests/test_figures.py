"""Figures in sentences: each is that of a row of the results."""

import csv
import re

import pytest

VELOCITY = "velocity_change, unsmoothed, falling, every 10 of 40, identity"
MIXED = "velocity_change+rotation, unsmoothed, falling, every 10 of 40, identity"
RANDOM = "random, unsmoothed, falling, every 10 of 40, identity"


def of(setting: str, **more) -> dict:
    return {"setting": setting, "target": "0.67", "task": "t2v", **more}


# page, words with a gap for every figure; for every gap the results, the row, column and factor
FIGURES = [
    (
        "README.md",
        "it keeps {:.1f} dB, a tie with the full model's {:.1f} in four steps, and moves as the dense "
        "video does ({:.2f}, the full model {:.2f}), but gets the shape right in {:.0f} % only (the "
        "full model {:.0f} %)",
        [
            ("students", {"setting": setting}, column, factor)
            for column, factor in (("psnr_db", 1), ("motion_ratio", 1), ("shape_ok", 100))
            for setting in ("stage III, 4 steps", "full model, 4 steps")
        ],
    ),
    (
        "README.md",
        "a slim model cut to 0.75 of its weights goes from {:.1f} to {:.1f} dB by training",
        [("students", {"setting": s}, "psnr_db", 1) for s in ("cut, not trained", "stage I")],
    ),
    (
        "benchmarks/README.md",
        "is best at 4 steps ({:.1f} dB, random {:.1f}) and, alone or mixed with rotation, at 20 "
        "({:.1f} and {:.1f} dB, random {:.1f})",
        [
            *(("quality", of(s, steps="4"), "psnr_db", 1) for s in (VELOCITY, RANDOM)),
            *(("quality", of(s, steps="20"), "psnr_db", 1) for s in (VELOCITY, MIXED, RANDOM)),
        ],
    ),
    (
        "benchmarks/README.md",
        "{:.1f} dB, the dense motion ({:.2f}), direction right in {:.0f} %, shape in {:.0f} %. The "
        "full model in four steps without guidance keeps {:.1f} dB at twice the FLOPs and the shape "
        "in {:.0f} %, but little more than half of the motion ({:.2f})",
        [
            *(
                ("students", {"setting": "stage III, 4 steps"}, column, factor)
                for column, factor in (
                    ("psnr_db", 1), ("motion_ratio", 1), ("direction_ok", 100), ("shape_ok", 100),
                )
            ),
            *(
                ("students", {"setting": "full model, 4 steps"}, column, factor)
                for column, factor in (("psnr_db", 1), ("shape_ok", 100), ("motion_ratio", 1))
            ),
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


def test_the_importances_that_are_called_best_are(root):
    """What the sentence of the importances claims: no other one beside them keeps as much."""
    with (root / "benchmarks" / "results" / "quality.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["target"] == "0.67" and r["task"] == "t2v"]
    alike = [r for r in rows if r["setting"].endswith("falling, every 10 of 40, identity")]
    assert len(alike) > 20
    for steps, best in (("4", {VELOCITY}), ("20", {VELOCITY, MIXED})):
        own = sorted((r for r in alike if r["steps"] == steps), key=lambda r: -float(r["psnr_db"]))
        assert {r["setting"] for r in own[: len(best)]} == best

"""The table of what was aimed at: counted by hand."""

from wantrim.benchmarks.aims import MOTION, SLIM, aims_table

FIRST, SECOND, FEW = "tiny_wan", "tiny_wan_2", "tiny_wan_2_4_steps_lora"


def row(model, task, steps, target, method, psnr, *, flops=None, vs="", motion=1.0) -> dict:
    return {
        "model": model, "task": task, "steps": steps, "target": target, "method": method,
        "guidance": "5", "prompts": "12", "seeds": "1", "flops_ratio": str(flops or target),
        "psnr_db": str(psnr), "psnr_lo": str(psnr - 1), "psnr_hi": str(psnr + 1),
        "vs_default": vs, "motion_ratio": str(motion),
    }  # fmt: skip


def cell(where, ours, free, *, motion=1.0, flops=None) -> list[dict]:
    """A cell of the default and what is free in it: {method: (psnr, FLOPs, verdict)}."""
    made = [row(*where, "default", ours, motion=motion, flops=flops)]
    return made + [row(*where, m, db, flops=at, vs=vs) for m, (db, at, vs) in free.items()]


VERDICTS = [
    {"candidate": name, "first": first, "psnr_db": db}
    for first, shift in (("0", 100), ("32", 0))
    for name, db in (
        ("plan", 43.9 + shift), ("repeats", 43.4), ("easycache", 37.0), ("steps", 31.0), ("verdict", ""),
    )
]  # fmt: skip
PROMISED = (
    cell((FIRST, "t2v", "20", "0.67"), 51.7, {"easycache": (45.0, 0.68, "")})
    + cell((FIRST, "t2v", "20", "0.5"), 34.6, {"sea_cache": (33.0, 0.5, "")})
    + cell((FIRST, "t2v", "4", "0.67"), 34.4, {"mag_cache": (21.0, 0.67, "")}, motion=1.1)
)


def reached(rows) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in aims_table(rows, VERDICTS).splitlines()[2:]]
    found: dict[str, list[str]] = {}
    for aim, said in lines:
        found.setdefault(aim.split(",")[0].split(" on prompts")[0], []).append(said)
    return found


def test_cells_are_won_lost_or_level_against_the_best_at_like_flops():
    others = (
        # paired by video it is better, though the intervals touch
        cell((FEW, "i2v", "4", "0.75"), 35.8, {"fewer_steps": (37.0, 0.75, "better"), "easycache": (30, 0.75, "worse")})
        # ToMe and random tokens are not what is free, and another share is not the same
        + cell((SECOND, "t2v", "20", "0.75"), 50.0, {"tome": (90.0, 0.75, "better"), "teacache": (90.0, 0.8, ""), "zeus_like": (40.0, 0.75, "")})
        + cell((SECOND, "i2v", "20", "0.4"), 30.0, {"teacache": (29.0, 0.4, "")})
        # nothing like it, and a default that met another share
        + cell((SECOND, "i2v", "20", "0.5"), 30.0, {"teacache": (29.0, 0.6, "")})
        + cell((FEW, "t2v", "4", "0.4"), 30.0, {"fewer_steps": (40.0, 0.5, "better")}, flops=0.5)
    )  # fmt: skip
    said = reached(PROMISED + others)
    (worse,) = said["nowhere worse than the best of fewer steps and the step caches at like FLOPs"]
    assert worse.startswith("in 1 of 6 cells worse (second, image to video, 4 steps, 0.75: ")
    assert worse.endswith("fewer steps 37.0, we 35.8)")
    # the second of the three that were promised is within both intervals
    assert said["better in half of the cells"] == ["3; level in 2"]
    low, high = MOTION
    assert said[f"motion {low} to {high} at 0.67"] == [
        "in 1 of 2; not in first, text to video, 4 steps, 0.67 1.10"
    ]


def test_what_nothing_was_chosen_on_is_said_beside_whole_and_repeated_steps():
    slim = cell(
        (SLIM, "t2v", "20", "0.67"),
        46.6,
        {"skip": (45.8, 0.65, ""), "fewer_steps": (31.0, 0.65, "")},
    )
    text = aims_table(PROMISED + slim, VERDICTS)
    assert "16 prompts: 43.9 dB, they 43.4; EasyCache 37.0, fewer steps 31.0" in text
    assert "0.67: 46.6 dB, they 45.8; fewer steps 31.0 |" in text
    # and it is no cell of the tiny Wans
    assert "of 3 cells worse" in text and text.count("nothing was chosen on") == 2

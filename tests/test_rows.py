"""Rows that people share: good ones are printed, damaged and foreign ones refused in words."""

import copy
import json

import pytest

from wantrim.benchmarks.rows import check_row, main, read_rows


def candidate(name: str, **figures) -> dict:
    empty = dict.fromkeys(
        ("psnr_db", "ssim", "motion_ratio", "flicker", "dense_flicker", "equal", "failed")
    )
    base = {"name": name, "label": name, "seconds": 31.5, "cached": False, "work": 0.63}
    return {**base, **empty, "remarks": 0, **figures}


ROW = {
    "format": "wantrim_trial/1",
    "models": [
        {
            "class": "WanModel",
            "dim": 1536,
            "ffn_dim": 8960,
            "num_blocks": 30,
            "num_heads": 12,
            "in_channels": 16,
            "out_channels": 16,
            "sample": [0.1, -0.2],
        }  # fmt: skip
    ],
    "run": {
        "pixels": [81, 480, 832],
        "grid": [21, 30, 52],
        "steps": 30,
        "sampler": "uni_pc",
        "guidance": 6.0,
        "prompts": 2,
        "shift": 8.0,
        "start_image": False,
    },  # fmt: skip
    "device": "NVIDIA GeForce RTX 4090",
    "versions": {"wantrim": "0.1.0", "comfyui": "0.33.0", "torch": "2.13.0+cu130"},
    "wanted": 1.6,
    "best": "plan",
    "rows": [
        candidate("whole", seconds=50.4, work=1.0),
        candidate("plan", psnr_db=27.31, ssim=0.91, motion_ratio=1.04, equal=False),
        candidate("steps", work=0.6, failed="out of memory while sampling", seconds=None),
    ],
}


def changed(*where, to) -> dict:
    row = copy.deepcopy(ROW)
    inside = row
    for name in where[:-1]:
        inside = inside[name]
    inside[where[-1]] = to
    return row


def test_good_row_is_printed(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(ROW))
    assert main([str(tmp_path / "mine.json")]) == 0
    said = capsys.readouterr().out
    assert "WanModel, 30 blocks, dim 1536, 81x480x832, 30 steps uni_pc" in said
    plan, steps = [line for line in said.splitlines() if line.startswith(("  plan", "  steps"))]
    assert "27.3 dB" in plan and plan.endswith("<- best")
    assert "out of memory" in steps and "best" not in steps


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"format": "wantrim_profile/1"}, "expected a row of WanTrim Verdict"),
        (7, "expected a row of WanTrim Verdict"),
        ({**ROW, "prompt": "a secret"}, "not known ['prompt']"),
        ({k: v for k, v in ROW.items() if k != "wanted"}, "missing ['wanted']"),
        (changed("device", to="/home/me/gpu"), "without a path"),
        (changed("rows", 1, "label", to="C:\\\\me"), "without a path"),
        (changed("rows", 1, "label", to="a" * 300), "short text"),
        (changed("rows", 1, "psnr_db", to=float("nan")), "psnr_db: expected"),
        (changed("rows", 1, "work", to="0.5"), "work: expected 0 to 2"),
        (changed("rows", 1, "seconds", to=True), "seconds: expected"),
        (changed("rows", 1, "name", to="whole"), "names that differ"),
        (changed("best", to="whole"), "best: expected the name"),
        (changed("models", to=[]), "models: expected one"),
        (changed("models", 0, "num_heads", to=7), "impossible sizes"),
        (changed("models", 0, "file", to="mine.gguf"), "not known ['file']"),
        (changed("run", "pixels", to=[81, 480]), "pixels: expected frames"),
    ],
)
def test_other_rows_are_refused_in_words(row, says):
    check_row(ROW)
    with pytest.raises(ValueError) as caught:
        check_row(row)
    assert says in str(caught.value)


def test_good_rows_beside_bad_ones_are_kept(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    lines = [json.dumps(ROW), json.dumps(changed("wanted", to=-1))]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    (tmp_path / "broken.json").write_text('{"format": "wantrim_trial/1",')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    files = [str(tmp_path / name) for name in ("two.jsonl", "broken.json", "deep.json", "none")]
    assert main(files) == 1
    assert capsys.readouterr().out.count("<- best") == 1
    assert "two.jsonl, row 2: wanted: expected 1 to 100, got -1" in caplog.text
    assert (
        caplog.text.count("cannot be read") == 3 and "1 rows are good, 4 are refused" in caplog.text
    )
    assert [type(row) for _, row in read_rows(tmp_path / "two.jsonl")] == [dict, ValueError]

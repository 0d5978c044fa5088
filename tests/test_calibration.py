"""How far the toys are off: the table by hand, and the command in the bench's runner."""

import pytest

from wantrim.benchmarks import calibration, quality
from wantrim.benchmarks.calibration import PUBLISHED, Published, calibration_table, middle
from wantrim.benchmarks.cases import Point
from wantrim.benchmarks.table import RESULTS, read_rows
from wantrim.toy.worlds import World


def test_published_figures_are_read():
    assert [middle(said) for said in ("22.5-25", "14.5", "15.8 (14B)")] == [23.75, 14.5, 15.8]
    names = {one.name for one in PUBLISHED if one.psnr_db and one.method}
    issue = "EasyCache TeaCache SeaCache ZEUS MagCache PAB Astraea"
    assert names == {*issue.split(), "fewer steps"}
    # a pair's figures are shown, and nothing is held against them yet
    assert all(not one.method for one in PUBLISHED if "Wan2.2" in one.psnr_db)


def test_the_table_says_how_far_each_toy_is_off(monkeypatch):
    def row(name, speedup, here, model="tiny_wan", prompts="8"):
        return {
            "published": name, "speedup": speedup, "method": "tome", "model": model,
            "prompts": prompts, "seeds": "1", "psnr_db": here, "flops_ratio": "0.5",
        }  # fmt: skip

    figures = (("a", 2.0, "20-22"), ("b", 3.0, "15 (14B)"), ("c", 4.0, ""), ("d", 5.0, "9"))
    published = [Published(*one, "somebody's", "tome") for one in figures]
    published.append(Published("e", 2.0, "30 (Wan2.2)", "somebody's", ""))
    monkeypatch.setattr(calibration, "PUBLISHED", published)
    rows = [
        row("a", "2.0", "24"),
        row("a", "2.0", "99", prompts="4"),
        row("b", "3.0", "11"),
        row("c", "4.0", "30"),
        row("d", "5.0", ""),
        row("b", "3.0", "16", model="tiny_wan_2"),
        row("b", "2.0", "99", model="tiny_wan_2"),
    ]

    assert calibration_table(rows).splitlines()[2:] == [
        "| a | 2x | 20-22 | tome | 24.0 (2.00x) |  |",
        "| b | 3x | 15 (14B) | tome | 11.0 (2.00x), **-4.0** | 16.0 (2.00x) |",
        "| c | 4x |  | tome | 30.0 (2.00x) |  |",
        "| d | 5x | 9 | tome | not reached |  |",
        "| e | 2x | 30 (Wan2.2) | needs a pair |  |  |",
        # the differences are 3 and -4; 1
        "| root mean square of the differences | | | | 3.5 | 1.0 |",
    ]


def test_the_command_fills_a_toys_column(monkeypatch, tmp_path):
    published = [
        Published("steps", 2.0, "15.8", "somebody's", "fewer_steps"),
        Published("cache", 3.0, "9", "somebody's", "easycache"),
        Published("pair", 2.0, "30 (Wan2.2)", "somebody's", ""),
    ]
    monkeypatch.setattr(calibration, "PUBLISHED", published)
    monkeypatch.setattr(calibration, "POINT", Point(4, 3.0, shift=8.0))
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["calibration", *folders, "--jobs", "1", "--prompts", "1"])
    calibration.main()
    rows = read_rows(tmp_path / "calibration.csv")
    ran = [(r["published"], r["model"], r["steps"], r["guidance"], r["shift"]) for r in rows]
    assert ran == [(name, "tiny_wan", "4", "3", "8") for name in ("steps", "cache")]
    assert float(rows[0]["flops_ratio"]) == 0.5 and 0 < float(rows[0]["psnr_db"]) < 60
    assert rows[1]["psnr_db"] == "" and "of the dense FLOPs" in rows[1]["knob"]
    assert "| cache | 3x | 9 | easycache | not reached |  |" in calibration_table(rows)


def test_the_documented_command_makes_the_rows_that_are_there(monkeypatch):
    ran = []
    monkeypatch.setattr(calibration, "run_cases", lambda args, *_, **__: ran.append(args))
    monkeypatch.setattr(quality, "commit", lambda: "1234567")
    monkeypatch.setattr("sys.argv", ["calibration", "--full"])
    calibration.main()
    (args,) = ran
    rows = read_rows(RESULTS / "calibration.csv")
    assert {(r["prompts"], r["seeds"]) for r in rows} == {(str(args.prompts), str(args.seeds))}
    assert args.results == RESULTS


def test_a_toy_in_training_has_no_row_here(monkeypatch):
    monkeypatch.setattr("sys.argv", ["calibration", "--world", "2"])
    monkeypatch.setattr(quality, "commit", lambda: "1234567")
    monkeypatch.setattr(World, "finished", False)
    with pytest.raises(SystemExit, match="in training"):
        calibration.main()
    for row in read_rows(RESULTS / "calibration.csv"):
        assert "dirty" not in row["commit"]

import csv
import shutil

import pytest

from wantrim.demo import anatomy
from wantrim.hosts.diffusers.weights import load_original
from wantrim.toy import CHECKPOINT
from wantrim.toy.held_out import held_out_scenes
from wantrim.toy.worlds import FIRST, SECOND


@pytest.fixture(scope="module")
def model():
    return load_original(CHECKPOINT)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(anatomy, "STEPS", 2)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_head_gets_its_ratio_and_role(model, tmp_path):
    anatomy.measure_heads(model, FIRST, held_out_scenes(1), tmp_path)
    written = rows(tmp_path / "heads.csv")
    assert len({(row["block"], row["head"]) for row in written}) == 16 * 8
    assert all(0 <= float(row["intra_slice_ratio"]) <= 1 for row in written)
    assert {"uniform", "temporal", "mixed"} <= {row["role"] for row in written}
    assert (tmp_path / "head_roles.png").stat().st_size > 0
    assert all(not block._diffusers_hook.hooks for block in model.blocks)


@pytest.mark.parametrize(
    ("ratio", "frames", "wanted"),
    [
        (0.1499, 5, "temporal"), (0.1501, 5, "uniform"), (0.2499, 5, "uniform"),
        (0.2501, 5, "temporal"), (0.31, 5, "mixed"), (0.71, 5, "spatial"),
        (0.2, 2, "temporal"), (0.46, 2, "uniform"), (0.56, 2, "mixed"),
    ],
)  # fmt: skip
def test_a_head_like_uniform_attention_has_no_role(ratio, frames, wanted):
    assert anatomy.label(ratio, frames) == wanted


def test_the_second_worlds_heads_are_measured_on_its_own_grid(model, tmp_path, monkeypatch):
    monkeypatch.setattr(anatomy, "STEPS", 1)
    anatomy.measure_heads(model, SECOND, SECOND.held_out_scenes(1), tmp_path)
    ratios = [float(row["intra_slice_ratio"]) for row in rows(tmp_path / "heads.csv")]
    assert len(ratios) == 16 * 8
    # five latent frames: attention that does not look at time gives 0.2
    assert 0.1 < sum(ratios) / len(ratios) < 0.6


def test_leaving_out_a_block_changes_the_video(model, tmp_path):
    anatomy.measure_blocks(model, FIRST, held_out_scenes(1), tmp_path)
    written = rows(tmp_path / "skip_one_block.csv")
    assert [row["left_out"] for row in written[:16]] == [f"block {i}" for i in range(16)]
    assert all(float(row["psnr_db"]) < 60 for row in written[:16])
    assert (tmp_path / "skip_one_block.png").stat().st_size > 0


def test_adherence_and_loss_are_written(model, tmp_path):
    anatomy.measure_adherence(model, FIRST, 2, tmp_path, 2)
    written = rows(tmp_path / "adherence.csv")
    assert [(row["objects"], row["prompts"]) for row in written] == [
        ("1", "2"),
        ("2", "1"),
        ("3", "1"),
    ]
    shutil.copy(anatomy.HERE / "tiny_wan" / "training_log.csv", tmp_path)
    anatomy.plot_loss(FIRST, tmp_path)
    assert (tmp_path / "loss_curve.png").stat().st_size > 0


def test_a_second_measurement_replaces_its_own_rows_only(model, tmp_path, monkeypatch):
    scored = iter(range(9))
    monkeypatch.setattr(anatomy, "score_prompts", lambda *a, **k: {"colour_ok": next(scored) / 10})
    for steps, guidance in ((20, None), (4, 1.0), (20, None)):
        anatomy.measure_adherence(model, FIRST, 2, tmp_path, steps, guidance)
    found = [(r["steps"], r["guidance"], r["colour_ok"]) for r in rows(tmp_path / "adherence.csv")]
    assert found == [
        ("4", "1", "0.300"),
        ("4", "1", "0.400"),
        ("4", "1", "0.500"),
        ("20", "4", "0.600"),
        ("20", "4", "0.700"),
        ("20", "4", "0.800"),
    ]

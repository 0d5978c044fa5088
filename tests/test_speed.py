"""The speed bench on a model that takes milliseconds."""

from argparse import Namespace

import pytest
import torch

from wantrim.benchmarks.speed import COLUMNS, Size, build, measure, plans

SMALL = Size("small", 48, 4, 64, 2, (3, 8, 8))


def test_a_row_has_every_column_and_the_predicted_speed_up():
    built = build(SMALL, "cpu", torch.float32)
    args = Namespace(dtype="float32", device="cpu", repeats=1)
    rows = {name: measure(SMALL, built, name, plan, args) for name, plan in plans(SMALL).items()}
    assert all(set(row) == set(COLUMNS) for row in rows.values())
    assert rows["neutral"]["predicted"] == 1.0
    off = rows["1 of 4 heads off"]
    assert off["tokens"] == 3 * 4 * 4 and 1.0 < off["predicted"] < 4 / 3
    assert off["efficiency"] == pytest.approx(off["speedup"] / off["predicted"])
    # of three latent frames, half of the heads see one
    frames = rows["2 of 4 heads within latent frames"]
    assert 1.0 < frames["predicted"] < 1.5

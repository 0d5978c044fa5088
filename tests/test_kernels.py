import math

import pytest
import torch

from wantrim.kernels import reference
from wantrim.kernels.reference import frame_mass, smooth_select, token_mass


def exact_mass(q, k, grid, index, start, radius):
    """The same mean from the whole attention matrix, in fp64."""
    f, h, w = grid
    tokens = f * h * w
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    matrix = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)
    matrix = matrix[:, start : start + tokens, start : start + tokens]
    out = torch.zeros(len(matrix), tokens, dtype=torch.float64)
    for key in range(tokens):
        row, column = divmod(key % (h * w), w)
        used = []
        for query in index.tolist():
            qr, qc = divmod(query % (h * w), w)
            if radius == 0 or abs(qr - row) > radius or abs(qc - column) > radius:
                used.append(query)
        if used:
            out[:, key] = matrix[:, used, key].mean(-1)
    return out


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 7, 9), (3, 5, 4), (5, 6, 6)])
@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize(("batch", "start", "after"), [(1, 0, 0), (2, 3, 2)])
def test_token_mass_is_the_streamed_column_mean(grid, radius, batch, start, after, monkeypatch):
    tokens = math.prod(grid)
    torch.manual_seed(tokens + radius)
    q, k = torch.randn(2, batch, start + tokens + after, 3, 8).unbind()
    index = torch.arange(0, tokens, 2)
    # two queries at a time: the stream must not depend on its chunks
    monkeypatch.setattr(reference, "CHUNK_SCORES", 2 * batch * k.shape[1])
    got = token_mass(q, k, grid, index, start=start, exclude_radius=radius)
    want = exact_mass(q, k, grid, index, start, radius)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_token_mass_never_holds_the_whole_matrix(monkeypatch):
    largest = 0
    softmax = torch.Tensor.softmax

    def watch(self, dim):
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 8 * 300)
    q, k = torch.randn(2, 1, 300, 2, 4).unbind()
    token_mass(q, k, (3, 10, 10), torch.arange(300))
    assert 0 < largest <= 8 * 300


def test_token_mass_in_bf16_follows_fp64():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 60, 2, 16).unbind()
    low_q, low_k = q.bfloat16(), k.bfloat16()
    got = token_mass(low_q, low_k, (3, 4, 5), torch.arange(60))
    want = exact_mass(low_q, low_k, (3, 4, 5), torch.arange(60), 0, 0)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_smoothing_uses_the_raw_score_of_the_frame_before():
    # alpha 0.5: frame 1 becomes (4+0)/2, (1+8)/2 -> 2.0, 4.5; frame 2 (1+4)/2, (2+1)/2 -> 2.5, 1.5
    # a recursive average would give frame 2: (1+2)/2, (2+4.5)/2 -> 1.5, 3.25 and keep the other
    scores = torch.tensor([[[0.0, 8.0], [4.0, 1.0], [1.0, 2.0]]])
    assert smooth_select(scores, 1, 0.5).tolist() == [[[1], [1], [0]]]
    assert smooth_select(scores, 1, 1.0).tolist() == [[[1], [0], [1]]]


def test_ties_go_to_the_lowest_position_and_come_sorted():
    scores = torch.tensor([[[1.0, 5.0, 1.0, 1.0, 5.0, 1.0]]])
    assert smooth_select(scores, 4, 0.5).tolist() == [[[0, 1, 2, 4]]]


@pytest.mark.parametrize("positions", [1, 63, 100])
def test_every_frame_keeps_the_same_number(positions):
    torch.manual_seed(positions)
    scores = torch.randn(2, 4, positions)
    for keep in (1, positions // 2 or 1, positions):
        index = smooth_select(scores, keep, 0.5)
        assert index.shape == (2, 4, keep)
        assert (index.diff(dim=-1) > 0).all()
    assert torch.equal(index, torch.arange(positions).expand(2, 4, -1))


def tile_of(position, grid, side):
    _, h, w = grid
    row, column = divmod(position % (h * w), w)
    return math.floor(row * side / h), math.floor(column * side / w)


@pytest.mark.parametrize(
    ("grid", "start", "after"), [((1, 2, 3), 0, 0), ((4, 3, 3), 2, 5), ((3, 7, 5), 1, 2)]
)
@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_mass_kept_is_the_share_of_each_pattern(grid, start, after, chunk, monkeypatch):
    tokens, per_frame = math.prod(grid), grid[1] * grid[2]
    tiles = (2, 3, 4)
    torch.manual_seed(1)
    q, k = torch.randn(2, 2, start + tokens + after, 3, 8).unbind()
    monkeypatch.setattr(reference, "CHUNK_SCORES", chunk * 2 * k.shape[1])
    index = torch.arange(0, tokens, 2)
    matrix = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 8**0.5).softmax(-1)
    want = torch.zeros(2, 3, 4, dtype=torch.float64)
    for query in index.tolist():
        row = matrix[:, :, start + query] / len(index)
        first = start + query // per_frame * per_frame
        want[..., 0] += row[..., first : first + per_frame].sum(-1)
        for at, side in enumerate(tiles, 1):
            own = tile_of(query, grid, side)
            seen = [start + key for key in range(tokens) if tile_of(key, grid, side) == own]
            want[..., at] += row[..., seen].sum(-1)
    got = frame_mass(q, k, grid, index, start=start, tiles=tiles)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    alone = frame_mass(q, k, grid, index, start=start, tiles=())
    torch.testing.assert_close(alone, got[..., :1])


def test_mass_kept_never_holds_the_whole_matrix(monkeypatch):
    largest = 0
    softmax = torch.Tensor.softmax

    def watch(self, dim):
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 8 * 300)
    q, k = torch.randn(2, 1, 300, 2, 4).unbind()
    frame_mass(q, k, (3, 10, 10), torch.arange(300))
    assert 0 < largest <= 8 * 300


def test_uniform_attention_keeps_the_size_of_each_pattern():
    zeros = torch.zeros(1, 5 * 4 * 6, 2, 4)
    mass = frame_mass(zeros, zeros, (5, 4, 6), torch.arange(120), tiles=(2, 1))
    torch.testing.assert_close(mass, torch.tensor([0.2, 0.25, 1.0]).expand(1, 2, 3))

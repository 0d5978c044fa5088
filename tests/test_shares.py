"""Which share of a step's tokens is computed: by hand."""

import pytest
import torch

from wantrim.methods.grid import TokenGrid
from wantrim.methods.shares import (
    Shares,
    expected_error,
    held_by_most,
    latent_mask,
    place_of,
    token_change,
)

SIGMAS = (1.0, 0.8, 0.4, 0.3)


@pytest.mark.parametrize(
    ("sigma", "wanted"),
    [
        (1.2, 0),
        (1.0, 0),
        # a tenth of the way before it is still that step
        (0.83, 0),
        (0.82, 1),
        (0.81, 1),
        (0.8, 1),
        (0.5, 1),
        (0.45, 1),
        (0.435, 2),
        (0.4, 2),
        (0.32, 2),
        (0.305, 3),
        (0.0, 3),
    ],
)
def test_a_sigma_belongs_to_the_step_that_began_last(sigma, wanted):
    assert place_of(SIGMAS, sigma) == Shares(SIGMAS, (1.0,) * 4).place(sigma) == wanted


def test_a_sampler_that_goes_up_is_followed():
    # no way between two alike sigmas, nor back up
    assert [place_of((0.5, 0.5, 0.9), at) for at in (0.95, 0.9, 0.51, 0.5)] == [0, 2, 2, 2]


def test_a_share_of_every_step():
    shares = Shares(SIGMAS, (1.0, 0.5, 0.0, 1.0))
    assert [shares.at(sigma) for sigma in SIGMAS] == [1.0, 0.5, 0.0, 1.0]
    assert shares.partial and not shares.neutral
    # without a context there is no part
    bare = Shares(SIGMAS, (1.0, 0.5, 0.0, 1.0), context=False)
    assert [bare.at(sigma) for sigma in SIGMAS] == [1.0, 1.0, 0.0, 1.0] and not bare.partial
    assert Shares(SIGMAS, (1.0,) * 4).neutral and not Shares(SIGMAS, (1.0,) * 4).partial
    repeats = Shares(SIGMAS, (1.0, 0.0, 0.0, 1.0))
    assert not repeats.partial and not repeats.neutral


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ((1.0, 0.5, 0.0, 1.0), [True, False, False, False]),
        ((1.0, 0.0, 0.5, 1.0), [True, True, False, False]),
        ((1.0, 1.0, 1.0, 0.01), [False, False, True, False]),
        ((1.0, 0.0, 0.0, 0.0), [False] * 4),
    ],
)
def test_context_is_needed_until_a_step_is_whole(shares, wanted):
    assert [Shares(SIGMAS, shares).needs_context(sigma) for sigma in SIGMAS] == wanted


def test_the_change_of_a_token_is_that_of_its_patch():
    """Latents of 2 channels, 2 frames, 4 x 6 places; tokens are 2 x 2 of them."""
    grid = TokenGrid(2, 2, 3)
    difference = torch.zeros(1, 2, 2, 4, 6, dtype=torch.bfloat16)
    # frame 1, token row 1, column 2
    difference[0, :, 1, 2:, 4:] = torch.tensor([3.0, -1.0]).view(2, 1, 1)
    # one place of four, one channel of two, at the first token
    difference[0, 1, 0, 1, 1] = 4.0
    found = token_change(difference, grid)
    wanted = torch.zeros(1, 12)
    wanted[0, 11], wanted[0, 0] = 5.0, 2.0
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_of_an_odd_latent_each_row_is_of_the_token_that_computes_it():
    """45 x 5 places in 23 x 3 tokens of 2 x 2: the last ones are padded."""
    grid = TokenGrid(2, 23, 3)
    for row in range(45):
        difference = torch.zeros(1, 4, 2, 45, 5)
        difference[:, :, 0, row] = 1.0
        found = token_change(difference, grid).view(2, 23, 3)
        assert (found[0, row // 2] == (1.0 if row == 44 else 0.5)).all()
        assert found.sum() == found[0, row // 2].sum()
    assert (token_change(torch.ones(1, 4, 2, 45, 5), grid) == 1.0).all()


def test_what_lies_behind_the_video_does_not_change():
    # a reference is a latent frame more of tokens
    found = token_change(torch.ones(2, 3, 2, 4, 4), TokenGrid(3, 2, 2))
    assert torch.equal(found, torch.tensor([1.0] * 8 + [0.0] * 4).expand(2, -1))


def test_what_most_changed_tokens_hold():
    change = torch.tensor([[0.0, 1.0, 6.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    # 1, 2 and 3 of 4; never none
    found = held_by_most(change, (0.01, 0.5, 0.75))
    assert found.tolist() == pytest.approx([(0.6 + 0.25) / 2, (0.9 + 0.5) / 2, (1.0 + 0.75) / 2])
    assert held_by_most(torch.zeros(1, 4), (0.5, 1.0)).tolist() == [0.0, 0.0]
    # of 20 that change alike it is their share, of those that curves know where none are named
    known = held_by_most(torch.ones(1, 20)).tolist()
    assert known == pytest.approx([0.1, 0.2, 0.35, 0.5, 0.8])
    # of what changes hardly at all it is the same
    assert held_by_most(change[:1] * 1e-30, (0.25,)).item() == pytest.approx(0.6)


def test_an_error_grows_with_the_square_of_the_steps():
    change = torch.tensor([2.0, 2.0, 3.0])
    assert expected_error(change, torch.tensor([0.0, 1.0, 2.0])).tolist() == [2.0, 8.0, 27.0]


def test_places_that_are_padded_are_of_the_last_token():
    """A latent of 1 x 3 x 5 places in 1 x 2 x 3 tokens of 2 x 2."""
    kept = torch.tensor([[True, False, False, False, True, True]])
    mask = latent_mask(kept, TokenGrid(1, 2, 3), (1, 3, 5))
    assert mask.shape == (1, 1, 1, 3, 5)
    assert mask[0, 0, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]

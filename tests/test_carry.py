"""A velocity that is not computed goes on as it changed last: by hand, and in the engine."""

import pytest
import torch

from wantrim.engine.context import Room
from wantrim.engine.memory import Part, Prompt
from wantrim.methods.carry import MOST, carried, explain, persistence


def test_the_persistence_is_the_least_squares_fit_of_each_sample():
    foretold = torch.tensor([[1.0, 2.0, -2.0], [3.0, 0.0, 4.0]])
    came = torch.stack([0.5 * foretold[0] + torch.tensor([2.0, -1.0, 0.0]), -foretold[1]])
    # what stands upright on it tells nothing; what turned back does not go on
    assert persistence(foretold, came).flatten().tolist() == pytest.approx([0.5, 0.0])
    assert persistence(foretold, 3 * foretold).flatten().tolist() == pytest.approx([MOST] * 2)
    assert persistence(0 * foretold, came).tolist() == [[0.0], [0.0]]
    broken = persistence(foretold, came * torch.nan)
    assert broken.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("by", "ahead", "wanted"),
    [
        (0.5, 1.0, 0.5),
        (0.5, 2.0, 0.75),
        (0.5, 3.0, 0.875),
        (0.8, 2.0, 1.44),
        (0.0, 1.0, 0.0),
        (0.5, 0.0, 0.0),
        # no way back, and half of a way is a little more than half of the change
        (0.5, -1.0, 0.0),
        (0.81, 0.5, 0.81 * 0.1 / 0.19),
    ],
)
def test_changes_shrink_by_the_same_factor(by, ahead, wanted):
    assert carried(torch.tensor(by), torch.tensor(ahead)).item() == pytest.approx(wanted)


def test_a_change_is_never_more_than_in_a_straight_line():
    ahead = torch.tensor([1.0, 2.0, 5.0])
    assert (carried(torch.tensor(MOST), ahead) <= ahead).all()
    assert torch.allclose(carried(torch.tensor(0.9), 1e4 * ahead), torch.tensor(9.0))


def way(a: float, b: float, c: float) -> torch.Tensor:
    return torch.tensor([a, b, c])


def test_a_path_is_explained_by_any_number_of_ways():
    ways = [way(1.0, 1, 0), way(0.0, 2, 0), way(0.0, 0, 0), way(2.0, 4, 0)]
    parts, rest = explain(3 * ways[0] - 2 * ways[1] + way(0, 0, 5), ways)
    assert torch.allclose(rest, way(0, 0, 5.0), atol=1e-5)
    assert torch.allclose(sum(p * w for p, w in zip(parts, ways, strict=True)), way(3, -1, 0.0))
    assert parts[2] == 0 and abs(parts[3]) < 1e-4
    assert explain(way(1, 2, 3), [])[0] == []


SIZE = (1, 2, 1, 2, 2)


def sampled(velocity, sigmas, computed, guidance=3.0, dtype=torch.float32):
    """What a part gives for two prompts at each sigma, along the way of an Euler sampler.

    Args:
        velocity: sigma -> velocities of both prompts.
        computed: whether each step is.
    """
    part, x, found = Part(Room()), torch.zeros(SIZE), []
    for number, sigma in enumerate(sigmas):
        if number:
            part.look(torch.tensor(sigma, dtype=torch.float64), x)
        part.begin(sigma, x)
        rows = []
        for key, said in zip("ab", velocity(sigma), strict=True):
            said = said.to(dtype)
            again = part.remember(key, said, sigma, x, None) if computed[number] else None
            rows.append(part.repeat(key, sigma, x) if again is None else again)
        found.append(rows)
        ahead = (sigmas[number + 1] if number + 1 < len(sigmas) else 0.0) - sigma
        cond, uncond = (row.float() for row in rows)
        x = x + ahead * (uncond + guidance * (cond - uncond))
    return found, part


def shape(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


SIGMAS = (1.0, 0.9, 0.8, 0.7, 0.6)


def test_a_change_that_goes_on_alike_is_met():
    """Each step's change is 0.6 times the one before, of both prompts."""
    fast, slow = shape(1), shape(2)

    def velocity(sigma):
        done = (1 - 0.6 ** ((1.0 - sigma) / 0.1)) / 0.4
        return fast + done * slow, slow - done * fast

    found, part = sampled(velocity, SIGMAS, (1, 1, 1, 0, 0))
    assert part.persistence.item() == pytest.approx(0.6, abs=1e-4)
    for number in (3, 4):
        for got, want in zip(found[number], velocity(SIGMAS[number]), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    # kept as it was until it is known how far it goes on
    found, part = sampled(velocity, SIGMAS, (1, 1, 0, 0, 1))
    assert torch.equal(found[2][0], found[1][0]) and torch.equal(found[3][0], found[1][0])
    # in bf16 what is lost is the rounding of what came
    found, _ = sampled(velocity, SIGMAS, (1, 1, 1, 0, 0), dtype=torch.bfloat16)
    assert found[4][0].dtype == torch.bfloat16
    torch.testing.assert_close(found[4][0].float(), velocity(SIGMAS[4])[0], atol=0.06, rtol=0.03)


def test_in_bf16_what_is_not_computed_is_rounded_once():
    """Of a velocity that goes to almost nothing: its change all but cancels what it was."""
    draw = torch.Generator().manual_seed(5)
    first, end = torch.randn(2, 2, 4, 3, 6, 5, generator=draw, dtype=torch.float64)
    mask = torch.rand(2, 1, 3, 6, 5, generator=draw) < 0.5
    by = torch.tensor([0.35, 0.2]).view(2, 1, 1, 1, 1)

    def came(sigma):
        return (0.02 * end + first * by.double() ** ((0.88 - sigma) / 0.08)).bfloat16()

    prompt = Prompt()
    for sigma in (0.88, 0.8):
        prompt.take(came(sigma), sigma, None)
    old, turn = came(0.8).double(), came(0.8).double() - came(0.88).double()
    since, gap = torch.full(mask.shape, 0.8).double(), 0.08
    for number, sigma in enumerate((0.74, 0.65, 0.61, 0.47, 0.3, 0.11)):
        got, exact = prompt.at(sigma, by), old + turn * carried(by.double(), (since - sigma) / gap)
        once = (exact.bfloat16().double() - exact).square().mean((1, 2, 3, 4)).sqrt()
        error = (got.double() - exact).square().mean((1, 2, 3, 4)).sqrt()
        assert got.dtype == torch.bfloat16 and (error < 1.2 * once).all(), (sigma, error / once)
        if number == 2:
            # a part of it is computed
            new = came(sigma)
            prompt.take(new, sigma, mask)
            turn, gap = (
                torch.where(mask, new.double() - old, turn),
                torch.where(mask, since - sigma, gap),
            )
            old, since = torch.where(mask, new.double(), old), torch.where(mask, sigma, since)


def test_it_is_the_guided_velocity_that_tells():
    """The prompts go on and their difference turns back: with guidance nothing does."""
    shared, between = shape(1), shape(2)

    def velocity(sigma):
        done = (1.0 - sigma) / 0.1
        swings = (-1.0) ** round(done)
        return shared * done + between * swings, shared * done

    weak, strong = (sampled(velocity, SIGMAS, (1, 1, 1, 0, 0), g)[1] for g in (0.0, 50.0))
    assert weak.persistence.item() == pytest.approx(MOST, abs=1e-3)
    assert strong.persistence.item() == 0.0


def test_where_a_sampler_goes_back_nothing_goes_on():
    def velocity(sigma):
        return shape(1) * sigma, shape(2) * sigma

    sigmas = (1.0, 0.8, 0.6, 0.9, 0.7)
    found, part = sampled(velocity, sigmas, (1, 1, 1, 1, 0))
    assert torch.equal(found[4][0], found[3][0])
    # the same sigma again tells nothing of how it changes
    part = Part(Room())
    for number, sigma in enumerate((1.0, 0.8, float("0.8"))):
        part.remember("a", shape(number), sigma, torch.zeros(SIZE), None)
    prompt = part.prompts["a"]
    assert torch.equal(prompt.turn, shape(1) - shape(0)) and torch.equal(prompt.velocity, shape(2))
    assert prompt.foretold is None


def test_a_step_of_which_nothing_came_tells_nothing():
    part, x = Part(Room()), torch.zeros(SIZE)
    assert part.look(1.0, x) == (None, None)
    # another node answered it
    part.begin(1.0, x)
    assert part.look(0.9, x) == (None, None)

"""Stage III: rollouts on the student's own samples, distribution matching, and its critic."""

import json

import pytest
import torch
from torch import nn

from wantrim.hosts.diffusers.sample import sample, sigmas_for
from wantrim.hosts.diffusers.slim import load_slim
from wantrim.slim.file import read_header
from wantrim.tests.small_wan import make_origin, train_here, write_recipe
from wantrim.toy.text import TEXT_DIM
from wantrim.training.draws import Draws
from wantrim.training.forcing import distribution_loss, rollout, self_forcing
from wantrim.training.gate import Taps
from wantrim.training.objectives import OBJECTIVES, Pair
from wantrim.training.recipe import Stage
from wantrim.training.shards import Batch
from wantrim.training.toy_data import ToyDataset

CHANGES = ("steps.steps=7", "steps.sampler_steps=3", "steps.critic_updates=3")
# what is changed by its kind comes before
CHANGES += ("steps.critic_lr=1e-3", "steps.guidance=2.0", "steps.kind='self_forcing'")


class Towards(nn.Module):
    """Its velocity leads from any point to one video, the text's mean plus its weight, everywhere."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(offset)]))
        self.blocks = nn.ModuleList()
        self.asked = []

    def forward(self, x, timestep, text, image=None, return_dict=False):
        self.asked.append((x[:, :16].detach().clone(), (timestep / 1000).tolist()))
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        target = text.mean((1, 2)).view(-1, 1, 1, 1, 1) + self.weight
        return ((x[:, :16] - target) / sigma,)


def pair_of(student=0.0, teacher=0.0, critic=0.0):
    student, teacher, critic = Towards(student), Towards(teacher), Towards(critic)
    negative = torch.full((24, TEXT_DIM), 0.1)
    return Pair(student, teacher, Taps(student), Taps(teacher), None, negative, critic=critic)


def batch_of(count=2, text=0.5):
    batch = ToyDataset(count).batch(0)
    return Batch(batch.latents, torch.full_like(batch.text, text), batch.condition)


def stage_of(**options):
    given = {"sampler_steps": 3, "guidance": 4.0, "shift": 2.0, "critic_updates": 3}
    return Stage("self_forcing", 9, warmup=1, **given | options)


# rollout


def test_a_rollout_is_the_samplers_steps_on_the_students_own_samples():
    pair, batch, stage = pair_of(student=0.3), batch_of(), stage_of()
    ends = sigmas_for(3, 2.0).tolist()
    lasts = set()
    for step in range(12):
        pair.student.asked.clear()
        made = rollout(pair, stage, batch, Draws(0, 3, step), False)
        asked = pair.student.asked
        lasts.add(len(asked))
        assert [at[0] for _, at in asked] == pytest.approx(ends[: len(asked)])
        # from pure noise, each on what the one before made of it by Euler's rule
        x = Draws(0, 3, step).noise(batch.latents.shape)
        for (given, _), now, then in zip(asked, ends, ends[1:], strict=False):
            assert torch.allclose(given, x, atol=1e-4)
            x = x + (then - now) * (x - 0.8) / now
        assert torch.allclose(made, torch.full_like(made, 0.8), atol=1e-4)
    assert lasts == {1, 2, 3}


def test_only_the_last_step_of_a_rollout_learns():
    pair, batch, stage = pair_of(), batch_of(), stage_of()
    step = next(s for s in range(20) if Draws(0, 3, s).shared.integers(3) == 2)
    rollout(pair, stage, batch, Draws(0, 3, step), True).mean().backward()
    # through all three steps the target's slope would be more than 1
    assert float(pair.student.weight.grad) == pytest.approx(1.0, rel=1e-4)
    assert not rollout(pair, stage, batch, Draws(0, 3, step), False).requires_grad


# distribution matching


def test_a_sample_is_moved_from_the_critics_to_the_guided_teachers():
    """By hand: the critic says 0.5 + 0.2, the teacher, guided by 4, 0.1 + 4 * 0.4 = 1.7."""
    pair, batch, stage = pair_of(critic=0.2), batch_of(), stage_of()
    made = torch.full(batch.latents.shape, 0.9, requires_grad=True)
    loss = distribution_loss(pair, stage, batch, Draws(0, 3, 0), made)
    assert loss.shape == (2,)
    # 1 / |0.9 - 1.7| of the difference
    step = (0.7 - 1.7) / 0.8
    assert loss.tolist() == pytest.approx([0.5 * step**2] * 2, rel=1e-3)
    loss.sum().backward()
    assert float(made.grad.mean() * made[0].numel()) == pytest.approx(step, rel=1e-3)
    assert pair.critic.weight.grad is None and pair.teacher.weight.grad is None
    # each sample by how far it is itself
    with torch.no_grad():
        made[1] = 2.2
    apart = distribution_loss(pair, stage, batch, Draws(0, 3, 0), made)
    assert apart.tolist() == pytest.approx([0.5 / 0.8**2, 0.5 / 0.5**2], rel=1e-3)


def test_noise_levels_are_drawn_for_each_sample_between_the_ends():
    pair, stage = pair_of(), stage_of(shift=5.0)
    for step in range(60):
        batch = batch_of(4)
        distribution_loss(pair, stage, batch, Draws(0, 3, step), batch.latents)
    levels = torch.tensor([at for _, at in pair.critic.asked])
    assert (levels[:, 0] != levels[:, 1]).all()
    # 0.02 and 0.98 under a shift of 5
    assert 0.0925 < float(levels.min()) < 0.2 and 0.98 < float(levels.max()) < 0.9960
    # critic and teacher see the same
    assert torch.equal(pair.critic.asked[0][0], pair.teacher.asked[0][0])


def test_the_critic_learns_what_the_student_makes_and_nothing_else():
    pair, batch, stage = pair_of(student=0.3), batch_of(), stage_of()
    for step, turn in ((0, True), (1, False), (2, False), (3, True), (5, False)):
        terms = self_forcing(pair, stage, batch, Draws(0, 3, step))
        assert ("match" in terms) == turn
        for model in (pair.student, pair.critic):
            model.weight.grad = None
        terms["loss"].backward()
        assert (pair.student.weight.grad is not None) == turn
        # the student makes 0.3 more than the critic believes: it has to rise
        assert float(pair.critic.weight.grad) < 0
        assert pair.teacher.weight.grad is None
        said = {name: float(term.detach()) for name, term in terms.items()}
        assert said["loss"] == pytest.approx(said["critic"] + said.get("match", 0.0), rel=1e-5)
    for model in (pair.student, pair.critic):
        model.weight.grad = None
    pair.critic.weight.data.fill_(0.3)
    terms = self_forcing(pair, stage, batch, Draws(0, 3, 1))
    assert float(terms["critic"].detach()) < 1e-6


def test_it_leads_a_student_to_where_the_guided_teacher_is():
    """Under a critic that knows the student."""
    pair, batch, stage = pair_of(student=-0.5), batch_of(), stage_of(guidance=2.0, critic_updates=2)
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=0.05)
    for step in range(60):
        pair.critic.weight.data.copy_(pair.student.weight.data)
        self_forcing(pair, stage, batch, Draws(0, 3, step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    # from 0 to 0.1 + 2 * 0.4, where the text alone asks for 0.5
    assert 0.5 + float(pair.student.weight.detach()) == pytest.approx(0.9, abs=0.06)


# whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("checkpointing", "dtype"), [("false", "fp32"), ("true", "fp32"), ("false", "bf16")]
)
def test_a_student_of_stage_iii_is_written_and_goes_on_bit_for_bit(
    folder, tmp_path, monkeypatch, checkpointing, dtype
):
    changes = (*CHANGES, "run.save_every=2", f"run.dtype={dtype}")
    recipe = write_recipe(folder, *changes, checkpointing=checkpointing)
    cached = []

    def watched(*args):
        # a rollout casts weights without a gradient, and the cache of older torch keeps them so
        cached.append(torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu"))
        return self_forcing(*args)

    monkeypatch.setitem(OBJECTIVES, "self_forcing", watched)
    last = train_here(recipe, tmp_path / "whole", kinds=["router", "self_forcing"])
    assert last.name == "3-self_forcing" and not any(cached)
    said = rows(last)
    # the student's turns; between them its last loss is repeated
    match = [row["match"] for row in said]
    assert match[0] == match[1] == match[2] != match[3] == match[4] == match[5] != match[6]
    made = read_header(last / "student.safetensors").made["trained"][-1]
    assert made["stage"] == "self_forcing" and made["sampler_steps"] == 3
    student = load_slim(last / "student.safetensors")
    video = sample(student, torch.randn(1, 24, TEXT_DIM), (2, 4, 4), steps=3, guidance=1)
    assert video.isfinite().all()

    class Killed(Exception):
        pass

    whole = ToyDataset.batch

    def dies(self, step, *place):
        # between two of the student's turns
        if step == 2:
            raise Killed
        return whole(self, step, *place)

    start = {"start": tmp_path / "whole" / "2-router", "kinds": ["self_forcing"]}
    monkeypatch.setattr(ToyDataset, "batch", dies)
    with pytest.raises(Killed):
        train_here(recipe, tmp_path / "again", **start)
    monkeypatch.setattr(ToyDataset, "batch", whole)
    again = train_here(recipe, tmp_path / "again", **start)
    for name in ("student", "router"):
        mine, theirs = ((f / f"{name}.safetensors").read_bytes() for f in (again, last))
        assert mine == theirs
    assert [row["loss"] for row in rows(again)] == [row["loss"] for row in said]
    # a run that went on repeats nothing from before; the student's turn comes at step 4
    assert [row.get("match") for row in rows(again)] == [*match[:2], None, *match[3:]]

"""PARE's stages on a small real Wan: losses, gate, resuming, and what they write."""

import json
import math

import pytest
import torch
from torch import nn

from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.profiling import model_fingerprint
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.slim import load_slim
from wantrim.methods.depth import BlockBudget, BlockPlan
from wantrim.methods.routers import FixedRouter
from wantrim.slim.file import read_header
from wantrim.slim.router import load_router
from wantrim.tests.small_wan import RECIPE, make_origin, train_here, write_recipe
from wantrim.toy.text import TEXT_DIM
from wantrim.training.changes import change
from wantrim.training.draws import Draws
from wantrim.training.gate import Gate, Routing, Taps, new_router
from wantrim.training.losses import (
    feature_loss,
    inlier_tokens,
    temporal_loss,
    timestep_weights,
    velocity_loss,
)
from wantrim.training.models import full_model, open_origin
from wantrim.training.objectives import Pair, distil, few_steps
from wantrim.training.recipe import Stage, Weights, load_recipe
from wantrim.training.toy_data import ToyDataset
from wantrim.training.trainer import Trainer, learning_rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def recipe(folder):
    return write_recipe(folder)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    """A whole run; its last folder."""
    return train_here(recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture
def pair(recipe, tmp_path):
    """Student and teacher in front of their first step."""
    origin = open_origin(recipe)
    origin.cut(tmp_path / "start.safetensors", recipe.stages[0])
    student = load_slim(tmp_path / "start.safetensors").requires_grad_(True)
    teacher = full_model(origin.source, torch.float32).fill("cpu")
    negative = torch.zeros(24, TEXT_DIM)
    return Pair(student, teacher, Taps(student), Taps(teacher), None, negative)


HALF = BlockBudget(0.5, 0.5)


def routed(pair, budget=HALF):
    torch.manual_seed(1)
    pair.routing = Routing(new_router(4, "latent", 16), "latent", budget)
    return pair


# losses


def test_the_feature_loss_is_relative_and_leaves_outliers_out():
    torch.manual_seed(0)
    teacher = torch.randn(2, 50, 8)
    # a token a hundred times as large, and wrong
    teacher[0, 7] *= 100
    student = teacher * 1.1
    student[0, 7] = 0
    inside = inlier_tokens(teacher)
    assert not inside[0, 7] and inside.float().mean() > 0.97
    assert feature_loss(student, teacher).tolist() == pytest.approx([0.01, 0.01], rel=1e-4)
    # the same at another scale
    assert feature_loss(student * 30, teacher * 30).tolist() == pytest.approx([0.01] * 2, rel=1e-4)


def test_velocity_and_temporal_losses_on_known_errors():
    wanted = torch.randn(2, 3, 4, 2, 2)
    still = wanted.clone()
    still[1] += 2.0
    assert velocity_loss(still, wanted).tolist() == pytest.approx([0, 4], abs=1e-6)
    # an error that does not move is none in time
    assert temporal_loss(still, wanted).tolist() == pytest.approx([0, 0], abs=1e-6)
    moving = wanted.clone()
    moving[0] += torch.arange(4.0).view(1, 4, 1, 1)
    assert temporal_loss(moving, wanted).tolist() == pytest.approx([1, 0], abs=1e-5)
    assert temporal_loss(wanted[:, :, :1], wanted[:, :, :1]).tolist() == [0, 0]


def test_timestep_weights_are_the_papers_with_a_mean_of_one():
    sigma = (torch.arange(1000) + 0.5) / 1000
    weights = timestep_weights(sigma)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-3)
    assert float(weights[-1] / weights[99]) == pytest.approx(
        math.log1p(float(sigma[-1])) / math.log1p(float(sigma[99])), rel=1e-5
    )


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    stage = Stage("width", steps=100, warmup=10)
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] < 1e-3


# chance


def test_a_sample_draws_the_same_wherever_it_is_computed():
    shape = torch.Size((4, 2, 3))
    whole = Draws(1, 2, 3)
    for first in (0, 2):
        part = Draws(1, 2, 3, first)
        own = torch.Size((2, 2, 3))
        assert torch.equal(part.noise(own), whole.noise(shape)[first : first + 2])
        assert torch.equal(part.uniform(2), whole.uniform(4)[first : first + 2])
        assert torch.equal(part.choice(2, 9), whole.choice(4, 9)[first : first + 2])
    assert part.blocks(16, 4) == whole.blocks(16, 4)
    others = [Draws(0, 2, 3), Draws(1, 1, 3), Draws(1, 2, 4)]
    assert not any(torch.equal(other.noise(shape), whole.noise(shape)) for other in others)


def test_no_two_samples_of_a_step_get_the_same_noise():
    noise = Draws(0, 1, 0).noise(torch.Size((8, 100)))
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.5


# the gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_exact_forward_and_lets_the_router_learn(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, requires_grad=True)
    hard = torch.tensor([[True, False, True], [True, True, False]])
    before = torch.randn(2, 5, 4).to(dtype).requires_grad_()
    after = torch.randn(2, 5, 4).to(dtype).requires_grad_()
    # neither Inf nor a large number may leak out of a block that does not count
    out = Gate(hard, logits.sigmoid()).apply(1, before, after)
    assert torch.equal(out[0], before[0]) and torch.equal(out[1], after[1])
    out.float().square().sum().backward()
    assert not after.grad[0].any() and after.grad[1].any()
    assert before.grad[0].any() and not before.grad[1].any()
    # d/dm of x + m (y - x), through the sigmoid's slope
    soft = logits.detach().sigmoid()[:, 1]
    slope = (2 * out * (after - before)).detach().float().sum((1, 2)) * soft * (1 - soft)
    assert torch.allclose(logits.grad[:, 1], slope, rtol=0.02 if dtype != torch.float32 else 1e-4)


def test_the_budget_is_kept_for_each_sample_and_the_ends_always_run(pair):
    routed(pair, BlockBudget(0.5, 1.0))
    gate = pair.routing.gate(torch.tensor([1.0, 0.5, 0.0]), torch.randn(3, 16, 5, 12, 12))
    assert gate.hard.sum(1).tolist() == [4, 3, 2]
    assert gate.hard[:, 0].all() and gate.hard[:, -1].all()
    assert float(gate.active) == pytest.approx(0.75)


def test_a_routed_student_is_what_sampling_skips(pair, recipe):
    """The gate in training and the skipped blocks in sampling are the same function."""
    routed(pair)
    batch = ToyDataset(2, image_share=0.0).batch(0)
    sigma = torch.tensor([0.7, 0.7])
    x = torch.randn(batch.latents.shape)
    with torch.no_grad():
        trained = pair.ask(x, sigma, batch)
    hard, pair.taps.gate = pair.taps.gate.hard, None
    assert hard.sum(1).tolist() == [2, 2]
    with torch.no_grad():
        for row in range(2):
            skipped = tuple(i for i in range(4) if not hard[row, i])
            plan = TrimPlan(blocks=BlockPlan(FixedRouter(skipped)))
            one = slice(row, row + 1)
            given = torch.cat([x[one], batch.condition[one]], 1)
            with attach(pair.student, plan):
                out = pair.student(given, 1000 * sigma[one], batch.text[one], return_dict=False)[0]
            assert torch.allclose(out, trained[one], atol=1e-5)


def test_features_of_skipped_blocks_do_not_count(pair, recipe):
    """With everything skipped that can be, only the blocks that ran are compared."""
    routed(pair)
    batch = ToyDataset(2, image_share=0.0).batch(0)
    stage = Stage(
        "router", 4, warmup=1, feature_blocks=4, weights=Weights(1, 0, 0, 0), k_min=0.5, k_max=0.5
    )
    terms = distil(pair, stage, batch, Draws(0, 2, 0))
    assert float(terms["active"].detach()) == 0.5
    terms["loss"].backward()
    skipped = ~pair.taps.gate.hard.any(0)
    for index, block in enumerate(pair.student.blocks):
        moved = any(p.grad is not None and p.grad.any() for p in block.parameters())
        assert moved != bool(skipped[index])
    assert all(p.grad is not None for p in pair.routing.mlp.parameters())


# stage III


def test_a_perfect_student_of_few_steps_has_no_loss(pair):
    """Where the teacher's path is straight, one step ends where five do."""

    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.blocks = nn.ModuleList()

        def forward(self, x, timestep, text, image=None, return_dict=False):
            return (torch.ones_like(x[:, :16]) * 0.5 + self.weight,)

    model = Straight()
    straight = Pair(model, Straight(), Taps(model), Taps(model), None, torch.zeros(24, TEXT_DIM))
    batch = ToyDataset(4).batch(0)
    stage = Stage("steps", 4, warmup=1, guidance=4.0, shift=3.0)
    terms = few_steps(straight, stage, batch, Draws(0, 3, 0))
    assert float(terms["loss"].detach()) < 1e-9
    model.weight.data += 0.1
    assert float(
        few_steps(straight, stage, batch, Draws(0, 3, 0))["teacher"].detach()
    ) == pytest.approx(0.01, rel=1e-3)


def test_guidance_is_folded_into_what_few_steps_are_asked_for(pair):
    batch = ToyDataset(2, image_share=0.0, drop_text=0.0).batch(0)
    x, sigma = torch.randn(batch.latents.shape), torch.tensor([0.9, 0.9])
    plain, guided = (pair.teach(x, sigma, batch, g) for g in (1.0, 3.0))
    nothing = type(batch)(batch.latents, torch.zeros_like(batch.text), batch.condition)
    free = pair.teach(x, sigma, nothing)
    assert torch.allclose(guided, free + 3 * (plain - free), atol=1e-5)


# whole runs


def test_every_stage_leaves_a_student_that_diffusers_loads(done):
    steps = done
    assert steps.name == "3-steps"
    router = load_router(steps / "router.safetensors")
    student = load_slim(steps / "student.safetensors")
    made = read_header(steps / "student.safetensors").made
    assert [stage["stage"] for stage in made["trained"]] == ["width", "router", "steps"]
    assert router.model.differs(model_fingerprint(student)) is None
    plan = TrimPlan(blocks=BlockPlan(router, BlockBudget()))
    with attach(student, plan, shift=3.0) as attachment:
        x = sample(student, torch.randn(1, 24, TEXT_DIM), (5, 12, 12), steps=4, guidance=1)
        report = attachment.finish()
    assert x.isfinite().all() and report.steps
    assert any(step.blocks_run < step.num_blocks for step in report.steps)


def test_training_lowers_the_loss_against_the_teacher(folder, tmp_path):
    recipe = write_recipe(folder, "width.steps=30", "width.ema_decay=0")
    rows = log_of(train_here(recipe, tmp_path, kinds=["width"]))
    first, last = ([row[name] for name in ("feature", "teacher")] for row in (rows[0], rows[-1]))
    assert sum(row["teacher"] for row in rows[-5:]) < 0.8 * sum(row["teacher"] for row in rows[:5])
    assert len(rows) == 30 and first != last


class Killed(Exception):
    pass


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    folder, done, tmp_path, monkeypatch, checkpointing
):
    recipe = write_recipe(folder, checkpointing=checkpointing)
    whole = ToyDataset.batch

    def dies(self, step, *place):
        if step == 3:
            raise Killed
        return whole(self, step, *place)

    for _ in range(2):
        monkeypatch.setattr(ToyDataset, "batch", dies)
        with pytest.raises(Killed):
            train_here(recipe, tmp_path, kinds=["width", "router"])
        monkeypatch.setattr(ToyDataset, "batch", whole)
        train_here(recipe, tmp_path, kinds=["width"])
    last = train_here(recipe, tmp_path, kinds=["width", "router"])
    there = done.parent / "2-router"
    for name in ("student", "router"):
        # computing blocks again gives the same numbers
        assert (last / f"{name}.safetensors").read_bytes() == (
            there / f"{name}.safetensors"
        ).read_bytes()
    mine, theirs = log_of(last), log_of(there)
    assert [row["step"] for row in mine] == [1, 2, 3, 4]
    assert [row["loss"] for row in mine] == [row["loss"] for row in theirs]


def test_the_average_is_what_is_written(folder, tmp_path, monkeypatch):
    """By hand, of the weights in front of the first step and behind each."""
    weights, train_step = [], Trainer.train_step

    def watched(trainer, batch):
        if not weights:
            weights.append([value.detach().clone() for value in trainer.student.parameters()])
        terms = train_step(trainer, batch)
        weights.append([value.detach().clone() for value in trainer.student.parameters()])
        return terms

    monkeypatch.setattr(Trainer, "train_step", watched)
    recipe = write_recipe(folder, "width.ema_decay=0.25")
    last = train_here(recipe, tmp_path, kinds=["width"])
    average, *rest = weights
    # of the first steps less is kept: 2/11, 3/12, from where on the recipe's holds
    for step, now in enumerate(rest, 1):
        kept = min(0.25, (1 + step) / (10 + step))
        average = [kept * one + (1 - kept) * two for one, two in zip(average, now, strict=True)]
    written = flat(load_slim(last / "student.safetensors").parameters())

    def equal(values) -> float:
        # the file holds bf16
        return float((written == flat(values).bfloat16().float()).float().mean())

    assert len(rest) > 2 and equal(average) > 0.999 and equal(rest[-1]) < 0.9


def flat(tensors) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in tensors])


def test_a_stage_that_is_done_is_not_done_again(recipe, done):
    before = (done / "student.safetensors").stat().st_mtime_ns
    assert train_here(recipe, done.parent) == done
    assert (done / "student.safetensors").stat().st_mtime_ns == before


def test_a_stage_begins_with_the_student_it_is_given(recipe, done, tmp_path):
    last = train_here(recipe, tmp_path, start=done.parent / "1-width", kinds=["router"])
    there = done.parent / "2-router"
    assert last.name == "2-router"
    assert (last / "student.safetensors").read_bytes() == (
        there / "student.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["width.protection=x"], "protection: expected a number from 1 to 10, got 'x'"),
        (["width.protection="], "TOML"),
        (["width.protection=[1"], "TOML"),
        (["nothing"], "KEY=VALUE"),
        (["depth.lr=1"], "got 'depth'"),
        (["data.batch.size=1"], "no table"),
        (["width.steps=0"], "steps: expected"),
        (["data.bach=2"], "no such key"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        write_recipe(folder, *changes)


def test_changes_reach_every_stage_of_their_kind():
    stages = [{"kind": "width"}, {"kind": "router"}, {"kind": "width"}]
    given = {"stage": stages, "data": {"folder": "toy"}}
    change(given, ["width.weights.temporal = 0", "data.batch=3"])
    assert [stage.get("weights") for stage in given["stage"]] == [
        {"temporal": 0},
        None,
        {"temporal": 0},
    ]
    assert given["data"] == {"folder": "toy", "batch": 3}
    # a shell takes the quotes away
    change(given, ["run.optimizer=adamw8bit", "data.folder=/data/t2v 480p", "run.keep_state=true"])
    assert given["run"] == {"optimizer": "adamw8bit", "keep_state": True}
    assert given["data"]["folder"] == "/data/t2v 480p"


@pytest.mark.parametrize(
    ("change_", "said"),
    [
        ("width.lr=5e-4", "1-width: it began with stages.1.lr = 0.001, and this is 0.0005"),
        ("data.seed=1", "data.seed = 0, and this is 1"),
        ("run.weight_decay=0.1", "run.weight_decay = 0.0, and this is 0.1"),
    ],
)
def test_a_run_does_not_go_on_with_another_recipe(folder, done, change_, said):
    with pytest.raises(ValueError, match=said):
        train_here(write_recipe(folder, change_), done.parent)


def test_a_step_that_cannot_be_read_is_named(folder, tmp_path):
    state = tmp_path / "1-width" / "state"
    (state / "step-2").mkdir(parents=True)
    (state / "step-x").mkdir()
    with pytest.raises(ValueError, match="step-2: the saved step cannot be read"):
        train_here(write_recipe(folder), tmp_path, kinds=["width"])


def test_a_gradient_that_is_not_finite_changes_nothing(folder, tmp_path, monkeypatch):
    whole = ToyDataset.batch

    def poisoned(self, step, *place):
        batch = whole(self, step, *place)
        if step == 3:
            batch.latents[0, 0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(ToyDataset, "batch", poisoned)
    with pytest.raises(ValueError, match="step 4: the gradient is nan"):
        train_here(write_recipe(folder), tmp_path, kinds=["width"])
    assert [path.name for path in (tmp_path / "1-width" / "state").iterdir()] == ["step-2"]
    assert not (tmp_path / "1-width" / "student.safetensors").exists()


def test_a_stage_that_the_recipe_has_not_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="stages: expected some of width"):
        train_here(write_recipe(folder), tmp_path, kinds=["other"])
    # beside one that it has
    for kinds in (["width", "ruoter"], ["1", "4"]):
        with pytest.raises(ValueError, match=f"stages: expected .*, got '{kinds[1]}'"):
            train_here(write_recipe(folder), tmp_path, kinds=kinds)


def test_a_model_of_another_task_is_refused(folder):
    path = folder / "t2v.toml"
    text = RECIPE.format(folder=folder, checkpointing="false", teacher="whole")
    path.write_text(text.replace('"both"', '"t2v"').replace("image_share = 0.3", ""))
    with pytest.raises(ValueError, match="expected a model with 16 input channels"):
        open_origin(load_recipe(path))

"""That a recipe's values reach what they are for: none of them is what it is by default."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wantrim.hosts.diffusers.slim import load_slim
from wantrim.methods.depth import BlockBudget
from wantrim.methods.routers import latent_statistics
from wantrim.profiles.fingerprint import WHOLE, sample_modulation, width_digest
from wantrim.slim.file import read_header
from wantrim.slim.router import Conditions, load_router
from wantrim.slim.source import open_source
from wantrim.slim.width import ffn_channels, pare_heads
from wantrim.tests.small_wan import make_origin, random_wan, write_recipe
from wantrim.tests.test_width import profile_of, set_heads
from wantrim.toy.text import TEXT_DIM
from wantrim.training.average import Average
from wantrim.training.draws import Draws, noisy, shifted
from wantrim.training.gate import Routing, Taps, new_router
from wantrim.training.losses import feature_loss, inlier_tokens
from wantrim.training.models import full_model, open_origin, starting_width, write_student
from wantrim.training.objectives import Pair, distil, few_steps
from wantrim.training.parallel import world
from wantrim.training.recipe import Data, Stage, Weights
from wantrim.training.run import load_teacher, open_data, train
from wantrim.training.shard_files import Sample, ShardWriter
from wantrim.training.toy_data import ToyDataset
from wantrim.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def pair(folder, tmp_path):
    """Student and teacher of four blocks, a random router over the student."""
    recipe = write_recipe(folder)
    origin = open_origin(recipe)
    origin.cut(tmp_path / "start.safetensors", recipe.stages[0])
    student = load_slim(tmp_path / "start.safetensors").requires_grad_(True)
    teacher = full_model(origin.source, torch.float32).fill("cpu")
    negative = torch.zeros(24, TEXT_DIM)
    torch.manual_seed(1)
    routing = Routing(new_router(4, "latent", 16), "latent", BlockBudget(0.5, 1.0))
    return Pair(student, teacher, Taps(student), Taps(teacher), routing, negative)


class Known(nn.Module):
    """A router that says what it is told to, and remembers what it was given."""

    def __init__(self, *logits: list[float]):
        super().__init__()
        self.said = torch.tensor(logits)

    def forward(self, sigma, content):
        self.given = content
        return self.said


# the gate


def test_the_blocks_with_the_highest_logits_run():
    mlp = Known([-9.0, 1.0, 4.0, 2.0, 3.0, -8.0], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    gate = Routing(mlp, "none", BlockBudget(0.5, 0.8)).gate(
        torch.tensor([0.0, 1.0]), torch.zeros(2, 16, 2, 4, 4)
    )
    # 3 of 6 without noise and 5 at full noise; the ends always
    assert gate.hard.tolist() == [
        [True, False, True, False, False, True],
        [True, True, True, True, False, True],
    ]
    assert torch.equal(gate.soft, mlp.said.sigmoid()) and mlp.given is None


def test_logits_are_in_fp32_whatever_the_model_is_trained_in():
    torch.manual_seed(2)
    mlp, sigma = new_router(6, "latent", 3), torch.tensor([0.3, 0.8])
    latent = torch.randn(2, 3, 2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate = Routing(mlp, "latent", BlockBudget(0.5, 0.8)).gate(sigma, latent)
    assert torch.equal(gate.soft, mlp(sigma, latent_statistics(latent)).sigmoid())


def test_the_router_is_given_clips_class_token_of_each_sample():
    mlp = Known([0.0, 1.0, 2.0], [2.0, 1.0, 0.0])
    clip = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))
    routing = Routing(mlp, "clip", BlockBudget(0.7, 0.9))
    routing.gate(torch.tensor([0.2, 0.9]), torch.zeros(2, 16, 2, 4, 4), clip)
    assert torch.equal(mlp.given, torch.stack([clip[0, 0], clip[1, 0]]))


# losses


def test_the_feature_loss_is_the_mean_over_the_blocks_that_ran(pair):
    """Eq. 15, added up by hand for each sample; the samples run different numbers of blocks."""
    batch = ToyDataset(3, image_share=0.0).batch(0)
    stage = Stage("router", 4, warmup=1, shift=2.0, weights=Weights(3, 0, 0, 0))
    terms = distil(pair, stage, batch, Draws(5, 2, 1))
    draws = Draws(5, 2, 1)
    noise = draws.noise(batch.latents.shape)
    sigma = shifted(draws.uniform(3), 2.0)
    x = noisy(batch.latents, noise, sigma)
    blocks = range(4)
    with torch.no_grad():
        with pair.teacher_taps.keeping(blocks) as kept:
            pair.teach(x, sigma, batch)
        wanted = dict(kept)
        with pair.taps.keeping(blocks) as kept:
            pair.ask(x, sigma, batch)
            got, hard = dict(kept), pair.taps.gate.hard
    of_samples = []
    for sample in range(3):
        one = slice(sample, sample + 1)
        ran = [block for block in blocks if hard[sample, block]]
        of_samples.append(
            sum(float(feature_loss(got[b][one], wanted[b][one])) for b in ran) / len(ran)
        )
    assert len(set(hard.sum(1).tolist())) > 1 and not hard.all()
    assert float(terms["feature"].detach()) == pytest.approx(sum(of_samples) / 3, rel=1e-4)
    assert float(terms["loss"].detach()) == pytest.approx(sum(of_samples), rel=1e-4)


@pytest.mark.parametrize("weighting", ["none", "log"])
def test_samples_count_alike_unless_the_recipe_weighs_them(pair, weighting):
    """Eq. 13 to 15 have no w(t); 0.3863 is the mean of log(1 + sigma)."""
    pair.routing = None
    batch = ToyDataset(3, image_share=0.0).batch(0)
    stage = Stage("width", 4, warmup=1, shift=4.0, weighting=weighting)
    terms = distil(pair, stage, batch, Draws(5, 1, 1))
    draws = Draws(5, 1, 1)
    noise, sigma = draws.noise(batch.latents.shape), shifted(draws.uniform(3), 4.0)
    with torch.no_grad():
        error = pair.ask(noisy(batch.latents, noise, sigma), sigma, batch) - noise + batch.latents
    weight = [math.log(1 + float(s)) / 0.3863 if weighting == "log" else 1.0 for s in sigma]
    of_samples = [w * float(e.square().mean()) for w, e in zip(weight, error, strict=True)]
    assert float(terms["data"].detach()) == pytest.approx(sum(of_samples) / 3, rel=1e-3)


def test_an_expert_learns_at_its_own_noise_levels(pair, monkeypatch):
    """Wan 2.2's low-noise expert: nothing above its boundary, and every part below it."""

    class Seen(Exception):
        pass

    def teach(self, x, sigma, batch):
        raise Seen(sigma)

    monkeypatch.setattr(Pair, "teach", teach)
    batch = ToyDataset(4, image_share=0.0).batch(0)
    for low, high in ((0.0, 0.875), (0.875, 1.0), (0.2, 0.4)):
        stage = Stage("width", 4, warmup=1, shift=5.0, sigma_min=low, sigma_max=high)
        sigmas = []
        for step in range(60):
            with pytest.raises(Seen) as seen:
                distil(pair, stage, batch, Draws(5, 1, step))
            sigmas.append(seen.value.args[0])
        sigma = torch.cat(sigmas)
        assert low <= float(sigma.min()) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < float(sigma.max()) <= high + 1e-6


def test_a_token_is_an_outlier_from_three_standard_deviations():
    """Both odd ones are beyond 2.5, and only one of them beyond 3."""
    size = torch.cat([torch.tensor([9.0, 11.0]).repeat(49), torch.tensor([6.9, 13.8])])
    away = (size - size.mean()).abs() / size.std(correction=0)
    assert 2.6 < away[-2] < 2.95 and 3.05 < away[-1] < 3.5
    inside = inlier_tokens(torch.nn.functional.pad(size.view(1, -1, 1), (0, 3)))
    assert inside[0].tolist() == [True] * 99 + [False]


class Told(nn.Module):
    """A velocity that is the text's mean, plus a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList()

    def forward(self, x, timestep, text, image=None, return_dict=False):
        return (torch.ones_like(x[:, :16]) * text.mean() + self.weight,)


def test_few_steps_are_asked_for_what_the_guided_teacher_does():
    """Text 0.5 and negative prompt 0.1 guided by 6: 0.1 + 6 * 0.4 = 2.5."""
    model, teacher, times = Told(), Told(), set()
    teacher.register_forward_pre_hook(lambda _, given: times.add(given[1][0].item()))
    negative = torch.full((24, TEXT_DIM), 0.1)
    pair = Pair(model, teacher, Taps(model), Taps(model), None, negative)
    batch = ToyDataset(2).batch(0)
    batch = type(batch)(batch.latents, torch.full_like(batch.text, 0.5), batch.condition)
    stage = Stage("steps", 4, warmup=1, guidance=6.0, shift=2.0)
    terms = few_steps(pair, stage, batch, Draws(0, 3, 0))
    assert float(terms["teacher"].detach()) == pytest.approx((2.5 - 0.5) ** 2, rel=1e-4)
    # five steps for one, as docs/training.md says
    assert len(times) == 5


# the cut


def test_protection_decides_what_a_student_keeps():
    profile = profile_of(blocks=1)
    # heads 5 and 6 are temporal
    set_heads(
        profile,
        [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.5, 1.0],
        [0.9, 0.5, 0.8, 0.4, 0.5, 0.2, 0.1, 0.4],
    )
    kept = [
        starting_width(profile, Stage("width", prune_ratio=0.5, protection=p), None).self_heads[0]
        for p in (1.0, 1.8, 3.0)
    ]
    assert kept == [(0, 1, 2, 3), (0, 1, 2, 5), (0, 1, 5, 6)]
    assert kept[1] == pare_heads(profile, 0.5, 1.8)[0]


def test_channels_are_told_apart_by_what_they_read_and_by_what_they_write(folder):
    """Eq. 7's signature of a file: W_up's rows beside W_down's columns."""
    source = open_source(folder / "wan.safetensors")
    up, down = (source.tensor(f"blocks.2.ffn.{layer}.weight") for layer in (0, 2))
    signature = source.signature(2)
    assert signature.shape == (64, 128)
    for channel in (0, 17, 63):
        assert torch.equal(signature[channel], torch.cat([up[channel], down[:, channel]]))
    # the same reading and another writing: both stay
    reading = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    writing = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    score = torch.tensor([3.0, 2.0, 1.0])
    assert ffn_channels(score, reading, 2) == (0, 2)
    assert ffn_channels(score, torch.cat([reading, writing], 1), 2) == (0, 1)


# a trainer


def one_step(folder, out, kind, *changes):
    """A trainer of one stage behind its first step, the state before it, and the step's terms."""
    recipe = write_recipe(folder, *changes)
    number, stage = next((n, s) for n, s in enumerate(recipe.stages, 1) if s.kind == kind)
    origin = open_origin(recipe)
    start = out / "start.safetensors"
    origin.cut(start, stage)
    data = ToyDataset(recipe.data.batch, image_share=0.0)
    with world("cpu") as processes:
        teacher = load_teacher(origin.source, recipe, processes)
        made = Trainer(
            recipe,
            stage,
            number,
            processes,
            teacher,
            data.negative_text,
            start,
            out / kind,
            origin.source,
        )
        before = copy.deepcopy(made.trained.state_dict())
        terms = made.train_step(data.batch(0))
        made.close()
    return made, before, terms


def moved(made, before, part):
    """How far each weight of a part went."""
    after = made.trained.state_dict()
    return torch.cat(
        [(after[n] - v).abs().flatten() for n, v in before.items() if n.startswith(part)]
    )


def test_the_router_learns_at_its_own_rate(folder, tmp_path):
    """AdamW's first step moves a weight by the learning rate, whatever its gradient."""
    changes = ("router.lr=2e-4", "router.router_lr=0.03", "router.k_min=0.5", "router.k_max=0.5")
    made, before, terms = one_step(folder, tmp_path, "router", *changes)
    assert float(moved(made, before, "router").max()) == pytest.approx(0.03, rel=1e-3)
    assert float(moved(made, before, "student").max()) == pytest.approx(2e-4, rel=1e-2)
    assert float(terms["active"]) == 0.5


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_as_many_blocks_run_as_the_recipe_says(folder, tmp_path, share):
    made, _, terms = one_step(
        folder, tmp_path, "router", f"router.k_min={share}", f"router.k_max={share}"
    )
    assert float(terms["active"]) == share
    assert made.pair.routing.budget == BlockBudget(share, share)


def test_the_budget_follows_the_recipe_at_both_ends(folder, tmp_path):
    made, _, _ = one_step(folder, tmp_path, "router", "router.k_min=0.3", "router.k_max=0.8")
    assert made.pair.routing.budget == BlockBudget(0.3, 0.8)


def test_a_router_is_written_with_what_it_was_trained_with(folder, tmp_path):
    changes = ("router.k_min=0.3", "router.k_max=0.8", "router.shift=4.0")
    made, _, _ = one_step(folder, tmp_path, "router", *changes)
    # as after a run, where the processes are gone
    made.world = SimpleNamespace(first=True, wait=lambda: None)
    made.folder.mkdir(exist_ok=True)
    made.write("toy")
    router = load_router(made.folder / "router.safetensors")
    assert router.conditions == Conditions(0.3, 0.8, "falling", "identity", 4.0)


def test_a_student_has_its_own_fingerprint(folder, tmp_path):
    """The sample in both headers is of the tables that are written beside it."""
    made, _, _ = one_step(folder, tmp_path, "router", "router.lr=0.05")
    state = {n: v.detach().clone() for n, v in made.student.state_dict().items()}
    write_student(tmp_path, state, made.pair.routing.mlp, "latent", made.header, [], torch.float32)
    router = load_router(tmp_path / "router.safetensors")
    assert router.model.width == width_digest(made.header.model, made.header.width) != WHOLE
    tables = [state[f"blocks.{block}.scale_shift_table"] for block in range(4)]
    own = sample_modulation([*tables, state["scale_shift_table"]])
    teacher = open_source(folder / "wan.safetensors").model
    for model in (
        read_header(tmp_path / "student.safetensors").model,
        load_router(tmp_path / "router.safetensors").model,
    ):
        assert model.sample == pytest.approx(own, rel=1e-5)
        assert model.sample != pytest.approx(teacher.sample, rel=1e-3)


# data


def test_texts_are_dropped_as_the_recipe_says(folder, tmp_path):
    """The recipe's shares reach the samples: here every text becomes the negative prompt."""
    prompts = {"empty": torch.zeros(1, 3), "negative": torch.full((2, 3), -1.0)}
    writer = ShardWriter(tmp_path / "data", {}, 4, prompts)
    for number in range(4):
        writer.add(f"{number}", Sample(torch.ones(16, 1, 2, 2), torch.ones(3, 3)))
    writer.flush()
    told = (f"data.folder='{tmp_path / 'data'}'", "data.drop_text=1", "data.negative_share=1")
    with world("cpu") as processes:
        data = open_data(write_recipe(folder, *told), processes)
    assert all(torch.equal(text, data.negative_text) for text in data.batch(0).text)


# the average


def test_the_average_of_the_first_steps_forgets_quickly():
    """By hand: 2 of 11 and 3 of 12 of what was, then the recipe's decay."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = Average(module, 0.24)
    wanted = 0.0
    for step, decay in ((1, 2 / 11), (2, 0.24), (3, 0.24)):
        module.weight.data.fill_(float(step))
        average.update(step)
        wanted = decay * wanted + (1 - decay) * step
        assert average.tensors["weight"].item() == pytest.approx(wanted)


# a recipe without a width


def test_a_student_whose_recipe_has_no_width_keeps_all_of_it(folder, tmp_path, caplog):
    recipe = write_recipe(folder, "router.steps=2")
    recipe = replace(recipe, stages=recipe.stages[1:2])
    with world("cpu") as processes, caplog.at_level("INFO"):
        last = train(recipe, tmp_path, processes)
    assert "keeps all heads and channels" in caplog.text
    header = read_header(last / "student.safetensors")
    assert [header.width.sizes(block) for block in range(4)] == [(4, 4, 64)] * 4
    assert header.made["prune_ratio"] == 0.0


def test_a_header_names_the_data_and_no_folder_of_anybodys(tmp_path):
    data = Data(folder=(str(tmp_path / "first"), str(tmp_path / "second")))
    assert data.names == "first, second" and not data.toy
    assert data.folders == (tmp_path / "first", tmp_path / "second")
    assert Data(folder="toy").toy


def test_a_students_hooks_go_with_its_taps():
    model = random_wan(2)
    taps = Taps(model)
    # the registry itself is diffusers' and stays
    hooked = [block._diffusers_hook for block in model.blocks]
    assert all(registry.hooks for registry in hooked)
    taps.remove()
    assert not any(registry.hooks for registry in hooked)

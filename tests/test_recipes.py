import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.nn.attention import SDPBackend, sdpa_kernel

from wantrim.benchmarks.flops import forward_flops
from wantrim.toy import CHECKPOINT
from wantrim.training import memory
from wantrim.training.memory import (
    KNOWN,
    Video,
    kept_bytes,
    largest_video,
    model_shape,
    parameters,
    plan_recipe,
    slim_sizes,
)
from wantrim.training.recipe import SHIPPED, Data, Recipe, Run, Stage, Weights, load_recipe
from wantrim.training.video_files import Size

DOCS = SHIPPED.parent.parent / "docs"
VIDEO, SIZE = Video(21, 60, 104), Size(832, 480, 81)
SMALL = """
name = "small"
model = "tiny"
task = "both"
[data]
folder = "toy"
[[stage]]
kind = "width"
[[stage]]
kind = "router"
lr = 1
[stage.weights]
feature = 2
"""


@pytest.fixture
def written(tmp_path):
    def write(old: str = "", new: str = ""):
        assert old in SMALL
        path = tmp_path / "mine.toml"
        path.write_text(SMALL.replace(old, new, 1) if old else SMALL)
        return path

    return write


def test_a_recipe_is_read_with_the_papers_values_where_it_says_nothing(written):
    recipe = load_recipe(written())
    assert recipe.data == Data(folder="toy", batch=4)
    assert recipe.stages[0] == Stage("width", 7000, 3e-5, 5e-4, 100, Weights(10, 6, 1, 8), 0.3)
    assert (recipe.stages[0].k_min, recipe.stages[0].k_max) == (0.5, 0.875)
    second = recipe.stages[1]
    assert second.lr == 1.0 and type(second.lr) is float
    assert second.weights == Weights(feature=2)
    assert recipe.run == Run(dtype="bf16", checkpointing=True, teacher="sharded")


def loaded(tmp_path, kinds, task="i2v", changes=()):
    """A recipe with bare stages of these kinds."""
    path = tmp_path / "bare.toml"
    stages = "".join(f"[[stage]]\nkind = '{kind}'\n" for kind in kinds)
    path.write_text(f"name='a'\nmodel='m'\nprofile='p'\ntask='{task}'\ndata.folder='d'\n{stages}")
    return load_recipe(path, changes)


def test_what_a_recipe_leaves_out_is_the_papers_for_its_task_and_kind(tmp_path):
    kinds = ("width", "router", "self_forcing", "steps")
    for task, temporal, content in (("i2v", 4, "clip"), ("t2v", 8, "latent")):
        width, router, forcing, steps = loaded(tmp_path, kinds, task).stages
        assert [s.weights.temporal for s in (width, router, steps)] == [temporal] * 3
        assert router.content == content
        assert (forcing.lr, forcing.steps) == (2e-6, 1200)
        assert (router.lr, router.steps, router.warmup) == (3e-5, 7000, 100)
        # ours, as it was tried
        assert (steps.lr, steps.steps, steps.warmup) == (2e-4, 300, 20)
    said = ["router.weights.feature=3", "router.content=latent", "self_forcing.steps=700"]
    _, router, forcing, _ = loaded(tmp_path, kinds, changes=said).stages
    assert (router.weights, router.content) == (Weights(3, temporal=4), "latent")
    assert (forcing.lr, forcing.steps) == (2e-6, 700)
    _, _, _, steps = loaded(tmp_path, kinds, changes=["steps.lr=1e-3", "steps.steps=40"]).stages
    assert (steps.lr, steps.steps) == (1e-3, 40)


def conditions(stage):
    return stage.k_min, stage.k_max, stage.shift


def test_few_steps_are_learned_under_what_the_last_router_learned_under(tmp_path):
    kinds = ("width", "router", "router", "self_forcing", "steps")
    said = ["router.k_min=0.4", "router.k_max=0.7", "router.shift=3"]
    width, *others = loaded(tmp_path, kinds, changes=said).stages
    assert [conditions(stage) for stage in others] == [(0.4, 0.7, 3.0)] * 4
    assert width.shift == 5
    _, _, _, forcing, steps = loaded(tmp_path, kinds, changes=[*said, "steps.k_max=0.6"]).stages
    assert (conditions(forcing), conditions(steps)) == ((0.4, 0.7, 3.0), (0.4, 0.6, 3.0))
    # a router stage that says nothing has the paper's, whatever the one before had
    path = tmp_path / "bare.toml"
    path.write_text(path.read_text().replace("'router'", "'router'\nk_min=0.3\nshift=4", 1))
    assert [conditions(stage)[::2] for stage in load_recipe(path).stages[1:4]] == [
        (0.3, 4.0), (0.5, 5.0), (0.5, 5.0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["t2v_14b", "i2v_14b", "t2v_1_3b", "i2v_1_3b", "tiny"])
def test_a_shipped_recipes_few_steps_follow_its_router(name):
    recipe = load_recipe(name, ["router.k_min=0.3", "router.k_max=0.6", "router.shift=7"])
    last = recipe.stages[-1]
    assert last.few and (last.k_min, last.k_max) == (0.3, 0.6)
    assert last.shift == (3 if name == "tiny" else 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("width.content=none", "number 1: content: a stage 'width' does not read it, got 'none'"),
        ("width.k_min=0.3", "k_min: a stage 'width' does not read it"),
        ("width.critic=student", "critic: a stage 'width' does not read it"),
        ("router.prune_ratio=0.4", "number 2: prune_ratio: a stage 'router' does not read it, got"),
        ("router.protection=1.0", "protection: a stage 'router' does not read it"),
        ("self_forcing.weights.teacher=1", "weights: a stage 'self_forcing' does not read it"),
        ("self_forcing.weighting=log", "weighting: a stage 'self_forcing' does not read it"),
        ("self_forcing.content=none", "content: a stage 'self_forcing' does not read it"),
        ("steps.feature_blocks=3", "feature_blocks: a stage 'steps' does not read it, got 3"),
        ("steps.weights.feature=1", "weights.feature: a stage 'steps' does not read it, got 1.0"),
        ("steps.weights.data=0", "weights.data: a stage 'steps' does not read it, got 0.0"),
        ("steps.weights={teacher=0,temporal=0}", "weights: expected teacher or temporal above 0"),
        ("steps.critic_lr=1e-3", "critic_lr: a stage 'steps' does not read it"),
        (
            "width.rule=budget width.protection=1",
            "protection: the rule 'budget' does not read it, got 1.0",
        ),
    ],
)
def test_what_a_stage_does_not_read_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError) as caught:
        loaded(tmp_path, ("width", "router", "self_forcing", "steps"), "t2v", change.split())
    assert said in str(caught.value)


def test_only_the_first_stages_cut_and_all_of_them_alike(tmp_path):
    with pytest.raises(ValueError, match="number 2: expected the stage 'width' before all others"):
        loaded(tmp_path, ("router", "width"))
    twice = loaded(tmp_path, ("width", "width", "router"))
    other = replace(twice.stages[1], prune_ratio=0.5)
    with pytest.raises(ValueError, match="number 2: prune_ratio: expected 0.3, as in number 1"):
        replace(twice, stages=(twice.stages[0], other))
    # a router goes on as what it is, too
    with pytest.raises(ValueError, match="number 3: content: expected 'clip', as in number 2, got"):
        routers = loaded(tmp_path, ("width", "router", "router"))
        third = replace(routers.stages[2], content="none")
        replace(routers, stages=(*routers.stages[:2], third))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "small"', "", "mine.toml: name: expected a text, got nothing"),
        ('name = "small"', "name = ' '", "name: expected a text, got an empty one"),
        ("[data]", "[date]", "mine.toml: date: there is no such key; expected one of name, model"),
        ('folder = "toy"', "", "mine.toml: [data]: folder: expected a text, or a list of"),
        (
            'folder = "toy"',
            "folder = 3",
            "[data]: folder: expected a text, or a list of them, got 3",
        ),
        ('folder = "toy"', "folder = []", "[data]: folder: expected a text, or a list of them"),
        (
            'folder = "toy"',
            "folder = ['a', 3]",
            "[data]: folder: expected a text, or a list of them",
        ),
        ('kind = "router"', 'kind = "r"', "[[stage]] number 2: kind: expected one of 'width'"),
        ("lr = 1", "lr = true", "[[stage]] number 2: lr: expected a number above 0 and at most 1"),
        ("lr = 1", "lr = nan", "number 2: lr: expected a number above 0 and at most 1, got nan"),
        ("lr = 1", "lr = 0", "number 2: lr: expected a number above 0 and at most 1, got 0"),
        ("lr = 1", "steps = 1.5", "steps: expected a whole number of 1 or more, got 1.5"),
        ("lr = 1", "prune_ratio = 1", "prune_ratio: expected a number from 0 to 0.9, got 1"),
        ("lr = 1", "sigma_min=0.5\nsigma_max=0.5", "sigma_min: expected less than sigma_max (0.5)"),
        (
            'kind = "width"',
            'kind = "steps"\nsigma_max = 0.9',
            "sigma_min, sigma_max: expected 0 and 1 where whole runs",
        ),
        ("lr = 1", "k_min = 0.9", "k_min: expected at most k_max (0.875), got 0.9"),
        ("lr = 1", "steps = 50", "warmup: expected fewer than steps (50), got 100"),
        ("lr = 1", "content = 'clip'", "[[stage]] number 2: content: 'clip' looks at the first"),
        ("lr = 1", "learning_rate = 1", "number 2: learning_rate: there is no such key"),
        ("feature = 2", "features = 2", "[[stage]] number 2: weights: features: there is no such"),
        ("feature = 2", "feature = -1", "number 2: weights: feature: expected a number of 0 or m"),
        (
            "feature = 2",
            "feature=0\nteacher=0\ndata=0\ntemporal=0",
            "weights: feature, teacher, data, temporal: expected one above 0, got none",
        ),
        ('model = "tiny"', 'model = "x"', "mine.toml: profile: expected the file that WanTrim P"),
        ('"both"', '"i2v"\ndata = 3', "mine.toml: expected a recipe in TOML"),
        (
            "[data]",
            "[data]\nimage_share = 0.5\nbatch = 0",
            "[data]: batch: expected a whole number",
        ),
        ('"both"', '"x"', "mine.toml: task: expected one of 't2v', 'i2v', 'both', got 'x'"),
        ('name = "small"', "name = [", "mine.toml: expected a recipe in TOML: "),
    ],
)
def test_what_is_wrong_is_said_with_file_table_and_key(written, old, new, said):
    with pytest.raises(ValueError) as caught:
        load_recipe(written(old, new))
    assert said in str(caught.value)


def test_data_can_lie_in_several_folders(written):
    recipe = load_recipe(written('folder = "toy"', 'folder = ["data/one", "data/two"]'))
    assert [folder.name for folder in recipe.data.folders] == ["one", "two"]


def test_stages_have_to_be_tables(tmp_path):
    path = tmp_path / "mine.toml"
    for stages in ("stage = []", "stage = 3", "stage = [1]", "[stage]\nkind = 'width'"):
        path.write_text(f"name='a'\nmodel='tiny'\ntask='both'\ndata.folder='toy'\n{stages}\n")
        with pytest.raises(ValueError, match=r"mine.toml: \[\[stage\]\]"):
            load_recipe(path)


def test_only_a_model_for_both_tasks_loses_images(written):
    with pytest.raises(ValueError, match=r"\[data\] image_share: expected 1 for task 't2v'"):
        load_recipe(written('"both"\n[data]', '"t2v"\n[data]\nimage_share = 0.5'))


def test_a_recipe_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match="nothing: there is no such recipe.*t2v_14b, t2v_1_3b"):
        load_recipe("nothing")
    with pytest.raises(ValueError, match="there is no such recipe"):
        load_recipe(tmp_path / "tiny.toml")


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.toml")))
def test_shipped_recipes_load_and_say_what_the_paper_says(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    kinds = [stage.kind for stage in recipe.stages]
    if name.startswith("tiny"):
        alone = name == "tiny_forcing"
        assert kinds == (["self_forcing"] if alone else ["width", "router", "router", "steps"])
        assert (recipe.model, recipe.data.folder, recipe.profile) == ("tiny", "toy", "")
        return
    expert = "_a14b_" in name
    assert kinds == ["width", "router", "self_forcing"][: 2 if expert else 3]
    temporal = 8 if recipe.task == "t2v" else 4
    assert recipe.data.batch == 4 and recipe.run.dtype == "bf16"
    for stage in recipe.stages[:2]:
        assert stage.weights == Weights(10, 6, 1, temporal)
        assert (stage.steps, stage.lr, stage.router_lr, stage.warmup) == (7000, 3e-5, 5e-4, 100)
    clip = recipe.task == "i2v" and not expert
    assert recipe.stages[1].content == ("clip" if clip else "latent")
    boundary = 0.875 if recipe.task == "t2v" else 0.9
    levels = {"high": (boundary, 1.0), "low": (0.0, boundary)}.get(name.rpartition("_")[2], (0, 1))
    assert {(stage.sigma_min, stage.sigma_max) for stage in recipe.stages} == {levels}
    if expert:
        return
    third = recipe.stages[2]
    assert (third.k_min, third.k_max, third.shift) == (0.5, 0.875, 5)
    assert (third.kind, third.steps, third.lr, third.guidance) == ("self_forcing", 1200, 2e-6, 5)


@pytest.mark.parametrize("name", KNOWN)
def test_the_cost_in_a_recipes_comments_is_the_plans(name):
    text = (SHIPPED / f"{name}.toml").read_text()
    said = re.findall(
        r"^# (\d+) GPUs?, batch (\d+): ([\d.]+) GiB each, (\d+) hours"
        r"(?:; stage III ([\d.]+) GiB, (\d+) hours)?$",
        text,
        re.MULTILINE,
    )
    assert len(said) >= 2
    for gpus, batch, size, hours, third, last in said:
        plans = plan_recipe(load_recipe(name), KNOWN[name], VIDEO, int(gpus))
        assert plans[0].batch == int(batch)
        assert f"{max(plan.total for plan in plans[:2]):.1f}" == size
        assert f"{sum(plan.hours() for plan in plans[:2]):.0f}" == hours
        if len(plans) == 3:
            assert (f"{plans[2].total:.1f}", f"{plans[2].hours():.0f}") == (third, last)
    host, disk = re.search(
        r"^# machine of 8: (\d+) GiB of memory, (\d+) GiB of disk", text, re.M
    ).groups()
    assert f"{max(plan.host for plan in plans):.0f}" == host
    assert f"{max(plan.disk for plan in plans):.0f}" == disk


@pytest.mark.parametrize("name", ["t2v_14b", "i2v_14b", "t2v_1_3b", "i2v_1_3b"])
def test_the_cost_in_the_docs_is_the_plans(name):
    (row,) = re.findall(rf"^\| `{name}`.*$", (DOCS / "training.md").read_text("utf-8"), re.M)
    said = []
    for gpus in (4, 8):
        plans = plan_recipe(load_recipe(name), KNOWN[name], VIDEO, gpus)
        for some in (plans[:2], plans[2:]):
            size, hours = max(plan.total for plan in some), sum(plan.hours() for plan in some)
            said.append((f"{size:.1f}", f"{hours:.0f}"))
    assert re.findall(r"([\d.]+) GiB, (\d+) hours", row) == said


def config_14b(image: bool) -> dict:
    extra = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120} if image else {}
    return {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "num_layers": 40,
        **extra,
    }


@pytest.mark.parametrize("name", ["t2v_14b", "i2v_14b"])
def test_parameters_are_those_of_diffusers_model(name):
    with torch.device("meta"):
        model = WanTransformer3DModel(**config_14b(name == "i2v_14b"))
    there = sum(p.numel() for p in model.parameters())
    assert parameters(KNOWN[name]) == there
    assert 14e9 < there < 16.5e9


def test_the_tiny_wans_sizes_are_read_from_its_file():
    shape = model_shape(load_recipe("tiny"))
    assert (shape.dim, shape.num_blocks, shape.head_dim, shape.in_channels) == (128, 16, 16, 36)
    assert abs(2 * parameters(shape) / CHECKPOINT.stat().st_size - 1) < 0.02


def test_a_model_that_is_not_there_needs_a_known_name():
    recipe = replace(load_recipe("t2v_14b"), name="mine")
    with pytest.raises(ValueError, match="wan2.1_t2v_14B_bf16.safetensors is not there"):
        model_shape(recipe)


def kept_of_a_block(width: tuple[int, int, int], tokens: int) -> int:
    """Bytes that autograd keeps in diffusers' block of dim 128 and heads of 32."""
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, ffn_dim=width[2], num_layers=1, text_dim=8
    )
    block = model.blocks[0]
    processor = block.attn1.processor
    block.attn1 = WanAttention(128, width[0], 32, processor=processor)
    block.attn2 = WanAttention(128, width[1], 32, cross_attention_dim_head=32, processor=processor)
    block = block.bfloat16()
    hidden = torch.randn(1, tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    text, temb = torch.randn(1, 4, 128).bfloat16(), torch.randn(1, 6, 128).bfloat16()
    rotary = (torch.randn(1, tokens, 1, 32), torch.randn(1, tokens, 1, 32))
    given = {t.untyped_storage().data_ptr() for t in [*block.parameters(), *rotary]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        block(hidden, text, temb, rotary)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("width", [(4, 4, 256), (3, 2, 512)])
def test_kept_activations_are_what_autograd_keeps_of_diffusers_block(width):
    measured = (kept_of_a_block(width, 512) - kept_of_a_block(width, 256)) / 256
    shape = replace(KNOWN["t2v_14b"], dim=128, ffn_dim=256, head_dim=32)
    # the norms' statistics are a few numbers beside it
    assert kept_bytes(shape, width) == pytest.approx(measured, rel=0.02)


def recipe_14b(**run) -> Recipe:
    recipe = load_recipe("t2v_14b")
    return replace(recipe, run=replace(recipe.run, **{"optimizer": "adamw"} | run))


def first(recipe: Recipe, gpus: int = 4, video: Video = VIDEO):
    return plan_recipe(recipe, KNOWN["t2v_14b"], video, gpus)[0]


def test_a_plan_adds_up():
    plan = first(recipe_14b(teacher="sharded"))
    shape = KNOWN["t2v_14b"]
    own = parameters(shape, slim_sizes(shape, 0.3))
    assert plan.parameters == own and 0.65 < own / parameters(shape) < 0.75
    shared = plan.rows["weights"] + plan.rows["gradients"] + plan.rows["moments"]
    assert shared * memory.GIB * 4 == pytest.approx(16 * own)
    assert plan.rows["teacher"] * memory.GIB * 4 == pytest.approx(2 * parameters(shape))
    assert plan.rows["inputs"] * memory.GIB == 40 * 32760 * 5120 * 2
    # a teacher's forward, and four of a student that is about a third smaller outside of attention
    teacher = forward_flops(shape, 32760)
    assert 4 * (1 + 4 * 0.6) * teacher < plan.flops < 4 * (1 + 4 * 0.8) * teacher


def test_what_a_stage_takes_of_a_machine_beside_its_gpus():
    """The teacher once a machine, the student where it is written, and two saved steps."""
    shape = KNOWN["t2v_14b"]
    own, full = parameters(shape, slim_sizes(shape, 0.3)), parameters(shape)
    offloaded, sharded = (first(recipe_14b(teacher=t)) for t in ("offloaded", "sharded"))
    assert offloaded.host - sharded.host == pytest.approx(2 * full / memory.GIB)
    assert sharded.host == pytest.approx(4 * memory.PROCESS + 4 * own / memory.GIB)
    assert sharded.disk * memory.GIB == pytest.approx((2 * 12 + 4) * own)
    assert first(recipe_14b(), 8).host - first(recipe_14b(), 4).host == 4 * memory.PROCESS
    low = first(recipe_14b(optimizer="adamw8bit"))
    assert low.rows["moments"] * memory.GIB * 4 == pytest.approx(2 * own)
    assert low.disk * memory.GIB == pytest.approx((2 * 6 + 4) * own)


def test_a_critic_costs_what_it_trains():
    shape, recipe = KNOWN["t2v_14b"], recipe_14b()
    own, full = parameters(shape, slim_sizes(shape, 0.3)), parameters(shape)
    plans = {}
    for critic in ("full", "student"):
        third = replace(recipe.stages[2], critic=critic)
        changed = replace(recipe, stages=(*recipe.stages[:2], third))
        plans[critic] = plan_recipe(changed, shape, VIDEO, 4)[2]
    for plan, trained in ((plans["full"], full), (plans["student"], own)):
        assert plan.rows["critic"] * memory.GIB * 4 == pytest.approx(16 * trained)
        assert plan.disk * memory.GIB == pytest.approx(24 * (own + trained) + 4 * own)
        assert plan.rows["feature"] == 0
    # for each of the student's updates: five rollouts of 2.5 steps and a backward pass, the critic
    # five times, and both asked
    teacher = forward_flops(shape, 32760)
    often = replace(recipe.stages[2], critic="full", critic_updates=1)
    each = plan_recipe(replace(recipe, stages=(*recipe.stages[:2], often)), shape, VIDEO, 4)[2]
    turn = (each.flops - plans["full"].flops) / 0.8 / 4
    assert 3 * teacher + 3 * 0.6 * teacher < turn < 3 * teacher + 3 * 0.8 * teacher
    # a slim critic does less of everything: its own turn, and its answer in the student's
    slim = plan_recipe(replace(recipe, stages=(recipe.stages[0],)), shape, VIDEO, 4)[0]
    passes = (slim.flops / 4 - teacher) / 4
    less = (plans["full"].flops - plans["student"].flops) / 4
    assert less == pytest.approx((4 + 1 / 5) * (teacher - passes), rel=0.02)
    assert plans["student"].rows["gathered"] < plans["full"].rows["gathered"]
    third = [replace(recipe.stages[2], critic=critic) for critic in ("full", "student")]
    full, student = (
        plan_recipe(
            replace(recipe_14b(checkpointing=False), stages=(*recipe.stages[:2], stage)),
            shape, VIDEO, 4,
        )[2].rows["block"]
        for stage in third
    )  # fmt: skip
    alone = first(recipe_14b(checkpointing=False)).rows["block"]
    # the student's graph, and as much again for a critic of its sizes
    assert student < 2 * alone < full


def test_more_costs_more():
    base = first(recipe_14b(teacher="sharded"))
    assert first(recipe_14b(teacher="sharded"), 2).total > base.total
    assert first(recipe_14b(teacher="sharded"), 8).total < base.total
    assert first(recipe_14b(teacher="whole")).total > base.total
    assert first(recipe_14b(teacher="offloaded")).total < base.total
    assert first(recipe_14b(teacher="sharded", checkpointing=False)).total > 2 * base.total
    assert first(recipe_14b(teacher="sharded", checkpointing=False)).flops < base.flops
    assert first(recipe_14b(teacher="sharded", dtype="fp32")).total > base.total
    longer = first(recipe_14b(teacher="sharded"), video=Video(31, 60, 104))
    assert longer.total > base.total and longer.flops > base.flops
    recipe = recipe_14b(teacher="sharded")
    for change in ({"prune_ratio": 0.5}, {"feature_blocks": 1}):
        stages = (replace(recipe.stages[0], **change), *recipe.stages[1:])
        assert first(replace(recipe, stages=stages)).total < base.total
    averaged = (replace(recipe.stages[0], ema_decay=0.9), *recipe.stages[1:])
    assert first(replace(recipe, stages=averaged)).total > base.total
    # twice the GPUs: half the time for a batch that stays, none less for one that grows with them
    assert first(recipe, 2).hours() == pytest.approx(2 * base.hours())
    assert first(recipe, 8).batch == 8 and first(recipe, 8).hours() == pytest.approx(base.hours())
    width, router, steps = plan_recipe(recipe, KNOWN["t2v_14b"], VIDEO, 4)
    # blocks that are left out are computed for the router; few steps ask the teacher ten times
    assert width.flops == router.flops < steps.flops


def test_the_largest_sample_is_planned_for(tmp_path):
    recipe = load_recipe("t2v_14b")
    assert largest_video(recipe, SIZE) == VIDEO
    shapes = [{"latents": [16, f, 8, 8], "text": [5, 4096]} for f in (3, 7, 5)]
    shard = {
        "file": "shard-00001.safetensors",
        "bytes": 1,
        "sha256": "",
        "names": ["a", "b", "c"],
        "shapes": shapes,
    }
    index = {"format": "wantrim_shards/1", "made": {}, "text_tokens": 512, "shards": [shard]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    recipe = replace(recipe, data=replace(recipe.data, folder=str(tmp_path)))
    assert largest_video(recipe, SIZE) == Video(7, 8, 8)


def test_the_command(capsys, caplog):
    assert memory.main(["i2v_14b", "--gpus", "4", "8"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "(fits)" in said and "32,760 tokens" in said
    assert memory.main(["nothing"]) == 1
    assert "there is no such recipe" in caplog.text
    # changed as training changes it, and planned as far as it can be encoded
    assert memory.main(["t2v_14b", "--gpus", "4", "--set", "width.steps=700", "data.batch=8"]) == 0
    said = capsys.readouterr().out
    assert "weights, 700 steps" in said and "4 GPUs, batch 8" in said
    for wrong in (["--size", "854x478"], ["--pixel-frames", "80"]):
        assert memory.main(["t2v_14b", *wrong]) == 1
    assert "expected multiples of 16, got 854x478" in caplog.text
    assert "expected 4n + 1, as 81, got 80" in caplog.text

"""Routers: what each of them makes of a profile, a run, a latent or a file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wantrim.benchmarks.peers.random_router import RandomRouter
from wantrim.methods.cost import Width
from wantrim.methods.routers import (
    Content,
    FixedRouter,
    RouterMLP,
    latent_statistics,
)
from wantrim.profiles.artifact import package_version
from wantrim.profiles.fingerprint import WHOLE, Fingerprint, width_digest
from wantrim.slim.router import KIND, Conditions, TrainedRouter, load_router
from wantrim.training.router_file import save_router

BLOCKS = 5
MODEL = Fingerprint(48, 64, BLOCKS, 4, 16, 16, (0.5, -0.25))
CONTENT = Content(torch.zeros(1, 4, 3, 6, 5))


def trained(kind="latent", content_dim=16, blocks=BLOCKS) -> TrainedRouter:
    torch.manual_seed(0)
    mlp = RouterMLP(blocks, content_dim, hidden=32, time_dim=16).requires_grad_(False)
    return TrainedRouter(mlp, kind, MODEL)


def test_random_is_a_function_of_seed_and_sigma():
    one, other = RandomRouter(1), RandomRouter(2)
    assert torch.equal(one.logits(9, 0.5), RandomRouter(1).logits(9, 0.5))
    assert not torch.equal(one.logits(9, 0.5), one.logits(9, 0.6))
    assert not torch.equal(one.logits(9, 0.5), other.logits(9, 0.5))


def test_a_fixed_list_keeps_the_first_and_the_last_block():
    router = FixedRouter((0, 2, 4))
    assert router.count(5, 2) == 4
    assert router.logits(5, 0.5).tolist() == [1, 1, 0, 1, 1]
    assert router.skips_nothing is False and FixedRouter(()).skips_nothing is True
    router.check(5)
    for outside in (5, -1):
        with pytest.raises(ValueError, match=rf"from 0 to 4, got \[{outside}\]"):
            FixedRouter((outside,)).check(5)


def test_latent_statistics_of_constructed_latents():
    """Channel 0 is 3 everywhere, 1 grows by 2 a latent frame, 2 by 0.5 a column, 3 by 1 a row."""
    f, h, w = 3, 4, 5
    time, row, column = torch.meshgrid(
        torch.arange(float(f)), torch.arange(float(h)), torch.arange(float(w)), indexing="ij"
    )
    latent = torch.stack([torch.full_like(time, 3.0), 2 * time, 0.5 * column, row])[None]
    both = torch.cat([latent, -latent])
    mean, std, temporal, spatial = latent_statistics(both).unflatten(1, (4, 4)).unbind(1)
    torch.testing.assert_close(mean[0], torch.tensor([3.0, 2.0, 1.0, 1.5]))
    torch.testing.assert_close(mean[1], -mean[0])
    torch.testing.assert_close(std[0, 0], torch.tensor(0.0))
    torch.testing.assert_close(std[0, 1], torch.tensor(2 * (2 / 3) ** 0.5))
    torch.testing.assert_close(temporal, torch.tensor([[0.0, 2.0, 0.0, 0.0]] * 2))
    # 45 differences down and 48 across
    down, across = f * (h - 1) * w, f * h * (w - 1)
    by_hand = [0.0, 0.0, 0.5 * across / (down + across), 1.0 * down / (down + across)]
    torch.testing.assert_close(spatial, torch.tensor([by_hand] * 2))


def test_latent_statistics_of_one_frame_of_one_pixel_are_finite():
    got = latent_statistics(torch.full((2, 3, 1, 1, 1), 2.0, dtype=torch.bfloat16))
    assert got.dtype == torch.float32
    assert got.tolist() == [[2.0] * 3 + [0.0] * 9] * 2


def test_two_latent_frames_of_two_rows_differ_by_hand():
    """One difference in time for each pixel, one down for each latent frame; none across."""
    latent = torch.tensor([1.0, 2.0, 5.0, 9.0]).view(1, 1, 2, 2, 1)
    # in time 4 and 7, down 1 and 4
    assert latent_statistics(latent)[0, 2:].tolist() == [5.5, 2.5]


def test_the_trained_router_is_its_mlp_on_sigma_and_content():
    latent = torch.randn(2, 4, 3, 6, 5)
    router = trained()
    got = router.ask(torch.tensor([0.7]), Content(latent))
    # eq. 9 by hand
    angle = 700 * 10000 ** -(torch.arange(8.0) / 8)
    given = torch.cat([angle.cos(), angle.sin(), latent_statistics(latent)[0]])
    first, _, second, _, third = router.mlp.layers
    hidden = torch.nn.functional.silu(first.weight @ given + first.bias)
    hidden = torch.nn.functional.silu(second.weight @ hidden + second.bias)
    torch.testing.assert_close(got, third.weight @ hidden + third.bias, rtol=1e-4, atol=1e-4)
    alone = trained("none", 0)
    one, other = (
        alone.ask(torch.tensor([0.7]), Content(torch.randn_like(latent))) for _ in range(2)
    )
    assert torch.equal(one, other)


def test_a_router_of_clip_needs_an_image():
    router = trained("clip", 12)
    sigma = torch.tensor([0.7])
    assert router.ask(sigma, Content(torch.zeros(1), torch.randn(1, 12))).shape == (BLOCKS,)
    with pytest.raises(ValueError, match="start image through CLIP"):
        router.ask(sigma, CONTENT)
    with pytest.raises(ValueError, match="expected one for 7 blocks, got 5"):
        router.check(7)


@pytest.mark.parametrize(("kind", "content_dim"), [("latent", 16), ("none", 0)])
def test_a_saved_router_is_the_same_router(tmp_path, kind, content_dim):
    router, path = trained(kind, content_dim), tmp_path / "deep" / "router.safetensors"
    save_router(path, router)
    loaded = load_router(path)
    assert loaded.kind == kind and loaded.model == MODEL
    for name, value in router.mlp.state_dict().items():
        assert torch.equal(loaded.mlp.state_dict()[name], value)
    content = Content(torch.randn(1, 4, 3, 6, 5))
    for sigma in (0.05, 0.5, 1.0):
        one, other = (r.ask(torch.tensor([sigma]), content) for r in (router, loaded))
        # weights read from a file lie elsewhere in memory, and sums may round otherwise
        torch.testing.assert_close(one, other)
    assert [file.name for file in path.parent.iterdir()] == ["router.safetensors"]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[KIND.key])["package"] == package_version() != ""


def _rewritten(path, **header):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()[KIND.key])
    save_file(tensors, path, {KIND.key: json.dumps(old | header)})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "cannot be read"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), "expected a WanTrim router"),
        (
            lambda p: save_file({"a": torch.zeros(1)}, p, {KIND.key: "[" * 100_000}),
            "cannot be read",
        ),
        (
            lambda p: save_file({"a": torch.zeros(1)}, p, {KIND.key: "[1]"}),
            "expected a WanTrim router",
        ),
        (lambda p: _rewritten(p, format="wantrim_router/9"), "expected a WanTrim router"),
        (lambda p: _rewritten(p, sizes=[5, 16, 32]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[5, 16, 32, -2]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[5, 16, 32, 1e9]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[True, 16, 32, 16]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[0, 16, 32, 16]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[5, 16, 0, 16]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[5, 16, 32, 15]), "impossible sizes"),
        (lambda p: _rewritten(p, sizes=[5, 17, 32, 16]), "do not fit its header"),
        (lambda p: _rewritten(p, content="magic"), "damaged"),
        (lambda p: _rewritten(p, content="none"), "damaged"),
        (lambda p: _rewritten(p, model={"dim": 1}), "router.safetensors: model"),
        (lambda p: _rewritten(p, model=MODEL.to_json() | {"num_blocks": 6}), "6 blocks"),
    ],
)
def test_damaged_and_hostile_files_are_refused_by_name(tmp_path, damage, said):
    path = tmp_path / "router.safetensors"
    save_router(path, trained())
    damage(path)
    with pytest.raises(ValueError, match=said) as error:
        load_router(path)
    assert "router.safetensors" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    router, path = trained(), tmp_path / "router.safetensors"
    router.mlp.layers[2].weight[3, 1] = value
    save_router(path, router)
    with pytest.raises(ValueError, match="not finite"):
        load_router(path)


def test_integers_in_place_of_weights_are_refused(tmp_path):
    path = tmp_path / "router.safetensors"
    save_router(path, trained())
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({name: value.long() for name, value in load_file(path).items()}, path, header)
    with pytest.raises(ValueError, match="not finite"):
        load_router(path)


@pytest.mark.parametrize("dtypes", [(torch.float8_e4m3fn,) * 2, (torch.float32, torch.float16)])
def test_a_router_of_any_precision_runs(tmp_path, dtypes):
    path = tmp_path / "router.safetensors"
    save_router(path, trained())
    with safe_open(path, "pt") as file:
        header = file.metadata()
    mixed = {n: v.to(dtypes[i % 2]) for i, (n, v) in enumerate(load_file(path).items())}
    save_file(mixed, path, header)
    logits = load_router(path).ask(torch.tensor([0.5]), Content(torch.randn(1, 4, 3, 6, 5)))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


CONDITIONS = Conditions(0.3, 0.7, "constant", "identity", 4.0)
USUAL = {"k_min": 0.5, "k_max": 0.875, "curve": "falling", "skipped": "reuse"}


def test_a_router_says_what_it_was_trained_with(tmp_path):
    path, router = tmp_path / "router.safetensors", trained()
    router.conditions, router.model = CONDITIONS, replace(MODEL, width="abc")
    save_router(path, router)
    again = load_router(path)
    assert again.conditions == CONDITIONS and again.model.width == "abc"
    assert CONDITIONS.describe() == (
        "The router was trained with k_min 0.3, k_max 0.7, constant, shift 4."
    )
    for damage in ({"k_min": 0.9}, {"shift": -1}, {"k_max": "x"}, {"curve": 3}, {"more": 1}):
        _rewritten(path, trained=CONDITIONS.to_json() | damage)
        with pytest.raises(ValueError, match="router.safetensors: damaged file: trained: expected"):
            load_router(path)


def test_another_kind_of_skipping_is_said(tmp_path):
    path, router = tmp_path / "router.safetensors", trained()
    router.conditions = replace(CONDITIONS, skipped="reuse")
    save_router(path, router)
    said = load_router(path).conditions.describe()
    assert said.endswith("gave 'reuse' then; here they add nothing, so that it may keep less.")


def test_a_router_of_the_first_format_is_read(tmp_path):
    path = tmp_path / "router.safetensors"
    save_router(path, trained())
    assert KIND.format == "wantrim_router/2"
    _rewritten(path, format="wantrim_router/1")
    old = load_router(path)
    assert old.conditions is None and old.model == MODEL
    # what it does not say does not tell it from a student
    assert replace(MODEL, width="abc").differs(old.model) is None
    _rewritten(path, format="wantrim_router/3")
    with pytest.raises(ValueError, match="wantrim_router/2.*got 'wantrim_router/3'"):
        load_router(path)


def test_what_nobody_set_is_the_routers_own_and_the_rest_is_said():
    assert CONDITIONS.settle(USUAL, USUAL) == (
        {"k_min": 0.3, "k_max": 0.7, "curve": "constant", "skipped": "identity"},
        [],
    )
    chosen = USUAL | {"k_max": 0.8, "skipped": "identity"}
    settled, said = CONDITIONS.settle(chosen, USUAL)
    assert settled == {"k_min": 0.3, "k_max": 0.8, "curve": "constant", "skipped": "identity"}
    assert said == ["k_max: 0.8 is set here; the router was trained with 0.7"]


def test_a_student_is_told_from_its_teacher_and_from_another_cut():
    """By what was cut: at 3e-5 training hardly moves the sample."""
    heads, channels = ((0, 1), (1, 3)), ((0, 1, 2), (2, 3, 4))
    model = Fingerprint(32, 5, 2, 4, 16, 16, (0.5, -0.25))
    cut = Width(heads, heads, channels)
    others = [
        replace(cut, self_heads=((0, 1), (1, 2))),
        replace(cut, cross_heads=((0, 2), (1, 3))),
        replace(cut, ffn_channels=((0, 1, 2), (1, 3, 4))),
    ]
    student = replace(model, width=width_digest(model, cut))
    assert student.differs(replace(student, sample=(0.500015, -0.25003))) is None
    for other in others:
        said = student.differs(replace(model, width=width_digest(model, other)))
        assert said == "expected a slim one, got a slim one: other heads and channels were cut"
    every = Width(((0, 1, 2, 3),) * 2, ((0, 1, 2, 3),) * 2, ((0, 1, 2, 3, 4),) * 2)
    teacher = replace(model, width=width_digest(model, every))
    assert teacher.width == WHOLE
    assert teacher.differs(student).startswith("expected the full model, got a slim one")
    assert student.differs(teacher).startswith("expected a slim one, got the full model")
    assert Fingerprint.from_json(student.to_json()) == student
    assert "width" not in model.to_json()
    with pytest.raises(ValueError, match="expected a digest as its width"):
        Fingerprint.from_json(model.to_json() | {"width": 3})

"""What a recorded profile says, against the same figures computed from the modules' own inputs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from wantrim.demo import profile as demo
from wantrim.engine.engine import COND, UNCOND
from wantrim.engine.plan import TrimPlan
from wantrim.hosts.diffusers.attach import attach
from wantrim.hosts.diffusers.blocks import watch_blocks
from wantrim.hosts.diffusers.profiling import model_fingerprint, profile_run
from wantrim.hosts.diffusers.sample import sample
from wantrim.hosts.diffusers.weights import load_original
from wantrim.kernels.reference import frame_mass
from wantrim.methods.tokens import paper_plan
from wantrim.profiles import recording
from wantrim.profiles.calibration import Calibration, calibration_bytes
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.picture import draw_profile, summary
from wantrim.profiles.profile import Profile, load_profile, of_weights
from wantrim.toy import CHECKPOINT

BOTH = (COND, UNCOND)
HEADS, HEAD_DIM, BLOCKS, FFN, TEXT_DIM = 4, 12, 3, 40, 24
DIM = HEADS * HEAD_DIM
# latent frames, rows and columns; 3 x 3 x 5 tokens: no tile divides the picture
SIZE, GRID = (3, 6, 10), (3, 3, 5)
TOKENS = math.prod(GRID)
# diffusers takes the last 512 for the text
TEXT, IMAGE = 512, 9


def wan(clip=False, seed=0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=FFN,
        num_layers=BLOCKS,
        image_dim=20 if clip else None,
        added_kv_proj_dim=DIM if clip else None,
    )
    # norms of ones and biases of zero would hide which side of them is measured
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or name.endswith("scale_shift_table"):
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return model.eval()


def text(batch=1, seed=9) -> torch.Tensor:
    return torch.randn(batch, TEXT, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def run(model, batch=1, seed=0, **options) -> torch.Tensor:
    if model.config.image_dim is not None:
        image = torch.randn(batch, IMAGE, 20, generator=torch.Generator().manual_seed(4))
        options["model_kwargs"] = {"encoder_hidden_states_image": image}
    options = {"steps": 2, "guidance": 4.0, "seed": seed} | options
    return sample(model, text(batch), SIZE, **options)


def recorded(model, batch=1, seed=0, calibrate="none", **options):
    with profile_run(model, cond_or_uncond=BOTH, shift=3.0, calibrate=calibrate) as recorder:
        run(model, batch, seed, **options)
    return recorder


class Direct:
    """The conditional rows' inputs of modules in every block and call, taken by plain hooks."""

    def __init__(self, model, batch: int):
        self.model, self.batch, self.seen, self.qk = model, batch, [], []
        self.handles = []
        for index, block in enumerate(model.blocks):
            watched = {
                "self_o": block.attn1.to_out[0],
                "cross_o": block.attn2.to_out[0],
                "down": block.ffn.net[2],
                "q": block.attn1.norm_q,
                "k": block.attn1.norm_k,
                "cross_q": block.attn2.norm_q,
                "cross_k": block.attn2.norm_k,
                "cross": block.attn2,
                "block": block,
            }
            if block.attn2.add_k_proj is not None:
                watched["k_img"] = block.attn2.norm_added_k
            for name, module in watched.items():
                self.handles.append(module.register_forward_hook(self._note(index, name)))

    def _note(self, index, name):
        def note(module, args, out):
            rows = [a[: self.batch].clone() for a in args if torch.is_tensor(a) and len(a) > 1]
            self.seen.append((index, name, rows, out[: self.batch].clone()))

        return note

    def inputs(self, index: int, name: str) -> list[list[torch.Tensor]]:
        return [rows for i, n, rows, _ in self.seen if (i, n) == (index, name)]

    def outputs(self, index: int, name: str) -> list[torch.Tensor]:
        return [out for i, n, _, out in self.seen if (i, n) == (index, name)]

    def done(self):
        for handle in self.handles:
            handle.remove()


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, HEAD_DIM)).double()


def share(x: torch.Tensor) -> torch.Tensor:
    """Sum over the rows of the mean outer product of the heads' shares in a token's energy."""
    energy = heads_of(x).square().sum(-1)
    energy = energy / energy.sum(-1, keepdim=True)
    return torch.einsum("bsn,bsm->nm", energy, energy) / x.shape[1]


def rms(x: torch.Tensor, dims) -> torch.Tensor:
    return x.double().square().mean(dims).sqrt()


def cross_parts(block, x: torch.Tensor, words: torch.Tensor) -> list[torch.Tensor]:
    """Text part and image part of a cross-attention's head outputs [b, s, n, d], by hand."""
    a = block.attn2
    q = heads_of(a.norm_q(a.to_q(x))).float().transpose(1, 2)
    image, words = words[:, :-TEXT], words[:, -TEXT:]
    pairs = [(a.norm_k(a.to_k(words)), a.to_v(words))]
    if a.add_k_proj is not None:
        pairs.append((a.norm_added_k(a.add_k_proj(image)), a.add_v_proj(image)))
    parts = []
    for k, v in pairs:
        k, v = (heads_of(t).float().transpose(1, 2) for t in (k, v))
        scores = (q @ k.mT / HEAD_DIM**0.5).softmax(-1)
        parts.append((scores @ v).transpose(1, 2))
    return parts


@pytest.mark.parametrize("sampled", [2048, 20])
@pytest.mark.parametrize(("clip", "batch"), [(False, 1), (False, 2), (True, 2)])
@torch.no_grad()
def test_profile_is_what_the_formulas_say(clip, batch, sampled, monkeypatch):
    monkeypatch.setattr(recording, "SAMPLED", sampled)
    model, qk = wan(clip), []
    direct = Direct(model, batch)
    with watch_blocks(model, lambda index, block, q, k: qk.append((index, q[:batch], k[:batch]))):
        run(model, batch)
    direct.done()
    recorder = recorded(model, batch)
    profile = recorder.profile()
    assert not recorder.notes
    assert profile.calls == 2 * batch
    # sigma 1 and 0.75 with shift 3
    assert profile.tensors["count"].nonzero().flatten().tolist() == [7, 9]
    positions = torch.arange(TOKENS)
    if sampled < TOKENS:
        positions = recording.sample_queries(recording.TokenGrid(*GRID), sampled / TOKENS, 0)
        assert len(positions) < TOKENS
    weights = {9: math.log(2), 7: math.log(1.75)}

    def check(name, index, step, want):
        at = {0: 9, 1: 7}[step]
        torch.testing.assert_close(
            profile.tensors[name][at, index].double(), want, rtol=1e-4, atol=1e-6
        )

    for index, block in enumerate(model.blocks):
        pairs = [(q, k) for i, q, k in qk if i == index]
        for step, (q, k) in enumerate(pairs):
            # fewer than 64 tokens: every query
            matrix = torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()) / HEAD_DIM**0.5
            matrix = matrix.softmax(-1)
            frame = torch.arange(TOKENS) // (GRID[1] * GRID[2])
            within = matrix[..., frame[:, None] == frame]
            check("ratio", index, step, within.sum(-1).sum(0) / TOKENS)
            weight = weights[{0: 9, 1: 7}[step]]
            own = heads_of(direct.inputs(index, "self_o")[step][0])[:, positions]
            check("self_output", index, step, weight * rms(own, (1, 3)).sum(0))
            x, words = direct.inputs(index, "cross")[step]
            parts = [part[:, positions] for part in cross_parts(block, x, words)]
            assert len(parts) == 1 + clip
            sizes = sum(rms(part, (1, 3)).sum(0) for part in parts)
            check("cross_output", index, step, weight * sizes)
        means = {
            "self_mean": [heads_of(x[0])[:, positions] for x in direct.inputs(index, "self_o")],
            "cross_mean": [heads_of(x[0])[:, positions] for x in direct.inputs(index, "cross_o")],
        }
        for name, values in means.items():
            want = sum(value.mean(1).sum(0) for value in values)
            torch.testing.assert_close(
                profile.tensors[name][index].double(), want, rtol=1e-4, atol=1e-6
            )
        down = [x[0][:, positions].double() for x in direct.inputs(index, "down")]
        torch.testing.assert_close(
            profile.tensors["channel_energy"][index].double(),
            sum(x.square().mean(1).sum(0) for x in down),
            rtol=1e-4,
            atol=1e-6,
        )
        videos, prompts = ("q", "k", "cross_q"), ("cross_k", "k_img") if clip else ("cross_k",)
        for name in (*videos, *prompts):
            inputs = [x[0] for x in direct.inputs(index, name)]
            some = [x[:, positions] if name in videos else x[:, :sampled] for x in inputs]
            torch.testing.assert_close(
                profile.tensors[f"{name}_share"][index].double(),
                sum(share(x) for x in some),
                rtol=1e-4,
                atol=1e-6,
            )
    assert bool(profile.tensors["k_img_share"].any()) == clip


def test_weights_are_measured_through_the_modules():
    model = wan()
    tensors = recorded(model, steps=1).profile().tensors
    for index, block in enumerate(model.blocks):
        for name, layer in (("self", block.attn1.to_out[0]), ("cross", block.attn2.to_out[0])):
            want = layer.weight.unflatten(1, (HEADS, HEAD_DIM)).norm(dim=(0, 2))
            torch.testing.assert_close(tensors[f"{name}_o_norm"][index], want)
        down = block.ffn.net[2].weight.norm(dim=0)
        torch.testing.assert_close(tensors["down_norm"][index], down)
        score = block.ffn.net[0].proj.weight.norm(dim=1) * down
        torch.testing.assert_close(tensors["channel_norm"][index], score)


def test_importance_is_equation_3():
    profile = recorded(wan(), batch=2).profile()
    output = profile.tensors["self_output"].sum(0) / 4
    want = output * profile.tensors["self_o_norm"]
    torch.testing.assert_close(profile.importance(), want)
    assert (want > 0).all()


@pytest.mark.parametrize("given", [BOTH, (UNCOND, COND), (UNCOND, COND, COND)])
@torch.no_grad()
def test_only_conditional_rows_count_wherever_they_are(given):
    model, sigma = wan(), 0.8
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, *SIZE, generator=generator)
    prompts = {i: text(2, seed=i) for i in range(len(given))}
    conds = [i for i, role in enumerate(given) if role == COND]

    def call(chunks):
        t = torch.full((2 * len(chunks),), 1000 * sigma)
        words = torch.cat([prompts[i] for i in chunks])
        return model(x.repeat(len(chunks), 1, 1, 1, 1), t, words, return_dict=False)

    with profile_run(model, cond_or_uncond=given) as together:
        call(range(len(given)))
    apart = []
    for cond in conds:
        with profile_run(model) as recorder:
            call([cond])
        apart.append(recorder.profile())
    want = apart[0] if len(apart) == 1 else apart[0].merged(apart[1])
    same(together.profile(), want, rtol=1e-4)
    assert together.calls == 2 * len(conds)


def same(a: Profile, b: Profile, **tolerance) -> None:
    assert a.model.differs(b.model) is None
    for name, value in a.tensors.items():
        torch.testing.assert_close(
            value, b.tensors[name], **({"atol": 1e-5, "rtol": 1e-4} | tolerance)
        )


@torch.no_grad()
def test_prompts_in_two_calls_give_the_same_profile():
    """As WanPipeline does it: the first call of a step is the conditional one."""
    model = wan()
    whole = recorded(model, batch=2, steps=3).profile()
    x = torch.randn((2, 16, *SIZE), generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([1.0, 6 / 7, 0.6, 0.0])
    with profile_run(model, shift=3.0) as recorder:
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            t = (1000 * sigma).expand(2)
            words = text(2)
            cond, uncond = (
                model(x, t, w, return_dict=False)[0] for w in (words, torch.zeros_like(words))
            )
            x = x + (following - sigma) * (uncond + 4.0 * (cond - uncond))
    assert recorder.calls == 6
    same(recorder.profile(), whole, rtol=1e-3)


def test_merging_two_runs_is_recording_both():
    model = wan()
    with profile_run(model, cond_or_uncond=BOTH, calibrate="all") as both:
        run(model)
        run(model, batch=2, seed=5)
    one, two = recorded(model).profile(), recorded(model, 2, seed=5).profile()
    merged = one.merged(two)
    same(both.profile(), merged)
    assert merged.calls == both.calls == 6
    assert len(merged.runs) == 2
    other = recorded(wan(seed=1)).profile()
    with pytest.raises(ValueError, match="two models"):
        one.merged(other)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("calibrate", ["none", "all"])
def test_recording_changes_nothing_and_leaves_nothing(clip, calibrate):
    model = wan(clip)
    weights = copy.deepcopy(model.state_dict())
    expected = run(model, batch=2)
    with profile_run(model, cond_or_uncond=BOTH, calibrate=calibrate) as recorder:
        assert torch.equal(run(model, batch=2), expected)
    assert recorder.calls == 4
    assert torch.equal(run(model, batch=2), expected)
    assert recorder.calls == 4
    assert not any(m._diffusers_hook.hooks for m in (model, *model.blocks))
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_an_exception_leaves_nothing_and_its_call_is_not_counted():
    model = wan()
    expected = run(model)
    handle = model.blocks[1].ffn.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError), profile_run(model, cond_or_uncond=BOTH) as recorder:
        run(model)
    handle.remove()
    assert recorder.calls == 0
    assert not any(m._diffusers_hook.hooks for m in (model, *model.blocks))
    assert torch.equal(run(model), expected)


def test_steps_that_leave_tokens_out_are_not_recorded():
    model = wan()
    plan = TrimPlan(paper_plan(0.5, start=0.2))
    with attach(model, plan, cond_or_uncond=BOTH, shift=3.0):
        expected = run(model, steps=3)
    with (
        attach(model, plan, cond_or_uncond=BOTH, shift=3.0),
        profile_run(model, cond_or_uncond=BOTH) as recorder,
    ):
        assert torch.equal(run(model, steps=3), expected)
    # the first step computes everything
    assert recorder.calls == 1
    assert recorder.notes


def by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_an_activation_that_is_not_seen_is_named_and_left_zero():
    model = wan()
    model.blocks[1].ffn.net[0].gelu = by_hand
    recorder = recorded(model)
    energy = recorder.profile().tensors["channel_energy"]
    assert energy[0].all() and energy[2].all() and not energy[1].any()
    assert len(recorder.notes) == 1 and "FFN" in recorder.notes[0]
    assert recorder.calls == 2


def test_an_ffn_that_runs_in_parts_gives_the_same(monkeypatch):
    monkeypatch.setattr(recording, "SAMPLED", 20)
    model = wan()
    want = recorded(model).profile()
    for block in model.blocks:
        whole = block.ffn.forward
        block.ffn.forward = lambda x, whole=whole: torch.cat(
            [whole(part) for part in x.split(17, 1)], 1
        )
    recorder = recorded(model)
    assert not recorder.notes
    same(recorder.profile(), want)


def test_no_bin_is_mixed_with_another():
    # sigma 1, 0.9, 0.75 and 0.5
    profile = recorded(wan(), steps=4).profile()
    assert profile.tensors["count"].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2]
    counted = profile.tensors["count"] > 0
    for name in ("ratio", "self_output", "cross_output"):
        filled = profile.tensors[name].flatten(1).any(1)
        assert torch.equal(filled, counted), name


@torch.no_grad()
def test_calibration_is_the_sum_of_outer_products(monkeypatch):
    monkeypatch.setattr(recording, "CALIBRATED", 20)
    model = wan(clip=True)
    direct = Direct(model, 2)
    run(model, 2)
    direct.done()
    calibration = recorded(model, 2, calibrate="all").calibration
    # every third of 45 tokens
    for kind, name in (("self", "self_o"), ("cross", "cross_o"), ("ffn", "down")):
        for index in range(BLOCKS):
            x = torch.cat([x[0][:, ::3].flatten(0, 1) for x in direct.inputs(index, name)]).double()
            assert calibration.tokens[f"{kind}.{index}"] == len(x) == 60
            torch.testing.assert_close(
                calibration.sums[f"{kind}.{index}"].double(), x.T @ x, rtol=1e-4, atol=1e-5
            )
    attention = recorded(model, 2, calibrate="attention").calibration
    assert set(attention.sums) == {f"{k}.{i}" for k in ("self", "cross") for i in range(BLOCKS)}
    held = sum(4 * s.numel() for s in attention.sums.values())
    assert held == calibration_bytes(model_fingerprint(model), "attention")


def test_sizes_of_a_14b_calibration():
    model = Fingerprint(5120, 13824, 40, 40, 16, 16)
    assert calibration_bytes(model, "none") == 0
    assert round(calibration_bytes(model, "attention") / 1e9, 1) == 8.4
    assert round(calibration_bytes(model, "all") / 1e9) == 39


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="calibrate: expected one of none, attention, all"):
        Calibration(Fingerprint(8, 8, 1, 1, 1, 1), "some")
    with (
        pytest.raises(ValueError, match="WanTransformer3DModel, got Linear"),
        profile_run(torch.nn.Linear(2, 2)),
    ):
        pass


def test_shipped_profile_is_the_tiny_wans():
    shipped = load_profile(demo.PROFILE)
    assert demo.PROFILE.stat().st_size < 1_000_000
    model = load_original(CHECKPOINT)
    assert shipped.model.differs(model_fingerprint(model)) is None
    assert shipped.calls == demo.STEPS * (demo.TEXT_PROMPTS + demo.IMAGE_PROMPTS)
    short = demo.record(model, 2, 1, steps=6)
    for name in of_weights(shipped.model):
        torch.testing.assert_close(short.tensors[name], shipped.tensors[name])
    pairs = {
        "self": (short.importance(), shipped.importance()),
        "cross": (short.importance("cross"), shipped.importance("cross")),
        "ratio": (short.ratio(), shipped.ratio()),
    }
    for name, (a, b) in pairs.items():
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9, name


def test_the_profile_that_comfyui_is_checked_against_is_todays(root):
    """`python -m wantrim.demo.profile --prompts 2 --images 0 --steps 3 --out` makes it anew."""
    kept = load_profile(root / "tests" / "data" / "tiny_wan_short_profile.safetensors")
    same(demo.record(load_original(CHECKPOINT), 2, 0, steps=3), kept, rtol=1e-3, atol=1e-4)


def test_a_profile_is_drawn_and_told():
    profile = load_profile(demo.PROFILE)
    picture = draw_profile(profile, "tiny_wan")
    # two pairs of maps below the title
    assert picture.size == (960, 728)
    said = summary(profile)
    assert "480 model calls in 2 recorded runs" in said and "spatial" in said
    # roles are told apart: green, grey and orange are all there
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(92, 184, 122), (122, 128, 141), (232, 150, 72)} <= colours


def test_a_profile_of_trials_alone_says_so_and_no_roles():
    tuned = {"sigmas": [1.0, 0.8, 0.5, 0.0], "speedup": 1.3, "chosen": "WanTrim 1.35x"}
    run = {"sigmas": [1.0, 0.5, 0.0], "speedup": 1.0, "chosen": None}
    model = load_profile(demo.PROFILE).model
    profile = replace(Profile.empty(model), tuned=[tuned, {"sigmas": "of a later one"}, run])
    said = summary(profile)
    assert (
        "A trial at 1.3x in 3 steps chose: WanTrim 1.35x." in said
        and "A trial chose: None." in said
        and "A whole run in 2 steps was recorded: WanTrim can be solved by it." in said
    )
    assert (
        "Nothing was recorded" in said and "temporal" not in said and "own latent frame" not in said
    )
    assert draw_profile(profile).height < 100


def test_mass_of_few_queries_is_close_to_all():
    torch.manual_seed(0)
    q, k = 1.5 * torch.randn(2, 1, 8 * 12 * 14, 2, 16)
    grid = recording.TokenGrid(8, 12, 14)
    some = recording.sample_queries(grid, recording.QUERY_RATIO, recording.MIN_QUERIES)
    assert len(some) == 64
    every = frame_mass(q, k, (8, 12, 14), torch.arange(grid.tokens))
    few = frame_mass(q, k, (8, 12, 14), some)
    assert (every - few).abs().max() < 0.05

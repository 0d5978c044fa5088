import json
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wantrim.__main__ import main
from wantrim.hosts.diffusers.profiling import profile_run
from wantrim.hosts.diffusers.sample import denoise
from wantrim.hosts.diffusers.slim import load_slim
from wantrim.hosts.diffusers.weights import load_original, new_transformer, save_original
from wantrim.methods.cost import Width
from wantrim.profiles.calibration import load_calibration
from wantrim.profiles.recorder import open_profile, save_profile
from wantrim.slim import file as slim_file
from wantrim.slim.cut import (
    check_width,
    expand_heads,
    find_cut,
    norm_scale,
    refit,
    take,
)
from wantrim.slim.export import export_slim, slim_checkpoint
from wantrim.slim.file import (
    PREFIX,
    list_entries,
    read_header,
    read_tensor,
    write_tensors,
)
from wantrim.slim.source import open_source
from wantrim.tests.whole_width import whole_width
from wantrim.toy import CHECKPOINT
from wantrim.toy.text import encode_prompt

SMALL = {"dim": 48, "num_heads": 4, "num_layers": 3, "ffn_dim": 80, "text_dim": 24, "out_dim": 16}
# another number of each in every block
SMALL_WIDTH = Width(
    ((0, 2, 3), (1,), (0, 1, 2, 3)),
    ((1, 3), (0, 1, 2, 3), (2,)),
    (tuple(range(0, 80, 2)), tuple(range(80)), (5, 6, 7, 61, 79)),
)
SIZE = (5, 12, 12)
PROMPTS = (
    "a red circle moving right slowly on a black background",
    "a green triangle moving left slowly on a black background",
    "a blue square moving down quickly on a navy background",
    "a yellow cross moving up slowly on a striped background",
    "a purple circle moving left quickly on a gray background",
)
OTHER_PROMPT = "a blue square moving up quickly on a gray background"


def small(seed=0):
    torch.manual_seed(seed)
    model = new_transformer(**SMALL, in_dim=16)
    for block in model.blocks:
        # the stock gates are so small that a broken block would hardly show
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
        for attention in (block.attn1, block.attn2):
            for norm in (attention.norm_q, attention.norm_k):
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small Wan in fp32, under its original names."""
    path = tmp_path / "full.safetensors"
    save_original(path, small(), torch.float32, {})
    return path


@pytest.fixture(scope="module")
def tiny():
    return load_original(CHECKPOINT).requires_grad_(False)


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """What an artist's profile of the tiny Wan is, with its calibration."""
    path = tmp_path_factory.mktemp("profile") / "tiny.safetensors"
    text = torch.stack([encode_prompt(prompt) for prompt in PROMPTS])
    with profile_run(tiny, cond_or_uncond=(0, 1), calibrate="all") as recorder:
        for _ in denoise(tiny, text, SIZE, steps=6):
            pass
    return save_profile(recorder, path, merge=False)


def inputs(batch=2, size=(3, 6, 10), seed=3):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, *size, generator=random)
    text = torch.randn(batch, 7, 24, generator=random)
    return x, torch.tensor([700.0] * batch), text


def run(model, x, t, text) -> torch.Tensor:
    with torch.no_grad():
        return model(x, t, text, return_dict=False)[0]


@dataclass
class Passes:
    """The tiny Wan on its way through a video that was not recorded: inputs and outputs."""

    text: torch.Tensor
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    blocks: list[tuple[int, tuple, torch.Tensor]]

    def errors(self, model) -> tuple[float, float]:
        """Mean relative distance of a model's outputs, and of what its blocks add."""
        whole, parts = [], []
        for x, t, full in self.calls:
            whole.append(float((run(model, x, t, self.text) - full).norm() / full.norm()))
        for index, given, full in self.blocks:
            with torch.no_grad():
                out = model.blocks[index](*given)
            parts.append(float((out - full).norm() / (full - given[0]).norm()))
        return sum(whole) / len(whole), sum(parts) / len(parts)


@pytest.fixture(scope="module")
def passes(tiny):
    text = encode_prompt(OTHER_PROMPT)[None]
    latents = list(denoise(tiny, text, SIZE, steps=6, seed=5))
    calls, blocks = [], []
    hooks = [
        block.register_forward_hook(
            lambda module, given, out, index=index: blocks.append((index, given, out))
        )
        for index, block in enumerate(tiny.blocks)
    ]
    for latent, sigma in zip(latents[:5:2], (0.94, 0.75, 0.4), strict=True):
        x = torch.cat([latent, torch.zeros(1, 20, *SIZE)], 1)
        t = torch.tensor([1000 * sigma])
        calls.append((x, t, run(tiny, x, t, text)))
    for hook in hooks:
        hook.remove()
    return Passes(text, calls, blocks)


# what is cut


@pytest.mark.parametrize(
    "layer", ["q", "k", "v", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img"]
)
def test_rows_of_the_kept_heads_stay(layer):
    cut = find_cut(f"blocks.1.cross_attn.{layer}.weight")
    tensor = torch.arange(48.0)[:, None].expand(48, 5)
    kept = take(tensor, cut.axis, cut.index(SMALL_WIDTH, 12))
    assert kept[:, 0].tolist() == list(range(48))
    cut = find_cut(f"blocks.0.cross_attn.{layer}.weight")
    kept = take(tensor, cut.axis, cut.index(SMALL_WIDTH, 12))
    assert kept[:, 0].tolist() == [*range(12, 24), *range(36, 48)]


def test_columns_of_output_projections_stay():
    cut = find_cut("blocks.1.self_attn.o.weight")
    assert cut.index(SMALL_WIDTH, 12).tolist() == list(range(12, 24))
    assert cut.axis == 1
    cut = find_cut("blocks.2.ffn.2.weight")
    assert (cut.axis, cut.index(SMALL_WIDTH, 12).tolist()) == (1, [5, 6, 7, 61, 79])
    cut = find_cut("blocks.2.ffn.0.bias")
    assert (cut.axis, cut.index(SMALL_WIDTH, 12).tolist()) == (0, [5, 6, 7, 61, 79])


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.self_attn.o.bias", "blocks.0.cross_attn.o.bias", "blocks.0.ffn.2.bias",
        "blocks.0.modulation", "blocks.0.norm3.weight", "head.head.weight", "time_projection.1.weight",
        "text_embedding.0.weight", "img_emb.proj.1.weight", "vace_blocks.0.self_attn.q.weight",
    ],
)  # fmt: skip
def test_the_residual_width_is_never_cut(key):
    assert find_cut(key) is None


@pytest.mark.parametrize(
    ("field", "block", "kept"),
    [
        ("self_heads", 0, ()), ("self_heads", 1, (0, 4)), ("cross_heads", 2, (1, 0)),
        ("cross_heads", 2, (1, 1)), ("ffn_channels", 1, (-1, 3)),
    ],
)  # fmt: skip
def test_an_impossible_width_is_refused(checkpoint, field, block, kept):
    blocks = list(getattr(SMALL_WIDTH, field))
    blocks[block] = kept
    width = Width(**{**SMALL_WIDTH.__dict__, field: tuple(blocks)})
    model = open_source(checkpoint).model
    with pytest.raises(ValueError, match=f"{field}: block {block}: expected"):
        check_width(width, model)
    with pytest.raises(ValueError, match="expected 3 blocks, got 2"):
        check_width(Width(**{**SMALL_WIDTH.__dict__, field: tuple(blocks[:2])}), model)


# the same function


class ExactNorm(torch.nn.Module):
    """A sliced model's norm over all heads with the root mean square that the full model has."""

    def __init__(self, norm, full):
        super().__init__()
        self.norm, self.full, self.given = norm, full, None

    def forward(self, q):
        every = self.full(self.given).square().mean(-1, keepdim=True)
        return q * (every + self.norm.eps).rsqrt() * self.norm.weight


@pytest.mark.parametrize("batch", [1, 2])
def test_a_masked_model_is_the_sliced_one_with_exact_norms(checkpoint, tmp_path, batch):
    full, out = small(), tmp_path / "slim.safetensors"
    source = open_source(checkpoint)
    export_slim(source, out, SMALL_WIDTH)
    sliced = load_slim(out)
    for block, mine in zip(full.blocks, sliced.blocks, strict=True):
        for attention, narrow, text in (
            (block.attn1, mine.attn1, False),
            (block.attn2, mine.attn2, True),
        ):
            norms = [
                ExactNorm(narrow.norm_q, attention.to_q),
                ExactNorm(narrow.norm_k, attention.to_k),
            ]
            narrow.norm_q, narrow.norm_k = norms

            def note(_module, args, kwargs, norms=norms, text=text):
                hidden = args[0]
                norms[0].given = hidden
                norms[1].given = args[1] if text else hidden

            narrow.register_forward_pre_hook(note, with_kwargs=True)
    raw = run(load_slim(out), *inputs(batch))
    for index, block in enumerate(full.blocks):
        for attention, heads in (
            (block.attn1, SMALL_WIDTH.self_heads[index]),
            (block.attn2, SMALL_WIDTH.cross_heads[index]),
        ):
            mask = torch.zeros(48)
            mask[expand_heads(torch.tensor(heads), 12)] = 1
            attention.to_out[0].weight.mul_(mask)
        mask = torch.zeros(80)
        mask[list(SMALL_WIDTH.ffn_channels[index])] = 1
        block.ffn.net[2].weight.mul_(mask)
    masked = run(full, *inputs(batch))
    torch.testing.assert_close(run(sliced, *inputs(batch)), masked, atol=2e-5, rtol=1e-4)
    # without the full norms it is another function
    assert (raw - masked).abs().max() > 1e-2


def test_a_width_that_keeps_all_is_the_full_model(checkpoint, tmp_path, recorded):
    source, out = open_source(checkpoint), tmp_path / "slim.safetensors"
    export_slim(source, out, whole_width(source.model))
    full = load_original(checkpoint)
    assert torch.equal(run(load_slim(out), *inputs()), run(full, *inputs()))
    # also with every correction asked for
    source, out = open_source(CHECKPOINT), tmp_path / "tiny.safetensors"
    gram = load_calibration(recorded.calibration).gram
    summary = export_slim(
        source, out, whole_width(source.model), profile=recorded.profile, gram=gram
    )
    assert summary.header.norm_scale == {}
    weights = load_file(CHECKPOINT)
    for name, value in load_file(out).items():
        key = name.removeprefix(PREFIX)
        assert "kept" in key or torch.equal(value, weights.pop(key)), name
    assert not weights


def test_tiny_wan_keeps_its_sizes_and_number_format(recorded, tmp_path):
    out = tmp_path / "slim.safetensors"
    summary = slim_checkpoint(
        CHECKPOINT, out, recorded.profile, calibration=recorded.calibration, rule="pare"
    )
    width = summary.header.width
    assert {width.sizes(block) for block in range(16)} == {(6, 6, 272)}
    assert len(set(width.self_heads)) > 4
    with safe_open(out, "pt") as file:
        names = [name for name in file.keys() if "kept" not in name]
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert file.get_slice(f"{PREFIX}blocks.3.ffn.0.weight").get_shape() == [272, 128]
        assert file.get_slice(f"{PREFIX}blocks.3.self_attn.o.weight").get_shape() == [128, 96]
    assert summary.after == out.stat().st_size < 0.8 * CHECKPOINT.stat().st_size
    assert "6 to 6 of 8 per block" in summary.text()


# the corrections


def test_norm_scale_is_the_mean_ratio_of_the_norms():
    random = torch.Generator().manual_seed(0)
    loudness = torch.rand(20000, 6, generator=random) + 0.2
    q = torch.randn(20000, 6, 16, generator=random) * loudness[:, :, None]
    energy = q.square().sum(-1)
    share = energy / energy.sum(-1, keepdim=True)
    kept = (0, 2, 5)
    ratio = (q[:, list(kept)].square().mean((1, 2)) / q.square().mean((1, 2))).sqrt()
    found = norm_scale(share.T @ share, kept)
    assert found == pytest.approx(float(ratio.mean()), rel=2e-3)
    # the spread between tokens matters
    assert abs(found - float(share.mean(0)[list(kept)].sum() * 2) ** 0.5) > 5e-3
    assert norm_scale(share.T @ share, tuple(range(6))) == 1.0
    assert norm_scale(torch.zeros(6, 6), kept) is None


def test_refit_is_least_squares(monkeypatch):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(500, 3, generator=random) @ torch.randn(3, 9, generator=random)
    x += 0.3 * torch.randn(500, 9, generator=random)
    weight = torch.randn(4, 9, generator=random)
    kept = torch.tensor([0, 1, 4, 8])
    wanted = torch.linalg.lstsq(x[:, kept].double(), x.double() @ weight.T.double()).solution.T
    cut = refit(weight, x.T @ x, kept)
    monkeypatch.setattr("wantrim.slim.cut.RIDGE", 1e-9)
    torch.testing.assert_close(refit(weight, x.T @ x, kept), wanted, atol=1e-4, rtol=1e-4)
    y = x @ weight.T
    left = [float((x[:, kept] @ w.float().T - y).norm()) for w in (cut, weight[:, kept])]
    assert left[0] < 0.6 * left[1]


def test_refit_where_nothing_can_be_told_leaves_the_columns():
    weight, kept = torch.randn(4, 6), torch.tensor([0, 3])
    assert torch.equal(refit(weight, torch.eye(6), kept), weight[:, kept].double())
    assert torch.equal(refit(weight, torch.zeros(6, 6), kept), weight[:, kept].double())


@pytest.mark.parametrize("rule", ["pare", "budget"])
def test_each_correction_brings_the_slim_model_closer(recorded, passes, tmp_path, rule):
    """Raw slice, + rescaled norms, + refitted projections: on a prompt and a seed of their own."""
    out = tmp_path / "slim.safetensors"
    options = {"rule": rule, "prune_ratio": 0.3}
    full = slim_checkpoint(
        CHECKPOINT, out, recorded.profile, calibration=recorded.calibration, **options
    )
    best = passes.errors(load_slim(out))
    slim_checkpoint(CHECKPOINT, out, recorded.profile, **options)
    scaled = passes.errors(load_slim(out))
    source, width = open_source(CHECKPOINT), full.header.width
    export_slim(source, out, width)
    raw = passes.errors(load_slim(out))
    gram = load_calibration(recorded.calibration).gram
    export_slim(source, out, width, gram=gram)
    refitted = passes.errors(load_slim(out))
    for index in (0, 1):
        assert refitted[index] < 0.9 * raw[index]
        assert best[index] < 0.9 * scaled[index]
    assert scaled[0] < raw[0]
    # a refit takes in nearly all that the norms' scale would mend
    assert best[0] < 1.01 * refitted[0]
    if rule == "pare":
        assert best[0] < refitted[0]
        assert scaled[1] < raw[1] and best[1] < refitted[1]
        assert best[0] < 0.6 * raw[0]


def test_what_was_not_corrected_is_said(recorded, tmp_path):
    out = tmp_path / "slim.safetensors"
    options = {"prune_ratio": 0.3}
    said = slim_checkpoint(CHECKPOINT, out, recorded.profile, **options)
    assert "recorded without calibration" in said.text()
    assert said.header.made["corrections"] == ["norms rescaled for the heads that are left"]
    empty = recorded.profile.merged(recorded.profile)
    empty.tensors["cross_k_share"] = torch.zeros_like(empty.tensors["cross_k_share"])
    said = slim_checkpoint(CHECKPOINT, out, empty, refitted=False, **options)
    assert "not corrected for the missing heads: cross_attn.norm_k;" in said.text()
    assert set(said.header.norm_scale) == {
        "self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q",
    }  # fmt: skip
    source = open_source(CHECKPOINT)
    only = load_calibration(recorded.calibration)
    said = export_slim(
        source,
        out,
        said.header.width,
        gram=lambda kind, block: only.gram(kind, block) if kind != "ffn" else None,
    )
    assert "no calibration of ffn.2: not refitted there" in said.text()
    assert "there is no profile" in said.text()


# the file


def test_exported_and_exported_again_is_the_same_file(recorded, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    options = {"calibration": recorded.calibration, "prune_ratio": 0.4}
    for path in paths[:2]:
        slim_checkpoint(CHECKPOINT, path, recorded.profile, **options)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    entries, _ = list_entries(paths[0])
    said = read_header(paths[0]).metadata()
    write_tensors(paths[2], entries, said, lambda entry: read_tensor(paths[0], entry))
    assert paths[0].read_bytes() == paths[2].read_bytes()


def test_header_says_what_it_is(root, recorded, tmp_path):
    version = re.search('version = "(.+)"', (root / "pyproject.toml").read_text("utf-8"))
    out = tmp_path / "slim.safetensors"
    written = slim_checkpoint(CHECKPOINT, out, recorded.profile, rule="budget").header
    header = read_header(out)
    assert (header.width, header.norm_scale) == (written.width, written.norm_scale)
    scales = zip(header.norm_scale["cross_attn.norm_k"], header.width.cross_heads, strict=True)
    corrected = {(scale != 1, len(kept) < 8) for scale, kept in scales}
    # a factor of its own wherever heads went, and only there; the rule leaves some blocks whole
    assert corrected == {(True, True), (False, False)}
    assert header.model.differs(recorded.profile.model) is None
    assert header.made == {
        "package": version[1], "rule": "budget", "prune_ratio": 0.3, "source": CHECKPOINT.name,
        "corrections": ["norms rescaled for the heads that are left"],
    }  # fmt: skip
    with safe_open(CHECKPOINT, "pt") as file:
        assert header.config == file.metadata()["config"]
    assert header.transformer["num_heads"] == 8 and header.transformer["text_dim"] == 64
    with safe_open(out, "pt") as file:
        said = json.loads(file.metadata()["wantrim_slim"])
        kept = file.get_tensor(f"{PREFIX}blocks.4.self_attn.kept_heads")
    assert said["format"] == "wantrim_slim/1"
    assert said["widths"][4]["self_heads"] == len(header.width.self_heads[4])
    assert (kept.dtype, tuple(kept.tolist())) == (torch.int32, header.width.self_heads[4])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3fn"])
def test_number_formats_and_checkpoint_prefixes(recorded, tmp_path, dtype):
    dtype = getattr(torch, dtype)
    weights = load_file(CHECKPOINT)
    with safe_open(CHECKPOINT, "pt") as file:
        metadata = {"config": file.metadata()["config"]}
    prefix = "model.diffusion_model." if dtype == torch.float16 else ""
    # plain fp8 files keep vectors in another format
    made = {
        prefix + name: value.to(dtype if value.ndim == 2 or dtype.itemsize > 1 else torch.float32)
        for name, value in weights.items()
    }
    if prefix:
        made["first_stage_model.decoder.conv1.weight"] = torch.zeros(3)
    full, out = tmp_path / "full.safetensors", tmp_path / "slim.safetensors"
    save_file(made, full, metadata)
    summary = slim_checkpoint(
        full, out, recorded.profile, calibration=recorded.calibration, prune_ratio=0.3
    )
    slim = load_file(out)
    for name, value in slim.items():
        if "kept" not in name:
            assert value.dtype == made[prefix + name.removeprefix(PREFIX)].dtype
    index = find_cut("blocks.2.self_attn.q.weight").index(summary.header.width, 16)
    key = "blocks.2.self_attn.q.weight"
    assert torch.equal(
        slim[PREFIX + key].view(torch.uint8),
        made[prefix + key].index_select(0, index).view(torch.uint8),
    )
    assert ("fp8 is too coarse" in summary.text()) == (dtype.itemsize == 1)
    # what is not done is not claimed
    claimed = "output projections refitted by least squares" in summary.header.made["corrections"]
    assert claimed == (dtype.itemsize > 1)
    assert not any("first_stage" in name for name in slim)


def test_a_file_with_fp8_in_parts_is_refitted_where_it_is_not(recorded, tmp_path):
    weights = load_file(CHECKPOINT)
    for name in weights:
        if ".ffn.2.weight" in name:
            weights[name] = weights[name].to(torch.float8_e4m3fn)
    with safe_open(CHECKPOINT, "pt") as file:
        save_file(weights, tmp_path / "full.safetensors", {"config": file.metadata()["config"]})
    made = []
    for calibration in (recorded.calibration, None):
        out = tmp_path / f"{len(made)}.safetensors"
        summary = slim_checkpoint(
            tmp_path / "full.safetensors", out, recorded.profile, calibration=calibration
        )
        made.append(load_file(out))
        assert ("fp8 is too coarse" in summary.text()) == (calibration is not None)
    differ = {n for n, w in made[0].items() if (w.float() != made[1][n].float()).any()}
    assert {n.split(".", 3)[3] for n in differ} == {"self_attn.o.weight", "cross_attn.o.weight"}


def test_a_cancelled_export_leaves_nothing_and_the_old_file(recorded, tmp_path):
    out = tmp_path / "slim.safetensors"
    out.write_bytes(b"the last one")

    class Cancelled(Exception):
        pass

    seen = []

    def progress(done, total):
        seen.append(done / total)
        if done > total / 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        slim_checkpoint(CHECKPOINT, out, recorded.profile, progress=progress)
    assert seen == sorted(seen) and seen[0] == 0 and 0.5 < seen[-1] < 0.6
    assert out.read_bytes() == b"the last one"
    assert list(tmp_path.iterdir()) == [out]


def test_a_tensor_of_another_size_is_not_written(tmp_path):
    entry = slim_file.Entry("x", "BF16", (2, 3))
    with pytest.raises(ValueError, match=r"x: expected BF16 \(2, 3\), got torch.float32"):
        slim_file.write_tensors(
            tmp_path / "x.safetensors", [entry], {}, lambda e: torch.zeros(2, 3)
        )
    assert not list(tmp_path.iterdir())


def test_what_is_written_can_be_read_and_is_aligned(tmp_path):
    tensors = {
        "b": torch.arange(5, dtype=torch.int32),
        "a": torch.randn(3).bfloat16(),
        "c": torch.randn(2, 3),
        "scalar": torch.tensor(2.0),
        "d": torch.randn(3).to(torch.float8_e5m2),
    }
    names = {"torch." + str(t).split(".")[-1]: n for n, t in slim_file.DTYPES.items()}
    entries = [
        slim_file.Entry(name, names[str(value.dtype)], tuple(value.shape))
        for name, value in tensors.items()
    ]
    path = tmp_path / "x.safetensors"
    size = slim_file.write_tensors(path, entries, {"a": "b"}, lambda entry: tensors[entry.name])
    assert size == path.stat().st_size
    for name, value in load_file(path).items():
        assert value.dtype == tensors[name].dtype and torch.equal(
            value.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8)
        )
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"a": "b"}
    for name, said in header.items():
        assert said["data_offsets"][0] % tensors[name].dtype.itemsize == 0


def test_a_file_larger_than_the_memory_is_read(tmp_path):
    size = 4 * 10**11
    header = {
        "large": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    text, path = json.dumps(header).encode(), tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(size, 1)
        file.write(torch.tensor([1.5, -2.0]).numpy().tobytes())
    entries = {entry.name: entry for entry in slim_file.list_entries(path)[0]}
    assert slim_file.read_tensor(path, entries["small"]).tolist() == [1.5, -2.0]
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match="x.safetensors: small: the file was changed while"):
        slim_file.read_tensor(path, entries["small"])


# refusals


def resaved(tmp_path, change, name="full.safetensors", config=True) -> Path:
    weights = load_file(CHECKPOINT)
    with safe_open(CHECKPOINT, "pt") as file:
        metadata = {"config": file.metadata()["config"]} if config else {}
    change(weights)
    save_file(weights, tmp_path / name, metadata)
    return tmp_path / name


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "blocks.0.self_attn.q.scale_weight",
            "quantised with scales .blocks.0.self_attn.q.scale_w",
        ),
        ("blocks.0.self_attn.q.weight_scale", "quantised with scales"),
        ("scaled_fp8", "quantised with scales .scaled_fp8"),
        ("blocks.3.ffn.0.comfy_quant", "quantised with scales"),
        ("vace_blocks.0.after_proj.weight", "it is Wan VACE .vace_blocks"),
        ("casual_audio_encoder.encoder.final_linear.weight", "it is Wan S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "it is Wan Animate"),
        ("blocks.0.audio_cross_attn.x.weight", "it is Wan HuMo"),
        ("blocks.0.self_attn.gate.weight", "blocks.0.self_attn.gate.weight, which is no part"),
        ("motion.weight", "motion.weight, which is no part"),
        ("blocks.17.modulation", "expected blocks 0, 1, 2 ..."),
    ],
)
def test_what_cannot_be_cut_is_named(tmp_path, key, said):
    path = resaved(tmp_path, lambda weights: weights.update({key: torch.zeros(1)}))
    with pytest.raises(ValueError, match=f"full.safetensors: .*{said}"):
        open_source(path)


def test_other_files_are_refused(tmp_path, recorded, checkpoint):
    gguf = tmp_path / "wan.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="wan.gguf: a GGUF file cannot be cut.*Choose the bf16"):
        open_source(gguf)
    renamed = gguf.rename(tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="a GGUF file cannot be cut"):
        open_source(renamed)
    renamed.write_bytes(bytes(100))
    with pytest.raises(
        ValueError, match="wan.safetensors: expected a safetensors file, got one that"
    ):
        open_source(renamed)
    with pytest.raises(ValueError, match="nowhere.safetensors: there is no such file"):
        open_source(tmp_path / "nowhere.safetensors")
    (tmp_path / "wan.pt").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="wan.pt: expected a .safetensors file"):
        open_source(tmp_path / "wan.pt")
    path = resaved(tmp_path, lambda weights: weights.update(x=weights.pop("head.modulation")))
    with pytest.raises(ValueError, match="has no head.modulation. Choose a Wan"):
        open_source(path)
    for key, size in (("patch_embedding.weight", (48, 16, 0, 2, 2)), ("blocks.0.modulation", (0,))):
        path = resaved(tmp_path, lambda weights, k=key, s=size: weights.update({k: torch.zeros(s)}))
        with pytest.raises(ValueError, match=f"full.safetensors: {key} is empty: damaged file"):
            open_source(path)
    save_file(small().state_dict(), tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="got those of diffusers. Choose the single-file"):
        open_source(tmp_path / "d.safetensors")
    # 128 channels in one head is not what it is
    path = resaved(tmp_path, lambda weights: None, config=False)
    with pytest.raises(
        ValueError, match="profile is of another model: expected 16 blocks, 8 heads"
    ):
        slim_checkpoint(path, tmp_path / "slim.safetensors", recorded.profile)
    with pytest.raises(ValueError, match="full.safetensors: the profile is of another model"):
        slim_checkpoint(checkpoint, tmp_path / "slim.safetensors", recorded.profile)
    # Wan2.2's other expert has the same sizes
    path = resaved(tmp_path, lambda w: w.update({"head.modulation": -w["head.modulation"]}))
    with pytest.raises(ValueError, match="Wan2.2's two experts look alike"):
        slim_checkpoint(path, tmp_path / "slim.safetensors", recorded.profile)
    slim = tmp_path / "slim.safetensors"
    slim_checkpoint(CHECKPOINT, slim, recorded.profile)
    with pytest.raises(ValueError, match="slim.safetensors: expected a full Wan.*slim already"):
        slim_checkpoint(slim, tmp_path / "again.safetensors", recorded.profile)
    with pytest.raises(ValueError, match="rule: expected one of budget, pare, got 'x'"):
        slim_checkpoint(CHECKPOINT, slim, recorded.profile, rule="x")
    with pytest.raises(ValueError, match="prune_ratio: expected 0 to less than 1, got 1.0"):
        slim_checkpoint(CHECKPOINT, slim, recorded.profile, prune_ratio=1.0)


def test_a_full_or_damaged_file_is_no_slim_file(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match="full.safetensors: expected a slim checkpoint that WanTrim"
    ):
        load_slim(checkpoint)
    good = tmp_path / "slim.safetensors"
    export_slim(open_source(checkpoint), good, SMALL_WIDTH)
    weights = load_file(good)
    with safe_open(good, "pt") as file:
        header = json.loads(file.metadata()["wantrim_slim"])

    def refused(said, change=None, **changed):
        bad = tmp_path / "bad.safetensors"
        made = dict(weights)
        if change is not None:
            change(made)
        save_file(made, bad, {"wantrim_slim": json.dumps({**header, **changed})})
        with pytest.raises(ValueError, match=f"bad.safetensors: .*{said}"):
            read_header(bad)

    refused("got 'wantrim_slim/9'", format="wantrim_slim/9")
    refused("model: expected the sizes", model={})
    refused("expected the sizes|indices", model={**header["model"], "num_blocks": 10**9})
    refused("norm_scale: expected factors", norm_scale={"x": [1.0] * 3})
    huge = {"self_attn.norm_q": [1.0, 10**400, 1.0]}
    refused("expected a positive factor per block", norm_scale=huge)
    refused(
        "expected a positive factor per block", norm_scale={"self_attn.norm_q": [1.0, -1.0, 1.0]}
    )
    refused("expected a positive factor", norm_scale={"self_attn.norm_q": [float("inf")] * 3})
    kept = f"{PREFIX}blocks.1.self_attn.kept_heads"
    refused("kept_heads: expected 1 to 4 indices, got nothing", lambda w: w.pop(kept))
    other = torch.tensor([4], dtype=torch.int32)
    refused("self_heads: block 1: expected at least one", lambda w: w.update({kept: other}))
    q = f"{PREFIX}blocks.1.self_attn.q.weight"
    refused(
        "q.weight: expected 12 of its axis, got 24", lambda w: w.update({q: torch.zeros(24, 48)})
    )
    refused("blocks.2.ffn.2 is missing", lambda w: w.pop(f"{PREFIX}blocks.2.ffn.2.weight"))
    refused("x .F32. does not belong", lambda w: w.update(x=torch.zeros(1)))
    bad = tmp_path / "bad.safetensors"
    save_file(weights, bad, {"wantrim_slim": "{"})
    with pytest.raises(ValueError, match="its header cannot be read"):
        read_header(bad)


def test_a_calibration_of_another_model_is_refused(recorded, checkpoint, tmp_path):
    other = tmp_path / "other.safetensors"
    model = small()
    with profile_run(model, calibrate="attention") as recorder:
        run(model, *inputs(1))
    wrong = save_profile(recorder, other, merge=False)
    with pytest.raises(ValueError, match="the calibration is of another model"):
        slim_checkpoint(
            CHECKPOINT, tmp_path / "s.safetensors", recorded.profile, calibration=wrong.calibration
        )


def test_a_gram_matrix_that_is_none_is_refused(checkpoint, tmp_path):
    size = {"self": 48, "cross": 48, "ffn": 80}
    with pytest.raises(ValueError, match="calibration: .* of block . is not a sum of x x"):
        export_slim(
            open_source(checkpoint),
            tmp_path / "s.safetensors",
            SMALL_WIDTH,
            gram=lambda kind, block: torch.diag(torch.tensor([9.0] + [-0.1] * (size[kind] - 1))),
        )


# from a shell


def test_the_command_does_what_the_node_does(recorded, tmp_path, caplog):
    profile = next(recorded.calibration.parent.glob("tiny.safetensors"))
    out, wanted = tmp_path / "out.safetensors", tmp_path / "wanted.safetensors"
    slim_checkpoint(
        CHECKPOINT,
        wanted,
        recorded.profile,
        calibration=recorded.calibration,
        rule="budget",
        prune_ratio=0.25,
    )
    with caplog.at_level(logging.INFO):
        arguments = ["slim", str(CHECKPOINT), str(out), "--profile", str(profile)]
        assert main([*arguments, "--budget", "0.75"]) == 0
    said = [record.getMessage() for record in caplog.records]
    assert " 50%" in said and any("Wrote out.safetensors" in line for line in said)
    with safe_open(out, "pt") as file, safe_open(wanted, "pt") as other:
        for name in file.keys():
            assert torch.equal(file.get_tensor(name), other.get_tensor(name))
    with pytest.raises(SystemExit):
        main([*arguments, "--prune", "0.3"])
    assert main([*arguments, "--prune", "2", "--overwrite"]) == 1
    assert "expected 0 to less than 1, got 2.0" in caplog.records[-1].getMessage()
    assert open_profile(profile).calibration == recorded.calibration


# memory

LARGE = """
import json, resource, sys
from pathlib import Path
import torch
from wantrim.slim.export import export_slim
from wantrim.slim.file import PREFIX
from wantrim.slim.source import open_source
from wantrim.tests.whole_width import whole_width
from wantrim.methods.cost import Width

folder, blocks, heads, channels = Path(sys.argv[1]), *map(int, sys.argv[2:])
dim, ffn = 5120, 13824
shapes = {"head.modulation": (1, 2, dim), "head.head.weight": (64, dim), "head.head.bias": (64,),
          "patch_embedding.weight": (dim, 16, 1, 2, 2)}
for block in range(blocks):
    p = f"blocks.{block}."
    shapes[p + "modulation"] = (1, 6, dim)
    for a in ("self_attn.", "cross_attn."):
        for l in "qkvo":
            shapes[p + a + l + ".weight"] = (dim, dim)
            shapes[p + a + l + ".bias"] = (dim,)
        for l in ("norm_q", "norm_k"):
            shapes[p + a + l + ".weight"] = (dim,)
    shapes |= {p + "ffn.0.weight": (ffn, dim), p + "ffn.0.bias": (ffn,),
               p + "ffn.2.weight": (dim, ffn), p + "ffn.2.bias": (dim,)}
header, at = {}, 0
for name, shape in shapes.items():
    size = 2 * torch.Size(shape).numel()
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
    at += size
text = json.dumps(header).encode()
with (folder / "full.safetensors").open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(folder / "full.safetensors")
kept = (tuple(range(heads)),) * blocks
width = Width(kept, kept, (tuple(range(channels)),) * blocks)
export_slim(source, folder / "slim.safetensors", width)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.stdout.write(json.dumps([at, (peak - before) * 1024, peak * 1024]))
"""


def large(folder: Path, blocks: int, heads: int, channels: int) -> tuple[int, int, int]:
    """Bytes of the checkpoint, of memory that its export added at most, and of all its memory."""
    command = [sys.executable, "-c", LARGE, folder, *map(str, (blocks, heads, channels))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def test_memory_of_an_export_is_that_of_a_few_tensors(tmp_path):
    """Blocks as large as 14B's; the file is sparse. The largest tensor has 142 MB."""
    size, added, _ = large(tmp_path, 2, 28, 9728)
    assert size > 1.4e9
    assert added < 0.6e9
    size = (tmp_path / "slim.safetensors").stat().st_size
    assert 0.95e9 < size < 1.05e9


@pytest.mark.slow
def test_memory_of_the_export_of_a_whole_14b(tmp_path):
    """Little is kept, so that little is written: 28 GB are read, more than many have."""
    size, added, peak = large(tmp_path, 40, 2, 128)
    assert size > 28e9
    assert added < 0.6e9
    assert peak < 2e9

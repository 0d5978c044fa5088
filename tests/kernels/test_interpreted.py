"""Every kernel against an fp64 run of its own arithmetic, in guarded and poisoned memory."""

import math

import pytest
import torch

import wantrim.kernels as kernels
from wantrim.kernels import reference

from .guard import Guard

triton = pytest.importorskip("triton", reason="Triton has no wheel here")
tl = triton.language
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# grid, heads, head_dim, batch, tokens before and after the grid, every n-th query
SHAPES = [
    ((1, 1, 1), 1, 12, 1, 0, 0, 1),
    ((1, 7, 9), 3, 16, 2, 0, 0, 2),
    ((3, 5, 7), 2, 128, 1, 1, 0, 1),
    ((5, 6, 6), 4, 40, 2, 3, 2, 7),
    ((2, 3, 21), 5, 64, 1, 0, 4, 3),
]


@pytest.fixture
def guard(monkeypatch):
    """Guards inputs, and everything that a kernel's function allocates, which starts as NaN."""
    guard = Guard()
    empty = torch.empty

    def poisoned(*size, dtype=torch.float32, device=None, **options):
        made = empty(*size, dtype=dtype, **options)
        value = float("nan") if made.is_floating_point() else torch.iinfo(dtype).max // 3
        return guard(made.fill_(value))

    for module in ("attention", "context"):
        target = __import__(f"wantrim.kernels.{module}", fromlist=["torch"])
        fake = type("Torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
        fake.empty = poisoned
        monkeypatch.setattr(target, "torch", fake)
    yield guard
    guard.check()


def attention_inputs(shape, dtype, guard, strided=False):
    grid, heads, dim, batch, start, after, every = shape
    tokens = math.prod(grid)
    random = torch.Generator().manual_seed(tokens + heads)
    width = 2 * dim + 3 if strided else dim
    size = (batch, start + tokens + after, heads, width)
    q, k = (torch.randn(size, generator=random).to(dtype)[..., :dim] for _ in range(2))
    index = torch.arange(0, tokens, every)
    return guard(q), guard(k), grid, guard(index), start


def close_as_fp32_is(got, name, arguments, options):
    """No further from the fp64 result than four times what the fp32 reference is.

    And what the rounding of the largest score makes of a power.
    """
    low = getattr(reference, name)(*arguments, **options)
    exact = exactly(name, arguments, options)
    q, k, _, index = arguments
    scores = torch.einsum("bmnd,bsnd->bnms", q[:, options["start"] + index].float(), k.float())
    step = 2**-23 * (1 + scores.abs().max() / q.shape[-1] ** 0.5)
    limit = 4 * (low.double() - exact).abs().max() + step * exact.abs().max()
    assert got.dtype == torch.float32 and got.shape == exact.shape
    assert not got.isnan().any()
    assert (got.double() - exact).abs().max() <= limit


def exactly(name, arguments, options):
    """The same numbers from the whole matrix in fp64, by another road than the reference's."""
    q, k, (frames, height, width), index = arguments
    start, per_frame = options["start"], height * width
    tokens = frames * per_frame
    attention = torch.einsum("bmnd,bsnd->bnms", q[:, start + index].double(), k.double())
    attention = (attention / q.shape[-1] ** 0.5).softmax(-1)[..., start : start + tokens]
    place = torch.arange(tokens)
    y, x = place % per_frame // width, place % width
    if name == "token_mass":
        radius = options["exclude_radius"]
        far = torch.ones(len(index), tokens, dtype=torch.bool)
        if radius:
            far = ((y[index, None] - y).abs() > radius) | ((x[index, None] - x).abs() > radius)
        count = far.sum(0).clamp(min=1)
        return (attention * far).sum(2).mean(1) / count
    frame = place // per_frame
    return (attention * (frame[index, None] == frame)).sum(-1).mean(-1)


# every shape in one dtype, every dtype at one shape: the interpreter is slow
CASES = [(shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)]
CASES += [(SHAPES[3], dtype) for dtype in DTYPES[1:]] + [(SHAPES[2], torch.bfloat16)]


@pytest.mark.parametrize("shape, dtype", CASES)
@pytest.mark.parametrize("radius", [0, 2])
def test_token_mass(shape, dtype, radius, guard):
    *arguments, start = attention_inputs(shape, dtype, guard)
    options = {"start": start, "exclude_radius": radius}
    got = kernels.token_mass(*arguments, **options, backend="triton")
    close_as_fp32_is(got, "token_mass", arguments, options)


@pytest.mark.parametrize("shape, dtype", CASES)
def test_frame_mass(shape, dtype, guard):
    *arguments, start = attention_inputs(shape, dtype, guard)
    options = {"start": start}
    got = kernels.frame_mass(*arguments, **options, backend="triton")
    close_as_fp32_is(got, "frame_mass", arguments, options)


@pytest.mark.parametrize("name", ["token_mass", "frame_mass"])
def test_views_of_larger_tensors(name, guard):
    """q and k as slices of something wider: what lies between their rows is poison."""
    *arguments, start = attention_inputs(SHAPES[3], torch.float32, guard, strided=True)
    assert arguments[0].stride(2) > arguments[0].shape[-1]
    options = {"start": start}
    options |= {"exclude_radius": 1} if name == "token_mass" else {}
    got = getattr(kernels, name)(*arguments, **options, backend="triton")
    close_as_fp32_is(got, name, arguments, options)
    # channels that are not next to each other
    arguments[:2] = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in arguments[:2])
    again = getattr(kernels, name)(*arguments, **options, backend="triton")
    assert torch.equal(got, again)


def test_sharp_attention_does_not_overflow(guard):
    """Scores of a hundred and more: only differences to the maximum may be raised to a power."""
    *arguments, start = attention_inputs(SHAPES[1], torch.float32, guard)
    arguments[0].mul_(60)
    for name, options in (("token_mass", {"exclude_radius": 0}), ("frame_mass", {})):
        options["start"] = start
        got = getattr(kernels, name)(*arguments, **options, backend="triton")
        close_as_fp32_is(got, name, arguments, options)


# tokens, kept ones, heads, head_dim, batch
ROWS = [(1, 1, 1, 12, 1), (7, 3, 3, 16, 2), (40, 23, 2, 128, 1), (63, 62, 5, 40, 2)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "size, dtype, strided", [(size, DTYPES[i % 3], i % 2) for i, size in enumerate(ROWS)]
)
def test_remembered_rows_are_the_references_to_the_bit(size, dtype, bits, strided, guard):
    tokens, kept, heads, dim, batch = size
    random = torch.Generator().manual_seed(tokens)

    def draw(count):
        wide = torch.randn(batch, count, heads, dim + 3 * strided, generator=random)
        # rows from a thousandth to a thousand, some numbers ties between two codes
        scale = 10.0 ** torch.randint(-3, 4, (batch, count, heads, 1), generator=random)
        return guard((wide * scale).to(dtype)[..., :dim])

    k, v = draw(tokens), draw(tokens)
    got = kernels.store_rows(k, v, bits, backend="triton")
    want = kernels.store_rows(k, v, bits, backend="torch")
    assert all(map(torch.equal, got, want))
    # into a place that is there already, all of them
    there = tuple(guard(torch.full_like(t, 7)) for t in want)
    assert kernels.store_rows(k, v, bits, there, backend="triton") is there
    assert all(map(torch.equal, there, want))
    order = torch.stack([torch.randperm(tokens, generator=random) for _ in range(batch)])
    index, left = guard(order[:, :kept]), guard(order[:, kept:])
    new_k, new_v = draw(kept), draw(kept)
    kernels.store_rows(new_k, new_v, bits, got, index, backend="triton")
    kernels.store_rows(new_k, new_v, bits, want, index, backend="torch")
    assert all(map(torch.equal, got, want))
    outs = [
        [guard(torch.full((batch, tokens, heads, dim), float("nan")).to(dtype)) for _ in "kv"]
        for _ in range(2)
    ]
    kernels.join_rows(new_k, new_v, got, left, bits, tuple(outs[0]), backend="triton")
    kernels.join_rows(new_k, new_v, want, left, bits, tuple(outs[1]), backend="torch")
    # the interpreter cuts off where a GPU rounds to bf16
    step = 2**-7 if dtype == torch.bfloat16 else 0.0
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=step, atol=0.0)
        assert torch.equal(one[:, :kept], other[:, :kept])


@pytest.mark.parametrize("bits", [8, 4])
def test_remembered_rows_that_are_no_numbers_or_huge(bits, guard):
    row = torch.tensor([1.5, -2.5, 0.5, 3e38, float("inf"), -float("inf"), float("nan"), 0.0])
    # one row a head
    k = torch.stack([row.roll(i)[:4] for i in range(8)])[None, None]
    outs = []
    for backend in ("triton", "torch"):
        held = kernels.store_rows(guard(k), guard(-k), bits, backend=backend)
        out = [guard(torch.zeros(1, 2, 8, 4)) for _ in "kv"]
        kernels.join_rows(
            k, k, held, torch.zeros(1, 1, dtype=torch.int64), bits, tuple(out), backend=backend
        )
        outs.append([t.nan_to_num(7.0, 8.0, 9.0) for t in out])
    assert all(map(torch.equal, *outs))


@triton.jit
def shift(source, target, count, offset, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(target + place, tl.load(source + place + offset, mask=inside) + 0 * place, mask=inside)


def test_the_guard_sees_what_is_written_and_read_out_of_bounds():
    guard = Guard()
    source, target = guard(torch.ones(1000)), guard(torch.zeros(1000))
    shift[(8,)](source, target, 1000, 0, BLOCK=128)
    guard.check()
    assert torch.equal(source, target)
    shift[(8,)](source, target, 1000, 24, BLOCK=128)
    # read past the end
    assert target[-24:].isnan().all() and not target[:-24].isnan().any()
    # and written past it: the poison of `source` has to be gone to be seen
    long = torch.ones(2000)
    shift[(16,)](long, target, 1001, 0, BLOCK=128)
    with pytest.raises(AssertionError, match="outside"):
        guard.check()

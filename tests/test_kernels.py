import contextlib
import functools
import logging
import math
import re
import sys
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wantrim import kernels
from wantrim.kernels import dispatch, reference
from wantrim.kernels.config import config_of
from wantrim.kernels.reference import (
    frame_mass,
    mean_counts,
    pack_rows,
    token_mass,
    unpack_rows,
)


def exact_mass(q, k, grid, index, start, radius):
    """The same mean from the whole attention matrix, in fp64."""
    f, h, w = grid
    tokens = f * h * w
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    matrix = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)
    matrix = matrix[:, start : start + tokens, start : start + tokens]
    out = torch.zeros(len(matrix), tokens, dtype=torch.float64)
    for key in range(tokens):
        row, column = divmod(key % (h * w), w)
        used = []
        for query in index.tolist():
            qr, qc = divmod(query % (h * w), w)
            if radius == 0 or abs(qr - row) > radius or abs(qc - column) > radius:
                used.append(query)
        if used:
            out[:, key] = matrix[:, used, key].mean(-1)
    return out


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 7, 9), (3, 5, 4), (5, 6, 6)])
@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize(("batch", "start", "after"), [(1, 0, 0), (2, 3, 2)])
def test_token_mass_is_the_streamed_column_mean(grid, radius, batch, start, after, monkeypatch):
    tokens = math.prod(grid)
    torch.manual_seed(tokens + radius)
    q, k = torch.randn(2, batch, start + tokens + after, 3, 8).unbind()
    index = torch.arange(0, tokens, 2)
    # two queries at a time: the stream must not depend on its chunks
    monkeypatch.setattr(reference, "CHUNK_SCORES", 2 * batch * k.shape[1])
    got = token_mass(q, k, grid, index, start=start, exclude_radius=radius)
    want = exact_mass(q, k, grid, index, start, radius)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_token_mass_never_holds_the_whole_matrix(monkeypatch):
    largest = 0
    softmax = torch.Tensor.softmax

    def watch(self, dim):
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 8 * 300)
    q, k = torch.randn(2, 1, 300, 2, 4).unbind()
    token_mass(q, k, (3, 10, 10), torch.arange(300))
    assert 0 < largest <= 8 * 300


def test_token_mass_in_bf16_follows_fp64():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 60, 2, 16).unbind()
    low_q, low_k = q.bfloat16(), k.bfloat16()
    got = token_mass(low_q, low_k, (3, 4, 5), torch.arange(60))
    want = exact_mass(low_q, low_k, (3, 4, 5), torch.arange(60), 0, 0)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("grid", "start", "after"), [((1, 2, 3), 0, 0), ((4, 3, 3), 2, 5), ((3, 7, 5), 1, 2)]
)
@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_mass_kept_is_that_of_the_own_latent_frame(grid, start, after, chunk, monkeypatch):
    tokens, per_frame = math.prod(grid), grid[1] * grid[2]
    torch.manual_seed(1)
    q, k = torch.randn(2, 2, start + tokens + after, 3, 8).unbind()
    monkeypatch.setattr(reference, "CHUNK_SCORES", chunk * 2 * k.shape[1])
    index = torch.arange(0, tokens, 2)
    matrix = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 8**0.5).softmax(-1)
    want = torch.zeros(2, 3, dtype=torch.float64)
    for query in index.tolist():
        first = start + query // per_frame * per_frame
        want += matrix[:, :, start + query, first : first + per_frame].sum(-1) / len(index)
    got = frame_mass(q, k, grid, index, start=start)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


def test_mass_kept_never_holds_the_whole_matrix(monkeypatch):
    largest = 0
    softmax = torch.Tensor.softmax

    def watch(self, dim):
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 8 * 300)
    q, k = torch.randn(2, 1, 300, 2, 4).unbind()
    frame_mass(q, k, (3, 10, 10), torch.arange(300))
    assert 0 < largest <= 8 * 300


def test_uniform_attention_keeps_the_size_of_a_latent_frame():
    zeros = torch.zeros(1, 5 * 4 * 6, 2, 4)
    mass = frame_mass(zeros, zeros, (5, 4, 6), torch.arange(120))
    torch.testing.assert_close(mass, torch.full((1, 2), 0.2))


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_means_are_over_the_queries_that_are_not_near(radius):
    grid = (2, 4, 7)
    index = torch.arange(0, 56, 3)
    y, x = torch.arange(56) % 28 // 7, torch.arange(56) % 7
    near = ((y[index, None] - y).abs() <= radius) & ((x[index, None] - x).abs() <= radius)
    want = len(index) - near.sum(0) * (radius > 0)
    assert torch.equal(mean_counts(grid, index, radius), want.float())


# remembered keys and values

BITS = pytest.mark.parametrize("bits", [8, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def round_trip(x, bits):
    return unpack_rows(*pack_rows(x, bits), bits).double()


@BITS
@DTYPES
@pytest.mark.parametrize("size", [(1, 1, 1, 2), (3, 5, 2, 12), (2, 7, 3, 128)])
def test_a_row_is_off_by_half_a_code_of_its_own(size, bits, dtype):
    torch.manual_seed(bits)
    # rows from a thousandth to a thousand, each with its own scale
    x = (torch.randn(size) * 10 ** (6 * torch.rand(*size[:-1], 1) - 3)).to(dtype)
    codes, scale = pack_rows(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (*size[:-1], size[-1] * bits // 8)
    assert scale.dtype == torch.float16 and scale.shape == size[:-1]
    back = unpack_rows(codes, scale, bits)
    assert back.dtype == torch.float16 and back.shape == size
    most = 2 ** (bits - 1) - 1
    largest = x.double().abs().amax(-1, keepdim=True)
    # half a code, and the scale's and the result's rounding to fp16
    bound = largest / most / 2 + largest * 2**-10 + most * 2**-24
    assert ((back.double() - x.double()).abs() <= bound).all()
    # a code less would not do
    if size[-1] == 128:
        assert (back.double() - x.double()).abs().mean() > bound.mean() / 8


@BITS
def test_codes_by_hand(bits):
    most = 2 ** (bits - 1) - 1
    row = torch.tensor([most, -most, 0.4, 0.6, -0.6, 1.5, 2.5, -1.5], dtype=torch.float32) * 0.25
    codes, scale = pack_rows(row, bits)
    assert scale == 0.25
    # ties go to the even number
    wanted = [most, -most, 0, 1, -1, 2, 2, -2]
    if bits == 8:
        assert codes.tolist() == [code + 128 for code in wanted]
    else:
        pairs = zip(wanted[::2], wanted[1::2], strict=True)
        assert codes.tolist() == [low + 8 | high + 8 << 4 for low, high in pairs]
    assert unpack_rows(codes, scale, bits).tolist() == [0.25 * code for code in wanted]


@BITS
@DTYPES
def test_zeros_stay_zeros_and_tiny_rows_tiny(bits, dtype):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    assert (round_trip(x, bits) == 0).all()
    x[1, 2] = 1e-6
    back = round_trip(x, bits)
    assert (back[0] == 0).all() and (back[1, 2] - 1e-6).abs().max() < 5e-7


@BITS
@DTYPES
def test_what_is_no_number_spoils_its_own_row_alone(bits, dtype):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8).to(dtype)
    clean = round_trip(x, bits)
    x[0, 1, 3], x[1, 0, 2], x[1, 2, 5] = float("nan"), float("inf"), float("-inf")
    back = round_trip(x, bits)
    for at in ((0, 0), (0, 2), (1, 1)):
        assert torch.equal(back[at], clean[at])
    assert back[0, 1].isnan().all()
    # cut off at what fp16 can hold, and the others are as good as zero beside it
    assert back[1, 0, 2] > 5e4 and back[1, 2, 5] < -5e4 and back[1].isfinite().all()


@BITS
def test_numbers_too_large_for_fp16_are_cut_off(bits):
    x = torch.tensor([[3e38, -1e6, 1.0, 0.0], [7e4, 6e4, -7e4, 0.0]], dtype=torch.bfloat16)
    back = round_trip(x, bits)
    assert back.isfinite().all()
    assert back[0, 0] > 5e4 and back[0, 1] < -5e4 and (back[:, 3] == 0).all()
    assert back[1, 0] == -back[1, 2] > 5e4


@BITS
def test_rows_that_lie_apart_in_memory_are_packed_alike(bits):
    torch.manual_seed(2)
    x = torch.randn(3, 4, 5, 24)
    views = (x.transpose(1, 2), x[..., ::2], x[:, 1:3], x.expand(2, 3, 4, 5, 24))
    for view in views:
        for one, other in zip(
            pack_rows(view, bits), pack_rows(view.contiguous(), bits), strict=True
        ):
            assert torch.equal(one, other)
    # some rows are the same rows
    codes, scale = pack_rows(x, bits)
    some = unpack_rows(codes[:, [0, 2]], scale[:, [0, 2]], bits)
    assert torch.equal(some, unpack_rows(codes, scale, bits)[:, [0, 2]])


@BITS
@DTYPES
def test_rows_are_stored_where_they_belong_and_joined_behind_others(bits, dtype):
    torch.manual_seed(3)
    k, v = torch.randn(2, 2, 9, 3, 12).to(dtype)
    held = kernels.store_rows(k, v, bits)
    assert [t.shape for t in held[:2]] == [(2, 9, 3, 12 * bits // 8), (2, 9, 3)]
    # each sample its own tokens, in any order
    index = torch.tensor([[0, 5, 7], [8, 1, 2]])
    new_k, new_v = torch.randn(2, 2, 3, 3, 12).to(dtype)
    assert kernels.store_rows(new_k, new_v, bits, held, index) is held
    sample = torch.arange(2)[:, None]
    k[sample, index], v[sample, index] = new_k, new_v
    assert all(map(torch.equal, held, kernels.store_rows(k, v, bits)))
    out = torch.full((2, 2, 7, 3, 12), float("nan")).to(dtype)
    left = torch.tensor([[1, 2, 3, 4], [7, 6, 5, 0]])
    kernels.join_rows(new_k, new_v, held, left, bits, (out[0], out[1]))
    for joined, own, whole in ((out[0], new_k, k), (out[1], new_v, v)):
        assert torch.equal(joined[:, :3], own)
        back = unpack_rows(*pack_rows(whole, bits), bits).to(dtype)
        assert torch.equal(joined[:, 3:], back[sample, left])


class Widest(TorchDispatchMode):
    """The most numbers in fp32 that one operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.numbers = max(self.numbers, made.numel())
        return made


@BITS
def test_many_rows_are_never_wide_at_once(bits, monkeypatch):
    torch.manual_seed(4)
    k, v = torch.randn(2, 2, 23, 3, 12).bfloat16()
    index = torch.stack([torch.randperm(23), torch.randperm(23)])
    found = []
    for at_once in (5, 100):
        monkeypatch.setattr(reference, "AT_ONCE", at_once)
        out = torch.full((2, 2, 20, 3, 12), float("nan")).bfloat16()
        with Widest() as widest:
            held = reference.store_rows(k, v, bits)
            reference.store_rows(v[:, :7], k[:, :7], bits, held, index[:, :7])
            reference.join_rows(k[:, :7], v[:, :7], held, index[:, 7:20], bits, (out[0], out[1]))
        found.append((*held, out))
        assert widest.numbers == 2 * min(at_once, 23) * 3 * 12
    assert all(map(torch.equal, *found)) and not found[0][-1].isnan().any()


NAMES = ("token_mass", "frame_mass", "store_rows", "join_rows")


def call(name, backend):
    run = functools.partial(getattr(kernels, name), backend=backend)
    return dispatch._try(run, name, torch.zeros(1), 16)


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu_auto_is_the_reference_and_triton_says_why_not(name):
    assert same(call(name, "auto"), call(name, "torch"))
    with pytest.raises(RuntimeError, match=f"{name}: backend 'triton' cannot run here: .*"):
        call(name, "triton")
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'gpu'"):
        call(name, "gpu")


@pytest.fixture
def as_if(monkeypatch):
    """as_if(kernel): tensors are taken to be on a GPU, where `kernel` stands for Triton's."""
    monkeypatch.setattr(dispatch, "_checked", {})
    monkeypatch.setattr(dispatch, "_said", set())
    # as in a process whose Triton is not interpreted
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "installed", lambda: True)

    def put(kernel, arch=90):
        monkeypatch.setattr(dispatch, "_architecture", lambda device: arch)
        monkeypatch.setattr(dispatch, "_kernel", lambda name, tensor: kernel)

    return put


def wrong(*arguments, **options):
    codes, *others = reference.store_rows(*arguments, **options)
    return codes.flip(-1), *others


def broken(*arguments, **options):
    raise OSError("no compiler")


@pytest.mark.parametrize(
    ("kernel", "tried", "why"),
    [
        # in 8 and in 4 bits
        (wrong, 2, "its whole numbers are not those of the torch reference"),
        (broken, 1, "OSError: no compiler"),
    ],
)
def test_a_kernel_that_disagrees_is_dropped_and_the_log_says_so(as_if, caplog, kernel, tried, why):
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return kernel(*arguments, **options)

    as_if(counted)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=why):
                call("store_rows", "triton")
    # checked once, said once
    assert len(calls) == tried and len(caplog.records) == 1
    assert "store_rows" in caplog.text and why in caplog.text


def test_a_kernel_that_agrees_is_used_after_one_check(as_if):
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return reference.store_rows(*arguments, **options)

    as_if(counted)
    # in 8 and in 4 bits, and at first to compare
    for count in (4, 6):
        assert same(call("store_rows", "triton"), call("store_rows", "torch"))
        assert len(calls) == count


@pytest.mark.parametrize(
    ("name", "dtype", "size", "arch", "why"),
    [
        ("token_mass", torch.float64, 16, 90, "float64 is none of bfloat16"),
        ("token_mass", torch.bfloat16, 256, 90, "more than 128"),
        ("frame_mass", torch.bfloat16, 64, 75, r"no tiles are known for this GPU \(75\)"),
        ("frame_mass", torch.bfloat16, 64, "gfx1030", "this GPU"),
        ("frame_mass", torch.float32, 64, "gfx1100", "float32 on this GPU"),
        ("frame_mass", torch.float32, 64, None, "no compiler for"),
    ],
)
def test_auto_declines_with_a_reason(as_if, name, dtype, size, arch, why):
    as_if(broken, arch)
    tensor = torch.zeros(1, 4, size, dtype=dtype)
    assert re.search(why, dispatch.why_not(name, tensor))


def test_without_triton_the_reason_is_that(as_if, monkeypatch):
    as_if(broken)
    monkeypatch.setattr(dispatch, "installed", lambda: False)
    assert dispatch.why_not("token_mass", torch.zeros(1, 1, 12)) == "Triton is not installed"


def test_a_stand_in_for_triton_is_no_triton(monkeypatch):
    """Some packs put an empty module of that name where there is none."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert dispatch.installed.__wrapped__() is False


def test_kernels_start_on_the_gpu_of_their_tensors(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    run = dispatch._launched_on(second, lambda one, *, two: (one, two, list(current)))
    assert run(1, two=2) == (1, 2, [second]) and not current
    here = torch.device("cpu")
    assert dispatch._launched_on(here, lambda: list(current))() == []


def test_a_nan_never_agrees():
    one = torch.tensor([1.0, float("nan")])
    assert "differs" in dispatch._difference(one, torch.ones(2), torch.float32)
    assert dispatch._difference(torch.ones(2), torch.ones(2), torch.float32) is None


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, "gfx942", "gfx1100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_are_what_a_matrix_product_takes(arch, dtype):
    config = config_of(arch, dtype)
    if config is None:
        assert (arch, dtype) == ("gfx1100", torch.float32)
        return
    sides = (*config.lse, *config.mass, *config.frame)
    assert all(side >= 16 and side & (side - 1) == 0 for side in sides)

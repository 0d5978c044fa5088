"""Kernels through Triton's compiler for GPUs that are not here."""

import csv

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel here")
tl = triton.language

from triton.compiler.errors import CompilationError  # noqa: E402

from wantrim.benchmarks import kernels_aot as aot  # noqa: E402
from wantrim.benchmarks.table import RESULTS  # noqa: E402

MAIN = ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942")


def every_build(target):
    return [build for other, build in aot.all_builds([target]) if other == target]


@pytest.mark.parametrize("target", MAIN)
def test_every_kernel_compiles_clean_in_bf16(target):
    for build in aot.builds(target, torch.bfloat16):
        assert not aot.complaints(aot.compile_row(build, target))


# one of each: what the front end sees does not depend on types and sizes
KINDS = list({(b.name, "exclusion" in b.config): b for b in every_build("sm_90")}.values())


@pytest.mark.parametrize("build", KINDS, ids=lambda b: f"{b.name} {b.config}")
def test_an_integer_argument_may_be_one(build):
    """The runtime makes a constant of it, on which methods of tensors do not exist."""
    for ones in [[name] for name in aot.integers(build)] + [aot.integers(build)]:
        aot.front_end(build, "sm_90", ones)


def test_rows_are_those_of_todays_kernels():
    """`python -m wantrim.benchmarks.kernels_aot` was run after the last change of a tile."""
    with (RESULTS / "kernels_aot.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # the rows of a kernel that is gone stay: every host's library has the operation now
    rows = [row for row in rows if row["kernel"] != "rms_rope_kernel"]
    known = {(row["kernel"], row["config"], row["target"]) for row in rows}
    wanted = {(b.name, b.config, target) for target, b in aot.all_builds(aot.TARGETS)}
    assert wanted == known
    for row in rows:
        numbers = {name: int(row[name]) for name in ("registers", "spills", "shared_bytes")}
        assert not aot.complaints(row | numbers)


ROW = {
    "kernel": "lse_kernel", "config": "bfloat16", "target": "sm_90", "registers": 9, "spills": 0,
    "shared_bytes": 1, "matrix_instructions": "HGMMA 8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spills": 3}, "3 spills"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory, of 232448"),
        ({"matrix_instructions": "HMMA 8"}, "no wgmma"),
        ({"matrix_instructions": "", "target": "sm_80"}, "no matrix instructions"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_said(change, why):
    assert not aot.complaints(ROW)
    assert any(why in said for said in aot.complaints(ROW | change))


def test_a_kernel_that_does_not_compile_is_a_failure(tmp_path):
    def fails(build, target):
        raise CompilationError("", None, "planted")

    with pytest.raises(SystemExit, match="planted"):
        aot.main(["--targets", "sm_90", "--results", str(tmp_path)], compile_one=fails)


@triton.jit
def tensor_method_on_an_argument(out_ptr, count):
    tl.store(out_ptr, count.to(tl.int64))


def test_the_front_end_sees_what_a_constant_cannot_do():
    signature = {"out_ptr": "*i64", "count": "i32"}
    build = aot.Build("planted", tensor_method_on_an_argument, "", signature, {}, {}, ())
    aot.front_end(build, "sm_90")
    with pytest.raises(CompilationError):
        aot.front_end(build, "sm_90", ["count"])

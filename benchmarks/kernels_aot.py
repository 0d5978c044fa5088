"""What Triton's compiler makes of our kernels, without a GPU: `python -m wantrim.benchmarks.kernels_aot`.

Each kernel is compiled for each architecture with the tiles that it would run with there; registers,
spills, shared memory and matrix instructions are rows of benchmarks/results/kernels_aot.csv. It
fails where a kernel does not compile, spills, or takes more shared memory than there is. It needs
the package triton, on Linux.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from ..kernels import attention, context
from ..kernels.config import config_of
from .table import RESULTS, merge_rows

log = logging.getLogger(__name__)
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100")
COLUMNS = (
    "kernel", "config", "target", "registers", "spills", "shared_bytes", "matrix_instructions",
    "triton",
)  # fmt: skip
KEY = ("kernel", "config", "target")
# bytes of shared memory that a program may have
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
AMD_SHARED = 65536
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Build:
    """A kernel as it is launched on one architecture.

    Args:
        signature: type of each argument; "constexpr" for a constant.
        divisible: arguments that are multiples of 16, as a launch would find for aligned tensors.
    """

    name: str
    kernel: object
    config: str
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]
    divisible: tuple[str, ...]


def builds(target: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> list[Build]:
    """Every kernel with its tiles for this architecture, at the sizes of Wan 14B."""
    arch = int(target[3:]) if target.startswith("sm_") else target
    config = config_of(arch, dtype)
    packing = [_rows(kernel, dtype, head_dim, bits) for kernel in ROWS for bits in (8, 4)]
    if config is None:
        return packing
    x, words = POINTERS[dtype], str(dtype).removeprefix("torch.")
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    strides = [f"stride_{t}{d}" for t in "qk" for d in "bsn"]
    base = {"q_ptr": x, "k_ptr": x, "index_ptr": "*i32"}
    shape = {
        "D": head_dim,
        "D_PAD": max(16, triton.next_power_of_2(head_dim)),
        "UPCAST": False,
        "PRECISION": config.precision,
    }

    def reading(kernel, tiles, pointers: dict, integers: Sequence[str], **constants) -> Build:
        constants = {"BLOCK_M": tiles[0], "BLOCK_N": tiles[1], **shape, **constants}
        signature = base | pointers | dict.fromkeys([*integers, *strides], "i32")
        signature |= {"scale": "fp32"}
        return _build(
            kernel,
            f"{tiles[0]} queries x {tiles[1]} keys, {config.warps} warps, {config.stages} stages, "
            f"{words}, head_dim {head_dim}" + (", exclusion" if constants.get("EXCLUDE") else ""),
            signature,
            constants,
            launch,
            strides,
        )

    counts = ("num_keys", "num_queries", "heads")
    found = [reading(attention.lse_kernel, config.lse, {"lse_ptr": "*fp32"}, counts)]
    places = {"place_ptr": "*i32", "lse_ptr": "*fp32", "out_ptr": "*fp32"}
    integers = (
        "tokens", "start", "num_queries", "heads", "groups", "per_frame", "width", "radius",
    )  # fmt: skip
    for exclude in (False, True):
        constants = {"HEADS": 5, "EXCLUDE": exclude}
        found.append(reading(attention.mass_kernel, config.mass, places, integers, **constants))
    frames = (*counts, "start", "per_frame")
    found.append(reading(attention.frame_mass_kernel, config.frame, {"out_ptr": "*fp32"}, frames))
    return found + packing


ROWS = (context.store_kernel, context.join_kernel)


def _rows(kernel, dtype: torch.dtype, head_dim: int, bits: int) -> Build:
    """Of remembered keys and values, some of the tokens."""
    x, strides = POINTERS[dtype], [f"stride_{t}{d}" for t in "kv" for d in "bsn"]
    pointers = {"k_ptr": x, "v_ptr": x, "index_ptr": "*i64", "k_out_ptr": x, "v_out_ptr": x}
    for t in "kv":
        pointers |= {f"{t}_codes_ptr": "*u8", f"{t}_scale_ptr": "*fp16"}
    kinds = pointers | dict.fromkeys(("tokens", "kept", "left", "heads", "held", *strides), "i32")
    constants = {
        "INDEXED": True, "D": head_dim, "D_PAD": triton.next_power_of_2(head_dim), "BITS": bits,
        "TILE": context.ROWS,
    }  # fmt: skip
    signature = {name: kind for name, kind in kinds.items() if name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    words = f"{bits} bits, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    return _build(kernel, words, signature, constants, {"num_warps": context.WARPS}, strides)


def _build(kernel, words, signature, constants, options, strides) -> Build:
    # in the order of the kernel's own arguments, which is what the compiler goes by
    known = signature | dict.fromkeys(constants, "constexpr")
    ordered = {name: known[name] for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    name = kernel.fn.__name__
    return Build(name, kernel, words, ordered, constants, options, (*aligned, *strides))


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def source(build: Build, ones: Sequence[str] = ()) -> ASTSource:
    """What the compiler is given; the integer arguments `ones` are the constant 1."""
    signature = build.signature | dict.fromkeys(ones, "constexpr")
    constants = build.constants | dict.fromkeys(ones, 1)
    names = list(signature)
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in build.divisible
        if name not in ones
    }
    return ASTSource(build.kernel, signature, constants, attributes)


def integers(build: Build) -> list[str]:
    return [name for name, kind in build.signature.items() if kind == "i32"]


def front_end(build: Build, target: str, ones: Sequence[str] = ()) -> None:
    """Parse and type a kernel, as far as its code is its own; `ones` as for `source`.

    Raises:
        CompilationError: where it cannot be compiled.
    """
    gpu = target_of(target)
    backend = make_backend(gpu)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(build.options)
    codegen = backend.get_codegen_implementation(options)
    source(build, ones).make_ir(gpu, options, codegen, backend.get_module_map(), context)


def compile_row(build: Build, target: str) -> dict[str, object]:
    """Compile for one architecture.

    Raises:
        Exception: whatever the compiler says.
    """
    made = triton.compile(source(build), target=target_of(target), options=build.options)
    read = _nvidia if target.startswith("sm_") else _amd
    code = made.asm["cubin" if target.startswith("sm_") else "amdgcn"]
    registers, spills, matrix = read(code)
    return {
        "kernel": build.name,
        "config": build.config,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared_bytes": made.metadata.shared,
        "matrix_instructions": " ".join(f"{name} {n}" for name, n in matrix.items()),
        "triton": triton.__version__,
    }


def _nvidia(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, local loads and stores, matrix instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.M))
    matrix = {name: n for name, n in sorted(found.items()) if "MMA" in name}
    return registers, found["LDL"] + found["STL"], matrix


def _cuobjdump(option: str, file: str) -> str:
    command = [str(TOOLS / "cuobjdump"), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(code: str) -> tuple[int, int, dict[str, int]]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
    spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
    found = Counter(re.findall(r"^\s+v_(mfma|wmma)", code, re.M))
    return registers, spills, {name.upper(): n for name, n in sorted(found.items())}


def complaints(row: dict[str, object]) -> list[str]:
    """What is wrong with a compiled kernel."""
    target, found = row["target"], []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    limit = SHARED.get(target, AMD_SHARED)
    if row["shared_bytes"] > limit:
        found.append(f"{row['shared_bytes']} bytes of shared memory, of {limit}")
    multiplies = row["kernel"] in ("lse_kernel", "mass_kernel", "frame_mass_kernel")
    half = "float32" not in row["config"]
    if multiplies and half and not row["matrix_instructions"]:
        found.append("no matrix instructions")
    if multiplies and half and target == "sm_90" and "HGMMA" not in row["matrix_instructions"]:
        found.append("no wgmma")
    return [f"{row['kernel']}, {row['config']}, {target}: {what}" for what in found]


def all_builds(targets: Sequence[str]) -> Iterator[tuple[str, Build]]:
    for target in targets:
        for dtype in POINTERS:
            for build in builds(target, dtype):
                yield target, build


def main(argv: Sequence[str] | None = None, compile_one: Callable = compile_row) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit(
            "TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it"
        )
    rows, wrong = [], []
    for target, build in all_builds(args.targets):
        try:
            row = compile_one(build, target)
        except Exception as error:
            wrong.append(f"{build.name}, {build.config}, {target}: {type(error).__name__}: {error}")
            log.info("%s", wrong[-1])
            continue
        rows.append(row)
        wrong += complaints(row)
        log.info(
            "%s, %s, %s: %s registers, %s spills, %s bytes shared, %s",
            row["kernel"], row["config"], target, row["registers"], row["spills"],
            row["shared_bytes"], row["matrix_instructions"] or "no matrix instructions",
        )  # fmt: skip
    merge_rows(args.results / "kernels_aot.csv", rows, COLUMNS, KEY)
    if wrong:
        raise SystemExit("\n".join(["", *wrong]))


if __name__ == "__main__":
    main()

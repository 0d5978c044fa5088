"""How many small faults the tests notice: `make mutants`, by Cosmic Ray.

Changes a sample of places in the modules below, one at a time and in a copy under out/mutants, and
runs the tests that should notice. Those that nobody noticed are in out/mutants/survivors.diff.
"""

import argparse
import difflib
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

# what most tests import: the forks that run them have it already
import diffusers.models.transformers.transformer_wan  # noqa: F401
import pytest
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB

log = logging.getLogger("mutants")

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "mutants"
# the package has to have its own name there
TREE = OUT / "wantrim"
ENGINE = "tests/test_carry.py tests/test_oracle.py tests/test_engine.py"
WAITS = "tests/test_device_waits.py::test_a_model_call_waits_for_the_device_once"
# without the one that times the solver
SOLVER = "tests/test_solve.py -k 'not seconds'"
TRAINING = "tests/test_training_wiring.py tests/test_training.py -k"
# but not engine/apart.py and engine/compiled.py, whose tests need a compiler's minutes
TESTS = {
    "methods/grid.py": "tests/test_tokens.py",
    "methods/tokens.py": "tests/test_tokens.py",
    "methods/schedule.py": "tests/test_schedule.py",
    "methods/carry.py": "tests/test_carry.py",
    "methods/shares.py": "tests/test_shares.py tests/test_program.py",
    "methods/importance.py": "tests/test_tokens.py",
    "methods/role_plan.py": "tests/test_online_roles.py",
    "methods/cost.py": "tests/test_cost.py tests/test_flops.py",
    "methods/knapsack.py": "tests/test_knapsack.py",
    "methods/depth.py": "tests/test_depth.py tests/test_routers.py",
    "methods/routers.py": "tests/test_routers.py",
    "methods/heads.py": "tests/test_roles.py tests/test_attend.py tests/test_heads.py",
    # that a copy does not wait for the device shows in the second alone
    "methods/attend.py": f"tests/test_attend.py {WAITS}",
    "slim/width.py": "tests/test_width.py tests/test_budget.py",
    "engine/plan.py": "tests/test_program.py",
    "engine/program.py": "tests/test_program.py tests/test_online_roles.py",
    "engine/memory.py": ENGINE,
    "engine/call.py": ENGINE,
    "engine/engine.py": ENGINE,
    "engine/block.py": "tests/test_attend.py tests/test_engine.py",
    "engine/context.py": "tests/test_context.py",
    "engine/record.py": "tests/test_record.py",
    "engine/work.py": "tests/test_cost.py tests/test_work_traffic.py",
    "solve/solver.py": SOLVER,
    "solve/curves.py": SOLVER,
    "solve/course.py": "tests/test_course.py -k 'not -20- and not waits'",
    "solve/dial.py": "tests/test_tuned.py tests/test_dial.py tests/test_online_roles.py -k 'not -50'",
    "training/losses.py": f"{TRAINING} '(loss or timestep_weights or outlier) and not lowers'",
    "training/objectives.py": "tests/test_training_wiring.py tests/test_training.py",
    "training/forcing.py": "tests/test_training_forcing.py",
    "training/gate.py": f"{TRAINING} 'gate or budget or routed or skipped or clips or logits or taps'",
}
# types in annotations, which nothing reads; bits of floats, which any call notices; and whether equal
# numbers are one object, which is Python's affair, as is None, True and False by `is` or by `==`
LEFT_OUT = re.compile(
    r"core/Replace(BinaryOperator_(BitOr_|.*_(Bit|LShift|RShift))"
    r"|ComparisonOperator_((Eq|NotEq|LtE?|GtE?)_Is|NotEq_IsNot|Is_Eq|IsNot_NotEq)$)"
)
# and by what stands in the line: whether plans can be changed, compared or hashed, no video shows;
# no remainder is below 0
LEFT_OUT_IN = tuple(
    (re.compile(operator), re.compile(line))
    for operator, line in (
        (r"core/Replace(True|False)With", r"\s*@dataclass"),
        (r"core/ReplaceComparisonOperator_(Eq_LtE|NotEq_Gt)$", r".* % [\w.]+ [=!]= 0\b"),
    )
)


def places(module: str) -> list:
    """Everything that can be changed in a module."""
    database = WorkDB(OUT / "places.sqlite", WorkDB.Mode.create)
    init([Path(module)], database, {})
    lines = Path(module).read_text("utf-8").splitlines()
    found = [item.mutations for item in database.work_items if not _left_out(item, lines)]
    database.close()
    return found


def _left_out(item, lines: list[str]) -> bool:
    (mutation,) = item.mutations
    name, line = mutation.operator_name, lines[mutation.start_pos[0] - 1]
    return bool(LEFT_OUT.match(name)) or any(
        operator.match(name) and stands.match(line) for operator, stands in LEFT_OUT_IN
    )


def noticed(command: str, patience: float) -> bool:
    """Whether tests fail, or take longer than `patience` seconds; in a fork, which imports less."""
    child = os.fork()
    if child == 0:
        os.setsid()
        said = os.open(OUT / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 1
        try:
            code = int(pytest.main(["-qx", "-p", "no:cacheprovider", *shlex.split(command)]))
        finally:
            os._exit(code)
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=6, help="places of a module, default 6")
    parser.add_argument("--minutes", type=float, default=15, help="stop after, default 15")
    parser.add_argument("--seed", type=int, default=0, help="chooses other places")
    parser.add_argument("--only", nargs="+", default=TESTS, help="of the modules")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    shutil.rmtree(OUT, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)
    os.chdir(TREE)
    # before the editable install, which is the tree that must not change
    os.environ |= {"PYTHONPATH": str(OUT), "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(OUT))
    # a changed file may look as old as the one before it
    sys.dont_write_bytecode = True
    ends = time.monotonic() + 60 * args.minutes
    jobs, patience = [], {}
    for module in args.only:
        command = TESTS[module]
        if command not in patience:
            began = time.monotonic()
            if noticed(command, 300):
                said = (OUT / "said.txt").read_text("utf-8")
                sys.exit(f"{module}: its tests fail without a change\n{said}")
            patience[command] = 10 + 4 * (time.monotonic() - began)
        found = places(module)
        chosen = random.Random(args.seed).sample(found, min(args.each, len(found)))
        jobs += [(number, module, mutation) for number, (mutation,) in enumerate(chosen)]
    killed, run = Counter(), Counter()
    survivors = []
    # a place of every module, then the next of every one: the time may run out
    for _, module, mutation in sorted(jobs, key=lambda job: job[0]):
        if time.monotonic() > ends:
            break
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        where = f"{module}:{mutation.start_pos[0]} {mutation.operator_name}"
        with use_mutation(mutation.module_path, operator, mutation.occurrence) as (old, new):
            run[module] += 1
            if noticed(TESTS[module], patience[TESTS[module]]):
                killed[module] += 1
                continue
        log.info("survived: %s", where)
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1)
        survivors.append("\n".join((where, *diff, "")))
    (OUT / "survivors.diff").write_text("\n".join(survivors), "utf-8")
    for module in run:
        log.info("%s: %d of %d", module, killed[module], run[module])
    for folder in dict.fromkeys(module.split("/")[0] for module in run):
        inside = [module for module in run if module.startswith(f"{folder}/")]
        log.info(
            "%s: %d of %d", folder, *(sum(c[module] for module in inside) for c in (killed, run))
        )
    log.info(
        "%d of %d killed (%.0f %%), %d not run",
        killed.total(),
        run.total(),
        100 * killed.total() / max(run.total(), 1),
        len(jobs) - run.total(),
    )


if __name__ == "__main__":
    main()

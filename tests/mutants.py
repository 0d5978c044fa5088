"""How many small faults the tests notice: `make mutants`, by Cosmic Ray.

Changes a sample of places in the modules below, one at a time and in a copy under out/mutants, and
runs the tests that should notice. Those that nobody noticed are in out/mutants/survivors.diff.
"""

import argparse
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import TestOutcome

log = logging.getLogger("mutants")

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "mutants"
# the package has to have its own name there
TREE = OUT / "wantrim"
ENGINE = "tests/test_oracle.py tests/test_engine.py"
TRAINING = "tests/test_training_wiring.py tests/test_training.py -k"
TESTS = {
    "methods/tokens.py": "tests/test_tokens.py",
    "methods/schedule.py": "tests/test_schedule.py",
    "slim/width.py": "tests/test_width.py",
    "methods/knapsack.py": "tests/test_knapsack.py",
    "methods/depth.py": "tests/test_depth.py tests/test_routers.py",
    "methods/routers.py": "tests/test_routers.py",
    "methods/heads.py": "tests/test_heads.py",
    "engine/program.py": "tests/test_program.py",
    "engine/memory.py": ENGINE,
    "engine/call.py": ENGINE,
    "training/losses.py": f"{TRAINING} 'loss or timestep_weights or outlier'",
    "training/gate.py": f"{TRAINING} 'gate or budget or routed or skipped or clips or logits'",
}
# types in annotations, which nothing reads; bits of floats, which any call notices; and whether equal
# numbers are one object, which is Python's affair
LEFT_OUT = re.compile(
    r"core/Replace(BinaryOperator_(BitOr_|.*_(Bit|LShift|RShift))"
    r"|ComparisonOperator_(Eq|NotEq|LtE?|GtE?)_Is)"
)


def places(module: str) -> list:
    """Everything that can be changed in a module."""
    database = WorkDB(OUT / "places.sqlite", WorkDB.Mode.create)
    init([Path(module)], database, {})
    found = [
        item.mutations
        for item in database.work_items
        if not LEFT_OUT.match(item.mutations[0].operator_name)
    ]
    database.close()
    return found


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
    pytest = f"{Path(sys.executable).parent / 'pytest'} -q -x -p no:cacheprovider"
    ends = time.monotonic() + 60 * args.minutes
    jobs, patience = [], {}
    for module in args.only:
        command = f"{pytest} {TESTS[module]}"
        if command not in patience:
            began = time.monotonic()
            outcome, said = run_tests(command, 300)
            if outcome != TestOutcome.SURVIVED:
                sys.exit(f"{module}: its tests fail without a change\n{said}")
            patience[command] = 20 + 4 * (time.monotonic() - began)
        found = places(module)
        chosen = random.Random(args.seed).sample(found, min(args.each, len(found)))
        jobs += [(number, module, mutations, command) for number, mutations in enumerate(chosen)]
    killed, run = 0, 0
    survivors = []
    # a place of every module, then the next of every one: the time may run out
    for _, module, mutations, command in sorted(jobs, key=lambda job: job[0]):
        if time.monotonic() > ends:
            break
        result = mutate_and_test(mutations, command, patience[command])
        if result.test_outcome not in (TestOutcome.KILLED, TestOutcome.SURVIVED):
            continue
        run += 1
        killed += result.test_outcome == TestOutcome.KILLED
        where = f"{module}:{mutations[0].start_pos[0]} {mutations[0].operator_name}"
        log.info("%s %s", result.test_outcome.value, where)
        if result.test_outcome == TestOutcome.SURVIVED:
            survivors.append(f"{where}\n{result.diff}\n")
    (OUT / "survivors.diff").write_text("\n".join(survivors), "utf-8")
    log.info(
        "%d of %d killed (%.0f %%), %d not run",
        killed,
        run,
        100 * killed / max(run, 1),
        len(jobs) - run,
    )


if __name__ == "__main__":
    main()

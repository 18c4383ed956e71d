"""Run the tests that train as other processors would run them: `python tests/processors.py [--all] [pytest arguments]`.

The same seed trains another model on another processor, since sums are added in another order. So each setting takes away
instructions from the libraries, and gives other numbers of threads and other seeds. Types are not checked again. Prints a
table; exits with 1 if a test fails anywhere.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROCESSORS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Nehalem"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "native": {},
}
GATE = [("default", 1, 0), ("avx2", 2, 0)]  # without the slow tests, which another step of the gate has


def run(
    processor: str, threads: int, seed: int, which: str, more: list[str]
) -> tuple[dict[str, int], list[str], float]:
    """Counts by outcome, the tests that failed, and seconds."""
    settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "MECHUNLEARN_TEST_SEED": seed}
    environment = {name: value for name, value in os.environ.items() if name not in PROCESSORS["default"]}
    environment |= PROCESSORS[processor] | {name: str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", which, "--dist", "loadfile", "-o", "addopts="]
    command += ["-n", str(max(1, (os.cpu_count() or 1) // threads)), *more]  # more threads than cores take hours
    if not any(argument.split("::")[0].endswith(".py") for argument in more):
        command += [
            str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.training" in path.read_text()
        ]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode:
        print(done.stdout)
        failed = failed or [f"pytest exited with {done.returncode}"]
    return counts, failed, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*itertools.product(PROCESSORS, (1, 2), (0, 1, 2))]
    parser.add_argument("--all", action="store_true", help=f"all {len(every)} settings, not only the gate's two")
    parser.add_argument("--processor", choices=PROCESSORS, help="only settings of this one, of all")
    asked, more = parser.parse_known_args()
    chosen = every if asked.all or asked.processor else GATE
    which = "training and not slow" if chosen is GATE else "training"
    rows, failures = [], set()
    for processor, threads, seed in chosen:
        if asked.processor in (None, processor):
            counts, failed, seconds = run(processor, threads, seed, which, more)
            failures |= {*failed}
            rows.append(
                f"| {processor} | {threads} | {seed} | {counts.get('passed', 0)} | {len(failed)} | {seconds:.0f} |"
            )
            print(rows[-1], flush=True)
    print("\n| processor | threads | seed | passed | failed | seconds |", "|---|---|---|---|---|---|", *rows, sep="\n")
    print(*sorted(failures), sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

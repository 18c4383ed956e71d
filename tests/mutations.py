"""Break the code and see tests fail: `python tests/mutations.py GROUP ... [--count 100] [--seed 0] [--tests PATH ...] [-o FOLDER]`.

Needs `pip install cosmic-ray pytest-cov`. One run of the tests notes which test reaches which line. Then places of the code
are drawn at random, each is broken in one way (cosmic-ray's operators: another comparison, number, condition, no decorator
...) in a copy of the project, and the tests that reach it run, the short ones first. A mutant that no test notices survives.
Prints the share that was killed, with its exact interval, and writes every result into FOLDER, where a run that was killed
goes on.

Annotations are not broken (the error at import would flatter the score), and a place is drawn once, however many ways there
are to break it. Mutants that cannot change what the code does count as survivors.
"""

import argparse
import ast
import json
import os
import random
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GROUPS = {
    "artifacts": ["mechunlearn/artifacts/*.py"],
    "layout": ["mechunlearn/model/layout.py"],
    "training": ["mechunlearn/training/*.py"],
    "status": ["mechunlearn/evaluation/status.py", "mechunlearn/evaluation/damage.py"],
}
LONGEST = 120  # seconds of tests a mutant
WHOLE = ["--doctest-modules", "--jaxtyping-packages=mechunlearn,tests.typecheck.checked", "-o", "addopts="]
LEFT_OUT = (".git", ".venv", "*.pyc", "__pycache__", ".*_cache", "site", "screenshots", "notebooks")


def copied(to: Path) -> Path:
    """A copy of the project that may be broken."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return to


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def reached(project: Path, folder: Path, which: str, paths: list[str]) -> dict[str, dict[int, list[str]]]:
    """Which tests reach a line, the short ones first: by file and line."""
    kept = folder / "reached.json"
    if not kept.exists():
        measured = ["--cov=mechunlearn", "--cov-context=test", "--cov-report=", "--durations=0", "-vv", "-n", "2"]
        command = [sys.executable, "-m", "pytest", *WHOLE, *measured, "-m", which, *paths]
        done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)
        seconds: dict[str, float] = {}
        for time, test in re.findall(r"^([0-9.]+)s (?:call|setup) +(\S.*)$", done.stdout, re.MULTILINE):
            seconds[test.strip()] = seconds.get(test.strip(), 0.0) + float(time)
        passed = {test.strip() for test in re.findall(r"PASSED (\S.*)$", done.stdout, re.MULTILINE)}
        print(done.stdout.splitlines()[-1], flush=True)
        shutil.copy(project / ".coverage", folder)
        with sqlite3.connect(project / ".coverage") as coverage:
            rows = coverage.execute(
                "select file.path, context.context, line_bits.numbits from line_bits"
                " join file on file.id = file_id join context on context.id = context_id"
            ).fetchall()
        lines: dict[str, dict[int, set[str]]] = {}
        for path, context, bits in rows:
            test = context.split("|")[0]
            if test not in passed:
                continue
            here = lines.setdefault(str(Path(path).relative_to(project)), {})
            for line in (8 * i + bit for i, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1):
                here.setdefault(line, set()).add(test)
        found = {
            file: {line: sorted(tests, key=lambda test: (seconds.get(test, 0.0), test)) for line, tests in here.items()}
            for file, here in lines.items()
        }
        kept.write_text(json.dumps({"seconds": seconds, "lines": found}))
    stored = json.loads(kept.read_text())
    SECONDS.update(stored["seconds"])
    return {file: {int(line): tests for line, tests in here.items()} for file, here in stored["lines"].items()}


SECONDS: dict[str, float] = {}


def annotated(source: str) -> set[tuple[int, int]]:
    """Where annotations begin and what lies in them: lines and columns."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if isinstance(part := getattr(node, name, None), ast.AST):
                found |= {(inner.lineno, inner.col_offset) for inner in ast.walk(part) if hasattr(inner, "lineno")}
                found |= {
                    (line, column)
                    for line in range(part.lineno, part.end_lineno + 1)
                    for column in range(
                        part.col_offset if line == part.lineno else 0,
                        part.end_col_offset if line == part.end_lineno else 200,
                    )
                }
    return found


def drawn(project: Path, patterns: list[str], count: int, seed: int) -> tuple[list[Any], int]:
    """Mutants at `count` places, and how many places there are."""
    from cosmic_ray.commands.init import _all_work_items  # what `cosmic-ray init` writes into its database

    files = [path.relative_to(project) for pattern in patterns for path in sorted(project.glob(pattern))]
    places: dict[tuple[str, tuple[int, int]], list[Any]] = {}
    outside = {str(file): annotated((project / file).read_text()) for file in files}
    for item in _all_work_items(files, {}):
        [mutation] = item.mutations
        if tuple(mutation.start_pos) not in outside[str(mutation.module_path)]:
            places.setdefault((str(mutation.module_path), tuple(mutation.start_pos)), []).append(mutation)
    order = sorted(places)
    random.Random(seed).shuffle(order)
    return [random.Random(f"{seed} {place}").choice(places[place]) for place in order[:count]], len(places)


def tried(mutation: Any, lines: dict[str, dict[int, list[str]]], project: Path) -> dict[str, Any]:
    """Break one place and run the tests that reach it."""
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import TestOutcome

    file = str(mutation.module_path)
    here = lines.get(file, {})
    # what a module says when it is imported is reached by every test of the module
    tests = here.get(mutation.start_pos[0]) or sorted(
        {test for tests in here.values() for test in tests}, key=lambda test: (SECONDS.get(test, 0.0), test)
    )
    chosen, total = [], 0.0
    for test in tests:
        total += SECONDS.get(test, 0.0)
        if chosen and total > LONGEST:
            break
        chosen.append(test)
    about = {"file": file, "line": mutation.start_pos[0], "operator": mutation.operator_name, "tests": len(chosen)}
    if not chosen:
        return about | {"outcome": "survived", "diff": "no test reaches it"}
    listed = project / "chosen.txt"
    listed.write_text("\n".join(chosen))
    command = [sys.executable, "-m", "pytest", *WHOLE, "-q", "-x", "-p", "no:cacheprovider", f"@{listed}"]
    result = mutate_and_test([mutation], shlex.join(command), timeout=3 * min(total, LONGEST) + 120)
    killed = result.test_outcome != TestOutcome.SURVIVED
    last = (result.output or "").strip().splitlines()[-1:]
    return about | {"outcome": "killed" if killed else "survived", "diff": result.diff, "said": last}


def main() -> int:
    from scipy.stats import binomtest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--count", type=int, default=100, help="mutants a group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--which", default="fast", help="the tests that try to notice, by marker")
    parser.add_argument("--tests", nargs="+", default=["mechunlearn", "tests"], help="where these tests are")
    parser.add_argument("-o", "--out", type=Path, default=Path(tempfile.gettempdir()) / "mutations")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        project = copied(Path(made) / "main")
        os.environ |= environment()
        os.chdir(project)
        lines = reached(project, asked.out, asked.which, asked.tests)
        for group in asked.groups:
            mutants, places = drawn(project, GROUPS[group], asked.count, asked.seed)
            kept = asked.out / f"{group}-{asked.seed}.jsonl"
            done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
            for mutation in mutants[len(done) :]:
                done.append(tried(mutation, lines, project))
                with kept.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
            killed = sum(result["outcome"] == "killed" for result in done)
            low, high = binomtest(killed, len(done)).proportion_ci(0.95)
            for result in done:
                if result["outcome"] == "survived":
                    print(f"survived: {result['file']}:{result['line']} ({result['operator']})\n{result['diff']}")
            print(
                f"{group}: {killed} of {len(done)} killed ({killed / len(done):.2f} [{low:.2f}, {high:.2f}]), {places} places"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

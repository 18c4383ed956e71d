"""Over two thousand bad calls: each is refused in one line, at once, and leaves nothing behind.

`python -m tests.hostile.test_bad_calls [COMMAND ... | arguments]` makes all of them and prints those that are not.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.hostile.commands import bad_calls, call, prepare, warm
from tests.hostile.functions import bad_calls as bad_functions
from tests.hostile.functions import outcome, world


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    warm()
    (folder := tmp_path_factory.mktemp("hostile") / "given").mkdir()
    return prepare(folder)


def checked(given, calls):
    """What is wrong with how they ended."""
    found = []
    for command, wrong, arguments in calls:
        ended = call(command, arguments, given)
        last = (ended.err.strip() or ended.out.strip()).splitlines()[-1:]
        if ended.fault:
            found.append(f"{command}: {wrong}: {ended.fault}: {last}")
        elif ended.err.startswith("mechunlearn:") and len(ended.err.strip().splitlines()) > 1:
            found.append(f"{command}: {wrong}: more than one line: {ended.err}")
    return found


def test_bad_commands_are_refused(given):
    """Every twenty-fourth of them; the slow test makes every eighth one, the module's own run all."""
    calls = list(bad_calls())
    assert len(calls) > 900
    assert checked(given, calls[::24]) == []


@pytest.mark.slow
def test_more_bad_commands_are_refused(given):
    assert checked(given, list(bad_calls())[1::8]) == []


def test_bad_arguments_are_refused():
    """Every method of `mu.localize`, `mu.edit` and `mu.attack`, as a user calls it: without the tests' type checker."""
    command = [sys.executable, "-m", "tests.hostile.test_bad_calls", "arguments"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=900)
    first = ran.stdout.splitlines()[:1]
    found = re.fullmatch(r"(\d+) bad arguments, 0 faults, \d+ s; the model is as it was", "".join(first))
    assert found, ran.stdout + ran.stderr
    assert int(found[1]) > 1200


def test_a_call_that_is_not_bad_is_accepted(given):
    """The campaign can fail: a good call is reported as accepted."""
    ended = call("localize", ["factworld", "factworld/sport", "-o", "OUT.mask.json", "--method", "random_units"], given)
    assert (ended.code, ended.fault, ended.left) == (0, "accepted", ("out.mask.json",))
    assert outcome(lambda: 1 / 0).startswith("ZeroDivisionError")


def main() -> None:
    torch.set_num_threads(1)
    warm()
    if sys.argv[1:] in ([], ["arguments"]):
        began, some = time.monotonic(), world()
        model = some.good["model"]
        before = model.fingerprint
        found = [(f"{method}: {wrong}", outcome(made)) for method, wrong, made in bad_functions(some)]
        faults = [f"{what}: {fault}" for what, fault in found if fault]
        kept = "as it was" if model.fingerprint == before else "another"
        took = time.monotonic() - began
        print(f"{len(found)} bad arguments, {len(faults)} faults, {took:.0f} s; the model is {kept}", *faults, sep="\n")
    if sys.argv[1:] == ["arguments"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        (place := Path(folder) / "given").mkdir()
        given, began = prepare(place), time.monotonic()
        wanted = [each for each in bad_calls() if not sys.argv[1:] or each[0] in sys.argv[1:]]
        faults = checked(given, wanted)
        print(f"{len(wanted)} bad commands, {len(faults)} faults, {time.monotonic() - began:.0f} s", *faults, sep="\n")


if __name__ == "__main__":
    main()

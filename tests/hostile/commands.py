"""Bad calls of every command, made from its own parameters: one value at a time is wrong."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = "99999999999999999999999"
WHOLE = ("-1", "abc", "1.5", "1e3", "", HUGE, "nan")
REAL = ("nan", "inf", "-inf", "abc", "", "1e999", "0x10", "1,5")
LISTED = ("abc", "1e-3,x", "nan", "inf", "-1", "1e-3;2e-3")
NAMED = ("zz", "", "all,zz", "../x", "None")
INTEGERS = (
    "seed",
    "forget",
    "steps",
    "rank",
    "prefixes",
    "texts",
    "port",
    "seeds",
    "validation",
    "cell_cpus",
    "size",
    "used",
)
INTEGERS += ("spliced_steps", "examples", "layers", "rows", "epochs", "limit", "shots", "batch_size")
POSITIVE = (
    "forget",
    "steps",
    "rank",
    "seeds",
    "size",
    "used",
    "cell_cpus",
    "texts",
    "examples",
    "rows",
    "epochs",
    "limit",
    "batch_size",
)  # of which 0 is nonsense too
REALS = ("lr", "stop_at", "covariance_weight", "overshoot", "retain_weight", "threshold", "scale", "weights")
REALS += ("cell_gpus", "cell_memory")
NEGATIVE = ("lr", "stop_at", "covariance_weight", "retain_weight", "weights")  # of which -1 is nonsense too
LISTS = ("lrs", "forget_weights")
NAMES = ("method", "objective", "position", "localizers", "objectives", "budgets", "attacks", "kind", "how", "target")
NAMES += ("methods", "split", "ray", "tasks")
DEVICES = ("zz", "cuda", "meta", "cuda:-1", "", "cpu:cpu", "mps")
DTYPES = ("zz", "int8", "", "torch.float32", "float8_e4m3fn", "complex64")


def prepare(folder: Path) -> Path:
    """Write good and bad files of every kind.

    Args:
        folder: A new folder.
    """
    import torch

    from mechunlearn import ComponentMask, edit, load_facts, load_model
    from mechunlearn.benchmarks.compare import needed_splits
    from mechunlearn.core.files import data_folder

    model = load_model("factworld")
    mask = ComponentMask.of(["L1.mlp.out"], model.signature)
    mask.save(folder / "good.mask.json")
    forget, retain = load_facts("factworld/sport").prompts(model).split(forget=8, retain=16)
    edit.masked_gradient(model, mask, forget, retain, steps=1).save(folder / "good.edit.safetensors")
    shutil.copytree(data_folder() / "factworld-codebook", folder / "codebook")
    (folder / "good.txt").write_text("Anna plays golf.\n\nBen plays chess.\n")
    (folder / "good.csv").write_text(
        "subject,prompt,answer\nAnna,{} plays,golf\nBen,{} plays,chess\nCarl,{} plays,golf\n"
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "data.jsonl").write_text(
        '{"question": "Anna plays", "choices": ["golf", "chess"], "label": 0}\n'
    )
    (folder / "tasks" / "mine.yaml").write_text(TASK.format(folder=folder / "tasks"))
    for name, text in BAD_FILES.items():
        (folder / name).write_bytes(text)
    (folder / "tofu").mkdir()
    row = {"question": "Where was Ann born?", "answer": "In Oslo.", "perturbed_answer": ["In Rome."]}
    for split in ("full", *needed_splits("forget01")):
        (folder / "tofu" / f"{split}.json").write_text(json.dumps([row]))
    (folder / "empty_folder").mkdir()
    (folder / "full_folder").mkdir()
    (folder / "full_folder" / "mine.txt").write_text("mine")
    (folder / "cut.mask.json").write_bytes((folder / "good.mask.json").read_bytes()[:-40])
    (folder / "cut.edit.safetensors").write_bytes((folder / "good.edit.safetensors").read_bytes()[:-40])
    (folder / "broken_model").mkdir()
    (folder / "broken_model" / "config.json").write_text("{")
    (folder / "empty_model").mkdir()
    (folder / "empty_model" / "config.json").write_text('{"model_type": "llama"}')
    torch.save({}, folder / "pickled.pt")
    return folder


TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/data.jsonl"}}, cache_dir: "{folder}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
"""
BAD_FILES = {
    "empty.csv": b"",
    "empty.json": b"",
    "empty.safetensors": b"",
    "empty.txt": b"",
    "blank.txt": b"\n \n\n",
    "noise.csv": bytes(range(256)) * 4,
    "noise.json": bytes(range(256)),
    "noise.safetensors": bytes(range(256)) * 4,
    "noise.parquet": b"PAR1" + bytes(range(256)),
    "noise.txt": b"\xff\xfe\x00bad",
    "columns.csv": b"a,b\n1,2\n",
    "head.csv": b"subject,prompt,answer\n",
    "ragged.csv": b'subject,prompt,answer\nA,{} is,b\nC,"{} is,d\n',
    "list.json": b"[1, 2, 3]",
    "null.json": b"null",
    "deep.json": b"[" * 100_000 + b"]" * 100_000,
    "other.json": b'{"kind": "mask"}',
    "number.json": b'[{"subject": 5, "prompt": {"a": 1}, "answer": []}]',
    "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
}
MODELS = (
    "",
    "/nothere",
    "no/such/model",
    "good.txt",
    "empty_folder",
    "full_folder",
    "broken_model",
    "empty_model",
    "pickled.pt",
    "a b",
)
FACTS = (
    "",
    "factworld/zz",
    "countries/zz",
    "nothere.csv",
    "nothere.CSV",
    "empty_folder",
    "good.txt",
    *(name for name in BAD_FILES if name.endswith((".csv", ".json", ".parquet")) and name != "number.json"),
)
ARTEFACTS = (
    "",
    "nothere",
    "empty_folder",
    "good.txt",
    "cut.mask.json",
    "cut.edit.safetensors",
    "pickled.pt",
    *(name for name in BAD_FILES if name.endswith((".json", ".safetensors"))),
)
TEXTS = (
    "",
    "nothere.txt",
    "empty_folder",
    "empty.txt",
    "blank.txt",
    "noise.txt",
    "columns.csv",
    "list.json",
    "pickled.pt",
)
FILES = ("", "empty_folder", "/proc/nope/x.json", "/dev/null/x.json", "x.exe", "/", "good.txt/x.json")
FOLDERS = ("", "full_folder", "good.txt", ".", "/proc/nope/x", "/dev/null/x", "good.txt/x")

WRITES_FOLDERS = ("run", "demo", "compare", "world build", "world twin", "world dictionaries")
WRITES_FOLDERS += ("benchmark tofu", "benchmark tofu-train", "benchmark lm-eval")
BASES: dict[str, list[str]] = {
    "doctor": ["factworld"],
    "run": ["factworld", "factworld/sport", "-o", "OUT"],
    "demo": ["-o", "OUT"],
    "localize": ["factworld", "factworld/sport", "-o", "OUT.mask.json"],
    "edit": ["factworld", "factworld/sport", "good.mask.json", "-o", "OUT.edit.safetensors"],
    "wash": ["factworld", "factworld/sport", "good.mask.json", "-o", "OUT.edit.safetensors"],
    "evaluate": ["factworld", "factworld/sport", "good.edit.safetensors", "-o", "OUT.html"],
    "explore": ["factworld", "factworld/sport", "--no-browser"],
    "compare": ["factworld", "factworld/sport", "-o", "OUT"],
    "benchmark tofu": ["factworld", "--data", "tofu", "--split", "forget01", "-o", "OUT"],
    "benchmark tofu-train": ["factworld", "--data", "tofu", "-o", "OUT"],
    "benchmark lm-eval": [
        "factworld",
        "--edit",
        "good.edit.safetensors",
        "--tasks",
        "mine",
        "--include",
        "tasks",
        "-o",
        "OUT",
    ],
    "world build": ["-o", "OUT"],
    "world twin": ["-o", "OUT", "--layers", "2"],
    "world dictionaries": ["-o", "OUT"],
    "reproduce loku": ["-o", "OUT"],
    "reproduce law": ["-o", "OUT"],
    "reproduce codeunlearn": ["-o", "OUT"],
    "reproduce mechanistic-unlearning": ["-o", "OUT"],
    "reproduce summary": ["FOLDER"],
    "dictionary train": ["factworld", "blocks.2.hook_resid_post", "good.txt", "-o", "OUT"],
    "dictionary explore": ["factworld", "codebook", "good.txt", "-o", "OUT.html"],
    "dictionary delete": ["factworld", "codebook", "good.txt", "--swap", "golf,chess", "-o", "OUT.edit.safetensors"],
}


def wrong_values(name: str, command: str) -> tuple[str, ...]:
    """Values that make no sense for a parameter.

    Args:
        name: The parameter's name.
        command: Its command.
    """
    if name in INTEGERS:
        return tuple(value for value in WHOLE if (name, value) != ("texts", HUGE)) + ("0",) * (name in POSITIVE)
    if name in REALS:
        return REAL + ("-1",) * (name in NEGATIVE)
    for kind, values in (("device", DEVICES), ("dtype", DTYPES), ("model", MODELS), ("facts", FACTS)):
        if name == kind:
            return values
    if name in LISTS:
        return LISTED
    if name in NAMES:
        return tuple(value for value in NAMED if (name, value) != ("attacks", ""))  # the default: none
    if name in ("mask", "edit", "dictionary"):
        return ARTEFACTS
    if name in ("text", "topic", "against"):
        return TEXTS
    if command == "world dictionaries" and name == "output":
        return "good.txt", "/proc/nope/x", "/dev/null/x", "good.txt/x"  # it makes two folders in this one
    if name in ("output", "scores"):
        return FOLDERS if command in WRITES_FOLDERS or command.startswith("reproduce") else FILES
    if name in ("export", "adapter"):
        return FOLDERS
    return {"hook": ("", "zz", "blocks.99.hook_resid_post", "blocks.-1.hook_resid_post"), "units": ("abc", "-1", HUGE), "folder": ARTEFACTS,
            "base": MODELS, "retain": MODELS, "data": ("", "nothere", "no/such", "empty_folder", "good.txt", "empty.json"), "words": ("",), "swap": ("", "zz"), "include": ("", "nothere", "good.txt"), "host": ("", "not a host", "256.1.1.1"), "page": FILES}.get(name, ())  # fmt: skip


def bad_calls() -> Iterator[tuple[str, str, list[str]]]:
    """Every command with one wrong value, as (command, what is wrong, arguments); also unknown options and no arguments."""
    import typer

    from mechunlearn.cli.main import app

    def walk(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, each in command.commands.items():
                yield from walk(each, [*path, name])
        else:
            yield " ".join(path), command

    for name, command in walk(typer.main.get_command(app), []):
        base = BASES[name]
        yield name, "an unknown option", [*base, "--zz", "1"]
        yield name, "one argument too many", [*base, "zz"]
        arguments = [each for each in command.params if not each.opts[0].startswith("-")]
        for param in command.params:
            if not isinstance(param.default, bool):
                for value in wrong_values(param.name, name):
                    given = list(base)
                    if param in arguments:
                        given[arguments.index(param)] = value
                    elif "-o" in base and param.name == "output":
                        given[base.index("-o") + 1] = value
                    else:
                        given += [param.opts[0], value]
                    yield name, f"{param.name} = {value!r}", given


@dataclass(frozen=True)
class Ended:
    """How a call ended.

    Args:
        code: Its exit code; negative for a signal.
        out: What it printed.
        err: What it printed as errors.
        seconds: How long it took.
        left: What it left in its folder that was not there.
    """

    code: int
    out: str
    err: str
    seconds: float
    left: tuple[str, ...]

    @property
    def fault(self) -> str:
        """What is wrong about it; empty if it was refused in one line and left nothing."""
        if "Traceback" in self.out + self.err:
            return "traceback"
        if self.code == -14:
            return f"still working after {self.seconds:.0f} s"
        if self.code == 0:
            return "accepted"
        if self.code != 2:
            return f"exit code {self.code}"
        if not self.err.strip():
            return "no message"
        return f"left {', '.join(self.left)}" if self.left else ""


def call(command: str, arguments: list[str], given: Path, limit: int = 90) -> Ended:
    """Run a command in a process of its own, made of this one, so that nothing is imported again.

    Args:
        command: The command.
        arguments: Its arguments; names of prepared files stand for their paths.
        given: The folder of the prepared files.
        limit: Seconds after which it is killed.
    """
    work = Path(tempfile.mkdtemp(dir=given.parent))
    paths = {path.name: str(path) for path in given.iterdir()}
    paths |= {"FOLDER": str(work)}
    told = [
        paths.get(each, each.replace("OUT", str(work / "out")) if each.startswith("OUT") else each)
        for each in arguments
    ]
    told = [str(given / each) if each.startswith("good.txt/") else each for each in told]
    outputs = [work.parent / f"{work.name}.{kind}" for kind in ("out", "err")]
    sys.stdout.flush()
    began = time.monotonic()
    child = os.fork()
    if not child:
        _become(["mechunlearn", *command.split(), *told], work, outputs, limit)
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    code = os.waitstatus_to_exitcode(status)
    texts = [path.read_text(errors="replace") for path in outputs]
    left = tuple(sorted(str(path.relative_to(work)) for path in work.rglob("*")))
    shutil.rmtree(work, ignore_errors=True)
    return Ended(code, *texts, time.monotonic() - began, left)


def _become(argv: list[str], work: Path, outputs: list[Path], limit: int) -> None:
    code = 70
    try:
        os.setsid()
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(work)
        sys.argv = argv
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit)
        from mechunlearn.cli.main import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:  # a traceback is what is looked for
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm() -> None:
    """Import what commands import, once, so that each call is a fork."""
    import torch

    torch.set_num_threads(1)
    import mechunlearn.cli.main
    import mechunlearn.evaluation.compare
    import mechunlearn.evaluation.workflow
    import mechunlearn.explore
    import mechunlearn.features.dictionaries  # noqa: F401

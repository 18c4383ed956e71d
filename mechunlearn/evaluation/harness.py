"""Benchmarks of EleutherAI's lm-evaluation-harness, before and after an edit: what else did the edit cost?"""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import check_edit
from mechunlearn.core.files import whole_file
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.core.tables import Table
from mechunlearn.core.tensors import one_line
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.robustness import edit_digest
from mechunlearn.metrics.stats import mean_interval, over_worlds, share_interval
from mechunlearn.model.hooked import HookedModel

RESAMPLES = 1000
STATES = ("before", "after")


def benchmark(
    model: HookedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    edit: Edit | None = None,
    folder: str | Path | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Run tasks of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a model, edited or not.

    The model, its tokenizer and the state of random numbers are left as they were. Data sets of the harness's own
    tasks are downloaded; those of tasks in a folder may be local files. It asks thousands of questions: use
    `evaluate` for what an edit did to its own facts.

    Args:
        model: The unedited model.
        tasks: Names that the harness knows (`lm-eval ls tasks`), or that YAML files in `folder` define.
        limit: The largest number of documents a task; None takes all.
        edit: The edit to apply for the run.
        folder: A folder with the YAML files of tasks of your own.
        shots: The number of examples in front of a document; None takes as many as the task says.
        batch_size: The number of requests a forward pass.
        seed: Draws the examples.

    Returns:
        One row a task and metric: `task` (groups have rows too), `metric` (with its filter, if it has one), `value`
        with its 95 % interval `low` to `high` (exact for a share of documents), `stderr` (the harness's standard error;
        NaN where it gives none) and `n` documents. `attrs["card"]` is the run card.

    Raises:
        MechunlearnError: If lm-eval is not installed, no task is given, one is unknown or its data cannot be loaded, or the
            model has no tokenizer.

    >>> from mechunlearn import load_model
    >>> benchmark(load_model("factworld"), [])
    Traceback (most recent call last):
    ...
    mechunlearn.errors.MechunlearnError: No tasks are given. Expected names of tasks, for example ['arc_easy'].
    """
    known = _known(model, tasks, folder)
    watch = Stopwatch()
    mask, settings = edit.card.mask if edit is not None else "", {"tasks": list(tasks), "limit": limit, "shots": shots}
    device = str(model.device)
    card = RunCard("benchmark", model=model.fingerprint, seed=seed, settings=settings, mask=mask, device=device)
    rows = _measured(model, edit, tasks, known, limit=limit, shots=shots, batch_size=batch_size, seed=seed)
    frame = pd.DataFrame(rows, columns=["task", "metric", "value", "low", "high", "stderr", "n"])
    frame.attrs["card"] = asdict(watch.stamp(card))
    return frame


def before_and_after(
    model: HookedModel,
    edit: Edit,
    tasks: Sequence[str],
    *,
    folder: str | Path,
    include: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Run tasks of the lm-evaluation-harness on a model before and after an edit, in a folder that a killed run resumes.

    Each task and model is kept when it is done; called again with more tasks, the folder gets these too. It writes
    `results.csv` and `results.json`, which has the settings and the edit's run card as well. Tasks are as in `benchmark`.

    Args:
        model: The unedited model.
        edit: The edit.
        tasks: Names of tasks, groups included.
        folder: Where results go: new, empty, or that of a stopped run.
        include: A folder with the YAML files of tasks of your own. Their data files are taken to stay the same.
        limit: The largest number of documents a task; None takes all.
        shots: The number of examples in front of a document; None takes as many as the task says.
        batch_size: The number of requests a forward pass.
        seed: Draws the examples.

    Returns:
        One row a task and metric: `task`, `metric`, `n` documents, `before` and `after` with their 95 % intervals
        (`before_low`, ...), and `change` with its own. Intervals are over documents: exact for a share of them; of the
        change, the documents are paired. Where the harness gives no number a document (groups, perplexities), an
        interval is its value and 1.96 of its standard errors, and the change has none.

    Raises:
        MechunlearnError: As `benchmark`, and if the folder holds something else.

    >>> from mechunlearn import ComponentMask, edit
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of([toy.neuron(0)], toy.model.signature)
    >>> gone = edit.masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1]), steps=1, lr=0.1)
    >>> before_and_after(toy.model, gone, ["arc_easy"], folder="results")
    Traceback (most recent call last):
    ...
    mechunlearn.errors.MechunlearnError: This model has no tokenizer, and benchmarks are text. Load it with its tokenizer.
    """
    known = _known(model, tasks, include)
    check_edit(edit)
    about: dict[str, Any] = {"benchmark": "lm-eval", "model": repr(model), "weights": model.fingerprint}
    files = sorted(Path(include).rglob("*.yaml")) if include is not None else []
    about |= {"edit": edit_digest(model, edit)}
    about |= {"include": digest(*(file.read_bytes() for file in files)), "limit": limit, "shots": shots, "seed": seed}
    about |= {"versions": RunCard("lm-eval").versions | {"lm-eval": version("lm-eval")}}
    grid = Grid.open_alone(folder, about)
    measured = partial(_measured, model, limit=limit, shots=shots, batch_size=batch_size, seed=seed)

    def rows(task: str, state: str) -> dict[str, Any]:
        return {"rows": measured(edit if state == "after" else None, [task], known)}

    found: list[dict[str, Any]] = []
    for task in dict.fromkeys(tasks):
        kept = [grid.cell({"task": task, "state": state}, partial(rows, task, state))["rows"] for state in STATES]
        found += [_beside(*pair) for pair in zip(*kept, strict=True)]
    frame = Table(found)
    results = frame.astype(object).where(frame.notna(), None).to_dict("records")
    told = {**about, "card": asdict(edit.card), "results": results}
    texts = {"results.csv": frame.to_csv(index=False), "results.json": json.dumps(told, indent=2) + "\n"}
    for name, written in texts.items():
        with whole_file(Path(folder) / name) as beside:
            beside.write_text(written, encoding="utf-8")
    return frame


def _known(model: HookedModel, tasks: Sequence[str], folder: str | Path | None) -> Any:
    """The harness's task manager, if it knows all tasks and there is something to ask."""
    if not tasks or isinstance(tasks, str):
        given = f"'{tasks}' is one name, not several" if tasks else "No tasks are given"
        raise MechunlearnError(f"{given}. Expected names of tasks, for example ['arc_easy'].")
    if model.tokenizer is None:
        raise MechunlearnError("This model has no tokenizer, and benchmarks are text. Load it with its tokenizer.")
    if folder is not None and not Path(folder).is_dir():
        raise MechunlearnError(f"There is no folder '{folder}'. Expected one with the YAML files of tasks.")
    try:
        import lm_eval.tasks
    except ImportError:
        raise MechunlearnError(
            'Benchmarks need lm-eval, which is not installed. Run: pip install "mechunlearn[benchmarks]"'
        ) from None
    path = str(folder) if folder is not None else None
    known = lm_eval.tasks.TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and not set(tasks) <= set(known.all_subtasks):  # its own tasks are many: seconds to list
        known = lm_eval.tasks.TaskManager(include_path=path)
    if missing := [task for task in tasks if not known.match_tasks([task])]:
        raise MechunlearnError(
            f"lm-eval knows no task {', '.join(missing)}. Expected names that `lm-eval ls tasks` prints, or that a "
            f"YAML file in {'the folder' if folder is None else folder} defines with `task:`."
        )
    known.load = partial(_loaded, known.load)
    return known


def _loaded(load: Any, tasks: Any) -> Any:
    """The tasks with their data; whatever keeps them from being loaded is one line."""
    try:
        return load(tasks)
    except Exception as error:  # of lm-eval, datasets, the hub, or what these ask with
        raise MechunlearnError(
            f"Could not load the data of {', '.join(map(str, tasks))}: {one_line(error).rstrip('.')}. Expected data that "
            "can be reached, or are in the cache of `datasets` already, or tasks of your own with local files."
        ) from None


def _measured(
    model: HookedModel,
    edit: Edit | None,
    tasks: Sequence[str],
    known: Any,
    *,
    limit: int | None,
    shots: int | None,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Every figure of the harness, and its value of each document where it has one."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with edit.applied(model) if edit is not None else nullcontext(), _same_random_numbers(), _enough(tasks, shots):
        found: Any = lm_eval.simple_evaluate(
            HFLM(pretrained=model.hf, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=True,
            task_manager=known,
            **seeds,
        )
    return list(_rows(found))


@contextmanager
def _enough(tasks: Sequence[str], shots: int | None) -> Iterator[None]:
    """Say in one line that a task has too few documents to draw the examples from."""
    try:
        yield
    except ValueError as error:
        if "Sample larger than population" not in str(error):
            raise
        raise MechunlearnError(
            f"{', '.join(tasks)}: there are fewer documents to take examples from than the {shots} that were asked for. "
            "Expected fewer shots."
        ) from None


def _beside(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """One row of both models, with the change over the documents, paired."""
    row = {name: before[name] for name in ("task", "metric", "n")}
    for state, found in zip(STATES, (before, after)):
        row |= {state: found["value"], f"{state}_low": found["low"], f"{state}_high": found["high"]}
    low = high = float("nan")
    was, now = (np.array(found["values"]) for found in (before, after))
    if len(was) and len(was) == len(now):
        low, high = _change(was, now)
    return row | {"change": after["value"] - before["value"], "change_low": low, "change_high": high}


def _change(was: NDArray[Any], now: NDArray[Any]) -> tuple[float, float]:
    """The interval of a mean change: of shares by the exact ones of what was gained and of what was lost, else Student's t."""
    if np.isin([was, now], (0.0, 1.0)).all():
        gained, lost = (share_interval(int((step > 0).sum()), len(was), 0.975) for step in (now - was, was - now))
        return gained[0] - lost[1], gained[1] - lost[0]
    estimate = over_worlds([(now - was).tolist()])
    return estimate.low, estimate.high


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The harness writes `{task: {"acc,none": .., "acc_stderr,none": .., "alias": .., ..}}`: metric and filter."""
    for task, values in found["results"].items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            given = values.get(f"{name}_stderr,{kind}")
            stderr = float(given) if isinstance(given, float | int) else float("nan")
            each = _by_document(found["samples"].get(task, ()), name, kind, float(value))
            ends = mean_interval(each) if each else (value - 1.96 * stderr, value + 1.96 * stderr)
            yield {
                "task": task,
                "metric": name if kind == "none" else f"{name}, {kind}",
                "value": float(value),
                "low": float(ends[0]),
                "high": float(ends[1]),
                "stderr": stderr,
                "n": found["n-samples"].get(task, {}).get("effective", values.get("sample_len")),
                "values": each,
            }


def _by_document(samples: Sequence[Mapping[str, Any]], name: str, kind: str, value: float) -> list[float]:
    """A metric of each document, if it is a number whose mean is the metric of the task."""
    each = [sample[name] for sample in samples if sample.get("filter") == kind and name in sample]
    if not each or not all(isinstance(one, bool | int | float | np.number) for one in each):
        return []
    return [float(one) for one in each] if abs(float(np.mean(each)) - value) < 1e-9 else []


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The harness seeds every generator there is; after the block they are where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

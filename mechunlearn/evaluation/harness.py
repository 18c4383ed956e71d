"""Benchmarks of EleutherAI's lm-evaluation-harness, before and after an edit: what else did the edit cost?"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import HookedModel

RESAMPLES = 1000


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
        One row a task and metric: `task` (groups have rows too), `metric` (with its filter, if it has one), `value`,
        `stderr` (the harness's standard error; NaN where it gives none) and `n` documents. `attrs["card"]` is the run
        card.

    Raises:
        MechunlearnError: If lm-eval is not installed, no task is given or one is unknown, or the model has no
            tokenizer.

    >>> from mechunlearn import load_model
    >>> benchmark(load_model("factworld"), [])
    Traceback (most recent call last):
    ...
    mechunlearn.errors.MechunlearnError: No tasks are given. Expected names of tasks, for example ['arc_easy'].
    """
    if not tasks or isinstance(tasks, str):
        given = f"'{tasks}' is one name, not several" if tasks else "No tasks are given"
        raise MechunlearnError(f"{given}. Expected names of tasks, for example ['arc_easy'].")
    if model.tokenizer is None:
        raise MechunlearnError("This model has no tokenizer, and benchmarks are text. Load it with its tokenizer.")
    if folder is not None and not Path(folder).is_dir():
        raise MechunlearnError(f"There is no folder '{folder}'. Expected one with the YAML files of tasks.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MechunlearnError(
            'Benchmarks need lm-eval, which is not installed. Run: pip install "mechunlearn[benchmarks]"'
        ) from None
    watch = Stopwatch()
    path = str(folder) if folder is not None else None
    known = TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and not set(tasks) <= set(known.all_subtasks):  # its own tasks are many: seconds to list
        known = TaskManager(include_path=path)
    if missing := [task for task in tasks if not known.match_tasks([task])]:
        raise MechunlearnError(
            f"lm-eval knows no task {', '.join(missing)}. Expected names that `lm-eval ls tasks` prints, or that a "
            "YAML "
            f"file in {'the folder' if folder is None else folder} defines with `task:`."
        )
    mask, settings = edit.card.mask if edit is not None else "", {"tasks": list(tasks), "limit": limit, "shots": shots}
    device = str(model.device)
    card = RunCard("benchmark", model=model.fingerprint, seed=seed, settings=settings, mask=mask, device=device)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with edit.applied(model) if edit is not None else nullcontext(), _same_random_numbers():
        found: Any = lm_eval.simple_evaluate(
            HFLM(pretrained=model.hf, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            task_manager=known,
            **seeds,
        )
    frame = pd.DataFrame(_rows(found), columns=["task", "metric", "value", "stderr", "n"])
    frame.attrs["card"] = asdict(watch.stamp(card))
    return frame


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The harness writes `{task: {"acc,none": .., "acc_stderr,none": .., "alias": .., ..}}`: metric and filter."""
    for task, values in found["results"].items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            yield {
                "task": task,
                "metric": name if kind == "none" else f"{name}, {kind}",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, float | int) else float("nan"),
                "n": found["n-samples"].get(task, {}).get("effective", values.get("sample_len")),
            }


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

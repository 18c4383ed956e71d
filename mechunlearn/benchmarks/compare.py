"""Methods of unlearning side by side on TOFU, in a folder that a killed run resumes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.benchmarks import tofu
from mechunlearn.benchmarks.asking import as_prompts, how_asked
from mechunlearn.benchmarks.leaderboard import FULL, RETAIN, Leaderboard, Row
from mechunlearn.benchmarks.methods import LR, STEPS, Editor, Method, check_methods
from mechunlearn.benchmarks.scores import Scores
from mechunlearn.core.grid import Grid
from mechunlearn.core.progress import track
from mechunlearn.core.runcard import RunCard, digest
from mechunlearn.core.spread import Ray, spreading
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

MOST_SEEDS = 100
RETAINED = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


@steady()
def compare_methods(
    model: HookedModel,
    data: tofu.Tofu,
    methods: Sequence[str | Editor],
    *,
    folder: str | Path,
    forget: str = "forget10",
    retain_model: HookedModel | None = None,
    seeds: int = 1,
    lr: float = LR,
    steps: int = STEPS,
    rows: int | None = 300,
    tokens: int = 200,
    batch_size: int = 16,
    ray: Ray | None = None,
    progress: bool | None = None,
) -> Leaderboard:
    """Edit a model that was finetuned on TOFU by each method and seed, and measure it with `tofu.evaluate`.

    A run that was stopped or killed goes on where it was when it is called again: each finished cell is kept in the
    folder and made once. Methods, seeds and a retain model can be added later. A method that fails is a row with its
    reason, and the next call tries it again.

    Args:
        model: The full model: finetuned on `full` (see docs/benchmarks.md). An untrained one has nothing to forget.
        data: What `tofu.load` returned, with the splits of `needed_splits(forget)`.
        methods: Names such as "masked:random_units:0.05+npo" (see `methods.method_of`), or functions
            `(model, forget, retain) -> Edit` of yours, which may take `seed`. They get the questions as `Prompts`.
        folder: Keeps the cells, and in the end the tables (see `Leaderboard.save`).
        forget: forget01, forget05 or forget10.
        retain_model: A model that was finetuned on the retain split alone: the gold. None leaves forget quality out.
        seeds: Each method is run with the seeds 0 to `seeds` - 1; one that takes none is run once.
        lr: Largest learning rate of all methods by name: AdamW, as published. Fewer weights need a larger one.
        steps: Optimiser steps of 64 questions, at most.
        rows: How many rows of each split are measured; 300 as in TOFU's own evaluation. All are edited.
        tokens: The most tokens that the model may write for ROUGE.
        batch_size: Rows at a time.
        ray: The Ray cluster that runs the cells; the folder must be one that all its nodes see. None runs them here.
        progress: Whether to show bars; None shows them where somebody can see them.

    Raises:
        MechunlearnError: For methods and numbers out of range, data that lack a split, a folder that holds other files
            or another grid, if the full or the retain model cannot be measured, and for a cluster that cannot be used.

    >>> from tempfile import TemporaryDirectory
    >>> from mechunlearn import load_model
    >>> row = tofu.TofuRow("Where was Ann born?", "In Oslo.", "In Oslo.", ("In Rome.",))
    >>> data = {split: [row] * 2 for split in needed_splits("forget01")}
    >>> with TemporaryDirectory() as folder:
    ...     made = compare_methods(load_model("factworld"), data, ["masked:random_units:0.01+npo"], folder=folder,
    ...                            forget="forget01", lr=1e-3, steps=1, tokens=2)
    >>> [row.method for row in made.rows]
    ['full model', 'masked:random_units:0.01+npo']
    """
    wanted = needed_splits(forget)
    if missing := [split for split in wanted if not data.get(split)]:
        raise MechunlearnError(f"The data lack {', '.join(missing)}. Load them too: tofu.load(source, splits=[...]).")
    check_numbers(seeds, rows, lr, steps)
    made = check_methods(methods, data[forget], lr=lr, steps=steps)
    about: dict[str, Any] = {"benchmark": "tofu", "model": repr(model), "weights": model.fingerprint}
    about |= {"data": digest(repr([(split, tuple(data[split])) for split in wanted])), "forget": forget}
    about |= {"lr": lr, "steps": steps, "rows": rows, "tokens": tokens, "versions": RunCard("tofu").versions}
    evaluate = partial(
        tofu.evaluate, data=data, forget=forget, tokens=tokens, rows=rows, batch_size=batch_size, progress=progress
    )
    sets = [as_prompts(model, data[split], split) for split in (forget, RETAINED[forget])]
    models = {FULL: model} | ({RETAIN: retain_model} if retain_model is not None else {})
    cells = [_Cell(name, 0, {"weights": each.fingerprint} if name == RETAIN else {}) for name, each in models.items()]
    for each, seed in product(made, range(seeds)):
        if each.seeded or not seed:
            cells.append(_Cell(each.name, seed, {"code": each.code} if each.code else {}))
    with spreading(ray, folder) as spread:
        grid = Grid.open_alone(Path(folder), about)
        work = partial(_result, grid, models, {each.name: each for each in made}, sets, evaluate)
        done = spread(work, cells, partial(_failed, grid))
        results = list(track(done, "methods", total=len(cells), progress=progress))
    found = [(cell.method, cell.seed, result) for cell, result in zip(cells, results)]
    board = Leaderboard(tuple(_rows(found, forget)), about | {"asked": how_asked(model)})
    board.save(folder)
    return board


@dataclass(frozen=True)
class _Cell:
    """A model to measure, or a method with its seed, and what else tells it from others of that name."""

    method: str
    seed: int
    more: Mapping[str, Any]

    def description(self) -> dict[str, Any]:
        return {"method": self.method, "seed": self.seed, **self.more}


def _result(
    grid: Grid,
    models: Mapping[str, HookedModel],
    methods: Mapping[str, Method],
    sets: Sequence[Prompts],
    evaluate: Callable[[HookedModel], Scores],
    cell: _Cell,
) -> dict[str, Any]:
    """The result of a cell: out of the grid, or made now."""
    return grid.cell(cell.description(), partial(_measured, models, methods, sets, evaluate, cell))


def _measured(
    models: Mapping[str, HookedModel],
    methods: Mapping[str, Method],
    sets: Sequence[Prompts],
    evaluate: Callable[[HookedModel], Scores],
    cell: _Cell,
) -> dict[str, Any]:
    if cell.method in models:
        return _kept(evaluate(models[cell.method]))
    model = models[FULL]
    edit = methods[cell.method](model, sets[0], sets[1], cell.seed)
    if edit.card.stopped == "interrupted":
        raise KeyboardInterrupt
    with edit.applied(model):
        return _kept(evaluate(model)) | {"share": _share(edit, model)}


def _failed(grid: Grid, cell: _Cell, reason: str) -> dict[str, Any]:
    """One method of many, perhaps a user's own: the others go on. Without the models it is compared with, none do."""
    grid.fail(cell.description(), reason)
    if cell.method in (FULL, RETAIN):
        raise MechunlearnError(f"The {cell.method} cannot be measured: {reason}")
    return {"note": reason}


def needed_splits(forget: str) -> tuple[str, ...]:
    """Return the splits of TOFU that a comparison reads.

    Args:
        forget: The forget set.

    Raises:
        MechunlearnError: There is no such forget set.

    >>> needed_splits("forget01")[:3]
    ('forget01', 'retain99', 'forget01_perturbed')
    """
    if forget not in RETAINED:
        raise MechunlearnError(f"There is no forget set '{forget}'. Expected one of {', '.join(RETAINED)}.")
    return forget, RETAINED[forget], f"{forget}_perturbed", *tofu.UTILITY.values()


def check_numbers(seeds: int, rows: int | None, lr: float, steps: int) -> None:
    """Check the numbers of a comparison before any work is done.

    Args:
        seeds: The number of seeds.
        rows: Rows of each split.
        lr: Learning rate.
        steps: Optimiser steps.

    Raises:
        MechunlearnError: One is out of range.

    >>> check_numbers(0, 300, 1e-5, 50)
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: 0 seeds are out of range. Expected 1 to 100.
    """
    for what, number, most in (("seeds", seeds, MOST_SEEDS), ("rows", rows, 10**6), ("steps", steps, 10**6)):
        if number is not None and not 1 <= number <= most:
            raise MechunlearnError(f"{number} {what} are out of range. Expected 1 to {most}.")
    if not 0 < lr <= 1000:
        raise MechunlearnError(f"A learning rate of {lr:g} is out of range. Expected above 0 and up to 1000, as 1e-5.")


def _kept(scores: Scores) -> dict[str, Any]:
    """Scores as a cell keeps them."""
    values = {"/".join(at): each.tolist() for at, each in scores.values.items()}
    return {"values": values, "figures": {"/".join(at): each for at, each in scores.figures.items()}}


def _rows(found: Sequence[tuple[str, int, Mapping[str, Any]]], forget: str) -> list[Row]:
    """The cells as rows, with the forget quality of each beside the retain model."""
    ratio, rows, gold = (forget, tofu.RATIO), [], None
    read = [_scores(cell) for _, _, cell in found]
    for (method, _, _), scores in zip(found, read):
        if method == RETAIN and scores is not None:
            gold = scores.values[ratio]
    for (method, seed, cell), scores in zip(found, read):
        if scores is not None and gold is not None:
            quality = tofu.forget_quality(scores.values[ratio], gold), len(scores.values[ratio])
            scores = Scores("tofu", scores.values, {**scores.figures, (forget, "forget_quality"): quality})
        rows.append(Row(method, seed, scores, cell.get("share", float("nan")), cell.get("note", "")))
    return rows


def _scores(cell: Mapping[str, Any]) -> Scores | None:
    if "values" not in cell:
        return None
    values, figures = (
        {(name.partition("/")[0], name.partition("/")[2]): each for name, each in cell[part].items()}
        for part in ("values", "figures")
    )
    tensors = {at: torch.tensor(each, dtype=torch.float64) for at, each in values.items()}
    return Scores("tofu", tensors, {at: (each[0], each[1]) for at, each in figures.items()})


def _share(edit: Edit, model: HookedModel) -> float:
    """The share of the editable weights that an edit may change; NaN for one that is no weight edit."""
    if not isinstance(edit, WeightEdit):
        return float("nan")
    return edit.mask.weights(model) / ComponentMask.everything(model).weights(model)

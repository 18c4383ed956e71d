"""From what a method computes to a `Localization` or `Circuit` of this model, with a run card."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts import resampling
from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.arguments import check_arguments
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.core.steady import steady
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import name_of
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import KINDS
from mechunlearn.model.unwrap import evaluating
from mechunlearn.patching.corruption import check_prompts
from mechunlearn.patching.sweep import Effects

SAME = "no difference: clean and corrupt prompts are the same, so nothing can be found"
WHOLE = {"attn_out": "attn.o", "mlp_out": "mlp.out"}
NOT_SETTINGS = ("model", "prompts", "against", "dictionary", "names", "seed", "batch_size", "budget", "progress")
Function = TypeVar("Function", bound=Callable[..., Any])


def localizer(function: Function) -> Function:
    """Do for a localizer what all of them need: check what it is given, and write its run card.

    Facts become prompts, and prompts are checked before anything is computed. The card of what the function returns
    gets its name, model, data, seed, device, time and memory; `settings` are its other arguments, and what it set
    itself.

    Args:
        function: A function `(model, prompts, *, ...)` that returns a `Localization`, a `Circuit` or a table.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def located(*given: Any, **named: Any) -> Any:
        watch = Stopwatch()
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        bound.apply_defaults()
        model, prompts = bound.arguments["model"], bound.arguments["prompts"]
        if isinstance(prompts, FactDataset) and isinstance(model, HookedModel):
            bound.arguments["prompts"] = prompts = prompts.prompts(model)
        check_arguments(function, bound.arguments)
        if isinstance(prompts, Prompts) and isinstance(model, HookedModel):
            check_prompts(model, prompts, bound.arguments.get("batch_size", 1))
        with steady(), torch.enable_grad(), evaluating(model.hf) if isinstance(model, HookedModel) else nullcontext():
            found = function(*bound.args, **bound.kwargs)
        if not isinstance(found, Localization | Circuit):
            return found
        settings = {name: _plain(value) for name, value in bound.arguments.items() if name not in NOT_SETTINGS}
        card = replace(
            found.card,
            method=function.__name__,
            model=found.card.model or model.fingerprint,
            data=prompts.fingerprint if isinstance(prompts, Prompts) else "",
            seed=bound.arguments.get("seed", 0),
            settings={name: value for name, value in settings.items() if value is not ...} | found.card.settings,
            device=str(getattr(model, "device", "cpu")),
        )
        return replace(found, card=watch.stamp(card))

    return located  # type: ignore[return-value]


def _plain(value: Any) -> Any:
    """A setting as JSON holds it; `...` for what it cannot hold."""
    if value is None or isinstance(value, str | int | float):
        return value
    if callable(value):
        return name_of(value)
    plain = isinstance(value, Sequence) and all(isinstance(one, str | int | float) for one in value)
    return list(value) if plain else ...


def localization(
    model: HookedModel,
    scores: Mapping[str, Tensor],
    evidence: Mapping[str, Any] | None = None,
    note: str = "",
    by_role: Mapping[str, Tensor] | None = None,
    roles: tuple[str, ...] = (),
    by_fact: Mapping[str, Float[Tensor, "fact _unit"]] | None = None,
) -> Localization:
    """Make a localization of scores; a `localizer` writes its card.

    With scores by fact the note says how far halves of the facts agree (`resampling.halves`).

    Args:
        model: The model, which gives the weights per unit and all editable weights.
        scores: By site, one a unit.
        evidence: What the method found on the way.
        note: A sentence for the reader.
        by_role: `[role unit]` by site.
        roles: Names of the rows of `by_role`.
        by_fact: By site, the scores of each fact, or one column for a site whose units share them; left out of the
            result above 256 MiB.
    """
    weights, total = editable(model)
    found, facts = dict(evidence or {}), dict(by_fact or {})
    if facts:
        note = "; ".join(filter(None, (note, resampling.halves(torch.cat(list(facts.values()), 1)))))
    if not resampling.fits(1, sum(rows.numel() for rows in facts.values())):
        facts = {}
    return Localization(scores, model.signature, weights, total, RunCard(""), found, note, by_role or {}, roles, facts)


def circuit(
    model: HookedModel,
    scores: Float[Tensor, "writer reader"],
    chosen: Bool[Tensor, "writer reader"],
    prompts: Prompts,
    by_fact: Float[Tensor, "fact writer reader"] | None = None,
) -> Circuit:
    """Make a circuit of scores on edges; a `localizer` writes its card.

    Args:
        model: The model.
        scores: By edge.
        chosen: The edges that were scored.
        prompts: The facts; where clean and corrupt are the same, the note has it.
        by_fact: The scores of each fact, if there are any; the note then says how far halves of them agree.
    """
    weights, total = editable(model)
    parallel, note = model.layout.parallel, note_of(prompts)
    if by_fact is not None:
        note = "; ".join(filter(None, (note, resampling.halves(by_fact[:, chosen], "edges"))))
    return Circuit(scores, model.signature, parallel, weights, total, RunCard(""), chosen, note, by_fact)


def note_of(prompts: Prompts) -> str:
    """Say that nothing can be found where clean and corrupt prompts are the same; else nothing.

    Args:
        prompts: The facts.
    """
    return SAME if torch.equal(prompts.tokens, prompts.corrupt) else ""


def at_read(model: HookedModel, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give, for each fact, its row, the position where `logit_diff` is taken, and the tokens of answer and foil there.

    Args:
        model: The model, on whose device they are.
        prompts: The facts.
    """
    given = (torch.arange(len(prompts)), prompts.read, prompts.answer_at_read, prompts.foil_at_read)
    rows, read, answer, foil = (tensor.to(model.device) for tensor in given)
    return rows, read, answer, foil


def editable(model: HookedModel) -> tuple[dict[str, int], int]:
    """Count the weights of one unit of each kind, and all editable weights of the model.

    Args:
        model: The model.
    """
    unit_weights = {kind: model.unit_weights(kind) for kind in model.layout.kinds}
    units = {kind: model.signature.units(kind) or 0 for kind in unit_weights}
    return unit_weights, sum(unit_weights[kind] * units[kind] for kind in units) * model.signature.layers


def from_effects(model: HookedModel, found: Effects, evidence: Mapping[str, Any] | None = None) -> Localization:
    """Average effects over facts. A block's score goes to each of its neurons, a whole layer's to each of its units.

    Args:
        model: The model.
        found: What patching did.
        evidence: What else the method found.
    """
    scores: dict[str, Tensor] = {}
    by_role: dict[str, Tensor] = {}
    by_fact: dict[str, Tensor] = {}
    for site, change in found.by_site.items():
        layer, kind = site.split(".", 1)
        rows, facts = change.mean(-1), change[0].T.contiguous()
        units = model.signature.units(WHOLE.get(kind, kind))
        if kind in KINDS and units is not None:
            size = found.neurons if kind == "mlp.out" else 1
            rows, facts = (table.repeat_interleave(size, dim=1)[:, :units] for table in (rows, facts))
        if units is not None:
            scores[f"{layer}.{WHOLE.get(kind, kind)}"] = rows[0].expand(units)
            by_fact[f"{layer}.{WHOLE.get(kind, kind)}"] = facts
        if len(found.rows) > 1 or kind not in KINDS:
            by_role[site] = rows
    note = (
        f"{found.unchanged} facts have no corrupt partner that differs: they count as zero" if found.unchanged else ""
    )
    note = SAME if found.unchanged == len(found.clean) else note
    numbers = {"clean": float(found.clean.mean()), "corrupt": float(found.corrupt.mean()), **(evidence or {})}
    return localization(model, scores, numbers, note, by_role, found.rows if by_role else (), by_fact)

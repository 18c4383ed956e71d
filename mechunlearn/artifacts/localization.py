"""How much each unit matters: scores, budgets, masks of the largest. A localization knows no method."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts import resampling
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core import tensors
from mechunlearn.core.display import by_kind, card, unit_name
from mechunlearn.core.runcard import RunCard
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component, check_site
from mechunlearn.model.layout import Layout, Signature

ABOUT = {
    "signature": Signature,
    "card": RunCard,
    "unit_weights": dict[str, int],
    "total_weights": int,
    "evidence": dict[str, Any],
    "note": str,
    "roles": list[str],
}
"""What a file says of a localization besides its tensors."""


@dataclass(frozen=True, eq=False)
class Localization:
    """How much each unit matters, and how it was found.

    Attributes:
        scores: `{site: Float[unit]}`, any sign; |score| ranks the units.
        signature: The architecture.
        unit_weights: For every kind of the model the weights of one unit.
        total_weights: The number of editable weights (embeddings, norms and output biases excluded).
        card: How it was found.
        evidence: What a method found on the way (probe curves, windows), as JSON can hold it.
        note: A sentence for the reader, such as "no window found".
        by_role: `[role unit]` scores of activation sites (`L3.attn.o`, `L3.resid_post`, with one unit), if there are
            any.
        roles: The names of their rows: token roles or positions.
        by_fact: `[fact unit]` scores of each fact, of which `scores` are the mean, for methods that have them; `[fact
            1]` is taken for a site whose units share them. They are float32 and take 4 bytes x facts x units: 12 MB
            for 64 facts and 46,350 units. Methods leave them out where they would take more than 256 MiB.

    Raises:
        MechunlearnError: If scores are not finite, or do not fit the architecture, the roles or the scores by fact.
    """

    scores: Mapping[str, Float[Tensor, " _unit"]]
    signature: Signature
    unit_weights: Mapping[str, int]
    total_weights: int
    card: RunCard
    evidence: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    by_role: Mapping[str, Float[Tensor, "role _unit"]] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    by_fact: Mapping[str, Float[Tensor, "fact _unit"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site, rows in self.by_role.items():
            if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(self.roles):
                raise MechunlearnError(
                    f"Scores by role of '{site}' must be a tensor [role unit], one row a name in roles."
                )
        object.__setattr__(self, "by_role", {site: rows.detach().float().cpu() for site, rows in self.by_role.items()})
        object.__setattr__(self, "roles", tuple(self.roles))
        for site, scores in self.scores.items():
            if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
                raise MechunlearnError(f"Scores of '{site}' must be a one-dimensional float tensor, one entry a unit.")
            if not torch.isfinite(scores).all():
                raise MechunlearnError(f"Scores of '{site}' are not finite: check the model's dtype and the metric.")
            check_site(site, len(scores), self.signature)
        ordered = sorted(self.scores, key=Component.parse)
        object.__setattr__(self, "scores", {site: self.scores[site].detach().float().cpu() for site in ordered})
        if self.by_fact:
            facts = {s: resampling.checked_facts(self.by_fact.get(s), self.scores[s], f"'{s}'") for s in ordered}
            if len({len(rows) for rows in facts.values()}) > 1:
                raise MechunlearnError("Scores by fact have more facts at some sites than at others. Give all facts.")
            object.__setattr__(self, "by_fact", facts)

    def check(self, signature: Signature) -> NoReturn:
        """Refuse to be a mask, which is what checks its architecture: scores say how much, a mask says which.

        Args:
            signature: That of the model which the mask is for.

        Raises:
            MechunlearnError: Always, with how to make a mask of the scores.
        """
        raise MechunlearnError(
            "A Localization is given where a mask is expected. Choose units: found.above(0), or "
            "found.top(weights=0.05)."
        )

    def above(self, threshold: float) -> ComponentMask:
        """Return the mask of the units whose |score| is larger than a threshold.

        Args:
            threshold: The largest |score| that is not selected.
        """
        return ComponentMask({site: s.abs() > threshold for site, s in self.scores.items()}, self.signature)

    def strongest_role(self, among: Iterable[str] | None = None) -> str:
        """Return the token role with the largest sum of |score| over sites: where a closed-form edit should act.

        Args:
            among: The roles to choose from, by default `subject last` and `last`.

        Raises:
            MechunlearnError: If nothing was scored by these roles.

        >>> tiny = Signature("llama", 2, 4, 2, 64, 32)
        >>> scores = {"L0.mlp_out": torch.tensor([[0.1], [0.6]]), "L1.mlp_out": torch.tensor([[0.3], [0.1]])}
        >>> roles = ("last", "subject last")
        >>> Localization({}, tiny, {}, 0, RunCard("example"), by_role=scores, roles=roles).strongest_role()
        'subject last'
        """
        chosen = [role for role in (among or ("subject last", "last")) if role in self.roles]
        if not self.by_role or not chosen:
            raise MechunlearnError(
                "This localization has no scores by the token roles asked for (it has: "
                f"{', '.join(self.roles) or 'none'}). "
                "Expected one such as causal_tracing(model, prompts, kinds=['mlp_out'], by='role')."
            )
        sums = {
            role: sum(float(s[self.roles.index(role)].abs().sum()) for s in self.by_role.values()) for role in chosen
        }
        return max(chosen, key=lambda role: sums[role])

    def ranked(self, first: int | None = None) -> list[Component]:
        """Return units, largest |score| first, ties in component order.

        Args:
            first: How many; all unless given.
        """
        sites = [Component.parse(site) for site in self.scores]
        _, site, unit = (ranks[:first].tolist() for ranks in self._order())
        return [Component(sites[i].layer, sites[i].kind, u) for i, u in zip(site, unit)]

    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """By rank: the place among all scores, the number of the site, the unit in it."""
        sizes = torch.tensor([len(scores) for scores in self.scores.values()], dtype=torch.long)
        everything = torch.cat([torch.zeros(0), *self.scores.values()])
        order = everything.abs().argsort(descending=True, stable=True)
        site = torch.arange(len(sizes)).repeat_interleave(sizes)[order]
        return order, site, order - (sizes.cumsum(0) - sizes)[site]

    def intervals(self, seed: int = 0) -> pd.DataFrame:
        """Return how sure each score is when the facts are taken as a sample of facts: standard error, interval, p.

        Formulas and sources are those of `resampling.uncertainty`. Facts are resampled, not subjects: facts that share
        a subject are not independent, and intervals are then too narrow, as a bootstrap's are with fewer than ten
        facts. Each p speaks of one unit and is not corrected: of 46,350 units whose effects are noise around nothing
        about 2,300 have a p of .05 or below.

        Args:
            seed: Draws the resamples and the sign flips.

        Returns:
            One row a unit, largest |score| first: site, unit, score, se (standard error), low and high (95 % bootstrap
            interval), p (two-sided, sign flips over facts), n (facts). Scores are in the method's unit.

        Raises:
            MechunlearnError: If there are no scores by fact, or there is one fact.

        >>> tiny = Signature("llama", 1, 2, 2, 3, 4)
        >>> facts = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, -2.0], [1.0, 0.0, 3.0]])
        >>> sites = {"scores": {"L0.mlp.out": facts.mean(0)}, "by_fact": {"L0.mlp.out": facts}}
        >>> found = Localization(**sites, signature=tiny, unit_weights={}, total_weights=0, card=RunCard("example"))
        >>> print(found.intervals().round(2).to_string(index=False))
              site  unit  score   se  low  high    p  n
        L0.mlp.out     0    1.0 0.00  1.0   1.0 0.25  3
        L0.mlp.out     2    1.0 1.53 -2.0   3.0 0.75  3
        L0.mlp.out     1    0.0 0.00  0.0   0.0 1.00  3
        """
        facts = self._every_fact()
        order, site, unit = (ranks.numpy() for ranks in self._order())
        scores = torch.cat(list(self.scores.values())).double().numpy()
        frame = pd.DataFrame({"site": pd.Index(self.scores)[site], "unit": unit, "score": scores[order]})
        found = resampling.uncertainty(facts, seed)
        return frame.assign(**{name: one[order] for name, one in found.items()}, n=len(facts))

    def _every_fact(self) -> Float[Tensor, "fact unit"]:
        facts = torch.cat(list(self.by_fact.values()), 1) if self.by_fact else None
        return resampling.needed(facts, self.card.method, "activation_patching or attribution_patching")

    def top(
        self,
        units: float | None = None,
        weights: float | None = None,
        tied: bool = False,
        stable: float | None = None,
    ) -> ComponentMask:
        """Return the mask of the units with the largest |score| within a budget.

        Units are taken in order, up to the first that would exceed the budget, so that masks of growing budgets nest.

        Args:
            units: The budget as a number of units; a float below 1 is a share, so `top(0.05)` is `top(weights=0.05)`.
            weights: The budget as a share of all editable weights, 0 to 1. Give one of the two.
            tied: Whether to add what feeds each unit (see `ComponentMask.tied`) and to count its weights too.
            stable: Keep of these k units only those that have the same sign, and are among the k of largest |score|, in
                at least this share of 2,000 resamples of the facts (seed 0; see `resampling.steadiness`). What is left
                out is not replaced, so the mask may be smaller than the budget, and may be empty.

        Raises:
            MechunlearnError: If the budget is out of range, or not exactly one is given; with `stable`, if it is no
                share, there are no scores by fact, or fewer than 8 facts.

        >>> tiny = Signature("llama", 1, 2, 2, 3, 4)
        >>> facts = torch.tensor([[1.0, 0.5, 9.0], [1.0, 0.5, -7.0]] * 8)
        >>> sites = {"scores": {"L0.mlp.out": facts.mean(0)}, "by_fact": {"L0.mlp.out": facts}}
        >>> found = Localization(**sites, signature=tiny, unit_weights={}, total_weights=0, card=RunCard("example"))
        >>> list(found.top(units=2)), list(found.top(units=2, stable=0.95))
        ([L0.mlp.out[0], L0.mlp.out[2]], [L0.mlp.out[0]])
        """
        if isinstance(units, float):
            if not units < 1 or weights is not None:
                raise MechunlearnError(
                    f"A budget of {units:g} is no number of units. Give one budget: top(64), top(units=64) or "
                    "top(weights=0.05)."
                )
            units, weights = None, units
        if (units is None) == (weights is None):
            raise MechunlearnError("Give one budget: top(units=64) or top(weights=0.05).")
        available = sum(len(s) for s in self.scores.values())
        if units is not None and not 0 <= units <= available:
            raise MechunlearnError(f"A budget of {units} units is out of range: the scores cover {available} units.")
        if weights is not None and not 0 <= weights <= 1:
            raise MechunlearnError(f"A budget of {weights} is out of range: a share of the weights lies in [0, 1].")
        if stable is not None and not 0 < stable <= 1:
            raise MechunlearnError(f"stable={stable} is out of range: a share of the resamples lies in (0, 1].")
        limit = float("inf") if weights is None else weights * self.total_weights + 1e-6
        return self._largest(units, limit, tied, stable)

    def _largest(self, units: int | None, limit: float, tied: bool, stable: float | None) -> ComponentMask:
        """Without a loop over units: a model of billions of weights has half a million."""
        order, site, unit = self._order()
        sites = [Component.parse(name) for name in self.scores]
        costs = torch.tensor([self._cost(each.kind, tied) for each in sites], dtype=torch.long)[site]
        if tied:
            head = torch.tensor([each.kind == "attn.o" for each in sites], dtype=torch.bool)[site]
            layer = torch.tensor([each.layer for each in sites], dtype=torch.long)[site]
            group = layer * self.signature.kv_heads + unit // (self.signature.heads // self.signature.kv_heads)
            first = ~torch.tensor(pd.Series(torch.where(head, group, -1).numpy()).duplicated().to_numpy())
            costs = costs + (first & head) * sum(self.unit_weights.get(kind, 0) for kind in ("attn.k", "attn.v"))
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: int((costs.cumsum(0) <= limit).sum()) if units is None else units]] = True
        if stable is not None:
            chosen &= resampling.steadiness(self._every_fact(), int(chosen.sum())) >= stable
        parts = chosen.split([len(scores) for scores in self.scores.values()]) if self.scores else ()
        mask = ComponentMask(dict(zip(self.scores, parts)), self.signature)
        return mask.tied(Layout(self.signature, 0)) if tied else mask

    def _cost(self, kind: str, tied: bool) -> int:
        """Weights of one unit, and of what is tied to it and to no other unit."""
        also = {"mlp.out": ("mlp.in", "mlp.gate"), "attn.o": ("attn.q",)}.get(kind, ()) if tied else ()
        return sum(self.unit_weights.get(each, 0) for each in (kind, *also))

    def share(self, mask: ComponentMask) -> float:
        """Return the weights of a mask as a share of all editable weights.

        Args:
            mask: A mask of this architecture.

        Raises:
            MechunlearnError: If it is of another.
        """
        mask.check(self.signature)
        used = sum(int(m.sum()) * self.unit_weights[Component.parse(site).kind] for site, m in mask.sites.items())
        return used / self.total_weights

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each unit: component, layer, kind, unit, score; largest |score| first."""
        order, site, unit = (ranks.numpy() for ranks in self._order())
        sites = pd.DataFrame(
            [(name, at.layer, at.kind) for name, at in ((name, Component.parse(name)) for name in self.scores)],
            columns=["component", "layer", "kind"],
        )
        frame = sites.iloc[site].reset_index(drop=True).assign(unit=unit)
        frame["component"] += "[" + frame.unit.astype(str) + "]"
        return frame.assign(score=torch.cat([torch.zeros(0), *self.scores.values()]).double().numpy()[order])

    def save(self, path: str | Path) -> None:
        """Write scores, evidence and run card to a file.

        Args:
            path: A name in `.json` (readable) or `.safetensors` (compact); both are complete. Scores by fact take 20
                bytes each in JSON: 18 MB for 16 facts and 46,350 units, 3 MB in `.safetensors`.

        Raises:
            MechunlearnError: If the name ends in something else, or the disk refuses.
        """
        held = {f"{part}/{site}": t for part in ("scores", "by_role") for site, t in getattr(self, part).items()}
        for site, facts in self.by_fact.items():
            held[f"by_fact/{site}"] = facts[:, :1] if (facts == facts[:, :1]).all() else facts
        tensors.save(path, "localization", held, {name: getattr(self, name) for name in ABOUT})

    @classmethod
    def load(cls, path: str | Path) -> "Localization":
        """Read a localization from a file of `save`.

        Args:
            path: The `.json` or `.safetensors` file.

        Returns:
            The localization, equal to the one that was saved.

        Raises:
            MechunlearnError: If the file is missing, damaged or something else than a localization.
        """
        return tensors.load(path, {"localization": cls._made})

    @classmethod
    def _made(cls, held: dict[str, Tensor], about: dict[str, Any]) -> "Localization":
        parts, rest = tensors.grouped(held, ("scores", "by_role", "by_fact")), tensors.checked(about, ABOUT)
        rest["roles"] = tuple(rest["roles"])
        return cls(parts["scores"], by_role=parts["by_role"], by_fact=parts["by_fact"], **rest)

    def __repr__(self) -> str:
        units = sum(len(s) for s in self.scores.values())
        best = ", ".join(f"{c} {float(self.scores[c.site][c.unit]):+.3g}" for c in self.ranked(3))
        note = f"; {self.note}" if self.note else ""
        return f"Localization({self.card.method}, {units} units, largest: {best or 'none'}{note})"

    def _repr_html_(self) -> str:
        scored = by_kind(
            (at.layer, at.kind, len(s), len(s)) for s, at in ((s, Component.parse(k)) for k, s in self.scores.items())
        )
        best = self.ranked(5)
        about = {
            "scored": ", ".join(f"{n} {unit_name(kind)}s at {kind} (layers {layers})" for kind, layers, n, _ in scored),
            "for": self.signature,
            "note": self.note,
            "by token role": ", ".join(self.roles) if self.by_role else "",
        }
        rows = [
            (
                one,
                f"{float(self.scores[one.site][one.unit]):+.4g}",
                f"{self.unit_weights.get(one.kind, 0) / self.total_weights:.3%}",
            )
            for one in best
            if one.unit is not None and self.total_weights
        ]
        return card(f"Localization: {self.card.method}", about, ("largest", "score", "of the weights"), rows)

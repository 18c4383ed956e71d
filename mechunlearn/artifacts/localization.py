"""Which and how much: component addresses, masks and scores. None of them knows a method or a parameter name."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.core.display import by_kind, card, unit_name
from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import RunCard
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Layout, Signature

if TYPE_CHECKING:
    pass
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.tensors import load_tensors, save_tensors
from mechunlearn.model.component import Component, check_site


@dataclass(frozen=True, eq=False)
class Localization:
    """How much each unit matters: `{site: Float[unit]}`, the weights a unit of each kind has, and how it was found.

    `unit_weights` maps every kind of the model to the weights of one unit; `total_weights` counts all editable weights
    (embeddings, norms and output biases excluded). `evidence` holds what a method found on the way (probe curves,
    windows); `note` is a sentence for the reader, such as "no window found". `by_role` may hold `[role unit]` scores of
    activation sites (`L3.attn.o`, `L3.resid_post`, with one unit), one row a name in `roles`: token roles or positions.
    """

    scores: Mapping[str, Float[Tensor, " _unit"]]
    signature: Signature
    unit_weights: Mapping[str, int]
    total_weights: int
    card: RunCard
    evidence: dict = field(default_factory=dict)
    note: str = ""
    by_role: Mapping[str, Float[Tensor, "role _unit"]] = field(default_factory=dict)
    roles: tuple[str, ...] = ()

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

    def check(self, signature: Signature) -> NoReturn:
        """Refuse to be a mask, which is what checks its architecture: scores say how much, a mask says which.

        Args:
            signature: That of the model which the mask is for.

        Raises:
            MechunlearnError: Always, with how to make a mask of the scores.
        """
        raise MechunlearnError(
            "A Localization is given where a mask is expected. Choose units: found.above(0), or found.top(weights=0.05)."
        )

    def above(self, threshold: float | int) -> ComponentMask:
        """The units whose |score| is larger than the threshold."""
        return ComponentMask({site: s.abs() > threshold for site, s in self.scores.items()}, self.signature)

    def strongest_role(self, among: Iterable[str] | None = None) -> str:
        """The token role with the largest sum of |score| over sites: where a closed-form edit should act.

        `among` limits the choice, by default to `subject last` and `last`. Raises `MechunlearnError` if nothing was scored by
        these roles.

        >>> tiny = Signature("llama", 2, 4, 2, 64, 32)
        >>> scores = {"L0.mlp_out": torch.tensor([[0.1], [0.6]]), "L1.mlp_out": torch.tensor([[0.3], [0.1]])}
        >>> roles = ("last", "subject last")
        >>> Localization({}, tiny, {}, 0, RunCard("example"), by_role=scores, roles=roles).strongest_role()
        'subject last'
        """
        chosen = [role for role in (among or ("subject last", "last")) if role in self.roles]
        if not self.by_role or not chosen:
            raise MechunlearnError(
                f"This localization has no scores by the token roles asked for (it has: {', '.join(self.roles) or 'none'}). "
                "Expected one such as causal_tracing(model, prompts, kinds=['mlp_out'], by='role')."
            )
        sums = {
            role: sum(float(s[self.roles.index(role)].abs().sum()) for s in self.by_role.values()) for role in chosen
        }
        return max(chosen, key=lambda role: sums[role])

    def ranked(self, first: int | None = None) -> list[Component]:
        """Units, largest |score| first, ties in component order: all, or the first so many."""
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

    def top(self, units: int | None = None, weights: float | int | None = None, tied: bool = False) -> ComponentMask:
        """The units with the largest |score| within a budget: a number of units, or a share of all editable weights.

        Taken in order and stopped before the first that would exceed the budget, so that masks of growing budgets
        nest. With `tied=True` the result is tied (see `ComponentMask.tied`) and tied weights count.
        Raises `MechunlearnError` if the budget is out of range or both are given.
        """
        if (units is None) == (weights is None):
            raise MechunlearnError("Give one budget: top(units=64) or top(weights=0.05).")
        available = sum(len(s) for s in self.scores.values())
        if units is not None and not 0 <= units <= available:
            raise MechunlearnError(f"A budget of {units} units is out of range: the scores cover {available} units.")
        if weights is not None and not 0 <= weights <= 1:
            raise MechunlearnError(f"A budget of {weights} is out of range: a share of the weights lies in [0, 1].")
        limit = float("inf") if weights is None else weights * self.total_weights + 1e-6
        return self._largest(units, limit, tied)

    def _largest(self, units: int | None, limit: float, tied: bool) -> ComponentMask:
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
        parts = chosen.split([len(scores) for scores in self.scores.values()]) if self.scores else ()
        mask = ComponentMask(dict(zip(self.scores, parts)), self.signature)
        return mask.tied(Layout(self.signature, 0)) if tied else mask

    def _cost(self, kind: str, tied: bool) -> int:
        """Weights of one unit, and of what is tied to it and to no other unit."""
        also = {"mlp.out": ("mlp.in", "mlp.gate"), "attn.o": ("attn.q",)}.get(kind, ()) if tied else ()
        return sum(self.unit_weights.get(each, 0) for each in (kind, *also))

    def share(self, mask: ComponentMask) -> float:
        """The mask's weights as a share of all editable weights."""
        mask.check(self.signature)
        used = sum(int(m.sum()) * self.unit_weights[Component.parse(site).kind] for site, m in mask.sites.items())
        return used / self.total_weights

    def to_frame(self) -> pd.DataFrame:
        """One row a unit: component, layer, kind, unit, score; largest |score| first."""
        order, site, unit = (ranks.numpy() for ranks in self._order())
        sites = pd.DataFrame(
            [(name, at.layer, at.kind) for name, at in ((name, Component.parse(name)) for name in self.scores)],
            columns=["component", "layer", "kind"],
        )
        frame = sites.iloc[site].reset_index(drop=True).assign(unit=unit)
        frame["component"] += "[" + frame.unit.astype(str) + "]"
        return frame.assign(score=torch.cat([torch.zeros(0), *self.scores.values()]).double().numpy()[order])

    def save(self, path: str | Path) -> None:
        """Write a `.json` or `.safetensors` file; both are complete."""
        path = Path(path)
        about = {
            "kind": "localization",
            "signature": asdict(self.signature),
            "unit_weights": dict(self.unit_weights),
            "total_weights": self.total_weights,
            "card": asdict(self.card),
            "evidence": self.evidence,
            "note": self.note,
            "roles": self.roles,
        }
        if path.suffix == ".safetensors":
            metadata = {"kind": "localization", "about": json.dumps(about)}
            by_role = {f"by role/{site}": rows for site, rows in self.by_role.items()}
            save_tensors(path, {**self.scores, **by_role}, metadata)
            return
        tensors = {"scores": self.scores, "by_role": self.by_role}
        listed = {name: {site: t.tolist() for site, t in of.items()} for name, of in tensors.items()}
        with whole_file(path) as beside:
            beside.write_text(json.dumps({**about, **listed}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Localization":
        """Raises `MechunlearnError` if the file is missing, truncated or something else."""
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                tensors, metadata = load_tensors(path, "localization")
                about = json.loads(metadata["about"])
                by_role = {k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith("by role/")}
                scores = {site: t for site, t in tensors.items() if not site.startswith("by role/")}
            else:
                about = json.loads(path.read_text(encoding="utf-8"))
                scores, by_role = (
                    {site: torch.tensor(t, dtype=torch.float32) for site, t in about.get(name, {}).items()}
                    for name in ("scores", "by_role")
                )
            return cls(
                scores,
                Signature(**about["signature"]),
                about["unit_weights"],
                about["total_weights"],
                RunCard(**about["card"]),
                about["evidence"],
                about["note"],
                by_role,
                tuple(about.get("roles", ())),
            )
        except (OSError, UnicodeDecodeError) as error:
            raise MechunlearnError(f"Could not read the localization '{path}': {error}.") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise MechunlearnError(f"'{path}' is not a whole localization file ({error}).") from None

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

"""Which edges and how much: scores on what one component writes and another reads.

An edge is named as in the MIB benchmark: `a0.h1->m2`, `input->a0.h0<q>`, `m1->logits`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.artifacts.edges import by_reader, described, edges, readers, shared, writers
from mechunlearn.artifacts.graphs import mib_graph, network, read_mib, write_graph
from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.resampling import checked_facts, needed, packed, uncertainty, unpacked
from mechunlearn.core import tensors
from mechunlearn.core.display import card
from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import RunCard
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Signature

if TYPE_CHECKING:
    import networkx

ABOUT = {
    "signature": Signature,
    "parallel": bool,
    "unit_weights": dict[str, int],
    "total_weights": int,
    "card": RunCard,
    "note": str,
}
"""What a file says of a circuit besides its two matrices."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """How much each edge matters, and which edges are in the circuit: two `[writer reader]` matrices.

    Rows are `writers(signature)`, columns `readers(signature)`. Circuits combine with `&`, `|`, `-`; `~` is the
    complement; the scores are those of the left one.

    Attributes:
        scores: How much each edge matters.
        signature: The architecture.
        parallel: Whether the MLP of a layer reads what its attention reads (GPT-J, Pythia, Phi), so that heads do not
            feed the MLP of their layer.
        unit_weights: As in a `Localization`.
        total_weights: As in a `Localization`.
        card: How the scores were found.
        chosen: Which edges are in the circuit; every edge unless given.
        note: A sentence for the reader.
        by_fact: The scores of each fact, of which `scores` are the mean, if the method gave them: float32, 4 bytes x
            facts x writers x readers, 37 MB for 64 facts and the 301 x 481 of SmolLM2-135M; left out above 256 MiB.

    Raises:
        MechunlearnError: If the scores do not fit the architecture or are not finite.

    >>> one = Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4)
    >>> scores = torch.linspace(-1, 2, 4)[:, None] * torch.arange(8.0)
    >>> circuit = Circuit(scores, one, False, {"attn.o": 8, "mlp.out": 4}, 140, RunCard("by hand"))
    >>> circuit.top(edges=3)
    Circuit(by hand, 3 of 13 edges, largest: m0->logits +14, input->logits -7, a0.h1->logits +7)
    >>> "m0->logits" in circuit, "m0->m0" in circuit
    (True, False)
    """

    scores: Float[Tensor, "writer reader"]
    signature: Signature
    parallel: bool
    unit_weights: Mapping[str, int]
    total_weights: int
    card: RunCard
    chosen: Bool[Tensor, "writer reader"] = None  # type: ignore[assignment]  # None becomes all edges
    note: str = ""
    by_fact: Float[Tensor, "fact writer reader"] | None = None

    def __post_init__(self) -> None:
        valid = edges(self.signature, self.parallel)
        chosen = valid if self.chosen is None else self.chosen
        for name, given, kind in (("scores", self.scores, "float"), ("chosen", chosen, "bool")):
            if not isinstance(given, Tensor) or given.shape != valid.shape or kind not in str(given.dtype):
                got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise MechunlearnError(
                    f"The {name} of a circuit of ({self.signature}) must be a {kind} tensor of shape "
                    f"{tuple(valid.shape)}, a row for each of `writers`, a column for each of `readers`; got {got}."
                )
        scores = self.scores.detach().to("cpu", torch.float32)
        if not torch.isfinite(scores).all():
            raise MechunlearnError("The scores of a circuit are not finite: check the model's dtype and the metric.")
        object.__setattr__(self, "scores", scores.masked_fill(~valid, 0))
        if self.by_fact is not None:
            facts = self.by_fact.masked_fill(~valid.to(self.by_fact.device), 0)
            object.__setattr__(self, "by_fact", checked_facts(facts, self.scores, "the edges"))
        object.__setattr__(self, "chosen", chosen.detach().cpu() & valid)

    def __len__(self) -> int:
        return int(self.chosen.sum())

    def __contains__(self, edge: str) -> bool:
        writer, _, reader = edge.partition("->")
        row, column = writers(self.signature), readers(self.signature)
        return writer in row and reader in column and bool(self.chosen[row.index(writer), column.index(reader)])

    def _combine(self, other: "Circuit", how: Callable[[Tensor, Tensor], Tensor]) -> "Circuit":
        if (self.signature, self.parallel) != (other.signature, other.parallel):
            mine, theirs = described(self.signature, self.parallel), described(other.signature, other.parallel)
            raise MechunlearnError(f"Circuits of different architectures: ({mine}) and ({theirs}).")
        return replace(self, chosen=how(self.chosen, other.chosen))

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "Circuit") -> "Circuit":
        both = self._combine(other, torch.logical_or)
        scores = torch.where(other.chosen & ~self.chosen, other.scores, self.scores)
        return replace(both, scores=scores, by_fact=self.by_fact if torch.equal(scores, self.scores) else None)

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def __invert__(self) -> "Circuit":
        return replace(self, chosen=~self.chosen)

    def jaccard(self, other: "Circuit") -> float:
        """Return the edges in both circuits over the edges in either; 1 for two empty circuits.

        Args:
            other: A circuit of the same architecture.

        Raises:
            MechunlearnError: If it is of another.
        """
        either = len(self | other)
        return len(self & other) / either if either else 1.0

    def _ranked(self) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
        """Writer and reader of every chosen edge, largest |score| first, ties in index order."""
        sizes = self.scores.abs().masked_fill(~self.chosen, -1).flatten()
        order = sizes.argsort(descending=True, stable=True)[: len(self)]
        return order // self.scores.shape[1], order % self.scores.shape[1]

    def _named(self, most: int | None = None) -> dict[str, float]:
        rows, columns = (index[:most] for index in self._ranked())
        source, target = writers(self.signature), readers(self.signature)
        scores = self.scores[rows, columns].tolist()
        return {f"{source[i]}->{target[j]}": s for i, j, s in zip(rows.tolist(), columns.tolist(), scores)}

    def top(self, edges: int | None = None, nodes: int | None = None, weights: float | None = None) -> "Circuit":
        """Return the circuit that remains within a budget.

        Only edges of this circuit count, ties are taken in index order, and the circuits of growing budgets nest.

        Args:
            edges: How many edges to keep: those of largest |score|.
            nodes: How many heads and MLPs to keep: those of largest |sum of outgoing scores|, with the chosen edges
                among them, the input and the logits (both free). A KV head is kept if any query head of its group is.
            weights: A share of all editable weights, 0 to 1: nodes are taken in the same order, up to the first whose
                output weights (a head's `attn.o`, all neurons of `mlp.out`) would exceed it.

        Raises:
            MechunlearnError: If the budget is out of range, or not exactly one is given.
        """
        if sum(budget is not None for budget in (edges, nodes, weights)) != 1:
            raise MechunlearnError("Give one budget: top(edges=64), top(nodes=10) or top(weights=0.05).")
        outgoing = self._outgoing()[1:]
        for budget, most, what in (
            (edges, len(self), "edges: the circuit has"),
            (nodes, len(outgoing), "nodes: the model's heads and MLPs are"),
            (weights, 1, "of the weights: the largest share is"),
        ):
            if budget is not None and not 0 <= budget <= most:
                raise MechunlearnError(f"A budget of {budget} is out of range for {what} {most}.")
        if edges is not None:
            rows, columns = self._ranked()
            chosen = torch.zeros_like(self.chosen)
            chosen[rows[:edges], columns[:edges]] = True
            return replace(self, chosen=chosen)
        order = outgoing.abs().argsort(descending=True, stable=True)
        if weights is not None:
            mlp = self.signature.d_mlp * self.unit_weights["mlp.out"]
            block = torch.tensor([self.unit_weights["attn.o"]] * self.signature.heads + [mlp])
            used = block.repeat(self.signature.layers)[order].cumsum(0)
            nodes = int((used <= weights * self.total_weights + 1e-6).sum())
        kept = torch.zeros(len(outgoing), dtype=torch.bool)
        kept[order[:nodes]] = True
        return replace(self, chosen=self.chosen & self._among(kept))

    def _outgoing(self) -> Float[Tensor, " writer"]:
        return (self.scores * self.chosen).sum(1)

    def _among(self, kept: Bool[Tensor, " node"]) -> Bool[Tensor, "writer reader"]:
        """The edges whose writer and reader belong to these heads and MLPs, the input or the logits."""
        free, block = torch.tensor([True]), kept.view(self.signature.layers, -1)
        heads, mlp = block[:, :-1], block[:, -1:]
        groups = heads.reshape(len(heads), self.signature.kv_heads, -1).any(2)
        return torch.cat([free, kept])[:, None] & by_reader(heads, groups, mlp, free)

    def check(self, signature: Signature) -> NoReturn:
        """Refuse to be a mask, which is what checks its architecture: a circuit has edges, a mask units.

        Args:
            signature: That of the model which the mask is for.

        Raises:
            MechunlearnError: Always, with how to make a mask of the circuit.
        """
        raise MechunlearnError(
            "A Circuit is given where a mask is expected. Choose units: circuit.nodes().above(0), or "
            "circuit.nodes().top(weights=0.05)."
        )

    def nodes(self) -> Localization:
        """Return how much each head and MLP matters: the sum of its outgoing edges in the circuit.

        A head's score is on its `attn.o`; an MLP has one score, written on every neuron of its `mlp.out`.
        """
        by_fact = {} if self.by_fact is None else self._by_site((self.by_fact * self.chosen).sum(2))
        evidence = {"mlp.out": "one score per layer, written on every neuron of its MLP"}
        about = (self.signature, self.unit_weights, self.total_weights, self.card, evidence, self.note)
        return Localization(self._by_site(self._outgoing()), *about, by_fact=by_fact)

    def _by_site(self, sums: Float[Tensor, "*fact writer"]) -> dict[str, Tensor]:
        """Numbers of the writers at their sites: an MLP's on every neuron."""
        block, found = sums[..., 1:].unflatten(-1, (self.signature.layers, -1)), {}
        for layer in range(self.signature.layers):
            found[f"L{layer}.attn.o"] = block[..., layer, :-1]
            found[f"L{layer}.mlp.out"] = block[..., layer, -1:].expand(*sums.shape[:-1], self.signature.d_mlp)
        return found

    def intervals(self, seed: int = 0) -> pd.DataFrame:
        """Return how sure the score of each edge is, as `Localization.intervals` does for units.

        Args:
            seed: Draws the resamples and the sign flips.

        Returns:
            One row an edge of the circuit, largest |score| first: the columns of `to_frame`, then se (standard error),
            low and high (95 % bootstrap interval), p (two-sided, by sign flips over facts, of this edge alone: not
            corrected for their number), n (facts).

        Raises:
            MechunlearnError: If there are no scores by fact, or there is one fact.

        >>> one = Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4)
        >>> facts = torch.arange(4.0)[:, None] * torch.tensor([[[1.0]], [[-1.0]], [[6.0]]]) * torch.ones(8)
        >>> found = Circuit(facts.mean(0), one, False, {}, 140, RunCard("by hand"), by_fact=facts)
        >>> print(found.top(edges=1).intervals().round(2).to_string(index=False))
        source target input  score   se  low  high    p  n
            m0 logits          6.0 6.24 -3.0  18.0 0.75  3
        """
        rows, columns = self._ranked()
        facts = needed(self.by_fact, self.card.method, "edge_attribution or edge_patching")[:, rows, columns]
        return self.to_frame().assign(**uncertainty(facts, seed), n=len(facts))

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each edge: source, target, input (q, k, v or ''), score; largest |score| first.

        The target of a k or v edge names a KV head (see `readers`).
        """
        rows, columns = (index.numpy() for index in self._ranked())
        reader = [name.rstrip(">").partition("<") for name in readers(self.signature)]
        return pd.DataFrame(
            {
                "source": pd.Index(writers(self.signature))[rows],
                "target": pd.Index([target for target, _, _ in reader])[columns],
                "input": pd.Index([one for _, _, one in reader])[columns],
                "score": self.scores[rows, columns].tolist(),
            }
        )

    def _by_query_head(self) -> "Circuit":
        """The same circuit with a key and a value for each query head; a group's score is shared equally."""
        place = shared(self.signature)
        scores = self.scores[:, place] / place.bincount()[place]
        whole = replace(self.signature, kv_heads=self.signature.heads)
        return replace(self, scores=scores, chosen=self.chosen[:, place], signature=whole, by_fact=None)

    def to_mib(self) -> dict[str, float]:
        """Return the score of each edge by the name that the MIB benchmark and EAP-IG give it, largest |score| first.

        They know query heads only: under grouped-query attention an edge into a key or value is written once for each
        query head of its group, with an equal share of the score, so that `from_mib` sums to the same.
        """
        return self._by_query_head()._named()

    def save_mib(self, path: str | Path) -> None:
        """Write the graph file (JSON) of the MIB circuit track and EAP-IG: all edges, and which are in the circuit.

        Args:
            path: The file.

        Raises:
            MechunlearnError: If the disk refuses.
        """
        whole = self._by_query_head()
        graph = mib_graph(whole.signature, whole.parallel, whole.scores, whole.chosen)
        with whole_file(path) as beside:
            beside.write_text(json.dumps(graph) + "\n", encoding="utf-8")

    @classmethod
    def from_mib(
        cls,
        source: Mapping[str, Any] | str | Path,
        *,
        signature: Signature,
        parallel: bool,
        unit_weights: Mapping[str, int],
        total_weights: int,
    ) -> "Circuit":
        """Read a circuit from a graph of the MIB circuit track or EAP-IG, or from scores by edge name.

        Key and value scores of the query heads of a group are summed, and the edge is in the circuit if any of them
        is. A graph with no edge `in_graph` is a list of scores: every edge it names is then in the circuit.

        Args:
            source: A JSON file or a dict: a graph, or `{edge name: score}`.
            signature: The architecture.
            parallel: Whether the MLP of a layer reads what its attention reads.
            unit_weights: As in a `Localization`.
            total_weights: As in a `Localization`.

        Raises:
            MechunlearnError: If the file is not whole, is of another architecture, or names an edge that this one
                lacks.

        >>> one = Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4)
        >>> about = {"signature": one, "parallel": False, "unit_weights": {"attn.o": 8}, "total_weights": 140}
        >>> Circuit.from_mib({"a0.h1->m0": 0.5, "input->a0.h0<q>": -2.0}, **about)
        Circuit(from_mib, 2 of 13 edges, largest: input->a0.h0<q> -2, a0.h1->m0 +0.5)
        """
        scores, chosen = read_mib(source, signature, parallel)
        card = RunCard("from_mib", settings={} if isinstance(source, Mapping) else {"file": Path(source).name})
        return cls(scores, signature, parallel, unit_weights, total_weights, card, chosen)

    def to_networkx(self) -> "networkx.MultiDiGraph":
        """Return the circuit for networkx: nodes are heads, MLPs, input, logits.

        Edges are keyed by input (q, k, v or '').

        Edges carry score, input and name. As in `to_mib`, an edge into a KV head goes to every query head of its group,
        with an equal share of the score, so that paths are those of the model.
        """
        whole = self._by_query_head()
        return network(whole.to_frame().assign(name=list(whole._named())))

    def save(self, path: str | Path) -> None:
        """Write the circuit to a file.

        Args:
            path: A name in `.json` (readable) or `.safetensors` (compact), both complete, for `load`; or in
                `.graphml` or `.dot`, for graph programs, with edges as in `to_networkx`. In DOT, colour is the sign
                of the score (blue positive, orange negative) and width its size.

        Raises:
            MechunlearnError: If the name ends in something else, or the disk refuses.
        """
        path = Path(path)
        if path.suffix in (".dot", ".graphml"):
            whole = self._by_query_head()
            write_graph(path, whole.to_frame().assign(name=list(whole._named())))
        else:
            held = {"scores": self.scores, "chosen": self.chosen, **packed(self.by_fact)}
            tensors.save(path, "circuit", held, {name: getattr(self, name) for name in ABOUT})

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read a circuit from a file of `save`.

        Args:
            path: The `.json` or `.safetensors` file.

        Returns:
            The circuit, equal to the one that was saved.

        Raises:
            MechunlearnError: If the file is missing, damaged or something else than a circuit.
        """
        advice = (
            "`Circuit.from_mib` reads MIB graphs; make others again with `Circuit.save`, or take an undamaged copy."
        )

        def made(held: dict[str, Tensor], about: dict[str, Any]) -> "Circuit":
            known = tensors.checked(about, ABOUT)
            return cls(held["scores"], chosen=held["chosen"], by_fact=unpacked(held), **known)

        return tensors.load(path, {"circuit": made}, advice)

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {score:+.3g}" for name, score in self._named(3).items())
        every = int(edges(self.signature, self.parallel).sum())
        note = f"; {self.note}" if self.note else ""
        return f"Circuit({self.card.method}, {len(self)} of {every} edges, largest: {best or 'none'}{note})"

    def _repr_html_(self) -> str:
        every = int(edges(self.signature, self.parallel).sum())
        frame = self.top(edges=min(5, len(self))).to_frame()
        rows = [
            (f"{one.source} → {one.target}", one.input or "–", f"{one.score:+.4g}")
            for one in frame.itertuples(index=False)
        ]
        title = f"Circuit: {self.card.method}, {len(self)} of {every} edges"
        about = {"for": described(self.signature, self.parallel), "note": self.note}
        return card(title, about, ("largest", "input", "score"), rows)

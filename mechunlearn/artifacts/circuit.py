"""Which edges and how much: scores on what one component writes and another reads.

An edge is named as in the MIB benchmark: `a0.h1->m2`, `input->a0.h0<q>`, `m1->logits`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.display import card
from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import RunCard
from mechunlearn.core.tensors import load_tensors, save_tensors
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Signature

if TYPE_CHECKING:
    import networkx

POSITIVE, NEGATIVE = "#0072b2", "#d55e00"  # Okabe-Ito, as in plots


def writers(signature: Signature) -> list[str]:
    """What writes to the residual stream, in order: the input, then every layer's query heads and its MLP.

    >>> writers(Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4))
    ['input', 'a0.h0', 'a0.h1', 'm0']
    """
    heads = [f"h{head}" for head in range(signature.heads)]
    return ["input"] + [
        name for layer in range(signature.layers) for name in [*(f"a{layer}.{head}" for head in heads), f"m{layer}"]
    ]


def readers(signature: Signature) -> list[str]:
    """What reads the residual stream, in order: every layer's queries, keys, values and MLP, then the logits.

    Under grouped-query attention there is one key and one value reader per KV head: the head of `<k>` and `<v>` is
    then the index of a *KV head*, that of `<q>` the index of a query head.

    >>> readers(Signature("llama", layers=1, heads=2, kv_heads=1, d_mlp=3, d_model=4))
    ['a0.h0<q>', 'a0.h1<q>', 'a0.h0<k>', 'a0.h0<v>', 'm0', 'logits']
    """
    units = {"q": signature.heads, "k": signature.kv_heads, "v": signature.kv_heads}
    heads = [f"h{head}<{one}>" for one, count in units.items() for head in range(count)]
    return [
        name for layer in range(signature.layers) for name in [*(f"a{layer}.{head}" for head in heads), f"m{layer}"]
    ] + ["logits"]


def _by_reader(heads: Tensor, groups: Tensor, mlp: Tensor, logits: Tensor) -> Shaped[Tensor, " _reader"]:
    """From `[layer unit]` values for q, for k and v, for the MLP and the value of the logits to one per reader."""
    return torch.cat([torch.cat([heads, groups, groups, mlp], 1).flatten(), logits])


def edges(signature: Signature, parallel: bool) -> Bool[Tensor, "writer reader"]:
    """Which writer feeds which reader; `parallel` says that the MLP reads what the attention of its layer reads.

    >>> one = Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4)
    >>> int(edges(one, parallel=False).sum()), int(edges(one, parallel=True).sum())
    (13, 11)
    """
    attention = 2 * torch.arange(signature.layers)[:, None] + 1  # how deep, the input being 0
    mlp, logits = attention + 1, torch.tensor([2 * signature.layers + 1])
    heads, groups = attention.expand(-1, signature.heads), attention.expand(-1, signature.kv_heads)
    written = torch.cat([torch.tensor([0]), torch.cat([heads, mlp], 1).flatten()])
    read = _by_reader(heads, groups, attention if parallel else mlp, logits)
    return written[:, None] < read


def _shared(signature: Signature) -> Int[Tensor, " _reader"]:
    """For every reader, were there a key and value for each query head: the place of the one that its group shares."""
    query, width = torch.arange(signature.heads), signature.heads + 2 * signature.kv_heads + 1
    group = signature.heads + query // (signature.heads // signature.kv_heads)
    block = torch.cat([query, group, group + signature.kv_heads, torch.tensor([width - 1])])
    places = width * torch.arange(signature.layers)[:, None] + block
    return torch.cat([places.flatten(), torch.tensor([width * signature.layers])])


def _names(signature: Signature, chosen: Bool[Tensor, "writer reader"]) -> list[str]:
    source, target = writers(signature), readers(signature)
    return [f"{source[row]}->{target[column]}" for row, column in chosen.nonzero().tolist()]


def _described(signature: Signature, parallel: bool) -> str:
    return f"{signature}, {'parallel' if parallel else 'sequential'} MLP"


def _mib_config(signature: Signature, parallel: bool) -> dict[str, int | bool]:
    sizes = {"n_layers": signature.layers, "n_heads": signature.heads, "d_model": signature.d_model}
    return {**sizes, "parallel_attn_mlp": parallel}


def _read(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MechunlearnError(f"Could not read the circuit '{path}': {error}.") from None
    except ValueError as error:
        raise MechunlearnError(
            f"'{path}' is not a whole circuit file ({error}). Expected JSON as `save` or `save_mib` writes it."
        ) from None
    if not isinstance(entry, dict):
        raise MechunlearnError(f"'{path}' is not a circuit file: it holds a {type(entry).__name__}, not an object.")
    return entry


@dataclass(frozen=True, eq=False)
class Circuit:
    """How much each edge matters, and which edges are in the circuit: two `[writer reader]` matrices.

    Rows are `writers(signature)`, columns `readers(signature)`. `parallel` says that the MLP of a layer reads what its
    attention reads (GPT-J, Pythia, Phi), so that heads do not feed the MLP of their layer. `unit_weights` and
    `total_weights` are those of a `Localization`. Without `chosen`, every edge is in the circuit. Circuits combine
    with `&`, `|`, `-`; `~` is the complement; the scores are those of the left one.
    Raises `MechunlearnError` if the scores do not fit the architecture or are not finite.

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
        object.__setattr__(self, "chosen", chosen.detach().cpu() & valid)

    def __len__(self) -> int:
        return int(self.chosen.sum())

    def __contains__(self, edge: str) -> bool:
        writer, _, reader = edge.partition("->")
        row, column = writers(self.signature), readers(self.signature)
        return writer in row and reader in column and bool(self.chosen[row.index(writer), column.index(reader)])

    def _combine(self, other: "Circuit", how: Callable[[Tensor, Tensor], Tensor]) -> "Circuit":
        if (self.signature, self.parallel) != (other.signature, other.parallel):
            mine, theirs = _described(self.signature, self.parallel), _described(other.signature, other.parallel)
            raise MechunlearnError(f"Circuits of different architectures: ({mine}) and ({theirs}).")
        return replace(self, chosen=how(self.chosen, other.chosen))

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "Circuit") -> "Circuit":
        both = self._combine(other, torch.logical_or)
        return replace(both, scores=torch.where(other.chosen & ~self.chosen, other.scores, self.scores))

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def __invert__(self) -> "Circuit":
        return replace(self, chosen=~self.chosen)

    def jaccard(self, other: "Circuit") -> float:
        """Edges in both over edges in either; 1 for two empty circuits."""
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

    def top(self, edges: int | None = None, nodes: int | None = None, weights: float | int | None = None) -> "Circuit":
        """The circuit that remains within a budget: edges, nodes, or a share of all editable weights.

        `edges` keeps those of largest |score|. `nodes` keeps the heads and MLPs of largest |sum of outgoing scores|
        and the chosen edges among them, the input and the logits (both free); a KV head is kept if any query head of
        its group is. `weights` takes nodes in the same order and stops before the first whose output weights (a head's
        `attn.o`, all neurons of `mlp.out`) would exceed the share. Only edges of this circuit count, ties are taken in
        index order, and the circuits of growing budgets nest.
        Raises `MechunlearnError` if the budget is out of range, or not exactly one is given.
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
        return torch.cat([free, kept])[:, None] & _by_reader(heads, groups, mlp, free)

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
        """How much each head and MLP matters: the sum of its outgoing edges in the circuit.

        A head's score is on its `attn.o`; an MLP has one score, written on every neuron of its `mlp.out`.
        """
        block, scores = self._outgoing()[1:].view(self.signature.layers, -1), {}
        for layer in range(self.signature.layers):
            scores[f"L{layer}.attn.o"] = block[layer, :-1].clone()
            scores[f"L{layer}.mlp.out"] = block[layer, -1].repeat(self.signature.d_mlp)
        evidence = {"mlp.out": "one score per layer, written on every neuron of its MLP"}
        return Localization(
            scores, self.signature, self.unit_weights, self.total_weights, self.card, evidence, self.note
        )

    def to_frame(self) -> pd.DataFrame:
        """One row an edge of the circuit: source, target, input (q, k, v or ''), score; largest |score| first.

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
        shared = _shared(self.signature)
        scores = self.scores[:, shared] / shared.bincount()[shared]
        whole = replace(self.signature, kv_heads=self.signature.heads)
        return replace(self, scores=scores, chosen=self.chosen[:, shared], signature=whole)

    def to_mib(self) -> dict[str, float]:
        """The circuit's edges as the MIB benchmark and EAP-IG name them, largest |score| first.

        They know query heads only: under grouped-query attention an edge into a key or value is written once for each
        query head of its group, with an equal share of the score, so that `from_mib` sums to the same.
        """
        return self._by_query_head()._named()

    def save_mib(self, path: str | Path) -> None:
        """Write the graph file (JSON) of the MIB circuit track and EAP-IG: all edges, and which are in the circuit."""
        whole = self._by_query_head()
        valid, frame = edges(whole.signature, whole.parallel), whole.to_frame()
        touched = {"logits", *frame.source, *frame.target}
        scores, chosen = whole.scores[valid].tolist(), whole.chosen[valid].tolist()
        graph = {
            "cfg": _mib_config(self.signature, self.parallel),
            "nodes": {node: {"in_graph": node in touched} for node in [*writers(self.signature), "logits"]},
            "edges": {
                name: {"score": score, "in_graph": inside}
                for name, score, inside in zip(_names(whole.signature, valid), scores, chosen)
            },
        }
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
        """The circuit in a graph of the MIB circuit track or EAP-IG, or in `{edge name: score}`; a JSON file or a dict.

        Key and value scores of the query heads of a group are summed, and the edge is in the circuit if any of them
        is. A graph with no edge `in_graph` is a list of scores: every edge it names is then in the circuit.
        Raises `MechunlearnError` if the file is not whole, or names an edge that the architecture lacks.

        >>> one = Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4)
        >>> about = {"signature": one, "parallel": False, "unit_weights": {"attn.o": 8}, "total_weights": 140}
        >>> Circuit.from_mib({"a0.h1->m0": 0.5, "input->a0.h0<q>": -2.0}, **about)
        Circuit(from_mib, 2 of 13 edges, largest: input->a0.h0<q> -2, a0.h1->m0 +0.5)
        """
        where = "the given circuit" if isinstance(source, Mapping) else f"'{source}'"
        data = source if isinstance(source, Mapping) else _read(Path(source))
        is_graph = isinstance(data.get("edges"), Mapping)
        entries: Mapping[str, Any] = data["edges"] if is_graph else data
        expected, config = _mib_config(signature, parallel), data.get("cfg") if is_graph else None
        if isinstance(config, Mapping) and any(config.get(key, value) != value for key, value in expected.items()):
            raise MechunlearnError(
                f"{where} is of another architecture: its cfg is {dict(config)}, expected {expected}."
            )
        try:
            rows = [
                (float(entry.get("score", 0.0)), bool(entry["in_graph"])) if is_graph else (float(entry), True)
                for entry in entries.values()
            ]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise MechunlearnError(
                f"{where} is no circuit as the MIB circuit track writes it ({type(error).__name__}: {error}). "
                'Expected {"a0.h0->logits": 0.5, ...}, or a graph whose edges have a score and in_graph.'
            ) from None
        whole = replace(signature, kv_heads=signature.heads)
        valid = edges(whole, parallel)
        place = {name: index for index, name in enumerate(_names(whole, valid))}
        unknown = next((name for name in entries if name not in place), None)
        if unknown is not None:
            raise MechunlearnError(
                f"{where} names '{unknown}', which is no edge of ({_described(signature, parallel)}). "
                "Expected names such as 'input->a0.h0<q>', 'input->m0' or 'a0.h0->logits', the writer first."
            )
        table = torch.tensor(rows, dtype=torch.float64).view(-1, 2)
        if not table[:, 1].any():
            table[:, 1] = 1
        found = torch.zeros(*valid.shape, 2, dtype=torch.float64)
        found[tuple(valid.nonzero()[[place[name] for name in entries]].T)] = table
        grouped = found.new_zeros(len(valid), len(readers(signature)), 2).index_add_(1, _shared(signature), found)
        scores, chosen = grouped.unbind(2)
        card = RunCard("from_mib", settings={} if isinstance(source, Mapping) else {"file": Path(source).name})
        return cls(scores, signature, parallel, unit_weights, total_weights, card, chosen > 0)

    def to_networkx(self) -> "networkx.MultiDiGraph":
        """The circuit for networkx: nodes are heads, MLPs, input and logits; edges are keyed by input (q, k, v or '').

        Edges carry score, input and name. As in `to_mib`, an edge into a KV head goes to every query head of its group,
        with an equal share of the score, so that paths are those of the model.
        """
        import networkx

        whole = self._by_query_head()
        frame = whole.to_frame().assign(name=list(whole._named()))
        attributes = ["score", "input", "name"]
        return networkx.from_pandas_edgelist(
            frame, "source", "target", attributes, networkx.MultiDiGraph, edge_key="input"
        )

    def _to_dot(self) -> str:
        frame = self._by_query_head().to_frame()
        largest = float(frame.score.abs().max()) if len(frame) else 0.0
        lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box];"]
        for source, target, one, score in frame.itertuples(index=False, name=None):
            width = 0.5 + 4.5 * abs(score) / (largest or 1.0)
            colour = POSITIVE if score >= 0 else NEGATIVE
            style = f'label="{one}", color="{colour}", penwidth={width:.3g}, tooltip="{score:+.4g}"'
            lines.append(f'  "{source}" -> "{target}" [{style}];')
        return "\n".join([*lines, "}"]) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `.json` or `.safetensors` (complete, for `load`), or export `.graphml` or `.dot` (edges as `to_networkx`).

        In DOT, colour is the sign of the score (blue positive, orange negative) and width its size.
        Raises `MechunlearnError` for another suffix.
        """
        path = Path(path)
        about = {**vars(self), "signature": asdict(self.signature), "card": asdict(self.card)}
        about["unit_weights"] = dict(self.unit_weights)
        tensors = {name: about.pop(name) for name in ("scores", "chosen")}
        if path.suffix == ".safetensors":
            metadata = {"kind": "circuit", "about": json.dumps(about)}
            save_tensors(path, tensors, metadata)
        elif path.suffix == ".json":
            matrices = {"scores": self.scores.tolist(), "chosen": self.chosen.int().tolist()}
            with whole_file(path) as beside:
                beside.write_text(json.dumps({"kind": "circuit", **about, **matrices}) + "\n", encoding="utf-8")
        elif path.suffix == ".dot":
            with whole_file(path) as beside:
                beside.write_text(self._to_dot(), encoding="utf-8")
        elif path.suffix == ".graphml":
            import networkx

            with whole_file(path) as beside:
                networkx.write_graphml(self.to_networkx(), beside, edge_id_from_attribute="name")
        else:
            raise MechunlearnError(
                f"A circuit is not written as '{path.name}'. Expected .json or .safetensors, which load again, or "
                ".graphml or .dot for graph programs; `save_mib` writes the MIB circuit track's file."
            )

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Raises `MechunlearnError` if the file is missing, truncated or something else."""
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                tensors, metadata = load_tensors(path, "circuit")
                about = {**json.loads(metadata["about"]), **tensors}
            else:
                about = _read(path)
                kind = about.pop("kind", "foreign file")
                if kind != "circuit":
                    hint = " `Circuit.from_mib` reads MIB graphs." if "edges" in about else ""
                    raise MechunlearnError(f"'{path}' holds a {kind}, not a circuit.{hint}")
                about["scores"] = torch.tensor(about["scores"], dtype=torch.float32)
                about["chosen"] = torch.tensor(about["chosen"], dtype=torch.bool)
            about |= {"signature": Signature(**about["signature"]), "card": RunCard(**about["card"])}
            return cls(**about)
        except MechunlearnError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise MechunlearnError(f"'{path}' is not a whole circuit file ({type(error).__name__}: {error}).") from None

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
        about = {"for": _described(self.signature, self.parallel), "note": self.note}
        return card(title, about, ("largest", "input", "score"), rows)

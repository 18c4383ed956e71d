"""Does a circuit do what the model does? Every reader sees the circuit's edges.

All other edges carry the corrupt run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.edges import edges, readers, writers
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff, per_fact, positions_read
from mechunlearn.model.component import SCORED, Component
from mechunlearn.model.decoder import Run
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.taps import Tap, tapped
from mechunlearn.patching.corruption import check_finite, check_prompts, paired
from mechunlearn.patching.edges import ATTENTION, check_streams, frozen_scales, rows_before, writer_sites, written
from mechunlearn.patching.sweep import UnitPatch, sweep

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RESAMPLES = 1000


@dataclass(frozen=True)
class Faithfulness:
    """How much of the model's behaviour a circuit keeps.

    Attributes:
        value: (m(circuit) - m(corrupt)) / (m(clean) - m(corrupt)) with m the mean metric over facts: 1 is the model,
            0 the corrupt model, and values above 1 overshoot.
        low: Lower end of its 95 % bootstrap interval over facts.
        high: Upper end of that interval.
        complement: The same of all edges outside the circuit: a complete circuit leaves nothing, 0.
        minimality: One row a component of the circuit: how much the value falls when its edges are removed. Near zero
            means that the circuit does not need it.
        edges: The number of edges in the circuit.
        facts: The number of facts.
    """

    value: float
    low: float
    high: float
    complement: float
    minimality: pd.DataFrame
    edges: int
    facts: int

    @property
    def completeness(self) -> float:
        """1 - |complement|: 1 if nothing is left outside the circuit."""
        return 1 - abs(self.complement)

    def __repr__(self) -> str:
        return (
            f"Faithfulness({self.value:.3f} [{self.low:.3f}, {self.high:.3f}], complement {self.complement:.3f}, "
            f"{self.edges} edges, {self.facts} facts)"
        )


@dataclass(frozen=True)
class Curve:
    """Faithfulness by edge budget, and its areas by trapezoids (the MIB benchmark's; arXiv 2504.13151).

    Compare circuits by `cmd`: `cpr` rewards overshooting.

    Attributes:
        frame: One row a budget: fraction, edges, faithfulness, low, high.
    """

    frame: pd.DataFrame

    @property
    def cpr(self) -> float:
        """The area under faithfulness over the fraction of edges."""
        return float(np.trapezoid(self.frame.faithfulness, self.frame.fraction))

    @property
    def cmd(self) -> float:
        """The area of |1 - faithfulness| over the fraction of edges."""
        return float(np.trapezoid((1 - self.frame.faithfulness).abs(), self.frame.fraction))


def faithfulness(
    model: HookedModel, circuit: Circuit, prompts: Prompts, *, metric: Metric = logit_diff, batch_size: int = 32
) -> Faithfulness:
    """Run the circuit alone: edges outside it carry the corrupt prompts' activations, and what follows is recomputed.

    Choose the budget first: `circuit.top(edges=200)`, `.top(nodes=20)` or `.top(weights=0.05)`. The circuit of all
    edges gives 1 and the empty one 0, exactly. The circuit is not changed. Cost: one patched forward pass for the
    circuit, one for its complement and one a component of it.

    Args:
        model: The model.
        circuit: The circuit, found on this architecture.
        prompts: The facts.
        metric: What is measured.
        batch_size: Facts a batch.

    Raises:
        MechunlearnError: The circuit is of another architecture, or clean and corrupt runs do not differ.

    >>> from mechunlearn.localize import edge_attribution
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = edge_attribution(toy.model, toy.prompts())
    >>> faithfulness(toy.model, found.top(edges=4), toy.prompts()).value > 0.9
    True
    """
    chosen, parts = circuit.chosen, _components(circuit)
    rows = [chosen, edges(circuit.signature, circuit.parallel) & ~chosen, *(chosen & ~part for part in parts.values())]
    found = _measured(model, circuit, prompts, torch.stack(rows), metric, batch_size)
    values = [found.ratio(i) for i in range(len(rows))]
    falls = [values[0] - value for value in values[2:]]
    minimality = pd.DataFrame({"component": list(parts), "fall": falls}).sort_values("fall", key=abs, ascending=False)
    return Faithfulness(
        values[0], *found.interval(0), values[1], minimality.reset_index(drop=True), len(circuit), len(prompts)
    )


def faithfulness_curve(
    model: HookedModel,
    circuit: Circuit,
    prompts: Prompts,
    *,
    fractions: Sequence[float] = FRACTIONS,
    metric: Metric = logit_diff,
    batch_size: int = 32,
) -> Curve:
    """Measure the faithfulness of the circuit's largest edges at growing shares of all edges, with CPR and CMD.

    Args:
        model: The model.
        circuit: The circuit, found on this architecture.
        prompts: The facts.
        fractions: Shares of all edges; by default those of the MIB circuit track.
        metric: What is measured.
        batch_size: Facts a batch.

    Raises:
        MechunlearnError: The circuit is of another architecture, or clean and corrupt runs do not differ.

    >>> from mechunlearn.localize import edge_attribution
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> curve = faithfulness_curve(toy.model, edge_attribution(toy.model, toy.prompts()), toy.prompts())
    >>> round(float(curve.frame.faithfulness.iloc[-1]), 4)
    1.0
    """
    total = int(edges(circuit.signature, circuit.parallel).sum())
    counts = [min(int(fraction * total), len(circuit)) for fraction in fractions]
    rows = torch.stack([circuit.top(edges=count).chosen for count in counts])
    found = _measured(model, circuit, prompts, rows, metric, batch_size)
    values = [(found.ratio(i), *found.interval(i)) for i in range(len(rows))]
    frame = pd.DataFrame(values, columns=["faithfulness", "low", "high"])
    frame.insert(0, "edges", counts)
    frame.insert(0, "fraction", list(fractions))
    return Curve(frame)


def mask_faithfulness(
    model: HookedModel, mask: ComponentMask, prompts: Prompts, *, metric: Metric = logit_diff, batch_size: int = 32
) -> tuple[float, float, float]:
    """Run the mask's heads and neurons alone: all others keep the activation they have on the corrupt prompts.

    A head is run if the mask has its `attn.o` or `attn.q`, or its group's `attn.k` or `attn.v`; a neuron with any of
    its weights. The embedding is that of the clean prompts throughout, so "nothing" is what it does without heads and
    neurons.
    Cost: one clean, one corrupt and two patched passes. A mask of look-up neurons alone is seldom faithful: what they
        write
    must be carried to the answer by other heads. For paths between components use `faithfulness` of a circuit.

    Args:
        model: The model.
        mask: The heads and neurons to run.
        prompts: The facts.
        metric: What is measured.
        batch_size: Facts a batch.

    Returns:
        (m(mask) - m(nothing)) / (m(clean) - m(nothing)) with m the mean metric over facts, and the ends of its 95 %
        bootstrap interval over facts. The mask of everything gives 1 and the empty one 0, exactly.

    Raises:
        MechunlearnError: The mask is of another architecture, or heads and neurons make no difference.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> carried = ComponentMask.of(["L0.mlp.out", "L1.attn.o[0]"], toy.model.signature)
    >>> round(mask_faithfulness(toy.model, carried, toy.prompts())[0], 3)
    1.0
    """
    mask.check(model.signature)
    check_prompts(model, prompts, batch_size)
    run = _units_run(mask)
    sites = [f"L{layer}.{kind}" for layer in range(model.signature.layers) for kind in SCORED]
    found: list[list[Tensor]] = [[], [], []]
    for rows in torch.split(torch.arange(len(prompts)), batch_size):
        pair = paired(model, prompts.select(rows), sites, metric)
        patches, where = [], pair.differs[None].to(model.device)
        for site in sites:
            address, units = Component.parse(site), int(model.signature.units(site.split(".", 1)[1]) or 0)
            outside = ~run.get(site, torch.zeros(units, dtype=torch.bool))
            taken = torch.stack([outside, torch.ones_like(outside)]).to(model.device)
            both, none = torch.arange(2), torch.zeros(2, dtype=torch.long)
            source = pair.source[site][None]
            patches.append(UnitPatch(address.layer, address.kind, both, where, none, source, taken, both))
        values = sweep(model.decoder, pair.base, patches, 2, metric, pair.prompts)
        for parts, value in zip(found, (values[:1], pair.clean, values[1])):
            parts.append(value)
    made = _Values.of(found, "With every head and neuron on the corrupt prompts the metric is the same")
    return made.ratio(0), *made.interval(0)


def _units_run(mask: ComponentMask) -> dict[str, Bool[Tensor, " _unit"]]:
    """The heads (`attn.o`) and neurons (`mlp.out`) that a mask has some weights of."""
    run: dict[str, Tensor] = {}
    group = mask.signature.heads // mask.signature.kv_heads
    for site, chosen in mask.sites.items():
        address = Component.parse(site)
        units = chosen.repeat_interleave(group) if address.kind in ("attn.k", "attn.v") else chosen
        place = f"L{address.layer}.{'attn.o' if address.kind.startswith('attn') else 'mlp.out'}"
        run[place] = run[place] | units if place in run else units
    return run


def stability(
    scores: Float[Tensor, "fact writer reader"], count: int, resamples: int = 100, seed: int = 0
) -> tuple[float, float, float]:
    """Measure how far the largest edges stay the same when the facts are redrawn.

    A circuit that another sample of facts would not give again is not a finding: below .8 report it as unstable (arXiv
    2510.00845).

    Args:
        scores: `edge_scores(model, prompts)`.
        count: How many edges.
        resamples: How many bootstrap samples of the facts.
        seed: Seed of the samples.

    Returns:
        Mean Jaccard overlap with the edges found on all facts, and its 2.5 and 97.5 % quantiles over samples.

    Raises:
        MechunlearnError: There are not so many edges.

    >>> torch.manual_seed(0) and None
    >>> steady = torch.arange(6.0).view(1, 2, 3).repeat(10, 1, 1)
    >>> stability(steady, 2)
    (1.0, 1.0, 1.0)
    """
    flat = scores.flatten(1).double()
    if not 0 < count <= flat.shape[1]:
        raise MechunlearnError(f"Cannot take the {count} largest of {flat.shape[1]} edges. Expected 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    weights = torch.stack(
        [
            torch.bincount(torch.randint(len(flat), (len(flat),), generator=generator), minlength=len(flat))
            for _ in range(resamples)
        ]
    )
    tops = ((weights.double() / len(flat)) @ flat).abs().topk(count, dim=1).indices
    whole = torch.zeros(flat.shape[1], dtype=torch.bool)
    whole[flat.mean(0).abs().topk(count).indices] = True
    shared = whole[tops].sum(1).double()
    found = (shared / (2 * count - shared)).numpy()
    low, high = np.quantile(found, (0.025, 0.975))
    return float(found.mean()), float(low), float(high)


@dataclass(frozen=True)
class _Values:
    """Metric by circuit and fact, and of the clean and the corrupt run."""

    circuit: Float[Tensor, "circuit fact"]
    clean: Float[Tensor, " fact"]
    corrupt: Float[Tensor, " fact"]

    @classmethod
    def of(cls, found: Sequence[Sequence[Tensor]], same: str) -> "_Values":
        """From what was measured in each batch; `same` says what it means if clean and corrupt do not differ."""
        made = cls(*(torch.cat(list(parts), -1).double().cpu() for parts in found))
        if abs(float(made.clean.mean() - made.corrupt.mean())) < 1e-9:
            raise MechunlearnError(
                f"{same}, so faithfulness is not defined. Expected prompts whose corrupt partner changes the answer."
            )
        return made

    def ratio(self, row: int) -> float:
        floor = self.corrupt.mean()
        return float((self.circuit[row].mean() - floor) / (self.clean.mean() - floor))

    def interval(self, row: int) -> tuple[float, float]:
        """Facts are resampled; numerator and denominator from the same ones.

        A sample in which clean and corrupt do not differ has no ratio.
        """
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, len(self.clean), (RESAMPLES, len(self.clean)))
        part, clean, corrupt = (t.numpy()[drawn].mean(1) for t in (self.circuit[row], self.clean, self.corrupt))
        differ = clean != corrupt
        low, high = np.quantile((part - corrupt)[differ] / (clean - corrupt)[differ], (0.025, 0.975))
        return float(low), float(high)


def _components(circuit: Circuit) -> dict[str, Bool[Tensor, "writer reader"]]:
    """Edges from and to each component that has some in the circuit; without grouped queries its key and value too."""
    names, columns = writers(circuit.signature), readers(circuit.signature)
    group = circuit.signature.heads // circuit.signature.kv_heads
    found = {}
    for row, name in enumerate(names):
        touched = torch.zeros_like(circuit.chosen)
        touched[row] = True
        own = {name, f"{name}<q>"}
        if ".h" in name:
            layer, head = name.split(".h")
            own |= {f"{layer}.h{int(head) // group}<{one}>" for one in "kv"} if group == 1 else set()
        touched[:, [i for i, column in enumerate(columns) if column in own]] = True
        if (circuit.chosen & touched).any() and name != "input":
            found[name] = touched
    return found


def _measured(
    model: HookedModel,
    circuit: Circuit,
    prompts: Prompts,
    chosen: Bool[Tensor, "circuit writer reader"],
    metric: Metric,
    batch_size: int,
) -> _Values:
    if circuit.signature != model.signature or circuit.parallel != model.layout.parallel:
        raise MechunlearnError(
            f"The circuit is for ({circuit.signature}), the model is ({model.signature}). Find it again on this model."
        )
    check_prompts(model, prompts, batch_size)
    check_streams(model.decoder)
    found: list[list[Tensor]] = [[], [], []]
    for rows in torch.split(torch.arange(len(prompts)), batch_size):
        part = prompts.select(rows)
        at = positions_read(metric, part).to(model.device)
        sites = [*writer_sites(model.layout), *(f"L{layer}.attn_out" for layer in range(model.signature.layers))]
        corrupt = model.decoder.record(part.corrupt, at, sites, keys=False)
        clean = model.decoder.record(part.tokens, at, keys=False)
        outputs = written(model.decoder, corrupt, frozen_scales(model.decoder, corrupt))
        values = [_run(model, part, corrupt, outputs, at, mask.to(model.device)) for mask in chosen]
        found[0].append(torch.stack([per_fact(metric, logits, part)[0] for logits in values]))
        for i, run in enumerate((clean, corrupt)):
            found[i + 1].append(per_fact(metric, run.logits, part)[0])
        check_finite(model, found[1][-1], part.tokens, metric)
    return _Values.of(found, "Clean and corrupt prompts give the same metric")


@torch.no_grad()
def _run(
    model: HookedModel,
    prompts: Prompts,
    corrupt: Run,
    outputs: Float[Tensor, "writer fact pos d_model"],
    at: Tensor,
    mask: Bool[Tensor, "writer reader"],
) -> Tensor:
    """Logits when each reader sees the corrupt stream plus the change of those writers that the circuit connects to it."""
    decoder, layout, signature = model.decoder, model.layout, model.signature
    parameters = dict(model.hf.named_parameters())
    change = torch.zeros_like(outputs)
    weights, width = mask.to(outputs.dtype), signature.heads + 2 * signature.kv_heads + 1
    counts = (signature.heads, signature.kv_heads, signature.kv_heads)
    kept: dict[str, Tensor] = {}

    def seen(layer: int, first: int, count: int, base: Tensor, mlp: bool = False) -> Tensor:
        """What `count` readers read, `[reader fact pos d_model]`."""
        rows, column = rows_before(layout, layer, mlp), layer * width + first
        return base + torch.einsum("wr,wfpd->rfpd", weights[:rows, column : column + count], change[:rows])

    def project(layer: int, kind: str, projected: Tensor) -> Tensor:
        i = ATTENTION.index(kind)
        x = decoder.part(layer, "attention_norm")(seen(layer, sum(counts[:i]), counts[i], corrupt.resid[layer]))
        weight, bias = layout.head_weights(parameters, layer, kind)
        made = torch.einsum("ufpd,uhd->fpuh", x, weight)
        return (made if bias is None else made + bias).to(projected.dtype)

    def attended(layer: int, projected: Tensor) -> Tensor | None:
        """After W_O: what each head changed, with the scale of this run's own post-norm."""
        here = Run([change[0]], [], [], projected, {f"L{layer}.attn_projected": projected, **kept})
        row = 1 + layer * (signature.heads + 1)
        scale = frozen_scales(decoder, here, [layer]).get(layer)
        weight = layout.head_weights(parameters, layer, "attn.o")[0]
        heads = torch.einsum("fpuh,uhd->ufpd", kept[f"L{layer}.attn.o"], weight)
        change[row : row + signature.heads] = (heads if scale is None else heads * scale) - outputs[
            row : row + len(heads)
        ]
        return None

    def mlp_reads(layer: int, _: Tensor) -> Tensor:
        base = corrupt.resid[layer] if layout.parallel else corrupt.resid[layer] + corrupt.kept[f"L{layer}.attn_out"]
        normed: Tensor = decoder.part(layer, "mlp_norm")(seen(layer, width - 1, 1, base, mlp=True)[0])
        return normed

    def mlp_wrote(layer: int, out: Tensor) -> None:
        row = (layer + 1) * (signature.heads + 1)
        change[row] = out - outputs[row]

    def entered(resid: Tensor) -> None:
        change[0] = resid - outputs[0]

    taps: list[Tap] = [(decoder.blocks[0], "in", entered)]
    for layer in range(signature.layers):
        for kind in ATTENTION:
            taps += decoder.taps(f"L{layer}.{kind}", partial(project, layer, kind))
        taps += decoder.taps(f"L{layer}.attn.o", partial(kept.__setitem__, f"L{layer}.attn.o"))
        taps += decoder.taps(f"L{layer}.attn_projected", partial(attended, layer))
        taps += decoder.taps(f"L{layer}.mlp_in", partial(mlp_reads, layer))
        taps += decoder.taps(f"L{layer}.mlp_out", partial(mlp_wrote, layer))
    last = signature.layers
    taps.append((decoder.final_norm, "in", lambda resid: seen(last, 0, 1, corrupt.resid[last])[0]))
    with tapped([*taps, decoder.reading(at)]):
        logits: Tensor = model.hf(input_ids=prompts.tokens.to(model.device), use_cache=False).logits
    return logits

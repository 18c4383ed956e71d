"""Edge attribution patching: the effect of every edge from a handful of passes and one matrix product a layer."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.edges import edges, readers, writers
from mechunlearn.artifacts.resampling import fits
from mechunlearn.core.batches import in_batches
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff
from mechunlearn.model.decoder import Run
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.corruption import check_prompts
from mechunlearn.patching.edges import (
    ATTENTION,
    attention_gradients,
    check_streams,
    frozen_scales,
    mlp_gradient,
    rows_before,
    writer_sites,
    written,
)
from mechunlearn.patching.gradients import differentiated
from mechunlearn.patching.scores import circuit, localizer

if TYPE_CHECKING:
    from mechunlearn.model.taps import Tap

BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


@localizer
def edge_attribution(
    model: HookedModel,
    prompts: Prompts,
    *,
    ig_steps: int = 0,
    both_ends: bool = False,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Circuit:
    """Estimate how the metric changes when a reader sees the corrupt output of one writer.

    The score of an edge is (corrupt - clean output of the writer) . d metric / d (input of the reader), summed over
    positions and averaged over facts (EAP: Syed, Rager and Conmy 2023, arXiv 2310.10348). A negative score is an edge
    that supports the answer. Readers are each head's query, each key and value head (shared under grouped-query
    attention), each MLP and the logits. In Gemma 2 and 3 a head's contribution passes the norm behind attention with
    its scale frozen at clean.

    Cost: about 3 forward passes for EAP, 2 + 2m for EAP-IG, and one matrix product a layer; memory for a few facts at a
    time. It is exact only where the metric is linear in the edge: check circuits with `faithfulness`.

    Args:
        model: The model.
        prompts: The facts.
        ig_steps: 0 takes the gradient at the clean run (EAP); m > 0 averages it over m left Riemann points of the
            embeddings from corrupt to clean (EAP-IG on the inputs: Hanna et al. 2024, arXiv 2403.17806).
        both_ends: Average the gradients at the corrupt and the clean run ("clean-corrupted", same paper).
        metric: A function of `(logits, prompts)`, one number a fact.
        seed: Recorded only: nothing is drawn.
        batch_size: Facts a batch, or fewer if their vectors need too much memory.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        The estimated change by edge, in units of the metric; `.nodes()` is a localization.

    Raises:
        MechunlearnError: Negative `ig_steps`, a metric of another shape, or facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> edge_attribution(toy.model, toy.prompts([1])).top(edges=2).to_frame().source.tolist()
    ['a1.h0', 'm0']
    """
    points = _points(ig_steps, both_ends)
    size = _facts_at_once(model, prompts, points, batch_size)
    chosen = edges(model.signature, model.layout.parallel)
    total, kept = torch.zeros(chosen.shape), fits(len(prompts), chosen.numel())

    def add(rows: Tensor) -> Tensor | None:
        found = _Batch(model, prompts.select(rows), metric).scores(points, by_fact=kept).float().cpu()
        total.add_(found.sum(0) if kept else found)
        return found if kept else None

    parts = [part for part in in_batches(len(prompts), size, add, "edge attribution", progress) if part is not None]
    by_fact = torch.cat(parts).mul_(chosen) if kept else None
    return circuit(model, (total / len(prompts)).masked_fill(~chosen, 0), chosen, prompts, by_fact)


def edge_scores(
    model: HookedModel,
    prompts: Prompts,
    *,
    ig_steps: int = 0,
    both_ends: bool = False,
    metric: Metric = logit_diff,
    batch_size: int = 32,
) -> Float[Tensor, "fact writer reader"]:
    """Estimate the scores of `edge_attribution` by fact, for resampling (`faithfulness.stability`).

    Args:
        model: The model.
        prompts: The facts.
        ig_steps: As in `edge_attribution`.
        both_ends: As in `edge_attribution`.
        metric: A function of `(logits, prompts)`, one number a fact.
        batch_size: Facts a batch.
    """
    points = _points(ig_steps, both_ends)
    size = _facts_at_once(model, prompts, points, batch_size)
    found = in_batches(
        len(prompts), size, lambda rows: _Batch(model, prompts.select(rows), metric).scores(points, by_fact=True)
    )
    return torch.cat(found).float().cpu() * edges(model.signature, model.layout.parallel)


def _points(ig_steps: int, both_ends: bool) -> list[float]:
    """Where gradients are taken, from the corrupt embeddings (0) to the clean ones (1)."""
    if ig_steps and both_ends:
        raise MechunlearnError(
            f"ig_steps={ig_steps} and both_ends=True are two ways to place gradients. Give one of them."
        )
    return [0.0, 1.0] if both_ends else [k / ig_steps for k in range(ig_steps)]


def _facts_at_once(model: HookedModel, prompts: Prompts, points: list[float], batch_size: int) -> int:
    """As many facts at a time as keep contributions and reader gradients within bounds."""
    check_prompts(model, prompts, batch_size)
    check_streams(model.decoder)
    rows, columns = len(writers(model.signature)), len(readers(model.signature))
    vectors = rows + (columns if points else -(-columns // model.signature.layers))
    size = 4 * vectors * prompts.tokens.shape[1] * model.signature.d_model
    return max(1, min(batch_size, BYTES.get(model.device.type, BYTES["cpu"]) // size))


class _Batch:
    """A few facts: both runs, what changed in every writer, and gradients by reader."""

    def __init__(self, model: HookedModel, prompts: Prompts, metric: Metric) -> None:
        self.model, self.decoder, self.layout = model, model.decoder, model.layout
        self.prompts, self.metric = prompts, metric
        self.nowhere = torch.zeros(len(prompts), 1, dtype=torch.long, device=model.device)
        self.sites = writer_sites(model.layout)

    def scores(self, points: list[float], by_fact: bool) -> Tensor:
        """`[writer reader]` summed over facts, or `[fact writer reader]`.

        Without points the gradient at the clean run.
        """
        corrupt = self.decoder.record(self.prompts.corrupt, self.nowhere, self.sites, keys=False)
        if points:
            clean = self.decoder.record(self.prompts.tokens, self.nowhere, self.sites, keys=False)
            changes = self._changes(clean, corrupt)
            gradients: Iterable[Tensor] = self._integrated(clean.resid[0], corrupt.resid[0], points)
        else:
            clean, found = self._differentiated(None, self.sites)
            changes = self._changes(clean, corrupt)
            gradients = self._by_reader(found)
        columns = []
        for i, gradient in enumerate(gradients):
            rows = rows_before(self.layout, i // 2, mlp=i % 2 == 1)
            columns.append(_product(changes, gradient, rows, by_fact))
        return torch.cat(columns, -1)

    def _changes(self, clean: Run, corrupt: Run) -> Float[Tensor, "writer fact pos d_model"]:
        """Corrupt minus clean output of every writer."""
        kept = {site: corrupt.kept[site] - clean.kept[site] for site in self.sites}
        change = Run([corrupt.resid[0] - clean.resid[0]], [], [], clean.logits, kept)
        return written(self.decoder, change, frozen_scales(self.decoder, clean))

    def _integrated(self, clean: Tensor, corrupt: Tensor, points: list[float]) -> list[Tensor]:
        """The mean gradient by reader over runs from embeddings between corrupt and clean."""
        total: list[Tensor] = []
        for point in points:
            found = self._by_reader(self._differentiated(torch.lerp(corrupt, clean, point), [])[1])
            if not total:
                total = list(found)
            else:
                for so_far, new in zip(total, found, strict=True):
                    so_far += new
        return [gradient.div_(len(points)) for gradient in total]

    def _differentiated(self, start: Tensor | None, sites: list[str]) -> tuple[Run, dict[str, tuple[Tensor, Tensor]]]:
        """A pass from these embeddings (the prompts' own, if None).

        Its activations, and inputs and gradients by part.
        """
        points: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        taps: list[Tap] = []
        layers = range(self.layout.signature.layers)
        for layer in layers:
            taps.append((self.decoder.blocks[layer], "in", partial(_note, inputs, f"{layer} attention")))
            if not self.layout.parallel:
                taps.append((*self.decoder.place(f"L{layer}.resid_mid"), partial(_note, inputs, f"{layer} mlp")))
            taps.append((self.decoder.part(layer, "mlp"), "in", partial(_branch, points, f"{layer} mlp")))
            for name in {self.layout.module_name(layer, kind) for kind in ATTENTION}:
                taps.append((self.model.hf.get_submodule(name), "out", partial(_apart, points, name)))  # noqa: PERF401
        taps.append((self.decoder.final_norm, "in", partial(_branch, points, "logits")))
        taps += [tap for site in sites for tap in self.decoder.taps(site, partial(_note, kept, site))]
        _, logits, gradients = differentiated(self.model, self.prompts, self.metric, start, taps, points)
        read = {f"{layer} mlp": inputs[f"{layer} {'attention' if self.layout.parallel else 'mlp'}"] for layer in layers}
        found = {name: (read.get(name, gradient), gradient) for name, gradient in gradients.items()}
        found |= {name: (x, x) for name, x in inputs.items() if name.endswith("attention")}
        return Run([inputs["0 attention"]], [], [], logits, kept), found

    @torch.no_grad()
    def _by_reader(self, points: dict[str, tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Gradients at the residual stream, `[reader token d_model]`.

        Of attention and of the MLP by layer, then logits.
        """
        for layer in range(self.layout.signature.layers):
            projected = [
                self.layout.heads(kind, points[self.layout.module_name(layer, kind)][1]).flatten(0, 1)
                for kind in ATTENTION
            ]
            yield attention_gradients(self.decoder, layer, points[f"{layer} attention"][0].flatten(0, 1), projected)
            x, gradient = (t.flatten(0, 1) for t in points[f"{layer} mlp"])
            yield mlp_gradient(self.decoder, layer, x, gradient)[None]
        yield points["logits"][1].flatten(0, 1)[None]


def _note(into: dict[str, Tensor], name: str, x: Tensor) -> None:
    into[name] = x.detach()


def _branch(into: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    into[name] = x.view_as(x)
    return into[name]


def _apart(into: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Note a projection and pass a copy on: OLMo clips it in place, and gradients would be those behind the clip."""
    into[name] = x
    return x.clone()


def _product(
    changes: Float[Tensor, "writer fact pos d_model"],
    gradient: Float[Tensor, "reader token d_model"],
    rows: int,
    by_fact: bool,
) -> Tensor:
    """Scores of the first `rows` writers (the others come later than the reader: zero)."""
    count, facts = changes.shape[:2]
    if by_fact:
        ends = changes[:rows].flatten(2), gradient.view(len(gradient), facts, -1)
        found = torch.stack([writer @ reader.T for writer, reader in zip(*(end.unbind(1) for end in ends))])
    else:
        found = changes[:rows].flatten(1) @ gradient.flatten(1).T
    return torch.nn.functional.pad(found, (0, 0, 0, count - rows))

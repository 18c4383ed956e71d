"""Effects that travel along chosen edges only: direct and total paths, and single edges, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.edges import edges, readers, writers
from mechunlearn.core.batches import counter
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric
from mechunlearn.model.decoder import Run
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Layout
from mechunlearn.patching.corruption import Paired, check_prompts, paired
from mechunlearn.patching.cost import TOKENS, check_budget
from mechunlearn.patching.edges import (
    EdgePatch,
    check_streams,
    frozen_scales,
    read_by,
    rows_before,
    writer_sites,
    written,
)
from mechunlearn.patching.sweep import sweep


@dataclass(frozen=True)
class Reader:
    """Where a reader of `artifacts.edges.readers` reads.

    Attributes:
        layer: Its layer; that of the logits is the number of layers.
        kind: `attn.q`, `attn.k`, `attn.v`, `mlp_in`, or `resid_pre` for the logits.
        head: Its head, or KV head.
    """

    layer: int
    kind: str
    head: int = 0

    @classmethod
    def of(cls, index: int, layout: Layout) -> "Reader":
        """Find a reader by its index.

        Args:
            index: Its place in `circuit.readers`.
            layout: The model's layout.
        """
        heads, groups = layout.signature.heads, layout.signature.kv_heads
        layer, place = divmod(index, heads + 2 * groups + 1)
        if layer == layout.signature.layers:
            return cls(layer, "resid_pre")
        for kind, count in (("attn.q", heads), ("attn.k", groups), ("attn.v", groups)):
            if place < count:
                return cls(layer, kind, place)
            place -= count
        return cls(layer, "mlp_in")


def readers_named(model: HookedModel, names: Sequence[str]) -> list[int]:
    """Find the indices of readers by name.

    A head without `<q>`, `<k>` or `<v>` stands for all three (its group's k and v).

    Args:
        model: The model.
        names: At least one name, such as `logits`, `m3`, `a3.h1` or `a3.h1<q>`.

    Raises:
        MechunlearnError: There is no name, or the model has no such reader.
    """
    known, found = readers(model.signature), []
    if not names:
        raise MechunlearnError("There is no receiver. Expected at least one, such as 'logits', 'm3' or 'a3.h1<q>'.")
    group = model.signature.heads // model.signature.kv_heads
    for name in names:
        wanted = [name]
        if name.startswith("a") and "<" not in name and ".h" in name:
            layer, _, head = name.partition(".h")
            shared = int(head) // group if head.isdigit() else head
            wanted = [f"{name}<q>", f"{layer}.h{shared}<k>", f"{layer}.h{shared}<v>"]
        if any(one not in known for one in wanted):
            raise MechunlearnError(
                f"No reader '{name}' in {model.signature}. Expected a head such as 'a3.h1', one of its inputs such as "
                "'a3.h1<q>', an MLP such as 'm3', or 'logits'."
            )
        found += [known.index(one) for one in wanted]
    return sorted(set(found))


@dataclass(frozen=True)
class _Setting:
    """A batch ready for edge patches: both runs, and what changed in every writer."""

    pair: Paired
    change: Float[Tensor, "writer fact pos d_model"]
    where: Bool[Tensor, "1 fact pos"]


def _setting(model: HookedModel, prompts: Prompts, metric: Metric, where: Bool[Tensor, "fact pos"] | None) -> _Setting:
    check_streams(model.decoder)
    sites = writer_sites(model.layout)
    if not model.layout.parallel:
        sites += [f"L{layer}.resid_mid" for layer in range(model.signature.layers)]
    pair = paired(model, prompts, sites, metric, base_sites=sites)
    clean, corrupt = pair.base, pair.other
    assert corrupt is not None
    kept = {site: pair.source[site] - clean.kept[site] for site in writer_sites(model.layout)}
    difference = Run([corrupt.resid[0] - clean.resid[0]], [], [], clean.logits, kept)
    change = written(model.decoder, difference, frozen_scales(model.decoder, clean))
    if where is None:
        return _Setting(pair, change, pair.differs[None])
    reached = pair.differs & where
    return _Setting(pair, change * reached.to(change.device)[None, :, :, None], reached[None])


@torch.no_grad()
def edge_effects(
    model: HookedModel,
    prompts: Prompts,
    pairs: Sequence[tuple[int, int]],
    metric: Metric,
    batch_size: int = 32,
    budget: float | None = None,
    progress: bool | None = False,
) -> Float[Tensor, "edge fact"]:
    """Measure exactly how the metric changes when one reader alone sees the corrupt output of one writer, for each edge.

    Each run restarts at the reader's layer and the first corrupt position.

    Args:
        model: The model.
        prompts: The facts.
        pairs: Edges as (writer, reader) indices.
        metric: What is measured.
        batch_size: Facts a batch.
        budget: Minutes that it may take (see `cost.check_budget`); None for any time.
        progress: Show a bar (see `progress.track`); True says before what it will cost.

    Raises:
        MechunlearnError: A pair is no edge, or there is more work than the budget allows.
    """
    check_prompts(model, prompts, batch_size)
    valid = edges(model.signature, model.layout.parallel)
    for source, index in pairs:
        if not valid[source, index]:
            names = writers(model.signature)[source], readers(model.signature)[index]
            raise MechunlearnError(
                f"There is no edge {names[0]}->{names[1]}: a reader sees only what was written before it."
            )
    found = []
    by_place: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
    for cell, (source, index) in enumerate(pairs):
        reader = Reader.of(index, model.layout)
        by_place.setdefault((reader.layer, reader.kind), []).append((cell, source, reader.head))
    behind = sum(len(entries) * (model.signature.layers - layer) for (layer, _), entries in by_place.items())
    share = behind / model.signature.layers / max(len(pairs), 1)
    check_budget(model, prompts, len(pairs), share, batch_size, budget, progress)
    with counter(len(pairs) * -(-len(prompts) // batch_size), "patched edges", progress) as done:
        for rows in torch.split(torch.arange(len(prompts)), batch_size):
            setting = _setting(model, prompts.select(rows), metric, None)
            patches = [
                _edge_patch(model, setting, *place, *torch.tensor(entries).T.contiguous())
                for place, entries in by_place.items()
            ]
            values = sweep(model.decoder, setting.pair.base, patches, len(pairs), metric, setting.pair.prompts, done)
            found.append(values - setting.pair.clean.to(values))
    return torch.cat(found, 1).float().cpu()


def _edge_patch(
    model: HookedModel,
    setting: _Setting,
    layer: int,
    kind: str,
    cells: Tensor,
    rows: Tensor,
    heads: Tensor,
    change: Tensor | None = None,
) -> EdgePatch:
    read, held = read_by(setting.pair.base, model.layout, layer, kind), change is not None
    where, first = setting.where.to(model.device), torch.zeros_like(cells)
    changed = setting.change if change is None else change
    return EdgePatch(layer, kind, cells, where, first, model.decoder, read, changed, rows, heads, held)


@torch.no_grad()
def path_effects(
    model: HookedModel,
    prompts: Prompts,
    senders: Sequence[int],
    receivers: Sequence[int],
    metric: Metric,
    through: str = "direct",
    batch_size: int = 32,
    where: Bool[Tensor, "fact pos"] | None = None,
    budget: float | None = None,
    progress: bool | None = False,
) -> tuple[Float[Tensor, "sender fact"], Float[Tensor, " fact"], Float[Tensor, " fact"]]:
    """Measure how the metric changes when all receivers see a sender's corrupt output.

    Receivers are held at what they see and everything after them is recomputed (Wang et al. 2022, arXiv 2211.00593,
    appendix B).

    Args:
        model: The model.
        prompts: The facts.
        senders: Indices of writers.
        receivers: Indices of readers.
        metric: What is measured.
        through: `direct`, along the residual stream alone, or `total`, along every path from sender to receivers.
        batch_size: Facts a batch.
        where: Positions at which the sender is corrupt; by default all.
        budget: Minutes that it may take (see `cost.check_budget`); None for any time.
        progress: Show a bar (see `progress.track`); True says before what it will cost.

    Returns:
        The change by sender, and the metric of the clean and the corrupt run.

    Raises:
        MechunlearnError: `through` is neither, or there is more work than the budget allows.
    """
    if through not in ("direct", "total"):
        raise MechunlearnError(f"Cannot follow paths '{through}'. Expected through='direct' or through='total'.")
    check_prompts(model, prompts, batch_size)
    layers, first = model.signature.layers, min(Reader.of(receiver, model.layout).layer for receiver in receivers)
    share = (1 - first / layers) + (through == "total")
    check_budget(model, prompts, len(senders), share, batch_size, budget, progress)
    found, clean, corrupt = [], [], []
    with counter(len(senders) * -(-len(prompts) // batch_size), "patched paths", progress) as done:
        for rows in torch.split(torch.arange(len(prompts)), batch_size):
            part = prompts.select(rows)
            there = None if where is None else where[rows, : part.tokens.shape[1]]
            setting = _setting(model, part, metric, there)
            pair, changes = setting.pair, []
            for chunk in torch.split(torch.tensor(list(senders)), max(1, TOKENS // pair.prompts.tokens.numel())):
                patches = _path_patches(model, setting, chunk, receivers, through == "total")
                values = sweep(model.decoder, pair.base, patches, len(chunk), metric, pair.prompts)
                changes.append(values - pair.clean.to(values))
                done(len(chunk))
            found.append(torch.cat(changes))
            clean.append(pair.clean)
            corrupt.append(pair.corrupt)
    return torch.cat(found, 1).float().cpu(), torch.cat(clean).float().cpu(), torch.cat(corrupt).float().cpu()


def _path_patches(
    model: HookedModel, setting: _Setting, chunk: Tensor, receivers: Sequence[int], total: bool
) -> list[EdgePatch]:
    """One cell a sender of the chunk, in which every receiver behind it reads what it changes."""
    patched = _sent(model, setting, chunk) if total else None
    patches = []
    for reader in (Reader.of(receiver, model.layout) for receiver in receivers):
        mlp = reader.kind == "mlp_in"
        cells = (chunk < rows_before(model.layout, reader.layer, mlp)).nonzero().flatten()
        if len(cells):
            change = None if patched is None else patched[reader.layer, mlp]
            sources, heads = chunk[cells] if patched is None else cells, torch.full_like(cells, reader.head)
            patches.append(_edge_patch(model, setting, reader.layer, reader.kind, cells, sources, heads, change))
    return patches


def _sent(model: HookedModel, setting: _Setting, chunk: Tensor) -> "_Streams":
    """Residual streams when each sender of the chunk is corrupt, minus those of the clean run."""
    layout, pair, copies = model.layout, setting.pair, len(chunk)
    prompts, mask = pair.prompts, setting.where[0].to(model.device)
    hooks: dict[str, partial[Tensor]] = {}
    for row, sender in enumerate(chunk.tolist()):
        layer, place = divmod(sender - 1, layout.signature.heads + 1)
        head = place if place < layout.signature.heads else None
        site = "L0.resid_pre" if sender == 0 else f"L{layer}.{'mlp_out' if head is None else 'attn.o'}"
        hooks.setdefault(site, partial(_send, [], copies, mask)).args[0].append((row, head))
    assert pair.other is not None
    sources = {**pair.source, "L0.resid_pre": pair.other.resid[0]}
    sites = [] if layout.parallel else [f"L{layer}.resid_mid" for layer in range(layout.signature.layers)]
    tokens = prompts.tokens.repeat(copies, 1)
    run = model.decoder.record(
        tokens,
        torch.zeros(len(tokens), 1, dtype=torch.long, device=model.device),
        sites,
        {site: partial(hook, sources[site]) for site, hook in hooks.items()},
        keys=False,
    )
    return _Streams(run, pair.base, copies)


def _send(
    entries: list[tuple[int, int | None]], copies: int, mask: Tensor, source: Tensor, activation: Tensor
) -> Tensor:
    changed = activation.view(copies, -1, *activation.shape[1:]).clone()
    for row, head in entries:
        taken = changed[row] if head is None else changed[row, :, :, head]
        given = source if head is None else source[:, :, head]
        taken[mask] = given[mask]
    return changed.flatten(0, 1)


@dataclass(frozen=True)
class _Streams:
    """What a reader reads in each sender's run minus what it reads in the clean run, `[sender fact pos d_model]`."""

    run: Run
    clean: Run
    copies: int

    def __getitem__(self, place: tuple[int, bool]) -> Tensor:
        layer, mlp = place
        site = f"L{layer}.resid_mid"
        patched, clean = (
            (self.run.kept[site], self.clean.kept[site])
            if mlp and site in self.clean.kept
            else (self.run.resid[layer], self.clean.resid[layer])
        )
        return patched.view(self.copies, -1, *patched.shape[1:]) - clean

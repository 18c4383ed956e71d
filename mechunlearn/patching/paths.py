"""Effects that travel along chosen edges only: direct and total paths, and single edges, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.circuit import edges, readers, writers
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric
from mechunlearn.model.decoder import Run
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Layout
from mechunlearn.patching.corruption import Paired, check_prompts, paired
from mechunlearn.patching.edges import (
    EdgePatch,
    check_streams,
    frozen_scales,
    read_by,
    rows_before,
    writer_sites,
    written,
)
from mechunlearn.patching.sweep import TOKENS, Counter, sweep


@dataclass(frozen=True)
class Reader:
    """Where a reader of `circuit.readers` reads: layer, site kind, head."""

    layer: int
    kind: str
    head: int = 0

    @classmethod
    def of(cls, index: int, layout: Layout) -> "Reader":
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
    """Indices of at least one reader; a head's name without `<q>`, `<k>` or `<v>` stands for all three (its group's k and v)."""
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
    pair = paired(model, prompts, sites, metric, "prompts", False, 0, base_sites=sites)
    clean, corrupt = pair.base, pair.other
    assert corrupt is not None
    kept = {site: pair.source[site] - clean.kept[site] for site in writer_sites(model.layout)}
    difference = Run([corrupt.resid[0] - clean.resid[0]], [], [], clean.logits, kept)
    change = written(model.decoder, difference, frozen_scales(model.decoder, clean))
    reached = pair.differs if where is None else pair.differs & where
    change = change * reached.to(change.device)[None, :, :, None] if where is not None else change
    return _Setting(pair, change, reached[None])


@torch.no_grad()
def edge_effects(
    model: HookedModel,
    prompts: Prompts,
    pairs: Sequence[tuple[int, int]],
    metric: Metric,
    batch_size: int = 32,
    progress: bool = False,
) -> Float[Tensor, "edge fact"]:
    """The exact change of the metric when one reader alone sees the corrupt output of one writer, for each edge.

    Edges are (writer, reader) indices. Each run restarts at the reader's layer and the first corrupt position.
    Raises `MechunlearnError` for a pair that is no edge.
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
    with Counter(len(pairs) * -(-len(prompts) // batch_size), progress) as done:
        for rows in torch.arange(len(prompts)).split(batch_size):
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
    read = read_by(setting.pair.base, model.layout, layer, kind)
    return EdgePatch(
        layer,
        kind,
        cells,
        setting.where.to(model.device),
        torch.zeros_like(cells),
        model.decoder,
        read,
        setting.change if change is None else change,
        rows,
        heads,
        held=change is not None,
    )


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
) -> tuple[Float[Tensor, "sender fact"], Float[Tensor, " fact"], Float[Tensor, " fact"]]:
    """Change of the metric when all receivers see a sender's corrupt output, and the metric clean and corrupt.

    `direct`: along the residual stream alone; `total`: along every path between sender and receivers. Receivers are then
    held at that value and everything after them is recomputed (Wang et al. 2022, arXiv 2211.00593, appendix B).
    `where` limits the sender to some positions.
    """
    if through not in ("direct", "total"):
        raise MechunlearnError(f"Cannot follow paths '{through}'. Expected through='direct' or through='total'.")
    check_prompts(model, prompts, batch_size)
    found, clean, corrupt = [], [], []
    for rows in torch.arange(len(prompts)).split(batch_size):
        part = prompts.select(rows)
        setting = _setting(model, part, metric, None if where is None else where[rows, : part.tokens.shape[1]])
        tokens = len(part) * part.tokens.shape[1]
        changes: list[Tensor] = []
        for chunk in torch.tensor(list(senders)).split(max(1, TOKENS // tokens)):
            patched = _sent(model, setting, chunk) if through == "total" else None
            patches = []
            for receiver in receivers:
                reader = Reader.of(receiver, model.layout)
                before = chunk < rows_before(model.layout, reader.layer, reader.kind == "mlp_in")
                cells = before.nonzero().flatten()
                if len(cells):
                    change = None if patched is None else patched[reader.layer, reader.kind == "mlp_in"]
                    sources = chunk[cells] if patched is None else cells
                    heads = torch.full_like(cells, reader.head)
                    patches.append(
                        _edge_patch(model, setting, reader.layer, reader.kind, cells, sources, heads, change)
                    )
            values = sweep(model.decoder, setting.pair.base, patches, len(chunk), metric, setting.pair.prompts)
            changes.append(values - setting.pair.clean.to(values))
        found.append(torch.cat(changes))
        clean.append(setting.pair.clean)
        corrupt.append(setting.pair.corrupt)
    return torch.cat(found, 1).float().cpu(), torch.cat(clean).float().cpu(), torch.cat(corrupt).float().cpu()


def _sent(model: HookedModel, setting: _Setting, chunk: Tensor) -> "_Streams":
    """Residual streams when each sender of the chunk is corrupt, minus those of the clean run."""
    layout, pair, copies = model.layout, setting.pair, len(chunk)
    prompts, mask = pair.prompts, setting.where[0].to(model.device)
    hooks: dict[str, partial] = {}
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


def _send(entries: list, copies: int, mask: Tensor, source: Tensor, activation: Tensor) -> Tensor:
    changed = activation.unflatten(0, (copies, -1)).clone()
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
        return patched.unflatten(0, (self.copies, -1)) - clean

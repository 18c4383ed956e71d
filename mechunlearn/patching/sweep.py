"""Exact patching: runs in which some activations come from another run, many at a time.

A cell is one patched run of every fact. It enters the computation at the layer and position of its first patch: what
lies before is the same as in the base run, whose residual stream, keys and values are reused. Cells that enter at later
layers join the batch of those already under way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.core.batches import counter, enough_memory
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.metrics.answers import Metric, per_fact, positions_read
from mechunlearn.model.decoder import Decoder, Run
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import KINDS
from mechunlearn.model.restart import Restart
from mechunlearn.patching.corruption import (
    Paired,
    check_prompts,
    inside,
    paired,
    role_means,
    unchanged,
    with_corruption,
)
from mechunlearn.patching.cost import TOKENS, check_budget


@dataclass(frozen=True)
class Patch:
    """A change of one site in some cells of a sweep.

    Attributes:
        layer: The layer of the site.
        kind: The kind of the site, such as `attn.o`.
        cells: The cells that it changes.
        where: Positions, one row a choice of them.
        rows: By cell, the row of `where` whose positions change.
    """

    layer: int
    kind: str
    cells: Int[Tensor, " cell"]
    where: Bool[Tensor, "row fact pos"]
    rows: Int[Tensor, " cell"]

    def applied(self, seen: Tensor, chosen: Tensor, start: int) -> Tensor:
        """Return the new activations of some cells.

        Args:
            seen: Their activations as computed, `[cell fact pos ...]`.
            chosen: Indices of the cells in this patch.
            start: The position at which `seen` begins.
        """
        raise NotImplementedError


Entry = tuple[Patch, Tensor, Tensor]  # a patch, indices of cells in it, their rows in a chunk


@dataclass(frozen=True)
class UnitPatch(Patch):
    """What some cells of a sweep take from another run at one site.

    Attributes:
        source: The activations to take, for all cells or one entry a cell.
        units: Units, one row a choice of them; None for all.
        blocks: By cell, the row of `units`.
    """

    source: Float[Tensor, "#cell fact pos *unit"]
    units: Bool[Tensor, "block unit"] | None = None
    blocks: Int[Tensor, " cell"] | None = None

    def applied(self, seen: Float[Tensor, "some fact t *unit"], chosen: Tensor, start: int) -> Tensor:
        """Put what the cells take into their activations; see `Patch.applied`.

        Args:
            seen: Activations of the cells as computed.
            chosen: Indices of the cells in this patch.
            start: The position at which `seen` begins.
        """
        stop = start + seen.shape[2]
        mask = self.where[self.rows[chosen], :, start:stop]
        if self.units is not None and self.blocks is not None:
            mask = mask[..., None] & self.units[self.blocks[chosen]][:, None, None]
        mask = mask.view(*mask.shape, *[1] * (seen.ndim - mask.ndim))
        source = self.source[chosen] if len(self.source) > 1 else self.source
        return torch.where(mask, source[:, :, start:stop].to(seen.dtype), seen)


@torch.no_grad()
def sweep(
    decoder: Decoder,
    base: Run,
    patches: Sequence[Patch],
    cells: int,
    metric: Metric,
    prompts: Prompts,
    done: Callable[[int], object] | None = None,
) -> Float[Tensor, "cell fact"]:
    """Measure every cell. Base, sources, masks and prompts are of the same batch of facts.

    Args:
        decoder: The model.
        base: The run that is patched.
        patches: What changes in which cells.
        cells: The number of cells.
        metric: What is measured.
        prompts: The facts.
        done: Called with the number of cells that have just been measured.
    """
    layers, facts, length = len(base.resid) - 1, *base.resid[0].shape[:2]
    at = positions_read(metric, prompts).to(base.resid[0].device)
    values = per_fact(metric, base.logits, prompts).repeat(cells, 1)
    enters = torch.full((cells,), layers)
    begins = torch.full((cells,), length)
    for patch in patches:
        taken = patch.where.any(1)
        first = torch.where(taken.any(1), taken.int().argmax(1), length).cpu()[patch.rows]
        enters.scatter_reduce_(0, patch.cells, torch.full_like(patch.cells, patch.layer), "amin")
        begins.scatter_reduce_(0, patch.cells, first, "amin")
    stop = int(at.max()) + 1
    begins = torch.where(begins < stop, begins.clamp(max=int(at.min())), length)
    for start in sorted(set(begins[begins < length].tolist())):
        pending = (begins == start).nonzero().flatten()
        pending = pending[enters[pending].argsort(stable=True)]
        restart = decoder.restart(start, stop, base)
        size = max(1, TOKENS // (facts * (stop - start)))
        while len(pending):
            with enough_memory(min(size, len(pending))) as smaller:
                chunk = pending[:size]
                hidden = _run(decoder, base, patches, chunk, enters, restart)
                read = hidden[:, torch.arange(facts, device=at.device)[:, None], at - start]
                logits = decoder.unembed(read.flatten(0, 1))
                values[chunk] = per_fact(metric, logits, prompts, copies=len(chunk)).to(values)
                pending = pending[size:]
                if done is not None:
                    done(len(chunk))
            size = smaller[0] if smaller[1:] else size
    return values


def _run(
    decoder: Decoder, base: Run, patches: Sequence[Patch], chunk: Tensor, enters: Tensor, restart: Restart
) -> Tensor:
    """What leaves the last block in each cell of a chunk, `[cell fact pos d_model]`; the chunk is sorted by layer."""
    facts, layers = len(base.resid[0]), len(base.resid) - 1
    place = {cell: i for i, cell in enumerate(chunk.tolist())}
    begun, at_layer = enters[chunk], _by_layer(patches, place)
    span = slice(restart.start, restart.stop)
    hidden = base.resid[0].new_empty(0, facts, restart.stop - restart.start, base.resid[0].shape[-1])
    for layer in range(int(begun[0]), layers + 1):
        joining = int((begun == layer).sum())
        if joining:
            new = base.resid[layer][None, :, span].expand(joining, -1, -1, -1)
            hidden = torch.cat([hidden, new]) if len(hidden) else new
        here = at_layer.get(layer, {})
        for patch, chosen, targets in here.pop("resid_pre", ()):
            hidden = hidden.clone()
            hidden[targets] = patch.applied(hidden[targets], chosen, span.start)
        if layer == layers:
            break
        taps = {f"L{layer}.{kind}": partial(_patched, entries, facts, span.start) for kind, entries in here.items()}
        with decoder.hooks(taps):
            hidden = restart.block(layer, hidden.reshape(-1, *hidden.shape[2:])).view(hidden.shape)
    return hidden


def _by_layer(patches: Sequence[Patch], place: dict[int, int]) -> dict[int, dict[str, list[Entry]]]:
    """Patches of some cells by layer and kind: patch, indices into it, rows of the cells in the chunk."""
    found: dict[int, dict[str, list[Entry]]] = {}
    wanted = torch.tensor(list(place))
    for patch in patches:
        chosen = torch.isin(patch.cells, wanted).nonzero().flatten()
        if len(chosen):
            targets = torch.tensor([place[cell] for cell in patch.cells[chosen].tolist()])
            found.setdefault(patch.layer, {}).setdefault(patch.kind, []).append((patch, chosen, targets))
    return found


def _patched(entries: list[Entry], facts: int, start: int, activation: Tensor) -> Tensor:
    seen = activation.view(-1, facts, *activation.shape[1:]).clone()
    for patch, chosen, targets in entries:
        seen[targets] = patch.applied(seen[targets], chosen, start)
    return seen.flatten(0, 1)


@dataclass(frozen=True)
class Effects:
    """What patching did to the metric.

    Attributes:
        by_site: The change of the metric, `[row block fact]` by site; a block of `mlp.out` is `neurons` neurons.
        rows: Names of the rows: all positions first, then token roles or positions.
        clean: The metric of the clean run.
        corrupt: The metric of the corrupt run.
        neurons: Neurons a block.
        unchanged: How many facts have no corrupt partner that differs from them.
    """

    by_site: dict[str, Float[Tensor, "row block fact"]]
    rows: tuple[str, ...]
    clean: Float[Tensor, " fact"]
    corrupt: Float[Tensor, " fact"]
    neurons: int = 1
    unchanged: int = 0


def effects(
    model: HookedModel,
    prompts: Prompts,
    metric: Metric,
    kinds: Sequence[str],
    *,
    by: str | None = None,
    denoise: bool = False,
    corrupt: str = "prompts",
    neurons: int = 1,
    window: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    sigma: float = 3.0,
    budget: float | None = None,
    progress: bool | None = False,
    only: Mapping[str, Bool[Tensor, "_block _unit"]] | None = None,
) -> Effects:
    """Patch every unit of the sites of some kinds, at all positions and (`by`) at each token role or position.

    Args:
        model: The model.
        prompts: The facts.
        metric: What is measured.
        kinds: Kinds of sites, such as `attn.o` and `mlp.out`.
        by: `role` or `position`: patch at each of these too.
        denoise: Put clean activations into the corrupt run, not corrupt ones into the clean run.
        corrupt: One of `corruption.CORRUPTIONS`.
        neurons: How many neurons are patched together.
        window: How many neighbouring layers are patched together.
        seed: Seed of what a corruption draws.
        batch_size: Facts a batch.
        sigma: Size of the noise, in standard deviations of the embeddings.
        budget: Minutes that the sweep may take (see `cost.check_budget`); None for any time.
        progress: Show a bar (see `progress.track`); True says before what the sweep will cost.
        only: The sites and units to patch instead of those of `kinds`, each row as one.

    Raises:
        MechunlearnError: Unknown kind, corruption or `by`, facts that do not fit the model, or more work than the
            budget allows.
    """
    if only is None:
        check_kinds(model, kinds)
    if neurons < 1 or (neurons > 1 and "mlp.out" not in kinds):
        raise MechunlearnError(
            f"Cannot patch {neurons} neurons at a time with kinds {list(kinds)}. Expected neurons=1 or more, and "
            "'mlp.out' among the kinds for more."
        )
    if denoise and corrupt in ("zero", "mean"):
        raise MechunlearnError(f"There is no corrupt run to restore with corrupt='{corrupt}'. Use denoise=False.")
    check_prompts(model, prompts, batch_size)
    names = rows_of(prompts, by)[1]
    width = prompts.tokens.shape[1]
    prompts = with_corruption(prompts, corrupt, seed, model)
    sites = [f"L{layer}.{kind}" for layer in range(model.signature.layers) for kind in kinds]
    blocks = dict(only) if only is not None else {s: _blocks(model, s.split(".", 1)[1], neurons) for s in sites}
    means = role_means(model, prompts, list(blocks), batch_size) if corrupt == "mean" else None
    counts = {site: 1 if chosen is None else len(chosen) for site, chosen in blocks.items()}
    cells = len(names) * sum(counts.values())
    behind = [count * (1 - int(site[1:].split(".")[0]) / model.signature.layers) for site, count in counts.items()]
    share = sum(behind) / sum(counts.values())
    check_budget(model, prompts, cells, share, batch_size, budget, progress)
    changes: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    with counter(cells * -(-len(prompts) // batch_size), "patched runs", progress) as done:
        for rows in torch.split(torch.arange(len(prompts)), batch_size):
            pair = paired(model, prompts.select(rows), list(blocks), metric, corrupt, denoise, seed, means, sigma)
            patches = _patches(model, pair, blocks, by, window, width)
            values = sweep(model.decoder, pair.base, patches, cells, metric, pair.prompts, done)
            changes.append((values - (pair.corrupt if denoise else pair.clean).to(values)).float().cpu())
            pairs.append((pair.clean.float().cpu(), pair.corrupt.float().cpu()))
    parts = torch.split(torch.cat(changes, 1), [count * len(names) for count in counts.values()])
    by_site = {
        site: part.view(count, len(names), -1).transpose(0, 1)
        for (site, count), part in zip(counts.items(), parts, strict=True)
    }
    clean, other = (torch.cat(one) for one in zip(*pairs, strict=True))
    return Effects(by_site, names, clean, other, neurons, unchanged(prompts, corrupt))


def check_kinds(model: HookedModel, kinds: Sequence[str]) -> None:
    """Check that every kind is an activation of this model, and none is given twice.

    Args:
        model: The model.
        kinds: Kinds of sites, such as `attn.o`.

    Raises:
        MechunlearnError: A kind is unknown, there is none, or two score the same units.
    """
    if not kinds or len(set(kinds)) < len(kinds):
        raise MechunlearnError(
            f"Kinds {list(kinds)} are none or name one twice. Expected some, such as 'attn.o' and 'mlp.out'."
        )
    for kind in kinds:
        model.decoder.place(f"L0.{kind}")
    for unit, whole in (("attn.o", "attn_out"), ("mlp.out", "mlp_out")):
        if unit in kinds and whole in kinds:
            raise MechunlearnError(f"Kinds '{unit}' and '{whole}' score the same units. Give one of them.")


def _blocks(model: HookedModel, kind: str, neurons: int) -> Bool[Tensor, "block unit"] | None:
    if kind not in KINDS:
        return None
    units = model.signature.units(kind)
    assert units is not None
    size = neurons if kind == "mlp.out" else 1
    return torch.arange(units)[None] // size == torch.arange(-(-units // size))[:, None]


def _patches(
    model: HookedModel, pair: Paired, blocks: Mapping[str, Tensor | None], by: str | None, window: int, width: int
) -> list[UnitPatch]:
    """One cell a unit (or block of neurons) and row, row 0 being all positions; a window patches layers around."""
    layers, where = model.signature.layers, (rows_of(pair.prompts, by, width)[0] & pair.differs).to(model.device)
    patches, offset, before = [], 0, (window - 1) // 2
    for site, chosen in blocks.items():
        layer, kind = int(site[1:].split(".")[0]), site.split(".", 1)[1]
        count = 1 if chosen is None else len(chosen)
        cells = offset + torch.arange(count * len(where))
        offset += len(cells)
        behind = kind == "resid_post"  # what leaves a block is what enters the next
        rows, units = torch.arange(len(where)).repeat(count), torch.arange(count).repeat_interleave(len(where))
        taken = None if chosen is None else chosen.to(model.device)
        for at in range(max(0, layer - before), min(layers, layer - before + window)):
            source = pair.source[f"L{at}.{kind}"][None]
            patches.append(
                UnitPatch(at + behind, "resid_pre" if behind else kind, cells, where, rows, source, taken, units)
            )
    return patches


def rows_of(
    prompts: Prompts, by: str | None, width: int | None = None
) -> tuple[Bool[Tensor, "row fact pos"], tuple[str, ...]]:
    """Return the positions of each row and the rows' names: all, then each token role or position.

    Args:
        prompts: The facts.
        by: "role", "position", or None for all positions alone.
        width: Positions of all facts, where these are a batch of shorter ones.

    Raises:
        MechunlearnError: `by` is none of these.
    """
    everywhere = inside(prompts)
    if by is None:
        return everywhere[None], ("all",)
    if by == "role":
        names = [name for name in ROLES if name != "padding"]
        rows = [prompts.roles == ROLES.index(name) for name in names]
    elif by == "position":
        positions = torch.arange(everywhere.shape[1])
        names = [str(i) for i in range(width or len(positions))]
        rows = [everywhere & (positions == i) for i in range(len(names))]
    else:
        raise MechunlearnError(f"Cannot patch by '{by}'. Expected by='role', by='position', or None for all positions.")
    return torch.stack([everywhere, *rows]), ("all", *names)

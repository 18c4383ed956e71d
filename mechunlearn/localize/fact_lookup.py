"""Fact-lookup MLPs: the layers in which an attribute of the subject becomes readable at its last token."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mechunlearn.artifacts.edges import writers
from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.progress import track
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered, logit_diff
from mechunlearn.metrics.probes import probe_curve, residuals
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.paths import path_effects, readers_named
from mechunlearn.patching.scores import localization, localizer

CLASSES, EACH = 64, 4
HEADS, SHARE, ALONE, BATCH = 10, 0.02, 0.9, 64
RULES = ("probe", "paths")
Found = tuple[dict[int, float], dict[str, Any], str]  # each layer's share, evidence, a sentence


@localizer
def fact_lookup(
    model: HookedModel, prompts: Prompts, *, rule: str = "probe", seed: int = 0, progress: bool | None = None
) -> Localization:
    """Find the MLPs that look the fact up at the subject. `found.above(0)` is the mask; all other units score zero.

    Give facts that the model knows (`facts.known(model)`): what it does not know is not looked up.

    `rule="probe"` (arXiv 2410.12949 for facts with few answers; the window was chosen by eye there): a linear probe for
    the answer is trained at every depth on other subjects of the same data set that the model knows, and tested on
    these and a fifth of the others (without a larger data set: 80 / 20 of these). The window is the smallest run of MLP
    layers that covers the rise of its accuracy from 10 % to 90 %, or to within two standard errors of its best; every
    neuron in it scores its layer's share of the rise. If the probe never gets half of the way from the majority class
    to 1, is nearly as good at the embedding, or rises by less than two standard errors, no window is found. Use it
    where answers are shared: it takes the answers (64 at most) that four training subjects or more have, leaves the
    facts with other answers out and counts them. Cost: two forward passes over the data set and one regression a depth.

    `rule="paths"` (the same paper, for CounterFact): path patching in two hops. First the 10 heads with the largest
    direct effect on the logits (fact extraction); then every MLP, at the subject's last token, through the inputs of
    those heads along direct paths. Every MLP with more than .02 of the corrupt prompts' whole effect is kept; every
    neuron in it scores its layer's share. The window is the run of neighbouring ones that has most of it in all.

    An early MLP often writes which token this is, and has the largest effect for any relation. So each MLP's output at
    the subject's last token is compared with its output for the same token behind another fact's subject, without the
    prompt: the cosine of the two, each minus its mean over facts, is averaged over facts. Above .9 (four fifths of the
    variance) it is token identity, and left out, unless nothing else is above .02: a subject of one token may be looked
    up in an MLP that needs no context, which this cannot tell from identity; the note then names both. With one fact,
    or facts that all end in one token, nothing is left out. Needs no shared answers. Cost: a few runs a component.

    Args:
        model: The model.
        prompts: The facts; their subjects must be named.
        rule: `probe` or `paths`.
        seed: Seed of the split into training and test subjects.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        Scores of neurons. `evidence` holds the curve (`probe`), or the shares of heads and MLPs and the cosine by MLP
        in `token_identity` (`paths`); `layers` are those that score, and `window` the first and last layer of the
        window. `note` says what was found.

    Raises:
        MechunlearnError: Fewer than two answers have four training subjects each, most facts have other answers, or
            no subject is named.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> fact_lookup(toy.model, toy.prompts()).evidence["window"]
    [0, 0]
    >>> fact_lookup(toy.model, toy.prompts(), rule="paths").evidence["layers"]
    [0]
    """
    if rule not in RULES:
        raise MechunlearnError(f"Unknown rule '{rule}'. Expected one of {', '.join(RULES)}.")
    found = _by_probe(model, prompts, seed, progress) if rule == "probe" else _by_paths(model, prompts, progress)
    shares, evidence, said = found
    scores = {f"L{layer}.mlp.out": torch.zeros(model.signature.d_mlp) for layer in range(model.signature.layers)}
    for layer, share in shares.items():
        scores[f"L{layer}.mlp.out"] += share
    window = max(_runs(sorted(shares)), key=lambda run: sum(shares[layer] for layer in run), default=[])
    also = [layer for layer in sorted(shares) if layer not in window]
    ends = dict.fromkeys((window[0], window[-1])) if window else ()
    note = f"look-up window: MLP {' to '.join(map(str, ends))}" if window else "no window found"
    note += f" (also above the threshold: {', '.join(map(str, also))})" if also else ""
    evidence |= {"layers": sorted(shares), "window": [window[0], window[-1]] if window else None}
    return localization(model, scores, evidence, ("; " if window else ": ").join(filter(None, [note, said])))


def _by_probe(model: HookedModel, prompts: Prompts, seed: int, progress: bool | None) -> Found:
    train, test, dropped, unknown = _train_and_test(model, prompts, seed)
    labels, held_out = _labels(train), _labels(test)
    depths = list(zip(*(residuals(model, part, _subject_last(part)) for part in (train, test)), strict=True))
    probes = track(depths, "probes", progress=progress)
    curve = [probe_curve(x[None], labels, unseen[None], held_out)[0] for x, unseen in probes]
    majority = max(Counter(held_out).values()) / len(held_out)
    start, top = curve[0], max(curve)
    window, rise = lookup_window(curve, majority, len(test)), top - start
    inside = range(window[0], window[1] + 1) if window else ()
    shares = {layer: max((curve[layer + 1] - curve[layer]) / rise, 0.01) for layer in inside}
    evidence = {"curve": curve, "majority": majority, "train": len(train), "test": len(test)}
    evidence |= {"dropped": dropped, "unknown": unknown}
    readable, best = (1 + majority) / 2, f"best probe {top:.2f}, majority {majority:.2f}"
    said = []
    if not window and top < readable:
        said.append(f"the answer is never readable at the subject ({best})")
    elif not window and start >= readable:
        said.append(f"the answer is readable from the embedding on ({start:.2f}), so there is no rise to locate")
    elif not window:
        said.append(
            f"the probe rises from {start:.2f} to {top:.2f}, too little to locate with {len(test)} test subjects"
        )
    if dropped:
        said.append(f"{dropped} of {len(train) + len(test) + dropped} facts have a rare answer and were left out")
    if unknown:
        said.append(f"{unknown} more are not known to the model")
    return shares, evidence, "; ".join(said)


def _by_paths(model: HookedModel, prompts: Prompts, progress: bool | None) -> Found:
    last = torch.arange(prompts.tokens.shape[1]) == _subject_last(prompts)[:, None]
    names = writers(model.signature)
    heads = [i for i, name in enumerate(names) if ".h" in name]
    mlps = [i for i, name in enumerate(names) if name[0] == "m"]
    logits = readers_named(model, ["logits"])
    effect, clean, corrupt = path_effects(model, prompts, heads, logits, logit_diff, progress=progress)
    whole = float((corrupt - clean).mean())
    if abs(whole) < 1e-6:
        return {}, {"heads": {}, "mlps": {}, "token_identity": {}}, "clean and corrupt prompts give the same answer"
    direct = effect.mean(1) / whole
    order = direct.abs().argsort(descending=True, stable=True)[:HEADS]
    extraction = [names[heads[i]] for i in order.tolist()]
    into = readers_named(model, extraction)
    effect, _, _ = path_effects(model, prompts, mlps, into, logit_diff, where=last, progress=progress)
    shares = (effect.mean(1) / whole).tolist()
    alike = _alike_without_context(model, prompts)
    above = [layer for layer, share in enumerate(shares) if share > SHARE]
    token = [layer for layer in above if alike[layer] > ALONE]
    kept = [layer for layer in above if layer not in token] or token
    evidence = {
        "heads": {name: float(direct[i]) for name, i in zip(extraction, order.tolist(), strict=True)},
        "mlps": {f"m{layer}": share for layer, share in enumerate(shares)},
        "token_identity": {f"m{layer}": cosine for layer, cosine in enumerate(alike)},
    }
    said = ""
    if not above:
        said = f"no MLP reaches the extraction heads from the subject's last token (largest share {max(shares):.3f})"
    elif token:
        each = ", ".join(
            f"MLP {layer} ({shares[layer]:.2f} of the effect, cosine {alike[layer]:.2f})" for layer in token
        )
        said = f"{each} writes the same for the token alone: token identity, left out"
        if kept == token:
            said = f"{each} writes the same for the token alone: a look-up that needs no context, or token identity"
    return {layer: shares[layer] for layer in kept}, evidence, said


@torch.no_grad()
def _alike_without_context(model: HookedModel, prompts: Prompts) -> list[float]:
    """Mean cosine, by layer, of what an MLP writes at the subject's last token, and at that token behind another subject."""
    at, rows = _subject_last(prompts), torch.arange(len(prompts))
    token, sites = prompts.tokens[rows, at], [f"L{layer}.mlp_out" for layer in range(model.signature.layers)]
    alone = torch.stack([prompts.tokens[:, 0], token.roll(1), token], 1)
    written = []
    for tokens, position in ((prompts.tokens, at), (alone, torch.full_like(at, 2))):
        found = []
        for part in rows.split(BATCH):
            _, kept = model.cache(tokens[part], sites)
            found.append(torch.stack([kept[site][torch.arange(len(part)), position[part]] for site in sites]).float())
        whole = torch.cat(found, 1)
        written.append(whole - whole.mean(1, keepdim=True))
    cosines: list[float] = torch.cosine_similarity(written[0], written[1], dim=-1).mean(1).tolist()
    return cosines


def _runs(layers: list[int]) -> list[list[int]]:
    """Runs of neighbouring layers."""
    return [
        [layer for i, layer in enumerate(layers) if layer - i == key]
        for key in sorted({n - i for i, n in enumerate(layers)})
    ]


def lookup_window(curve: list[float], majority: float, tested: int | None = None) -> tuple[int, int] | None:
    """Find the first and last MLP of the 10 to 90 % rise of a probe curve; None if it does not rise enough.

    With `tested`, a rise of less than two standard errors is none, and the window ends at the latest where the curve is
    within two standard errors of its best: a peak behind a plateau is often chance.

    Args:
        curve: Accuracy after 0, 1, ... all blocks.
        majority: The share of the most frequent answer.
        tested: How many facts the accuracy is of. None: the curve is taken as it is.

    >>> lookup_window([0.25, 0.3, 0.7, 0.95, 1.0], majority=0.25)
    (1, 2)
    >>> lookup_window([0.25, 0.3, 0.35, 0.3, 0.34], majority=0.25) is None
    True
    >>> plateau = [0.68, 0.7, 0.8, 0.9, 0.89, 0.9, 0.95]
    >>> lookup_window(plateau, majority=0.5), lookup_window(plateau, majority=0.5, tested=60)
    ((1, 5), (1, 2))
    """
    start, top = curve[0], max(curve)
    reached_at = start + 0.9 * (top - start)
    if top < (1 + majority) / 2 or top - start < 0.25 * (1 - majority):
        return None
    if tested:
        if top - start <= 2 * math.sqrt((start * (1 - start) + top * (1 - top)) / tested):
            return None
        reached_at = min(reached_at, top - 2 * math.sqrt(top * (1 - top) / tested))
    begun_at = start + 0.1 * (top - start)
    begun, reached = (next(k for k, y in enumerate(curve) if y >= level) for level in (begun_at, reached_at))
    return max(begun - 1, 0), max(reached - 1, begun - 1, 0)


def _train_and_test(model: HookedModel, prompts: Prompts, seed: int) -> tuple[Prompts, Prompts, int, int]:
    """Train on 80 % of the data set's other subjects, test on the rest of them and on these facts.

    Facts whose answer fewer than `EACH` training facts have are in neither, nor other subjects' facts that the model
    does not know; the third and fourth value count them.
    """
    generator, source = torch.Generator().manual_seed(seed), prompts.facts and prompts.facts.source
    parts = []
    if prompts.facts is not None and source:
        everyone = source.prompts(model, prompts.format)
        assert everyone.facts is not None
        mine = torch.tensor([fact.subject in prompts.facts.subjects for fact in everyone.facts])
        asked, others = mine.nonzero().flatten(), (~mine).nonzero().flatten()
        others = others[torch.randperm(len(others), generator=generator)]
        others = others[answered(model, everyone.select(others))]
        cut = len(others) // 5
        parts.append((everyone, asked, others[cut:], torch.cat([asked, others[:cut]])))
    shuffled = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    cut = max(1, len(prompts) // 5)
    parts.append((prompts, shuffled, shuffled[cut:], shuffled[:cut]))
    for all_of, asked, *halves in parts:
        labels = _labels(all_of)
        often = Counter(labels[i] for i in halves[0].tolist()).most_common(CLASSES)
        frequent = {answer for answer, count in often if count >= EACH}
        train, test = ([i for i in half.tolist() if labels[i] in frequent] for half in halves)
        kept = sum(labels[i] in frequent for i in asked.tolist())
        if len(frequent) > 1 and test and kept >= len(asked) / 2:
            used = sum(map(len, halves))
            return all_of.select(train), all_of.select(test), used - len(train) - len(test), len(labels) - used
    raise MechunlearnError(
        f"The probe needs two answers or more that {EACH} training subjects share, and half of the facts with such "
        f"answers. These {len(labels)} facts, {len(halves[0])} of them for training, have {len(set(labels))} different "
        "answers. Use rule='paths' or attribution_patching for facts that share no answers, or give more facts."
    )


def _labels(prompts: Prompts) -> list[str]:
    return [str(row) for row in prompts.answers.tolist()]


def _subject_last(prompts: Prompts) -> Tensor:
    if (prompts.spans < 0).any():
        raise MechunlearnError("fact_lookup reads at the subject's last token; some prompts name no subject.")
    return prompts.spans[:, 1]

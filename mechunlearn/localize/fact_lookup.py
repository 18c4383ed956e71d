"""Fact-lookup MLPs: the layers in which an attribute of the subject becomes readable at its last token."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mechunlearn.artifacts.edges import writers
from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.progress import track
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import logit_diff
from mechunlearn.metrics.probes import probe_curve, residuals
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.paths import path_effects, readers_named
from mechunlearn.patching.scores import localization, localizer

CLASSES = 64
HEADS, SHARE = 10, 0.02
RULES = ("probe", "paths")


@localizer
def fact_lookup(
    model: HookedModel, prompts: Prompts, *, rule: str = "probe", seed: int = 0, progress: bool | None = None
) -> Localization:
    """Find the MLPs that look the fact up at the subject. `found.above(0)` is the mask; all other units score zero.

    `rule="probe"` (arXiv 2410.12949 for facts with few answers; the window was chosen by eye there): a linear probe for
    the answer is trained at every depth on other subjects of the same data set and tested on these and a fifth of the
    others (without a larger data set: 80 / 20 of these). The window is the smallest run of MLP layers that covers the
    rise of its accuracy from 10 % to 90 %; every neuron in it scores its layer's share of the rise. If the probe never
    gets half of the way from the majority class to 1, no window is found. Use it where answers are shared; with one
    answer a subject there is nothing to classify. Cost: one forward pass over the data set and one regression a depth.

    `rule="paths"` (the same paper, for CounterFact): path patching in two hops. First the 10 heads with the largest
    direct effect on the logits (fact extraction); then every MLP, at the subject's last token, through the inputs of
    those heads along direct paths. The window is the run of neighbouring MLPs, each with more than .02 of the corrupt
    prompts' whole effect, that has most of it in all; every neuron in it scores its layer's share. MLPs above .02
    outside are named in `evidence["elsewhere"]` and the note; without any, no window is found. Needs no shared
    answers. Cost: a few runs a component.

    Args:
        model: The model.
        prompts: The facts; their subjects must be named.
        rule: `probe` or `paths`.
        seed: Seed of the split into training and test subjects.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        Scores of neurons. `evidence` holds the curve or the head and layer scores, and the window; `note` says what
        was found.

    Raises:
        MechunlearnError: Too few or too many different answers, or no subject is named.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> fact_lookup(toy.model, toy.prompts()).evidence["window"]
    [0, 0]
    >>> fact_lookup(toy.model, toy.prompts(), rule="paths").evidence["window"]
    [0, 0]
    """
    if rule not in RULES:
        raise MechunlearnError(f"Unknown rule '{rule}'. Expected one of {', '.join(RULES)}.")
    found = _by_probe(model, prompts, seed, progress) if rule == "probe" else _by_paths(model, prompts, progress)
    shares, evidence, reason = found
    layers = sorted(shares)
    also = evidence.get("elsewhere", [])
    scores = {f"L{layer}.mlp.out": torch.zeros(model.signature.d_mlp) for layer in range(model.signature.layers)}
    for layer, share in shares.items():
        scores[f"L{layer}.mlp.out"] += share
    note = f"look-up window: MLP {layers[0]} to {layers[-1]}" if layers else f"no window found: {reason}"
    note += f" (also above the threshold: {', '.join(map(str, also))})" if also else ""
    evidence["window"] = [layers[0], layers[-1]] if layers else None
    return localization(model, scores, evidence, note)


def _by_probe(
    model: HookedModel, prompts: Prompts, seed: int, progress: bool | None
) -> tuple[dict[int, float], dict[str, Any], str]:
    train, test = _train_and_test(model, prompts, seed)
    labels, held_out = _labels(train), _labels(test)
    classes = Counter(labels)
    if len(classes) < 2 or len(classes) > CLASSES or len(classes) > len(train) / 4:
        raise MechunlearnError(
            f"The probe needs 2 to {CLASSES} different answers with four subjects each; these {len(train)} training "
            f"facts have {len(classes)}. Use rule='paths' or attribution_patching for facts that share no answers."
        )
    depths = list(zip(*(residuals(model, part, _subject_last(part)) for part in (train, test)), strict=True))
    probes = track(depths, "probes", progress=progress)
    curve = [probe_curve(x[None], labels, unseen[None], held_out)[0] for x, unseen in probes]
    majority = max(Counter(held_out).values()) / len(held_out)
    window, rise = lookup_window(curve, majority), max(curve) - curve[0]
    inside = range(window[0], window[1] + 1) if window else ()
    shares = {layer: max((curve[layer + 1] - curve[layer]) / rise, 0.01) for layer in inside}
    evidence = {"curve": curve, "majority": majority, "train": len(train), "test": len(test)}
    reason = f"the answer is never readable at the subject (best probe {max(curve):.2f}, majority {majority:.2f})"
    return shares, evidence, reason


def _by_paths(
    model: HookedModel, prompts: Prompts, progress: bool | None
) -> tuple[dict[int, float], dict[str, Any], str]:
    last = torch.arange(prompts.tokens.shape[1]) == _subject_last(prompts)[:, None]
    names = writers(model.signature)
    heads = [i for i, name in enumerate(names) if ".h" in name]
    mlps = [i for i, name in enumerate(names) if name[0] == "m"]
    logits = readers_named(model, ["logits"])
    effect, clean, corrupt = path_effects(model, prompts, heads, logits, logit_diff, progress=progress)
    whole = float((corrupt - clean).mean())
    if abs(whole) < 1e-6:
        return {}, {"heads": {}, "mlps": {}}, "clean and corrupt prompts give the same answer"
    direct = effect.mean(1) / whole
    order = direct.abs().argsort(descending=True, stable=True)[:HEADS]
    extraction = [names[heads[i]] for i in order.tolist()]
    into = readers_named(model, extraction)
    effect, _, _ = path_effects(model, prompts, mlps, into, logit_diff, where=last, progress=progress)
    shares = (effect.mean(1) / whole).tolist()
    above = [layer for layer, share in enumerate(shares) if share > SHARE]
    runs = [[i for i in above if i - above.index(i) == key] for key in sorted({i - above.index(i) for i in above})]
    window = max(runs, key=lambda run: sum(shares[layer] for layer in run), default=[])
    found = {layer: shares[layer] for layer in window}
    evidence = {
        "heads": {name: float(direct[i]) for name, i in zip(extraction, order.tolist(), strict=True)},
        "mlps": {f"m{layer}": share for layer, share in enumerate(shares)},
        "elsewhere": [layer for layer in above if layer not in window],
    }
    reason = f"no MLP reaches the extraction heads from the subject's last token (largest share {max(shares):.3f})"
    return found, evidence, reason


def lookup_window(curve: list[float], majority: float) -> tuple[int, int] | None:
    """Find the first and last MLP of the 10 to 90 % rise of a probe curve; None if it does not rise enough.

    Args:
        curve: Accuracy after 0, 1, ... all blocks.
        majority: The share of the most frequent answer.

    >>> lookup_window([0.25, 0.3, 0.7, 0.95, 1.0], majority=0.25)
    (1, 2)
    >>> lookup_window([0.25, 0.3, 0.35, 0.3, 0.34], majority=0.25) is None
    True
    """
    start, top = curve[0], max(curve)
    if top < (1 + majority) / 2 or top - start < 0.25 * (1 - majority):
        return None
    reached = [next(k for k, y in enumerate(curve) if y >= start + share * (top - start)) for share in (0.1, 0.9)]
    return max(reached[0] - 1, 0), reached[1] - 1


def _train_and_test(model: HookedModel, prompts: Prompts, seed: int) -> tuple[Prompts, Prompts]:
    """Train on 80 % of the data set's other subjects, test on the rest of them and on these facts."""
    source = prompts.facts.source if prompts.facts is not None else None
    if prompts.facts is not None and source is not None:
        everyone = source.prompts(model, prompts.format)
        assert everyone.facts is not None
        asked = [fact.subject in prompts.facts.subjects for fact in everyone.facts]
        others = [i for i, mine in enumerate(asked) if not mine]
        if len(others) >= 4 * len({fact.answer for fact in everyone.facts}):
            order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
            cut = len(others) // 5
            test = [i for i, mine in enumerate(asked) if mine] + [others[i] for i in order[:cut]]
            return everyone.select([others[i] for i in order[cut:]]), everyone.select(test)
    shuffled = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    cut = max(1, len(prompts) // 5)
    return prompts.select(shuffled[cut:]), prompts.select(shuffled[:cut])


def _labels(prompts: Prompts) -> list[str]:
    return [str(row) for row in prompts.answers.tolist()]


def _subject_last(prompts: Prompts) -> Tensor:
    if (prompts.spans < 0).any():
        raise MechunlearnError("fact_lookup reads at the subject's last token; some prompts name no subject.")
    return prompts.spans[:, 1]

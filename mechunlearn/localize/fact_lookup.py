"""Fact-lookup MLPs: the layers in which an attribute of the subject becomes readable at its last token."""

from collections import Counter

import torch
from torch import Tensor

from mechunlearn.components import Localization
from mechunlearn.errors import MechunlearnError
from mechunlearn.hooked import HookedModel
from mechunlearn.probes import probe_curve, residuals
from mechunlearn.prompts import Prompts
from mechunlearn.runcard import RunCard, Stopwatch
from mechunlearn.scores import localization

CLASSES = 64


def fact_lookup(model: HookedModel, prompts: Prompts, *, seed: int = 0) -> Localization:
    """Find the MLPs that look the fact up, by how well the answer can be read at the subject's last token.

    A linear probe for the answer is trained at every depth on other subjects of the same data set and tested on these
    and a fifth of the others (without a larger data set: 80 / 20 of these). The window is the smallest run of MLP layers that covers the rise of
    its accuracy from 10 % to 90 %; every neuron in it scores its layer's share of the rise, all others zero, so
    `found.above(0)` is the mask (the probe rule of Mechanistic Unlearning, arXiv 2410.12949, chosen by eye there).

    If the probe never gets half of the way from the majority class to 1, no window is found: all scores are zero and
    `note` says so. Use it for relations with few answers; with one answer per subject there is nothing to classify, and
    it raises `MechunlearnError`. Cost: one forward pass over the data set and one regression a depth.
    The evidence holds the curve, the window and the numbers of subjects.

    >>> from mechunlearn.toy import planted_facts
    >>> toy = planted_facts()
    >>> fact_lookup(toy.model, toy.prompts()).evidence["window"]
    [0, 0]
    """
    watch = Stopwatch()
    train, test = _train_and_test(model, prompts, seed)
    labels, held_out = _labels(train), _labels(test)
    classes = Counter(labels)
    if len(classes) < 2 or len(classes) > CLASSES or len(classes) > len(train) / 4:
        raise MechunlearnError(
            f"The probe needs 2 to {CLASSES} different answers with four subjects each; these {len(train)} training "
            f"facts have {len(classes)}. Use attribution_patching for facts that share no answers."
        )
    curve = probe_curve(
        residuals(model, train, _subject_last(train)), labels, residuals(model, test, _subject_last(test)), held_out
    )
    majority = max(Counter(held_out).values()) / len(held_out)
    window = lookup_window(curve, majority)
    scores = {f"L{layer}.mlp.out": torch.zeros(model.signature.d_mlp) for layer in range(model.signature.layers)}
    if window:
        rise = max(curve) - curve[0]
        for layer in range(window[0], window[1] + 1):
            scores[f"L{layer}.mlp.out"] += max((curve[layer + 1] - curve[layer]) / rise, 0.01)
    best = max(curve)
    note = (
        f"look-up window: MLP {window[0]} to {window[1]}"
        if window
        else f"no window found: the answer is never readable at the subject (best probe {best:.2f}, majority {majority:.2f})"
    )
    evidence = {
        "curve": curve,
        "majority": majority,
        "window": list(window) if window else None,
        "train": len(train),
        "test": len(test),
    }
    card = RunCard(
        "fact_lookup",
        model=model.fingerprint,
        data=prompts.fingerprint,
        seed=seed,
        device=str(model.device),
    )
    return localization(model, scores, watch.stamp(card), evidence, note)


def lookup_window(curve: list[float], majority: float) -> tuple[int, int] | None:
    """First and last MLP of the 10 to 90 % rise of a probe curve (`curve[k]`: after k blocks), or None.

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

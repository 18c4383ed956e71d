"""Feature discovery: which features or codes of a dictionary belong to a topic or a set of facts."""

from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control, hypergeom
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.progress import track
from mechunlearn.core.runcard import RunCard
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import Codebook, Dictionary, check
from mechunlearn.features.firing import FiringStatistics, Texts, tokenized
from mechunlearn.features.places import Model, fingerprint_of, installed, signature_of
from mechunlearn.metrics.answers import Metric, logit_diff, name_of
from mechunlearn.metrics.text import token_losses
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.patching.scores import localizer

RULES = ("frequency", "squared", "attribution")
BATCH = 64


@localizer
def feature_discovery(
    model: Model,
    prompts: Texts | FiringStatistics,
    *,
    dictionary: Dictionary,
    against: Texts | FiringStatistics | None = None,
    by: str = "frequency",
    least: float = 0.002,
    false_discoveries: float = 0.05,
    nearest: int | None = None,
    metric: Metric = logit_diff,
    seed: int = 0,
    progress: bool | None = None,
) -> Localization:
    """Find the features or codes that a topic has and other text has not.

    Three rules give scores:

    - `frequency`: log2 of the share of tokens with the unit active, here over there (half a token added to each count);
      zero unless more frequent here by Fisher's exact test at a false discovery rate (Benjamini-Hochberg) of
      `false_discoveries`, and active at a share of `least` of the tokens (CodeUnlearn, arXiv 2410.10866; a codebook
      counts the `nearest` codes of each token, S'). Tokens are counted as independent, which those of one text are
      not.
    - `squared`: log2 of the mean squared activation here over there, at least 0, of units active at a share of `least`
      (the ratio of DSG, arXiv 2504.08192).
    - `attribution`: -z dm/dz summed over tokens, the mean over texts: how m changes if the unit is set to zero, to
      first order (below zero if m needs it). m is `metric` of prompts, and the log-probability of texts; `against` is
      not looked at.

    Not a proof that the unit *does* anything: delete it and measure (`edit.codebook_delete`).

    Args:
        model: The model, hooked or plain.
        prompts: Text on the topic, prompts, tokens and lengths, or `FiringStatistics` of them: then no forward pass
            is made.
        dictionary: The codebook or SAE; for `FiringStatistics`, the one they are of.
        against: Other text: the same sentences with the topic's words swapped (`firing.swapped`), or text to retain.
            Prompts have their corrupt partners.
        by: `frequency`, `squared` or `attribution`.
        least: The least share of tokens at which a unit is active.
        false_discoveries: The false discovery rate of `frequency`.
        nearest: How many nearest codes of each token a codebook counts; by default those that it uses.
        metric: What `attribution` measures of prompts.
        seed: Recorded only: nothing is drawn.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        Scores at the dictionary's site; `.above(1)` are the units more than twice as frequent, and a share in
        `.top(weights=)` is one of the dictionary's units, which have no weights. If none is enriched, the note reports it.

    Raises:
        MechunlearnError: A dictionary of another model, empty text, an unknown rule, or nothing to compare with.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> model, codebook = load_model("factworld"), load_dictionary("factworld-codebook")
    >>> topic = ["The knight fought the army.", "The soldier defended the flag."] * 8
    >>> other = ["The cook baked the soup.", "The baker tasted the onion."] * 8
    >>> found = feature_discovery(model, topic, dictionary=codebook, against=other)
    >>> 0 < len(found.above(1)) < 80
    True
    """
    if by not in RULES:
        raise MechunlearnError(f"Unknown rule '{by}'. Expected one of {', '.join(RULES)}.")
    check(dictionary, model)
    measured: str | None = None
    if by == "attribution":
        if not isinstance(model, HookedModel) or isinstance(prompts, FiringStatistics):
            raise MechunlearnError(
                "Attribution needs gradients: give a hooked model and texts or prompts to run it on."
            )
        scores, evidence = _attribution(model, prompts, dictionary, metric, progress), {}
        measured = name_of(metric) if isinstance(prompts, Prompts) else "log-probability of the text"
    else:
        if against is None:
            if not isinstance(prompts, Prompts):
                raise MechunlearnError(
                    "There is nothing to compare the topic with. Give against=: text with the topic's words swapped "
                    "(firing.swapped), or text to retain."
                )
            against = (prompts.corrupt, prompts.lengths)
        here, there = (
            one if isinstance(one, FiringStatistics) else FiringStatistics.of(model, dictionary, one, nearest)
            for one in (prompts, against)
        )
        if here.fire_count.shape[1] != dictionary.size or there.fire_count.shape[1] != dictionary.size:
            raise MechunlearnError(
                f"The activity is of {here.fire_count.shape[1]} and {there.fire_count.shape[1]} units, {dictionary} "
                "has others. "
                "Give the dictionary that it was seen with."
            )
        if not (here.tokens.sum() and there.tokens.sum()):
            raise MechunlearnError(
                "There is text without a token that counts. Expected passages, on the topic and other."
            )
        rule = _frequency if by == "frequency" else _squared
        scores = rule(here, there, least, false_discoveries)
        evidence = {"tokens": [float(here.tokens.sum()), float(there.tokens.sum())]}
    signature = signature_of(model)
    if by != "attribution" and not scores.any():
        note = (
            f"no unit of {dictionary} is enriched: it has none of its own for this topic, or there is too little text"
        )
    else:
        note = ""
    if dictionary.fitted_on not in ("", fingerprint_of(model)):
        other = f"{dictionary} was fitted on a model with other weights ({dictionary.fitted_on})"
        note = f"{note}; {other}" if note else other
    kind = dictionary.site.split(".", 1)[1]
    card = RunCard("", model=fingerprint_of(model), settings={"metric": measured})
    return Localization({dictionary.site: scores}, signature, {kind: 1}, dictionary.size, card, evidence, note)


def _frequency(
    here: FiringStatistics, there: FiringStatistics, least: float, false_discoveries: float
) -> Float[Tensor, " feature"]:
    mine, theirs = here.fire_count.sum(0).double(), there.fire_count.sum(0).double()
    n, m = float(here.tokens.sum()), float(there.tokens.sum())
    ratio = (((mine + 0.5) / n) / ((theirs + 0.5) / m)).log2()
    chance = hypergeom.sf((mine - 1).numpy(), n + m, (mine + theirs).numpy(), n)
    seen = ((mine + theirs) > 0).numpy()
    enriched = torch.zeros(len(mine), dtype=torch.bool)
    if seen.any():
        adjusted = torch.ones(len(mine), dtype=torch.float64)
        adjusted[torch.from_numpy(seen)] = torch.from_numpy(false_discovery_control(chance[seen]))
        enriched = (adjusted < false_discoveries) & (mine >= least * n)
    return torch.where(enriched, ratio.clamp(min=0), 0.0).float()


def _squared(here: FiringStatistics, there: FiringStatistics, least: float, _: float) -> Float[Tensor, " feature"]:
    mine, theirs = here.squared.sum(0) / here.tokens.sum(), there.squared.sum(0) / there.tokens.sum()
    floor = 1e-3 * (mine + theirs).mean() + 1e-12
    ratio = ((mine + floor) / (theirs + floor)).log2().clamp(min=0)
    return torch.where(here.rates() >= least, ratio, 0.0)


def _attribution(
    model: HookedModel, data: Any, dictionary: Dictionary, metric: Metric, progress: bool | None
) -> Float[Tensor, " feature"]:
    tokens, counted = tokenized(model, data)
    total = torch.zeros(dictionary.size)
    for rows in track(torch.split(torch.arange(len(tokens)), BATCH), "attribution", progress=progress):
        held: list[Tensor] = []

        def splice(h: Tensor, held: list[Tensor] = held) -> Tensor:
            z = dictionary.encode(h).detach().requires_grad_()
            held.append(z)
            new = dictionary.decode(z)
            return (new if isinstance(dictionary, Codebook) else new + (h - new).detach()).to(h.dtype)

        with torch.enable_grad(), frozen(model.hf), installed(model, dictionary.hook_name, splice):
            logits = model.forward(tokens[rows])
            if isinstance(data, Prompts):
                value = metric(logits, data.select(rows)).sum()
            else:
                value = -(token_losses(logits, tokens[rows]) * counted[rows, 1:].to(logits.device)).sum()
            (gradient,) = torch.autograd.grad(value, held[0])
        effect = -(held[0].detach() * gradient) * counted[rows].to(gradient.device)[..., None]
        total += effect.sum((0, 1)).float().cpu()
    return total / len(tokens)

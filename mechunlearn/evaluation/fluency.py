"""Fluency: how varied is what an edited model writes?"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.steady import steady
from mechunlearn.evaluation.written import WORDS, before_the_answer
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.text import ngram_entropy
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.text import decoded, ids_to_continue

PROMPTS, TOKENS = 8, 32
FORGET = "forget prompts"


@steady()
@torch.no_grad()
def fluency(
    model: HookedModel, edits: Mapping[str, Edit | None], forget: Prompts, texts: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Float[Tensor, " text"]]]:
    """Measure the n-gram entropy of what the model writes under several edits (`metrics.text.ngram_entropy`).

    The 32 most likely tokens, one by one, behind the prompts of eight forgotten facts and behind the first six words
    of eight ordinary texts; the prompts do not count. ROME (arXiv 2202.05262) samples 100 tokens behind prompts about
    the subject, prompts included, so the values are no match for published ones. It shows a model that repeats itself:
    for what else it says, see `drift.text_drift`.

    Args:
        model: The unedited model.
        edits: The edits by name; None is the unedited model.
        forget: The facts to forget.
        texts: Ordinary texts by name; those of the first name are taken.

    Returns:
        By what was continued ("forget prompts", "openings of neutral", ...) and edit, one value a prompt, in bits.
        Empty for a model without a tokenizer.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> forget = load_facts("factworld/sport").prompts(model).select([0, 1, 2])
    >>> found = fluency(model, {"before": None}, forget, {})
    >>> list(found), found["forget prompts"]["before"].shape
    (['forget prompts'], torch.Size([3]))
    """
    if model.tokenizer is None:
        return {}
    begun = {FORGET: [before_the_answer(forget, i).tolist() for i in range(min(PROMPTS, len(forget)))]}
    for name, passages in list(texts.items())[:1]:
        openings = [" ".join(text.split()[:WORDS]) for text in passages[:PROMPTS]]
        begun[f"openings of {name}"] = ids_to_continue(openings, model.tokenizer)
    rows = [row for some in begun.values() for row in some]
    width, sizes = max(map(len, rows)), [len(some) for some in begun.values()]
    found: dict[str, dict[str, Tensor]] = {what: {} for what in begun}
    for name, edit in edits.items():
        with edit.applied(model) if edit is not None else nullcontext():
            made = model.generate(rows, max_new_tokens=TOKENS)[:, width:]
        values = torch.tensor([ngram_entropy(text) for text in decoded(made, model.tokenizer, skip_special=True)])
        for what, part in zip(begun, values.split(sizes)):
            found[what][name] = part
    return found

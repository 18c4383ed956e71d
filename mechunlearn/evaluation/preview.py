"""What the whole job will cost, measured on one batch before it begins."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.core.runcard import peak_mib
from mechunlearn.edit.goal import OWN_TOKENS
from mechunlearn.edit.objective import STEPS
from mechunlearn.evaluation import fluency
from mechunlearn.evaluation.cells import LIMIT, OWN_COUNT, formats, neutral_texts, splits
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.text import encode
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.precision import arithmetic

BATCH = 16
"""Facts in the batch that is timed."""
PER_STEP = 64
"""Forget facts a step, at most."""
TEXT_TOKENS = 48
ATTACKED = {"relearning": (5, 20)}
"""Attacks that train: their settings and steps."""


def preview(
    model: HookedModel, forget: Prompts, retain: Prompts, attacks: Sequence[str] = (), edits: int = 2
) -> list[str]:
    """Estimate seconds and memory of the whole job: one forward and backward pass on a batch, times the counts of steps.

    An editor that tries several learning rates trains as often; that is not known before it runs.

    Args:
        model: The model.
        forget: The facts to edit.
        retain: The facts to keep.
        attacks: Names of attacks that will run.
        edits: How many edits are trained; they and the unedited model are measured.

    Returns:
        Lines to print.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> preview(toy.model, toy.prompts([0, 1]), toy.prompts([2, 3]))[0].startswith("cost, measured on one batch: about ")
    True
    """
    tokens = forget.tokens[forget.lengths.argsort()[-BATCH:]]
    forward, both = seconds_a_token(model, tokens)
    width = float(torch.cat([forget.lengths, retain.lengths]).float().mean())
    size = min(PER_STEP, len(forget))
    text = max(1, size // 4) * OWN_TOKENS if model.tokenizer is not None else 0
    step = both * (width * (size + min(PER_STEP, 2 * size, len(retain))) + text)
    read = (edits + 1) * (width * _prompts(model, forget, retain) + _text_tokens(model, forget)) * forward
    training = sum(settings * steps for name, (settings, steps) in ATTACKED.items() if name in attacks)
    weights = sum(parameter.numel() for parameter in model.hf.parameters())
    memory = peak_mib() / 1024 + (16 * weights / 2**30 if training else 0)
    editing, reading = _time(edits * STEPS * step), _time(read)
    lines = [
        (
            f"cost, measured on one batch: about {editing} for {edits} edits of {STEPS} steps at each learning rate that is "
            f"tried, {reading} to measure {edits + 1} models, {memory:.1f} GB of memory"
        )
    ]
    if attacks:
        attack = 2 * training * step  # on the edited model and, as its ceiling, on the unedited one
        others = len(set(attacks) - set(ATTACKED)) * read / (edits + 1)
        lines.append(f"attacks: about {_time(attack + others)} more; without them: attacks=() or --attacks none")
    return lines


def seconds_a_token(model: HookedModel, tokens: Int[Tensor, "fact pos"]) -> tuple[float, float]:
    """Time a forward pass, and one with a backward pass to the embeddings, in seconds a token: the faster of two each.

    Args:
        model: The model; nothing is left on it.
        tokens: One batch.
    """
    times: list[list[float]] = [[], []]
    products = arithmetic(model)
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            model.forward(tokens).sum().item()  # waits for a GPU
        times[0].append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.enable_grad(), products():
            embedded = model.hf.get_input_embeddings()(tokens.to(model.device)).detach().requires_grad_()
            loss = model.hf(inputs_embeds=embedded).logits.float().logsumexp(-1).mean()
            torch.autograd.grad(loss, embedded)[0].sum().item()
        times[1].append(time.perf_counter() - start)
    forward, both = (min(found) / tokens.numel() for found in times)
    return forward, both


def _prompts(model: HookedModel, forget: Prompts, retain: Prompts) -> int:
    """How many prompts a model is asked, in all formats."""
    sets = splits(forget, retain)
    asked = sum(len(facts) * len(formats(model, split, facts)) for split, facts in sets.items())
    skills = sum(min(LIMIT, len(tasks)) for tasks in forget.facts.skills.values()) if forget.facts is not None else 0
    return asked + skills or len(forget) + len(retain)


def _text_tokens(model: HookedModel, forget: Prompts) -> int:
    """How many tokens of ordinary text a model reads, samples of its own to begin with, and how many it writes."""
    passages = forget.facts.texts[1::2][:LIMIT] if forget.facts is not None else ()
    return sum(map(len, encode(model, (*neutral_texts(), *passages)))) + (
        OWN_COUNT * TEXT_TOKENS + 2 * fluency.PROMPTS * fluency.TOKENS
    ) * (model.tokenizer is not None)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

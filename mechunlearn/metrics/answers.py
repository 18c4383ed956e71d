"""Numbers from logits: metrics are functions of `(logits, prompts)`, one value a fact."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.answers import BATCH as BATCH
from mechunlearn.facts.answers import answer_logits
from mechunlearn.facts.answers import answered as answered
from mechunlearn.facts.prompts import PAD, ROLES, Prompts
from mechunlearn.model.hooked import HookedModel

Metric = Callable[[Tensor, Prompts], Tensor]


def at_answers(metric: Metric) -> Metric:
    """Mark a metric of yours that reads logits only where the answer is predicted (`prompts.start` and after).

    Methods then unembed only these positions, and give it prompts whose `start` is 0.

    Args:
        metric: Takes logits and prompts, and returns one number a fact.
    """
    metric.at_answers = True  # type: ignore[attr-defined]
    return metric


def name_of(metric: Metric) -> str:
    """Return what a run card calls a metric.

    Args:
        metric: The metric.
    """
    return getattr(metric, "__name__", repr(metric))


def positions_read(metric: Metric, prompts: Prompts) -> Int[Tensor, "fact read"]:
    """Return the positions whose logits a metric reads: those that predict the answer, or all of them.

    Args:
        metric: The metric.
        prompts: The facts it is taken of.
    """
    if not getattr(metric, "at_answers", False):
        return torch.arange(prompts.tokens.shape[1]).repeat(len(prompts), 1)
    steps = torch.arange(prompts.answers.shape[1])
    return torch.minimum(prompts.start[:, None] + steps, prompts.lengths[:, None] - 1)


def per_fact(
    metric: Metric, logits: Float[Tensor, "row read d_vocab"], prompts: Prompts, copies: int = 1
) -> Float[Tensor, "copy fact"]:
    """Take a metric of one or more runs of the same facts.

    Args:
        metric: The metric.
        logits: Logits at `positions_read`; the facts of one run after those of another.
        prompts: The facts.
        copies: How many runs there are.

    Raises:
        MechunlearnError: If the metric does not return one number a fact.
    """
    seen = prompts.tiled(copies, at_answers=getattr(metric, "at_answers", False))
    found = metric(logits, seen)
    if not isinstance(found, Tensor) or found.shape != (len(seen),):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MechunlearnError(
            f"The metric '{name_of(metric)}' returned {got}. Expected one number a fact: "
            f"a tensor of shape ({len(seen)},)."
        )
    return found.view(copies, len(prompts))


@at_answers
def logit_diff(logits: Float[Tensor, "fact pos d_vocab"], prompts: Prompts) -> Float[Tensor, " fact"]:
    """Return the logit of the answer minus the logit of the foil, at the first token where they differ.

    The foil is what the corrupt prompt answers, so the difference changes its sign between the clean and the corrupt
    run. It is linear in the logits, so attribution is exact behind a linear path. It says nothing of the rest of the
    vocabulary: use `answer_logprob` for that.

    Args:
        logits: The model's logits.
        prompts: The facts, each with a foil.

    Raises:
        MechunlearnError: If a fact has no foil.
    """
    rows = torch.arange(len(logits))
    at = logits[rows, prompts.read]
    return at[rows, prompts.answer_at_read] - at[rows, prompts.foil_at_read]


@at_answers
def answer_logprob(logits: Float[Tensor, "fact pos d_vocab"], prompts: Prompts) -> Float[Tensor, " fact"]:
    """Return the log-probability of the whole answer, summed over its tokens, in nats.

    Args:
        logits: The model's logits.
        prompts: The facts.
    """
    return _continuation(logits, prompts)[0]


@at_answers
def answer_probability(logits: Float[Tensor, "fact pos d_vocab"], prompts: Prompts) -> Float[Tensor, " fact"]:
    """Return the probability of the whole answer: the product over its tokens, as causal tracing measures it.

    Args:
        logits: The model's logits.
        prompts: The facts.
    """
    return _continuation(logits, prompts)[0].exp()


def supervised(
    prompts: Prompts, which: str = "answers"
) -> tuple[Int[Tensor, "fact pos"], Int[Tensor, " token"], Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Return prompts followed by an answer, and which of their tokens the model has to predict.

    Args:
        prompts: The facts.
        which: "answers", "foils" or "targets".

    Returns:
        Tokens, padded on the right with 0, and of each token of an answer the row, the position that predicts it, and
        its id.
    """
    wanted = getattr(prompts, which)
    sizes = (wanted != PAD).sum(1)
    steps = torch.arange(wanted.shape[1])
    valid = steps < sizes[:, None]
    positions = prompts.start[:, None] + steps
    tokens = prompts.tokens.new_zeros(len(prompts), int((prompts.start + sizes).max()))
    width = min(tokens.shape[1], prompts.tokens.shape[1])
    tokens[:, :width] = prompts.tokens[:, :width]
    tokens[torch.arange(tokens.shape[1]) > prompts.start[:, None]] = 0
    given = valid & (steps < sizes[:, None] - 1)
    rows = torch.arange(len(prompts))[:, None].expand_as(positions)
    tokens[rows[given], positions[given] + 1] = wanted[given]
    return tokens, rows[valid], positions[valid], wanted[valid]


def with_answers(prompts: Prompts, which: str) -> Prompts:
    """Return the same prompts followed by another answer, for scoring: there is no corrupt partner and no role in them.

    Args:
        prompts: The facts.
        which: "answers", "foils" or "targets".
    """
    if which == "answers":
        return prompts
    tokens, answers = supervised(prompts, which)[0], getattr(prompts, which)
    roles = torch.full_like(tokens, ROLES.index("padding"))
    lengths = prompts.start + (answers != PAD).sum(1).clamp(min=1)
    return replace(prompts, tokens=tokens, corrupt=tokens, roles=roles, lengths=lengths, answers=answers)


def _continuation(logits: Tensor, prompts: Prompts) -> tuple[Float[Tensor, " fact"], Bool[Tensor, " fact"]]:
    """Log-probability of the answer, and whether greedy decoding gives it; an answer without tokens is never given."""
    valid = prompts.answers != PAD
    none = ~valid.any(1)
    rows, steps = valid.nonzero(as_tuple=True)
    at = logits[rows, prompts.start[rows] + steps]
    labels = prompts.answers[valid].to(at.device)
    at = at.float()
    # log_softmax adds up a large vocabulary less exactly (test_probabilities_over_a_large_vocabulary)
    chosen = (at.gather(1, labels[:, None])[:, 0] - at.logsumexp(-1)).cpu()
    right = (at.argmax(-1) == labels).cpu()
    logprob = torch.zeros(len(prompts)).masked_fill(none, -torch.inf).index_add_(0, rows, chosen)
    wrong = none.float().index_add_(0, rows, (~right).float())
    return logprob, wrong == 0


@steady()
@torch.no_grad()
def measure(
    model: HookedModel,
    prompts: Prompts,
    batch_size: int = BATCH,
    targets: bool = True,
    options: bool = True,
    share: bool = False,
) -> dict[str, Float[Tensor, " fact"]]:
    """Measure, for each fact, accuracy and probability of the truth and of the edit target.

    For accuracy alone use `answered`, which reads no targets and no options.

    Args:
        model: The model.
        prompts: The facts.
        batch_size: Facts at a time.
        targets: Whether to measure the edit targets too; those of several tokens need a second forward pass.
        options: Whether to measure `option_probability`; each option of several tokens needs a forward pass of its own.
        share: Whether first tokens that all prompts have in common are read once (see `answer_logits`).

    Returns:
        `accuracy` and `target_accuracy`: 1 where greedy decoding over the full vocabulary gives all tokens of the
        answer. `probability` and `target_probability`: those of the whole answer. `option_probability`: the truth's,
        renormalised over the answer options (missing if the facts list none).
    """
    made: dict[str, Tensor] = {}
    order = prompts.lengths.argsort()
    for rows in order.split(batch_size):
        part = prompts.select(rows)
        logits, read = answer_logits(model, part, share)
        logprob, right = _continuation(logits, read)
        values = {"accuracy": right.float(), "probability": logprob.exp()}
        if targets:
            target_logprob, hit = _other_answers(model, part, part.targets, logits[:, 0], share)
            values |= {"target_accuracy": hit.float(), "target_probability": target_logprob.exp()}
        if options and part.options and all(part.options):
            values["option_probability"] = _option_probability(model, part, logits[:, 0], share)
        for name, value in values.items():
            made.setdefault(name, torch.zeros(len(prompts)))[rows] = value
    return made


def _other_answers(
    model: HookedModel,
    part: Prompts,
    answers: Int[Tensor, "fact step"],
    first: Float[Tensor, "fact d_vocab"],
    share: bool = False,
) -> tuple[Float[Tensor, " fact"], Bool[Tensor, " fact"]]:
    """Log-probability of another answer to each prompt, and whether greedy decoding gives it.

    `first` holds the logits after the prompts. They are all that an answer of one token needs; only the facts whose
    answer has more go through the model again.
    """
    at_prompt = replace(part, start=torch.zeros_like(part.start), answers=answers[:, :1])
    logprob, right = _continuation(first[:, None], at_prompt)
    if len(longer := (answers != PAD).sum(1).gt(1).nonzero()[:, 0]):
        asked = with_answers(replace(part.select(longer), foils=answers[longer]), "foils")
        logprob[longer], right[longer] = _continuation(*answer_logits(model, asked, share))
    return logprob, right


@steady()
@torch.no_grad()
def option_logprobs(model: HookedModel, prompts: Prompts, batch_size: int = BATCH) -> Float[Tensor, "fact option"]:
    """Return the log-probability of each answer to choose among, summed over its tokens, in nats.

    It favours short answers: beside options of unequal length a low value may say no more than that one is long.

    Args:
        model: The model.
        prompts: Facts with `options`.
        batch_size: Facts at a time.

    Returns:
        A column an option, in their order; -inf where a fact lists fewer than another.

    Raises:
        MechunlearnError: If a fact lists none.
    """
    if not prompts.options or not all(prompts.options):
        raise MechunlearnError("Some of these facts list no options. Expected facts with answers to choose among.")
    scores = torch.full((len(prompts), max(map(len, prompts.options))), -torch.inf)
    for rows in prompts.lengths.argsort().split(batch_size):
        part = prompts.select(rows)
        found = _option_logprobs(model, part, answer_logits(model, part)[0][:, 0])
        scores[rows, : found.shape[1]] = found
    return scores


def _option_logprobs(
    model: HookedModel, part: Prompts, logits: Float[Tensor, "fact d_vocab"], share: bool = False
) -> Float[Tensor, "fact option"]:
    """From the logits of the first token; options of several tokens go through the model, a part of rows at a time."""
    rows = torch.tensor([i for i, options in enumerate(part.options) for _ in options])
    columns = torch.tensor([k for options in part.options for k in range(len(options))])
    texts = [torch.tensor(option, dtype=torch.long) for options in part.options for option in options]
    answers = pad_sequence(texts, batch_first=True, padding_value=PAD)
    scores = torch.full((len(part), max(map(len, part.options))), -torch.inf)
    for some in torch.arange(len(rows)).split(len(part)):
        of = rows[some]
        scores[of, columns[some]] = _other_answers(model, part.select(of), answers[some], logits[of], share)[0]
    return scores


def _option_probability(
    model: HookedModel, part: Prompts, logits: Float[Tensor, "fact d_vocab"], share: bool
) -> Float[Tensor, " fact"]:
    """Probability of the truth among the options."""
    truth = [tuple(t for t in row if t != PAD) for row in part.answers.tolist()]
    where = torch.tensor([list(options).index(t) if t in options else -1 for options, t in zip(part.options, truth)])
    if (where < 0).any():
        return torch.full((len(part),), torch.nan)
    return _option_logprobs(model, part, logits, share).softmax(-1)[torch.arange(len(part)), where]

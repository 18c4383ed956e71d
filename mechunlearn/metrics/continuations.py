"""Given texts behind prompts, token by token: how likely each is, and whether the model ranks it first."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.core.batches import in_batches
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.join import Joiner
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.text import encode
from mechunlearn.model.hooked import HookedModel

BATCH = 32


class Continuations(NamedTuple):
    """Each token of some texts, as a model sees it behind the tokens before it.

    Attributes:
        logprobs: Log-probabilities in nats; NaN behind the last token of a text.
        right: Whether the model ranks the token first; False behind the last token.
    """

    logprobs: Float[Tensor, "row token"]
    right: Bool[Tensor, "row token"]

    @property
    def counts(self) -> Int[Tensor, " row"]:
        """The number of tokens of each text."""
        return (~self.logprobs.isnan()).sum(1)

    def without_last(self) -> "Continuations":
        """Return the same texts without their last tokens, such as the end of text; texts of one token keep it."""
        steps, counts = torch.arange(self.right.shape[1]), self.counts[:, None]
        last = (steps == counts - 1) & (counts > 1)
        return Continuations(self.logprobs.masked_fill(last, torch.nan), self.right & ~last)


def read_behind(
    model: HookedModel,
    queries: Sequence[Query],
    *,
    end: bool = False,
    batch_size: int = BATCH,
    progress: bool | None = False,
) -> Continuations:
    """Read the answer of each query behind its prompt, with the true tokens before every token (teacher forcing).

    Prompt and answer are tokenized in one piece. For what the model itself writes use `HookedModel.generate`.

    Args:
        model: The model.
        queries: Prompts with their answers.
        end: Whether the tokenizer's end-of-text token follows each answer, and is read as its last token.
        batch_size: Rows at a time.
        progress: Whether there is a bar (see `progress.track`).

    Returns:
        One row a query.

    Raises:
        MechunlearnError: The model has no tokenizer, or an answer is empty.

    >>> from mechunlearn import load_model
    >>> read = read_behind(load_model("factworld"), [Query("The capital of", "it"), Query("A", "company")], end=True)
    >>> read.counts.tolist(), read.without_last().counts.tolist()
    ([2, 2], [1, 1])
    """
    if model.tokenizer is None:
        raise MechunlearnError("This model has no tokenizer, so it cannot read text. Load it with one.")
    if empty := next((query.prompt for query in queries if not query.answer.strip()), None):
        raise MechunlearnError(
            f"There is no answer to {empty[-60:]!r}. Expected one for each prompt, none of them empty."
        )
    texts = [query.joined_by + query.answer.lstrip() for query in queries]
    joined = Joiner(model.tokenizer)([query.prompt for query in queries], texts)
    last = [model.tokenizer.eos_token_id] if end and model.tokenizer.eos_token_id is not None else []
    ids = [[*row.ids, *last] for row in joined]
    return read_tokens(model, ids, [row.prompt for row in joined], batch_size=batch_size, progress=progress)


def read_whole(
    model: HookedModel, texts: Sequence[str], *, batch_size: int = BATCH, progress: bool | None = False
) -> Continuations:
    """Read whole texts: every token but the first.

    Args:
        model: The model.
        texts: The texts, each of two or more tokens.
        batch_size: Texts at a time.
        progress: Whether there is a bar (see `progress.track`).

    Returns:
        One row a text.

    Raises:
        MechunlearnError: The model has no tokenizer, or a text has fewer than two tokens.

    >>> from mechunlearn import load_model
    >>> read_whole(load_model("factworld"), ["A company"]).counts.tolist()
    [2]
    """
    encoded = encode(model, texts)
    if not encoded or min(map(len, encoded)) < 2:
        raise MechunlearnError("Expected a model with a tokenizer, and texts of two tokens or more.")
    return read_tokens(model, encoded, [1] * len(encoded), batch_size=batch_size, progress=progress)


@steady()
@torch.no_grad()
def read_tokens(
    model: HookedModel,
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int = BATCH,
    progress: bool | None = False,
) -> Continuations:
    """Read rows of tokens from a given one on. Only the positions that predict those are unembedded.

    Args:
        model: The model.
        ids: The tokens of each row.
        starts: The first token of each row that is read; 1 or more.
        batch_size: Rows at a time, shortest first.
        progress: Whether there is a bar (see `progress.track`).

    Returns:
        One row each, in the order given.

    Raises:
        MechunlearnError: A row has no token to read.
    """
    sizes = torch.tensor([len(row) for row in ids]) - torch.tensor(starts)
    if not len(sizes) or int(sizes.min()) < 1 or min(starts) < 1:
        raise MechunlearnError("Some rows have no token to read. Expected tokens in front of, and from, each start.")
    order = torch.tensor([len(row) for row in ids]).argsort()
    logprobs = torch.full((len(ids), int(sizes.max())), torch.nan)
    right = torch.zeros(logprobs.shape, dtype=torch.bool)

    def read(part: Tensor) -> None:
        rows = order[part]
        tokens = pad_sequence([torch.tensor(ids[i]) for i in rows.tolist()], batch_first=True)
        steps = torch.arange(int(sizes[rows].max()))
        at = torch.tensor(starts)[rows][:, None] + steps
        real = steps < sizes[rows][:, None]
        wanted = tokens.gather(1, at.clamp(max=tokens.shape[1] - 1))
        run = model.decoder.record(tokens, (at - 1).clamp(max=tokens.shape[1] - 1), keys=False)
        logits = run.logits.float()
        chosen = logits.gather(-1, wanted[..., None].to(logits.device))[..., 0]
        # log_softmax adds up a large vocabulary less exactly
        logprobs[rows, : len(steps)] = (chosen - logits.logsumexp(-1)).cpu().masked_fill(~real, torch.nan)
        right[rows, : len(steps)] = (logits.argmax(-1).cpu() == wanted) & real

    in_batches(len(ids), batch_size, read, "reading", progress)
    return Continuations(logprobs, right)


@torch.no_grad()
def answer_logprobs(model: HookedModel, prompts: Prompts) -> Float[Tensor, "fact token"]:
    """Return the log-probability of each token of the true answers, given those before it; NaN behind the last.

    Args:
        model: The model.
        prompts: The facts.
    """
    counts = (prompts.answers != PAD).sum(1)
    rows = zip(prompts.tokens.tolist(), prompts.start.tolist(), prompts.answers.tolist(), counts.tolist())
    ids = [[*row[: start + 1], *answer[:count]] for row, start, answer, count in rows]
    found = read_tokens(model, ids, (prompts.start + 1).tolist(), batch_size=128).logprobs
    made = torch.full(tuple(prompts.answers.shape), torch.nan)
    made[:, : found.shape[1]] = found
    return made


def probability(read: Continuations) -> Float[Tensor, " row"]:
    """Return the length-normalised probability of each text: the geometric mean of its tokens' probabilities (0 to 1).

    p(a | q)^(1/|a|) = exp(mean_t log p(a_t | q, a_<t)), which TOFU calls probability (Maini et al., arXiv 2401.06121,
    section 2.2.1). Not for how often a text would be sampled: that is the product, which falls with every token.

    Args:
        read: Texts as a model reads them.

    >>> halves = torch.tensor([[0.5, 0.125]]).log()
    >>> round(float(probability(Continuations(halves, halves < 0))[0]), 6)
    0.25
    """
    return read.logprobs.nanmean(1).exp()


def exact_memorization(read: Continuations) -> Float[Tensor, " row"]:
    """Return the share of each text's tokens that the model ranks first, the true ones being given (0 to 1).

    EM(a) = sum_t 1{argmax p(. | q, a_<t) = a_t} / |a| (Tirumala et al., arXiv 2205.10770; open-unlearning calls it so).
    `memorization.memorization_accuracy` is the same of whole texts. The share is the token-level accuracy of zsRE too.
    It forgives every mistake: use `extraction_strength` for how much would come back without a break.

    Args:
        read: Texts as a model reads them.

    >>> right = torch.tensor([[True, False, True, True]])
    >>> float(exact_memorization(Continuations(torch.zeros(1, 4), right))[0])
    0.75
    """
    return read.right.sum(1) / read.counts


def extraction_strength(read: Continuations) -> Float[Tensor, " row"]:
    """Return how much of each text the model writes without a mistake to its end (0 to 1).

    ES(a) = 1 - k / |a| with k the fewest tokens that have to be given so that greedy decoding writes all others (Carlini
    et al., arXiv 2012.07805; Wang et al., arXiv 2406.08288). One mistake in the last token makes it 0: use
    `exact_memorization` for scattered knowledge. The public code of open-unlearning gives 1/|a| in that one case, as
    its loop ends one token early.

    Args:
        read: Texts as a model reads them.

    >>> right = torch.tensor([[True, False, True, True]])
    >>> float(extraction_strength(Continuations(torch.zeros(1, 4), right))[0])
    0.5
    """
    steps = torch.arange(read.right.shape[1])
    wrong = ~read.right & (steps < read.counts[:, None])
    given = torch.where(wrong, steps + 1, 0).max(1).values
    return 1 - given / read.counts

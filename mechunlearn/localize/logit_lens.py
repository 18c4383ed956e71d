"""The logit lens: what each depth of the residual stream would answer if it were the last."""

from collections import defaultdict

import pandas as pd
import torch
from torch import Tensor

from mechunlearn.core.progress import track
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.scores import at_read, localizer


@localizer
@torch.no_grad()
def logit_lens(
    model: HookedModel,
    prompts: Prompts,
    *,
    batch_size: int = 128,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Read the answer from the residual stream after each block, as if that block were the last.

    The stream at the position where `logit_diff` is taken goes through the model's own final norm, unembedding and
    softcap (nostalgebraist 2020, "interpreting GPT: the logit lens").

    It misleads at early depths: they are written in another basis than the last one, so an answer that cannot be read
    here may be there all the same, and how early it can be read differs between families for that reason alone
    (Belrose et al. 2023, arXiv 2303.08112, call it brittle). For what is encoded, train a probe (`fact_lookup`); for
    where it is made, patch.

    Args:
        model: The model.
        prompts: The facts.
        batch_size: Facts a batch.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        One row a depth (`depth`: blocks passed, 0 is the embedding, the last is the model itself): `logit_diff`
        (answer minus foil, in logits, mean over facts) with its 95 % bootstrap interval `low` to `high`,
        `probability` of the answer's token, `rank_1` (the share of facts whose answer has the largest logit of the
        full vocabulary), and `n` facts.

    Raises:
        MechunlearnError: No facts, or facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> logit_lens(toy.model, toy.prompts()).rank_1.tolist()  # written by the second block
    [0.0, 0.0, 1.0]
    """
    found: dict[int, list[Tensor]] = defaultdict(list)
    for chosen in track(torch.split(torch.arange(len(prompts)), batch_size), "logit lens", progress=progress):
        part = prompts.select(chosen)
        rows, read, answer, foil = at_read(model, part)
        for depth, resid in enumerate(model.decoder.record(part.tokens, read[:, None]).resid):
            logits = model.decoder.unembed(resid[rows, read]).float()
            right = logits[rows, answer]
            first = (logits.argmax(-1) == answer).float()
            values = [right - logits[rows, foil], logits.softmax(-1)[rows, answer], first]
            found[depth].append(torch.stack(values).cpu())
    table = []
    for depth, batches in found.items():
        difference, probability, first = torch.cat(batches, 1)
        interval = bootstrap_interval(difference.numpy())
        means = [float(values.mean()) for values in (difference, probability, first)]
        table.append((depth, means[0], *interval, *means[1:], len(prompts)))
    return pd.DataFrame(table, columns=["depth", "logit_diff", "low", "high", "probability", "rank_1", "n"])

"""A sample of what a model writes: a few prompts, continued greedily before and after an edit."""

from contextlib import nullcontext

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.evaluation.cells import asked, chats
from mechunlearn.facts.chat import CHAT
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.text import decoded

TOKENS = 20
WORDS = 6
COLUMNS = ["prompt", "before", "after"]


def written(
    model: HookedModel,
    edit: Edit,
    forget: Prompts,
    retain: Prompts,
    unseen: Prompts | None,
    texts: dict[str, tuple[str, ...]],
) -> pd.DataFrame:
    """Let the model go on from a few prompts, before and after an edit.

    Two facts to forget, one to retain, one that no edit saw, the beginning of an ordinary text, and a question through
    the chat template where the model and the facts have one.

    Args:
        model: The unedited model. One without a tokenizer writes nothing.
        edit: The edit.
        forget: The facts to forget.
        retain: The facts to retain.
        unseen: Facts that no edit saw, if there are any.
        texts: Ordinary texts by name; the first words of the first one are taken.

    Returns:
        Columns `prompt`, `before` and `after`: text, at most 20 tokens each. The index says what each prompt is.
    """
    if model.tokenizer is None:
        return pd.DataFrame(columns=COLUMNS)
    chat = asked(model, forget.facts.select([0]), CHAT) if chats(model) and forget.facts is not None else None
    sets = {"forget": (forget, 2), "retain": (retain, 1), "unseen": (unseen, 1), "forget, chat": (chat, 1)}
    rows = [
        (name, before_the_answer(prompts, i))
        for name, (prompts, count) in sets.items()
        if prompts is not None
        for i in range(min(count, len(prompts)))
    ]
    for name, (first, *_) in list(texts.items())[:1]:
        opening = " ".join(first.split()[:WORDS])
        rows.append((f"text, {name}", torch.tensor(model.tokenizer(opening)["input_ids"])))
    shown = decoded([row for _, row in rows], model.tokenizer, skip_special=True)
    told, begun = [], [row.tolist() for _, row in rows]
    width = max(map(len, begun), default=0)
    for changed in (None, edit):
        with changed.applied(model) if changed is not None else nullcontext():
            made = model.generate(begun, max_new_tokens=TOKENS)[:, width:]
        told.append(decoded(made, model.tokenizer, skip_special=True))
    return pd.DataFrame({"prompt": shown, "before": told[0], "after": told[1]}, index=[name for name, _ in rows])


def before_the_answer(prompts: Prompts, fact: int) -> Int[Tensor, " pos"]:
    """Return the tokens of a prompt without its answer.

    Args:
        prompts: The facts.
        fact: Which of them.
    """
    return prompts.tokens[fact, : int(prompts.start[fact]) + 1]

"""What an edit is measured on: splits of the facts in every format, skills, ordinary text."""

import math

from mechunlearn.core.files import data_folder
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.chat import CHAT
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.samples import own_texts

LIMIT = 200
UNSEEN, OTHER = "unseen", "unseen: other relations"
GENERALIZATION, OTHERS = "generalization", "other formats"
OWN_COUNT, OWN_SEED = 32, 1
"""Samples of the model that edits are measured on. Editors train on those of seed 0."""


def cells(
    model: HookedModel, forget: Prompts, retain: Prompts, unseen: Prompts | None = None
) -> list[tuple[str, Prompts]]:
    """Tokenize every split in every format, and the skills, once for all edits that are measured.

    The facts to forget and to retain are asked in every format, and through the chat template where the model and the
    facts have one. All other facts are asked by their statement alone: they are many, and a statement is what the edit
    was trained on.

    Args:
        model: The model whose tokenizer is used.
        forget: The facts to forget.
        retain: The facts to retain.
        unseen: Facts that no edit saw. None: those of the data set in neither set.

    Returns:
        Names of splits with their prompts.
    """
    given = [] if unseen is None else [(UNSEEN, unseen.select(range(min(LIMIT, len(unseen)))))]
    if forget.facts is None:
        return [("forget", forget), ("retain", retain), *given]
    cells = [
        (split, prompts)
        for split, facts in splits(forget, retain).items()
        if not (given and split.startswith(UNSEEN))
        for format in formats(model, split, facts)
        if (prompts := asked(model, facts, format)) is not None
    ]
    for name, tasks in forget.facts.skills.items():
        assert model.tokenizer is not None
        cells.append(("skills", Prompts.from_text(tasks[:LIMIT], model.tokenizer, format=name)))
    return [*cells, *given]


def formats(model: HookedModel, split: str, facts: FactDataset) -> tuple[str, ...]:
    """Return the formats in which a split is measured.

    Args:
        model: The model; one with a chat template is also asked through it.
        split: The name of the split.
        facts: Its facts.
    """
    if split not in ("forget", "retain"):
        return ("statement",)
    return tuple(dict.fromkeys((*facts.formats, CHAT))) if chats(model) else facts.formats


def chats(model: HookedModel) -> bool:
    """Return whether a model has a chat template.

    Args:
        model: The model.
    """
    return bool(getattr(model.tokenizer, "chat_template", None))


def asked(model: HookedModel, facts: FactDataset, format: str) -> Prompts | None:
    """Return the prompts of facts in a format; None for chat questions where the facts have none.

    Args:
        model: The model whose tokenizer is used.
        facts: The facts.
        format: The format.

    Raises:
        MechunlearnError: For any other format that the facts do not have.
    """
    try:
        return facts.prompts(model, format)
    except MechunlearnError:
        if format != CHAT:
            raise
        return None


def held_out(forget: Prompts) -> tuple[str, ...]:
    """Return the half of the passages that editors do not train on.

    Args:
        forget: The facts to forget, whose data set has the passages.
    """
    return forget.facts.texts[1::2][:LIMIT] if forget.facts is not None else ()


def neutral_texts() -> tuple[str, ...]:
    """Return the passages of plain English that were written for this project: nothing in them is a fact to forget.

    >>> len(neutral_texts()), neutral_texts()[0][:19]
    (42, 'The bus was late ag')
    """
    text = (data_folder() / "text" / "neutral.txt").read_text(encoding="utf-8")
    return tuple(" ".join(passage.split()) for passage in text.split("\n\n") if passage.strip())


def ordinary_texts(model: HookedModel, forget: Prompts) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the ordinary text that side effects are measured on, by name, and what was left out.

    Args:
        model: The unedited model.
        forget: The facts to forget, which may come with text.

    Returns:
        `neutral`: the passages of `neutral_texts`, for models that can read them; `own samples`: what the model itself
        writes, sampled with another seed than the samples that editors train on; `passages`: the held-out half of the
        text that comes with the facts. Then a sentence on each that is left out.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> texts, left_out = ordinary_texts(model, load_facts("factworld/sport").prompts(model).select([0]))
    >>> list(texts), left_out[0][:44]
    (['own samples', 'passages'], 'Neutral text is not measured: the model cann')
    """
    found, left_out = {}, []
    reason = _unreadable(model, neutral := neutral_texts())
    if reason:
        left_out.append(f"Neutral text is not measured: {reason}.")
    else:
        found["neutral"] = neutral
    try:
        found["own samples"] = own_texts(model, count=OWN_COUNT, seed=OWN_SEED)
    except MechunlearnError as error:
        left_out.append(f"Samples of the model are not measured: {error}")
    if passages := held_out(forget):
        found["passages"] = passages
    return found, left_out


def _unreadable(model: HookedModel, texts: tuple[str, ...]) -> str:
    """Why a model cannot read plain English; empty if it can."""
    if model.tokenizer is None:
        return "the model has no tokenizer"
    ids = [token for text in texts for token in model.tokenizer(text)["input_ids"]]
    if (unknown := ids.count(model.tokenizer.unk_token_id)) or not ids:
        return f"its tokenizer cannot write it ({unknown} of {len(ids)} tokens are unknown)"
    loss = float(text_loss(model, texts[:4]).mean())
    vocabulary = model.hf.config.get_text_config().vocab_size
    if not loss < math.log(vocabulary):
        return (
            f"the model cannot read it (a loss of {loss:.1f} nats a token; guessing gives {math.log(vocabulary):.1f})"
        )
    return ""


def splits(forget: Prompts, retain: Prompts) -> dict[str, FactDataset]:
    """Return the sets of facts by name: forget, retain, unseen, neighbours, other relations of the forgotten subjects.

    `unseen` are the facts of the data set in neither set, of the relations that are edited; those of its other
    relations are a split of their own. At most 200 of each, spread over the data set.

    Args:
        forget: The facts to forget.
        retain: The facts to retain.
    """
    if forget.facts is None or retain.facts is None:
        return {}
    splits = {"forget": forget.facts, "retain": retain.facts}
    source = forget.facts.source
    if source is not None:
        seen = {_key(fact) for facts in splits.values() for fact in facts}
        left = [i for i, fact in enumerate(source) if _key(fact) not in seen]
        relations = {fact.relation for fact in forget.facts}
        for split, same in ((UNSEEN, True), (OTHER, False)):
            rows = [i for i in left if (source[i].relation in relations) == same]
            if rows:
                splits[split] = source.select(_spread(rows))
        names = {word for subject in forget.facts.subjects for word in subject.split()}
        subjects = forget.facts.subjects | retain.facts.subjects
        near = {s for s in source.subjects - subjects if names & set(s.split())}
        if near:
            splits["neighbours"] = source.about(near)
    for relation, facts in forget.facts.related.items():
        about = facts.about(forget.facts.subjects)
        if len(about):
            splits[f"same subject: {relation}"] = about
    return {split: facts.select(range(min(LIMIT, len(facts)))) for split, facts in splits.items()}


def _key(fact: Fact) -> tuple[str, str, str]:
    return fact.subject, fact.relation, fact.queries["statement"].prompt


def _spread(rows: list[int]) -> list[int]:
    """At most as many rows as are measured, from all over the list: a file may be sorted."""
    most = min(LIMIT, len(rows))
    return [rows[i * len(rows) // most] for i in range(most)]

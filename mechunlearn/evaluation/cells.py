"""What an edit is measured on: splits of the facts in every format, skills, held-out text."""

from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

LIMIT = 200


def cells(model: HookedModel, forget: Prompts, retain: Prompts) -> list[tuple[str, Prompts]]:
    """Tokenize every split in every format, and the skills, once for all edits that are measured.

    Args:
        model: The model whose tokenizer is used.
        forget: The facts to forget.
        retain: The facts to retain.

    Returns:
        Names of splits with their prompts.
    """
    if forget.facts is None:
        return [("forget", forget), ("retain", retain)]
    cells = [
        (split, facts.prompts(model, format))
        for split, facts in splits(forget, retain).items()
        for format in facts.formats
    ]
    for name, tasks in forget.facts.skills.items():
        assert model.tokenizer is not None
        cells.append(("skills", Prompts.from_text(tasks[:LIMIT], model.tokenizer, format=name)))
    return cells


def held_out(forget: Prompts) -> tuple[str, ...]:
    """Return the half of the passages that editors do not train on.

    Args:
        forget: The facts to forget, whose data set has the passages.
    """
    return forget.facts.texts[1::2][:LIMIT] if forget.facts is not None else ()


def splits(forget: Prompts, retain: Prompts) -> dict[str, FactDataset]:
    """Return the sets of facts by name: forget, retain, neighbours, and other relations of the forgotten subjects.

    Args:
        forget: The facts to forget.
        retain: The facts to retain.
    """
    if forget.facts is None or retain.facts is None:
        return {}
    splits = {"forget": forget.facts, "retain": retain.facts}
    source = forget.facts.source
    if source is not None:
        names = {word for subject in forget.facts.subjects for word in subject.split()}
        seen = forget.facts.subjects | retain.facts.subjects
        near = {s for s in source.subjects - seen if names & set(s.split())}
        if near:
            splits["neighbours"] = source.about(near)
    for relation, facts in forget.facts.related.items():
        about = facts.about(forget.facts.subjects)
        if len(about):
            splits[f"same subject: {relation}"] = about
    return {split: facts.select(range(min(LIMIT, len(facts)))) for split, facts in splits.items()}

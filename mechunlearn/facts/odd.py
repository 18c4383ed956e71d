r"""Rows that make no sense as they stand: which are skipped, which are repaired, and how.

Skipped: no prompt or no answer; a subject that is not in its prompt; an answer that is its own target or foil; the same
prompt once more, with the same answer ("duplicate") or with another one, because greedy decoding can give only one.

Repaired: a subject that stands in its prompt in other letters' case is taken as it stands there; of a subject that
stands there twice, the last place is its span (a corrupt prompt replaces both); a text with `\u00e9` written out is
decoded; a paraphrase that does not name the subject is left out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mechunlearn.facts.formats import places

ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
OTHER = "same prompt, another answer"


@dataclass(frozen=True)
class Record:
    """One fact as a file gives it.

    Args:
        subject: Whom or what it is about; empty if the file does not say.
        relation: What it says of the subject; "fact" if the file does not name it.
        prompt: What stands before the answer.
        answer: The true answer.
        target: The answer that an edit injects; empty if the file has none.
        others: Further prompts, by format.
        foil: What the truth is compared with; empty if the file has none.
        options: The answers to choose among, if the row lists them.
        row: The number of the row that it stands in, from 1.
        turns: The conversation before the answer, as (role, text).
    """

    subject: str
    relation: str
    prompt: str
    answer: str
    target: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    foil: str = ""
    options: tuple[str, ...] = ()
    row: int = 0
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class OddRow:
    """A row that was not used as it stands.

    Args:
        row: Its number, from 1.
        reason: What is odd about it.
        text: What it says.
        kept: Whether it was repaired, by the rule that the reason names; otherwise it was skipped.
    """

    row: int
    reason: str
    text: str
    kept: bool = False


def checked(records: Iterable[Record]) -> tuple[list[Record], list[OddRow]]:
    """Part the facts that can be used from the odd ones, and repair those that can be repaired.

    Args:
        records: The facts as a file gives them.

    Returns:
        The facts to use, and what was skipped or repaired, in the order of the rows.

    >>> rows = [Record("Oslo", "", "Oslo lies in", "Norway", "Peru"), Record("Rome", "", "Rome lies in", "Italy", "Italy")]
    >>> kept, odd = checked(rows)
    >>> len(kept), odd[0].reason
    (1, 'truth = target')
    """
    kept: list[Record] = []
    odd: list[OddRow] = []
    asked: dict[str, str] = {}
    for given in records:
        record, repairs = _mended(given)
        said = asked.get(record.prompt.rstrip())
        reason = _wrong(record) or ("" if said is None else "duplicate" if said == record.answer else OTHER)
        text = f"{record.prompt} -> {record.answer} (subject '{record.subject}', target '{record.target}')"
        if reason:
            odd.append(OddRow(record.row, reason, text))
            continue
        asked[record.prompt.rstrip()] = record.answer
        kept.append(record)
        odd += [OddRow(record.row, repair, text, kept=True) for repair in repairs]
    return kept, odd


def line(odd: Sequence[OddRow]) -> str:
    """Count odd rows in one line.

    Args:
        odd: The rows.

    >>> line([OddRow(3, "truth = target", ""), OddRow(9, "duplicate", ""), OddRow(4, "duplicate", "")])
    '3 facts skipped: 2 duplicate, 1 truth = target'
    """
    found = []
    for kept, word in ((False, "skipped"), (True, "repaired")):
        reasons = Counter(each.reason for each in odd if each.kept == kept)
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        total = reasons.total()
        found += [f"{total} fact{'s' * (total != 1)} {word}: {counted}"] if total else []
    return "; ".join(found)


def _wrong(record: Record) -> str:
    """Why a fact cannot be used; empty if it can."""
    if not record.prompt.strip():
        return "no prompt"
    if not record.answer:
        return "no answer"
    if record.subject not in record.prompt:
        return "subject not in its prompt"
    return next((f"truth = {name}" for name in ("target", "foil") if getattr(record, name) == record.answer), "")


def _mended(record: Record) -> tuple[Record, list[str]]:
    """The fact after the repairs, and what they were."""
    repairs = []
    texts = {"prompt": record.prompt, **record.others}
    if any(ESCAPE.search(text) for text in (record.subject, record.answer, record.target, *texts.values())):
        subject, answer, target = (_decoded(text) for text in (record.subject, record.answer, record.target))
        prompt, *more = map(_decoded, texts.values())
        others = dict(zip(record.others, more))
        turns = tuple((role, _decoded(text)) for role, text in record.turns)
        record = replace(
            record, subject=subject, prompt=prompt, answer=answer, target=target, others=others, turns=turns
        )
        repairs.append("escaped twice, decoded")
    written = as_written(record.subject, record.prompt)
    if written != record.subject:
        record = replace(record, subject=written)
        repairs.append("subject in another case, taken as in its prompt")
    if len(places(record.prompt, record.subject)) > 1:
        repairs.append("subject twice, the last one is its span")
    others = {name: text for name, text in record.others.items() if as_written(record.subject, text) in text}
    if len(others) < len(record.others):
        repairs.append("paraphrase without its subject, left out")
    return replace(record, others=others), repairs


def as_written(subject: str, prompt: str) -> str:
    """Return a subject in the case in which a prompt has it; as it is, if the prompt does not have it in any.

    Args:
        subject: The subject.
        prompt: The prompt.

    >>> as_written("The Eiffel Tower", "Where is the Eiffel Tower?")
    'the Eiffel Tower'
    """
    at = None if subject in prompt else re.search(re.escape(subject), prompt, re.IGNORECASE)
    return at[0] if at else subject


def _decoded(text: str) -> str:
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)

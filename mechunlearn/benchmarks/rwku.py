"""RWKU: 200 famous people to be forgotten by models that know them from the web (Jin et al., arXiv 2406.10890)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from mechunlearn.benchmarks.asking import how_asked, queries, rouge_l, write
from mechunlearn.benchmarks.scores import Scores, made_by
from mechunlearn.benchmarks.sources import Place, needed, read_splits, text
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.tables import Row
from mechunlearn.metrics.continuations import read_whole
from mechunlearn.metrics.membership import min_k, zlib_score
from mechunlearn.model.hooked import HookedModel

HUB = "jinzhuoran/RWKU"
ASKED = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
TEXTS = {"mia_forget": "forget_mia", "mia_retain": "retain_mia"}
PLACES = {
    **{name: Place(name, name, "test") for name in ASKED},
    **{name: Place(file, name, "test") for name, file in TEXTS.items()},
}
SPLITS = tuple(PLACES)
TOKENS = 30


@dataclass(frozen=True)
class RwkuRow:
    """A query about a person, or a text about one.

    Args:
        subject: The person.
        question: The query: a sentence with a blank (level 1), a question (level 2) or an attack (level 3). Empty for a
            text.
        answer: The answer, or the text.
        kind: The kind of attack, or of query.
    """

    subject: str
    question: str
    answer: str
    kind: str = ""


Rwku = Mapping[str, Sequence[RwkuRow]]


def load(source: str | Path = HUB, splits: Sequence[str] | None = None, subject: str | None = None) -> Rwku:
    """Load RWKU.

    Args:
        source: A name on the hub, a folder with its files (`forget_level1.json`, `neighbor_level1.json`,
            `forget_mia.json`, ...), such as that of one person, or one of them.
        splits: Which of `SPLITS`: blanks, questions and attacks about the people to forget (`forget_level1` to 3),
            blanks and questions about their neighbours (`neighbor_level1` and 2), texts (`mia_forget`, `mia_retain`).
            None: all.
        subject: The person; None for all. Texts about others (`mia_retain`) are kept.

    Returns:
        The rows of each split, by name.

    Raises:
        MechunlearnError: There is no such split, source or person, or the hub does not answer.

    >>> load("no/such/place")
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: There is no file or folder 'no/such/place', and it is no name on the hub (owner/name).
    """
    found = read_splits(source, PLACES, splits, _row)
    if subject is None:
        return found
    chosen = {
        name: rows if name == "mia_retain" else tuple(row for row in rows if row.subject == subject)
        for name, rows in found.items()
    }
    if not any(rows for name, rows in chosen.items() if name != "mia_retain"):
        people = sorted({row.subject for rows in found.values() for row in rows})
        raise MechunlearnError(f"RWKU has no '{subject}'. Its people: {', '.join(people[:12])} and others.")
    return chosen


def _row(split: str, row: Row) -> RwkuRow:
    if split in TEXTS:
        return RwkuRow(text(row, "subject"), "", needed(row, "text"))
    return RwkuRow(text(row, "subject"), needed(row, "query"), needed(row, "answer"), text(row, "type"))


def asked(row: RwkuRow) -> RwkuRow:
    """Return a query as it is put to a model: a sentence with a blank says that it has one.

    Args:
        row: The row.

    >>> asked(RwkuRow("Ada", "Ada was born in ___.", "London")).question
    'Fill in the blank: Ada was born in ___.'
    """
    return replace(row, question=f"Fill in the blank: {row.question}") if "__" in row.question else row


def membership(
    model: HookedModel, rows: Sequence[str], batch_size: int = 8, progress: bool | None = False
) -> dict[str, Float[Tensor, " row"]]:
    """Return RWKU's membership scores of texts: the larger, the more likely the model was trained on them.

    `loss` is the mean log-probability of the tokens, `min_k` that of the least likely fifth, `zlib` the first over the
    compressed size. They are compared between texts to forget and texts to keep, before and after; one alone says
    nothing.

    Args:
        model: The model.
        rows: The texts.
        batch_size: Texts at a time.
        progress: Whether there is a bar (see `progress.track`).
    """
    logprobs = read_whole(model, rows, batch_size=batch_size, progress=progress).logprobs
    return {"loss": logprobs.nanmean(1), "min_k": min_k(logprobs), "zlib": zlib_score(logprobs, rows)}


def evaluate(
    model: HookedModel,
    data: Rwku,
    *,
    rows: int | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Scores:
    """Measure a model on RWKU: ROUGE-L recall of its answers, and membership scores of texts.

    The wording around the queries is ours and ROUGE is that of `rouge-score` without stems; RWKU uses another package. So
    compare figures made here with one another, not with published ones.

    Args:
        model: The model.
        data: What `load` returned.
        rows: How many rows of each split; None for all.
        batch_size: Rows at a time.
        progress: Whether to show bars; None shows them where somebody can see them.

    Returns:
        `rouge_l_recall` of each level, and of each kind of attack as "forget_level3: kind"; `loss`, `min_k` and `zlib` of
        the texts.

    Raises:
        MechunlearnError: The data have none of the splits, or the model has no tokenizer.
    """
    watch, values = Stopwatch(), {}
    for name in ASKED:
        if some := [asked(row) for row in data.get(name, ())[:rows]]:
            prompts = queries(model, [row.question for row in some], [row.answer for row in some])
            given = [query.prompt for query in prompts]
            said = write(model, given, TOKENS, until=("\n",), batch_size=batch_size, progress=progress)
            found = rouge_l([row.answer for row in some], said, stem=False)
            values[name, "rouge_l_recall"] = found
            for kind in dict.fromkeys(row.kind for row in some if name == "forget_level3" and row.kind):
                of_kind = [i for i, row in enumerate(some) if row.kind == kind]
                values[f"{name}: {kind}", "rouge_l_recall"] = found[of_kind]
    for name in TEXTS:
        if passages := [row.answer for row in data.get(name, ())[:rows]]:
            scores = membership(model, passages, batch_size, progress)
            values |= {(name, metric): found for metric, found in scores.items()}
    if not values:
        raise MechunlearnError(f"The data have none of RWKU's splits. Expected some of {', '.join(SPLITS)}.")
    return Scores("rwku", values, {}, how_asked(model), made_by("rwku", model, data, watch, rows=rows))

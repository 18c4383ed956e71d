"""zsRE: questions whose answers are rewritten (Levy et al., arXiv 1706.04115; for editing MEND, arXiv 2110.11309)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.benchmarks.asking import Rewritten, as_facts
from mechunlearn.benchmarks.scores import Scores, made_by
from mechunlearn.benchmarks.sources import Place, needed, read_splits, text, texts
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Query
from mechunlearn.facts.tables import Row
from mechunlearn.metrics.continuations import exact_memorization, read_behind
from mechunlearn.model.hooked import HookedModel

HUB = "zjunlp/KnowEdit"
PLACE = Place("zsre_mend_eval", split="train", data_file="benchmark/ZsRE/ZsRE-test-all.json")


@dataclass(frozen=True)
class ZsreRow:
    """A question, its answer, and what the answer is to become.

    Args:
        subject: What the question is about.
        question: The question.
        truth: The true answer.
        target: The answer that an edit injects; empty in a few rows of the data, which are not measured then.
        paraphrase: The same question in other words.
        neighbour: A question about something else, whose answer is to stay.
        neighbour_truth: Its true answer.
        portability: Questions whose answers follow from the injected one, with those answers; KnowEdit's data have them.
    """

    subject: str
    question: str
    truth: str
    target: str
    paraphrase: str = ""
    neighbour: str = ""
    neighbour_truth: str = ""
    portability: tuple[tuple[str, str], ...] = ()


def load(source: str | Path = HUB) -> tuple[ZsreRow, ...]:
    """Load zsRE, as MEND has it (src, alt, answers, rephrase, loc) or as KnowEdit has it (prompt, target_new, locality).

    Args:
        source: A name on the hub, a folder with `zsre_mend_eval.json`, or a file.

    Returns:
        The questions.

    Raises:
        MechunlearnError: There is no such source, or the hub does not answer.

    >>> load("no/such/place")
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: There is no file or folder 'no/such/place', and it is no name on the hub (owner/name).
    """
    return read_splits(source, {"zsre": PLACE}, ["zsre"], _row)["zsre"]


def _row(split: str, row: Row) -> ZsreRow:
    if "src" in row:
        truth = (texts(row, "answers") or (text(row, "pred"),))[0].strip()
        near = text(row, "loc").removeprefix("nq question: "), text(row, "loc_ans")
        asked = needed(row, "src")
        return ZsreRow(text(row, "subject"), asked, truth, text(row, "alt"), text(row, "rephrase"), *near)
    truth = (texts(row, "ground_truth") or ("",))[0].strip()
    near = (_parts(row.get("locality")) or [("", "")])[0]
    follows = tuple(_parts(row.get("portability")))
    asked, target = needed(row, "prompt"), needed(row, "target_new")
    return ZsreRow(text(row, "subject"), asked, truth, target, text(row, "rephrase_prompt"), *near, follows)


def _parts(given: object) -> list[tuple[str, str]]:
    """The questions and answers of KnowEdit's lists, whatever they are called."""
    lists = given.values() if isinstance(given, Mapping) else ()
    items = [item for some in lists if isinstance(some, list) for item in some if isinstance(item, Mapping)]
    pairs = [(text(dict(item), "prompt"), _first(item.get("ground_truth"))) for item in items]
    return [(asked, answer) for asked, answer in pairs if asked and answer]


def _first(answers: object) -> str:
    """The first of some answers, each of which may be a list of its names."""
    while isinstance(answers, list):
        answers = answers[0] if answers else None
    return answers.strip() if isinstance(answers, str) else ""


def facts(rows: Sequence[ZsreRow]) -> FactDataset:
    """Return the questions as a data set for localizers, editors and attacks, worded as `evaluate` asks them.

    Args:
        rows: What `load` returned.

    >>> facts([ZsreRow("Ada", "Who is Ada?", "a baker", "a smith", "Ada is who?")])
    FactDataset(zsre, 1 facts, formats statement, paraphrase_1; 'Who is Ada?' -> 'a baker')
    """
    told = [
        Rewritten(row.subject, "zsre", row.truth, row.target, (row.question, *filter(None, [row.paraphrase])))
        for row in rows
    ]
    return as_facts("zsre", told)


def token_accuracy(
    model: HookedModel,
    asked: Sequence[tuple[str, str]],
    batch_size: int = 32,
    progress: bool | None = False,
) -> Float[Tensor, " row"]:
    """Return of each answer the share of its tokens that the model ranks first behind the question (0 to 1).

    mean_t 1{argmax p(. | q, a_<t) = a_t}, the true tokens being given (MEND, arXiv 2110.11309, section 5; ROME's code).
    A half-right answer counts half, and the tokens given help: for what the model answers use `metrics.answered`.

    Args:
        model: The model. Its chat template is not used.
        asked: Questions, each with its answer.
        batch_size: Rows at a time.
        progress: Whether there is a bar (see `progress.track`).

    Returns:
        One number a question.

    Raises:
        MechunlearnError: The model has no tokenizer, or an answer is empty.

    >>> from mechunlearn import load_model
    >>> token_accuracy(load_model("factworld"), [("The capital of", "a country")]).shape
    torch.Size([1])
    """
    queries = [Query(question, answer) for question, answer in asked]
    return exact_memorization(read_behind(model, queries, batch_size=batch_size, progress=progress))


def evaluate(
    model: HookedModel,
    data: Sequence[ZsreRow],
    *,
    answer: Literal["target", "truth"] = "target",
    rows: int | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Scores:
    """Measure a model on zsRE, as it is: call it with the edited and with the unedited one.

    The answer follows the question and a space, and a question mark is added to neighbours, as in ROME's code.

    Args:
        model: The model.
        data: What `load` returned.
        answer: What the edit injected: the target, as EasyEdit does, or the truth, as ROME does.
        rows: How many questions; None for all.
        batch_size: Rows at a time.
        progress: Whether to show bars; None shows them where somebody can see them.

    Returns:
        `token_accuracy` of "rewrite", "paraphrase", "neighbourhood" (its true answer) and, where the data have it,
        "portability".

    Raises:
        MechunlearnError: There are no questions, or the model has no tokenizer.
    """
    watch, some = Stopwatch(), data[:rows]
    if not some:
        raise MechunlearnError("There is no question to ask. Expected what zsre.load returned.")
    asked = {
        "rewrite": [(row.question, getattr(row, answer)) for row in some],
        "paraphrase": [(row.paraphrase, getattr(row, answer)) for row in some],
        "neighbourhood": [(f"{row.neighbour.rstrip('?')}?" * bool(row.neighbour), row.neighbour_truth) for row in some],
        "portability": [pair for row in some for pair in row.portability],
    }
    values: dict[tuple[str, str], Tensor] = {}
    for name, pairs in asked.items():
        if there := [(question, said) for question, said in pairs if question and said]:
            found = token_accuracy(model, there, batch_size, progress)
            values[name, "token_accuracy"] = torch.full((len(pairs),), torch.nan)
            values[name, "token_accuracy"][[i for i, pair in enumerate(pairs) if all(pair)]] = found
    note = f"Tokens of the {answer} behind the bare question, the true ones being given; no chat template."
    return Scores("zsre", values, {}, note, made_by("zsre", model, some, watch, answer=answer, rows=rows))

"""MQuAKE: questions of several steps whose answer follows from edited facts (Zhong et al., arXiv 2305.14795)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.benchmarks.asking import Rewritten, as_facts, how_asked, queries, write
from mechunlearn.benchmarks.scores import Scores, made_by, per_group
from mechunlearn.benchmarks.sources import Place, needed, read_splits, text, texts
from mechunlearn.benchmarks.zsre import token_accuracy
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.tables import Row
from mechunlearn.model.hooked import HookedModel

HUB = "henryzhongsc/MQuAKE-Remastered"
FILES = {
    "CF3k": "MQuAKE-CF-3k",
    "CF9k": "MQuAKE-CF",
    "CF6334": "MQuAKE-CF-6334",
    "T": "MQuAKE-T",
    "hard": "MQuAKE-hard",
}
PLACES = {name: Place(file, split=name) for name, file in FILES.items()}
SPLITS = tuple(PLACES)
SHOTS = (
    ("What is the capital of the country where the Eiffel Tower stands?", "Paris"),
    ("Which continent is the home country of Nelson Mandela in?", "Africa"),
    ("What language is spoken where Johann Sebastian Bach was born?", "German"),
)
"""Examples that show how short an answer is to be. They are ours: the authors' are others."""
TOKENS = 16
EDGES = re.compile(r"^[\s\"'“”.,:;!?]+|[\s\"'“”.,:;!?]+$")


@dataclass(frozen=True)
class Hop:
    """A step of a question, or a fact that is edited.

    Args:
        question: The question of this step.
        cloze: The same as a sentence that its answer completes.
        answer: The answer.
        aliases: Its other names.
    """

    question: str
    cloze: str
    answer: str
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its other names."""
        return (self.answer, *self.aliases)


@dataclass(frozen=True)
class Case:
    """Facts to edit together, and questions that need them.

    Args:
        edits: The facts to edit, with the answers that are injected.
        truths: The true answers of the edited facts.
        questions: The same question in several wordings.
        answer: Its answer before the edits, with the other names.
        new_answer: Its answer after them, with the other names.
        hops: Its steps before the edits.
        new_hops: Its steps after them.
        case: Its number in the data.
        subjects: Whom or what the edited facts are about.
    """

    edits: tuple[Hop, ...]
    truths: tuple[str, ...]
    questions: tuple[str, ...]
    answer: tuple[str, ...]
    new_answer: tuple[str, ...]
    hops: tuple[Hop, ...] = ()
    new_hops: tuple[Hop, ...] = ()
    case: str = ""
    subjects: tuple[str, ...] = ()


def load(source: str | Path = HUB, split: str = "CF3k") -> tuple[Case, ...]:
    """Load MQuAKE.

    Args:
        source: A name on the hub (by default the authors' data with errors put right, Zhong et al., 2025), a folder with
            `MQuAKE-CF-3k.json` and its like, or a file.
        split: "CF3k", "CF9k", "CF6334" or "T" of the hub; "hard" too of a folder. A file is what it is.

    Returns:
        The cases.

    Raises:
        MechunlearnError: There is no such source, or the hub does not answer.

    >>> load("no/such/place")
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: There is no file or folder 'no/such/place', and it is no name on the hub (owner/name).
    """
    return read_splits(source, PLACES, [split], _row)[split]


def _row(split: str, row: Row) -> Case:
    edits = row["requested_rewrite"]
    return Case(
        tuple(
            Hop(
                text(each, "question"), each["prompt"].replace("{}", each["subject"]), each["target_new"]["str"].strip()
            )
            for each in edits
        ),
        tuple(each["target_true"]["str"].strip() for each in edits),
        texts(row, "questions"),
        (needed(row, "answer"), *texts(row, "answer_alias")),
        (needed(row, "new_answer"), *texts(row, "new_answer_alias")),
        tuple(map(_hop, row.get("single_hops") or ())),
        tuple(map(_hop, row.get("new_single_hops") or ())),
        text(row, "case_id"),
        tuple(each["subject"].strip() for each in edits),
    )


def _hop(given: Mapping[str, object]) -> Hop:
    hop = dict(given)
    return Hop(needed(hop, "question"), text(hop, "cloze"), needed(hop, "answer"), texts(hop, "answer_alias"))


def facts(cases: Sequence[Case]) -> FactDataset:
    """Return the facts that some cases edit as a data set for localizers, editors and attacks.

    Cases may want different answers to one prompt, so edit a case at a time, or few.

    Args:
        cases: What `load` returned, or some of it.

    >>> edit = Hop("Where was Ada born?", "Ada was born in", "Rome")
    >>> facts([Case((edit,), ("Oslo",), ("Who rules where Ada was born?",), ("Bo",), ("Cai",), subjects=("Ada",))])
    FactDataset(mquake, 1 facts, formats statement; 'Ada was born in' -> 'Oslo')
    """
    told = [
        Rewritten(subject, "mquake", truth, edit.answer, (edit.cloze,))
        for case in cases
        for subject, truth, edit in zip(case.subjects, case.truths, case.edits, strict=True)
    ]
    return as_facts("mquake", told)


def says(written: str, answers: Sequence[str]) -> bool:
    """Return whether the first line of a text is one of some answers, but for case and marks around it.

    The authors compare exactly; of "Paris, France" neither "Paris" nor "France" is the answer.

    Args:
        written: What the model wrote.
        answers: The answer and its other names.

    >>> says(" Paris.", ("Paris",)), says("Paris, France", ("Paris", "City of Light"))
    (True, False)
    """
    line = written.strip().partition("\n")[0]
    return EDGES.sub("", line).casefold() in {EDGES.sub("", answer).casefold() for answer in answers}


def multi_hop_accuracy(written: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> Float[Tensor, " case"]:
    """Return 1 for each case of which any question was answered, and 0 for the others.

    A case is right if one of its three questions is, and other names of the answer count (arXiv 2305.14795, section
    3.3). Three tries are more than one, so figures are above those of single questions.

    Args:
        written: What the model wrote to each question of each case.
        answers: The answer of each case, with its other names.

    >>> multi_hop_accuracy([["Rome", "It is Oslo", "oslo"], ["Rome", "Rome", "Rome"]], [["Oslo"], ["Oslo"]]).tolist()
    [1.0, 0.0]
    """
    return torch.tensor(
        [float(any(says(each, names) for each in said)) for said, names in zip(written, answers, strict=True)]
    )


def evaluate(
    model: HookedModel,
    data: Sequence[Case],
    *,
    rows: int | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Scores:
    """Measure a model on MQuAKE, as it is: call it with the edited and with the unedited one.

    Questions follow three examples of ours that show how short an answer is to be; the authors use others. The edits of
    all cases may contradict one another: edit case by case, or know what the model was given.

    Args:
        model: The model.
        data: What `load` returned.
        rows: How many cases; None for all.
        batch_size: Rows at a time.
        progress: Whether to show bars; None shows them where somebody can see them.

    Returns:
        `multi_hop_accuracy` by number of steps ("2 hops", ...) and of "all", of the answer after the edits;
        `multi_hop_accuracy_before` of "all", of the one before; `portability`: the share of tokens of the answer after
        the edits that are ranked first (`zsre.token_accuracy`), over questions. Of "edits" `token_accuracy`: the
        injected answers behind their sentences. Of "hops" `instance_accuracy`: 1 where every step is answered as after
        the edits, and `instance_accuracy_before`.

    Raises:
        MechunlearnError: There are no cases, or the model has no tokenizer.
    """
    watch, cases = Stopwatch(), data[:rows]
    if not cases:
        raise MechunlearnError("There is no case to ask about. Expected what mquake.load returned.")

    def ask(questions: list[list[str]]) -> list[list[str]]:
        flat = [each for some in questions for each in some]
        given = [query.prompt for query in queries(model, flat, ["?"] * len(flat), SHOTS)]
        said = iter(write(model, given, TOKENS, until=("\n",), batch_size=batch_size, progress=progress))
        return [[next(said) for _ in some] for some in questions]

    said = ask([list(case.questions) for case in cases])
    after = multi_hop_accuracy(said, [case.new_answer for case in cases])
    before = multi_hop_accuracy(said, [case.answer for case in cases])
    values = {("all", "multi_hop_accuracy"): after, ("all", "multi_hop_accuracy_before"): before}
    steps = torch.tensor([len(case.new_hops) for case in cases])
    for count in steps.unique().tolist():
        if count:
            values[f"{count} hops", "multi_hop_accuracy"] = after[steps == count]
    follows = [(each, case.new_answer[0]) for case in cases for each in case.questions]
    ported = token_accuracy(model, follows, batch_size, progress)
    values["all", "portability"] = per_group(ported, [len(case.questions) for case in cases])
    injected = [(edit.cloze, edit.answer) for case in cases for edit in case.edits]
    told = token_accuracy(model, injected, batch_size, progress)
    values["edits", "token_accuracy"] = per_group(told, [len(case.edits) for case in cases])
    for name, chains in {"": [case.new_hops for case in cases], "_before": [case.hops for case in cases]}.items():
        if all(chains):
            said = ask([[hop.question for hop in hops] for hops in chains])
            right = [all(says(each, hop.answers) for each, hop in zip(*pair)) for pair in zip(said, chains)]
            values["hops", f"instance_accuracy{name}"] = torch.tensor(right).float()
    note = f"{how_asked(model)} Three examples show how short an answer is to be."
    return Scores("mquake", values, {}, note, made_by("mquake", model, cases, watch, rows=rows))

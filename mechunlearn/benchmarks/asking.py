"""Questions in free text: asked as the model wants them, answered by greedy decoding, judged by words in common."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.core.batches import in_batches
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.chat import rendered
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.facts.odd import as_written
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.text import decoded, ids_to_continue

CHAT = "Questions are user's turns of the tokenizer's chat template, answers the assistant's."
PLAIN = "The tokenizer has no chat template: a line 'Question: ...' is followed by 'Answer:'."
FRAME = "Question: {}\nAnswer:"
"""As TOFU asks Phi and MUSE asks Llama 2, but for the space behind it, which belongs to the answer's first token."""
BATCH = 16


@runtime_checkable
class Asked(Protocol):
    """A row with a question and its answer."""

    @property
    def question(self) -> str:
        """The question."""

    @property
    def answer(self) -> str:
        """Its answer."""


def how_asked(model: HookedModel) -> str:
    """Say how a model is asked: through its chat template if its tokenizer has one.

    Args:
        model: The model.

    >>> from mechunlearn import load_model
    >>> how_asked(load_model("factworld"))
    "The tokenizer has no chat template: a line 'Question: ...' is followed by 'Answer:'."
    """
    return CHAT if getattr(model.tokenizer, "chat_template", None) else PLAIN


def queries(
    model: HookedModel,
    questions: Sequence[str],
    answers: Sequence[str],
    shots: Sequence[tuple[str, str]] = (),
) -> list[Query]:
    r"""Return questions with their answers as queries, without a subject.

    Args:
        model: Its tokenizer's chat template writes them out; without one `FRAME` does.
        questions: The questions.
        answers: One answer each.
        shots: Questions with their answers that are shown before each.

    Raises:
        MechunlearnError: The model has no tokenizer, or its chat template refuses such turns.

    >>> from mechunlearn import load_model
    >>> queries(load_model("factworld"), ["Where does Anna live?"], ["Oslo"])[0].prompt
    'Question: Where does Anna live?\nAnswer:'
    """
    if model.tokenizer is None:
        raise MechunlearnError("This model has no tokenizer, so it cannot be asked in words. Load it with one.")
    if not model.tokenizer.chat_template:
        before = "".join(f"{FRAME.format(asked)} {answer}\n\n" for asked, answer in shots)
        return [Query(before + FRAME.format(asked), answer) for asked, answer in zip(questions, answers, strict=True)]
    turns = tuple(turn for asked, answer in shots for turn in (("user", asked), ("assistant", answer)))
    return [
        rendered(Query("", answer, turns=(*turns, ("user", asked))), model.tokenizer)
        for asked, answer in zip(questions, answers, strict=True)
    ]


def as_prompts(model: HookedModel, rows: Sequence[Asked], name: str = "questions") -> Prompts:
    """Return rows with a question and an answer as prompts for editors and attacks, without an invented subject.

    There is no corrupt partner for a question without a subject, so localizers that need one cannot use them.

    Args:
        model: It is asked through its chat template if its tokenizer has one.
        rows: The rows, such as a split of `tofu.load`. A `subject` that a row has becomes the prompt's.
        name: What the data set is called.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.benchmarks.tofu import TofuRow
    >>> prompts = as_prompts(load_model("factworld"), [TofuRow("Where does Anna live?", "in Oslo")], "one row")
    >>> len(prompts), prompts.queries[0].answer, prompts.queries[0].subject
    (1, 'in Oslo', '')
    """
    asked = queries(model, [row.question for row in rows], [row.answer for row in rows])
    subjects = [as_written(getattr(row, "subject", ""), query.prompt) for row, query in zip(rows, asked)]
    facts = [Fact(subject, "question", {"statement": query}) for subject, query in zip(subjects, asked)]
    return FactDataset(name, tuple(facts)).prompts(model)


class Rewritten(NamedTuple):
    """A fact that an edit rewrites, as text.

    Attributes:
        subject: Whom or what it is about.
        relation: What it says of the subject.
        truth: The true answer.
        target: The answer that an edit injects; empty for none.
        prompts: What stands before the answer: the prompt to train on, then other wordings.
    """

    subject: str
    relation: str
    truth: str
    target: str
    prompts: tuple[str, ...]


def as_facts(name: str, rows: Iterable[Rewritten]) -> FactDataset:
    """Return facts to rewrite as a data set for localizers, editors and attacks; each once.

    Args:
        name: What the data set is called.
        rows: The facts. One whose target is its truth gets no target.

    >>> facts = as_facts("one", [Rewritten("Ada", "P103", "Polish", "Greek", ("Ada speaks", "In Ada's tongue,"))])
    >>> facts[0].subject, facts[0].target, facts.formats
    ('Ada', 'Greek', ('statement', 'paraphrase_1'))
    """
    facts = []
    for row in dict.fromkeys(rows):
        target = row.target if row.target != row.truth else ""
        names = ["statement", *(f"paraphrase_{i}" for i in range(1, len(row.prompts)))]
        asked = {
            name: Query(prompt, row.truth, target, subject=as_written(row.subject, prompt))
            for name, prompt in zip(names, row.prompts, strict=True)
        }
        facts.append(Fact(asked["statement"].subject, row.relation, asked))
    return FactDataset(name, tuple(facts))


@steady()
@torch.no_grad()
def write(
    model: HookedModel,
    prompts: Sequence[str],
    tokens: int,
    *,
    until: Sequence[str] = (),
    batch_size: int = BATCH,
    progress: bool | None = False,
) -> list[str]:
    """Return what the model writes behind each prompt by greedy decoding, without space around it.

    Args:
        model: The model.
        prompts: The prompts.
        tokens: How many tokens it may write.
        until: Words at the first of which an answer is cut.
        batch_size: Prompts at a time, shortest first.
        progress: Whether there is a bar (see `progress.track`).
    """
    ids = ids_to_continue(list(prompts), model.tokenizer)
    order = torch.tensor([len(row) for row in ids]).argsort().tolist()
    said = [""] * len(ids)

    def some(part: Tensor) -> None:
        rows = [order[i] for i in part.tolist()]
        made = model.generate([ids[i] for i in rows], max_new_tokens=tokens)
        width = max(len(ids[i]) for i in rows)
        for i, text in zip(rows, decoded(made[:, width:], model.tokenizer, skip_special=True)):
            said[i] = cut(text, until)

    in_batches(len(ids), batch_size, some, "writing", progress)
    return said


def cut(text: str, until: Sequence[str]) -> str:
    r"""Return a text up to the first of some words, without space around it.

    Args:
        text: The text.
        until: The words.

    >>> cut(" Oslo.\n\nQuestion: Who", ["\n\n"])
    'Oslo.'
    """
    for word in until:
        text = text.partition(word)[0]
    return text.strip()


def rouge_l(
    references: Sequence[str], texts: Sequence[str], measure: Literal["recall", "f1"] = "recall", stem: bool = True
) -> Float[Tensor, " row"]:
    """Return ROUGE-L: how much of each reference is in a text in the same order (0 to 1).

    With l the longest common subsequence of words, recall = l / |reference|, precision = l / |text|, F1 = 2 l /
    (|reference| + |text|) (Lin, 2004), by the package `rouge-score`. TOFU reports recall with stems (arXiv 2401.06121),
    MUSE F1 without (arXiv 2407.06460). It counts words, not truth: "born in Oslo" and "not born in Oslo" are alike, and
    a long text that says everything has a recall of 1. Words are runs of Latin letters and digits, so it is 0 of others.

    Args:
        references: The true answers.
        texts: What was written, one each.
        measure: Recall, or F1.
        stem: Whether words are compared by their stems (Porter's).

    Raises:
        MechunlearnError: The package is not installed.

    >>> rouge_l(["she was born in Oslo"], ["Oslo is where she was born"]).tolist()  # she was born
    [0.6000000238418579]
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MechunlearnError("ROUGE needs the package rouge-score: pip install 'mechunlearn[benchmarks]'.") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    found = [scorer.score(reference, text)["rougeL"] for reference, text in zip(references, texts, strict=True)]
    return torch.tensor([float(each.recall if measure == "recall" else each.fmeasure) for each in found])

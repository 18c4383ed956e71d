"""TOFU: 200 authors who do not exist, some of whom are to be forgotten (Maini et al., arXiv 2401.06121)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from scipy.stats import hmean, ks_2samp
from torch import Tensor

from mechunlearn.benchmarks.asking import how_asked, queries, rouge_l, write
from mechunlearn.benchmarks.scores import Scores, made_by
from mechunlearn.benchmarks.sources import Place, needed, read_splits, text, texts
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.tables import Row
from mechunlearn.metrics.continuations import exact_memorization, extraction_strength, probability, read_behind
from mechunlearn.model.hooked import HookedModel

HUB = "locuslab/TOFU"
SPLITS = (
    "full",
    *(f"forget{share}" for share in ("01", "05", "10")),
    *(f"retain{share}" for share in ("90", "95", "99")),
    *(f"holdout{share}" for share in ("01", "05", "10")),
    *(f"forget{share}_perturbed" for share in ("01", "05", "10")),
    "retain_perturbed",
    *("real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"),
)
UTILITY = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
RATIO = "truth_ratio"


@dataclass(frozen=True)
class TofuRow:
    """A question with its answer.

    Args:
        question: The question.
        answer: Its answer.
        paraphrased_answer: The same answer in other words; empty where the split has none.
        perturbed_answers: Wrong answers in the words of the paraphrase.
        paraphrased_question: The same question in other words.
        options: The answers to choose among, where the split lists them.
        subject: Whom or what the question is about, as it writes it. TOFU's files do not say; a column of this name of
            yours does, and then localizers that corrupt the subject can be used.
    """

    question: str
    answer: str
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    paraphrased_question: str = ""
    options: tuple[str, ...] = ()
    subject: str = ""


Tofu = Mapping[str, Sequence[TofuRow]]


def load(source: str | Path = HUB, splits: Sequence[str] | None = None) -> Tofu:
    """Load TOFU.

    Args:
        source: A name on the hub, a folder with its files (`forget01.jsonl`, `real_authors_perturbed.json`, ...), or one
            of them.
        splits: Which of `SPLITS`. None: all of the hub's, or those that the folder has.

    Returns:
        The rows of each split, by name. `asking.as_prompts` makes prompts of them.

    Raises:
        MechunlearnError: There is no such split or source, or the hub does not answer.

    >>> load("no/such/place")
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: There is no file or folder 'no/such/place', and it is no name on the hub (owner/name).
    """
    return read_splits(source, {name: Place(name, name) for name in SPLITS}, splits, _row)


def _row(split: str, row: Row) -> TofuRow:
    options = tuple(text(row, name) for name in row if name.startswith("option") and text(row, name))
    others = text(row, "paraphrased_answer"), texts(row, "perturbed_answer"), text(row, "paraphrased_question")
    return TofuRow(needed(row, "question"), needed(row, "answer"), *others, options, text(row, "subject"))


def truth_ratio(
    paraphrased: Float[Tensor, " row"],
    perturbed: Float[Tensor, "row wrong"],
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> Float[Tensor, " row"]:
    """Return how likely wrong answers are beside a right one in the same words (0 and above; 1: the model cannot tell).

    R = mean_i p(wrong_i | q)^(1/|wrong_i|) / p(right | q)^(1/|right|) (arXiv 2401.06121, equation 1). The paper writes an
    arithmetic mean; its code, open-unlearning and so all published figures take the geometric one, exp of the mean of
    the log-probabilities. It is small where the model knows the truth. It says nothing of what the model answers: a
    model that finds everything equally unlikely has R = 1.

    Args:
        paraphrased: Length-normalised probability of the right answer (see `continuations.probability`).
        perturbed: That of each wrong answer; NaN where a row has fewer.
        mean: The mean over wrong answers.

    >>> truth_ratio(torch.tensor([0.5]), torch.tensor([[0.25, 0.0625]])).tolist()
    [0.25]
    >>> truth_ratio(torch.tensor([0.5]), torch.tensor([[0.25, 0.0625]]), mean="arithmetic").tolist()
    [0.3125]
    """
    wrong = perturbed.log().nanmean(1).exp() if mean == "geometric" else perturbed.nanmean(1)
    return wrong / paraphrased


def forget_quality(ratios: Float[Tensor, " row"], retain_ratios: Float[Tensor, " other"]) -> float:
    """Return the p-value of a Kolmogorov-Smirnov test between truth ratios of a model and of one that never saw the data.

    D = sup_x |F(x) - F_retain(x)| over the two empirical distributions on the forget set (arXiv 2401.06121, section
    2.2.2); at .05 or below the two models differ. Few rows differ in nothing: with 40 of each the test needs D = .325. A
    large p-value is no proof of forgetting, and says nothing of what else an edit did: see `model_utility`.

    Args:
        ratios: Truth ratios of the model on the forget set.
        retain_ratios: Those of a model that was finetuned on the retain set alone.

    >>> round(forget_quality(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])), 6)  # 2 of 20 orders
    0.1
    """
    return float(ks_2samp(ratios.double().numpy(), retain_ratios.double().numpy()).pvalue)


def model_utility(figures: Sequence[float]) -> float:
    """Return the harmonic mean of the nine figures of what is to stay (0 to 1).

    9 / sum 1/x over probability, ROUGE-L recall and max(0, 1 - truth ratio) of the retain set, the real authors and the
    world facts (arXiv 2401.06121, section 2.2.1). One figure of 0 makes it 0: do not use it for models that never knew
    one of the sets, where it says nothing of an edit.

    Args:
        figures: The nine.

    Raises:
        MechunlearnError: There are not nine, or one is below 0 or missing.

    >>> round(model_utility([0.5] * 8 + [1.0]), 6)  # 9 / (8 x 2 + 1)
    0.529412
    """
    if len(figures) != 9 or not all(figure >= 0 for figure in figures):
        raise MechunlearnError(f"Got {len(figures)} figures: {list(figures)}. Expected nine, each 0 or above.")
    return float(hmean(list(figures)))


def evaluate(
    model: HookedModel,
    data: Tofu,
    *,
    forget: str = "forget10",
    retain_model: HookedModel | Float[Tensor, " row"] | None = None,
    tokens: int = 200,
    rows: int | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Scores:
    """Measure a model on TOFU: what is left of the forget set, and what became of the rest.

    Questions go through the chat template of the model's tokenizer, if it has one; the answer's probability includes the
    end of text, as in TOFU's code. Answers of real authors and world facts are measured against the wrong ones:
    p / (p + sum of theirs). TOFU's own evaluation takes the first 300 rows of each split: `rows=300`.

    Args:
        model: The model: edited, full or retrained.
        data: What `load` returned, with the perturbed splits.
        forget: Which forget set.
        retain_model: A model that was finetuned on the retain set alone, or its truth ratios: `scores.values` of it at
            (forget, "truth_ratio"). None leaves the forget quality out.
        tokens: The most tokens that the model may write for ROUGE.
        rows: How many rows of each split; None for all.
        batch_size: Rows at a time.
        progress: Whether to show bars; None shows them where somebody can see them.

    Returns:
        By split: `probability`, `rouge_l_recall`, and `truth_ratio` as R itself on the forget set, where
        `truth_ratio_closeness` = min(R, 1/R) is what TOFU's table has, and `truth_preference` = max(0, 1 - R) elsewhere;
        `exact_memorization` and `extraction_strength` of the forget set; `forget_quality` and `model_utility`.

    Raises:
        MechunlearnError: The data lack a split that is needed.
    """
    watch = Stopwatch()
    needs = {forget: f"{forget}_perturbed", **UTILITY}
    if missing := [split for split in needs.values() if not data.get(split)]:
        raise MechunlearnError(f"The data lack {', '.join(missing)}. Load them too: tofu.load(source, splits=[...]).")
    values: dict[tuple[str, str], Tensor] = {}
    for name, split in needs.items():
        found = _split(model, data[split][:rows], name, name == forget, tokens, batch_size, progress)
        values |= {(name, metric): each for metric, each in found.items()}
    nine = [(name, metric) for name in UTILITY for metric in ("probability", "rouge_l_recall", "truth_preference")]
    utility = model_utility([float(values[at].double().mean()) for at in nine])
    figures = {("all", "model_utility"): (utility, 9)}
    note = how_asked(model)
    if retain_model is None:
        note += " No retrained model was given, so there is no forget quality."
    else:
        if isinstance(retain_model, HookedModel):
            retain_model = truth_ratios(retain_model, data, forget, rows, batch_size, progress)
        ratios = values[forget, RATIO]
        figures[forget, "forget_quality"] = forget_quality(ratios, retain_model), len(ratios)
    card = made_by("tofu", model, data, watch, forget=forget, tokens=tokens, rows=rows, chat="chat template" in note)
    return Scores("tofu", values, figures, note, card)


def truth_ratios(
    model: HookedModel,
    data: Tofu,
    forget: str = "forget10",
    rows: int | None = None,
    batch_size: int = 16,
    progress: bool | None = False,
) -> Float[Tensor, " row"]:
    """Return the truth ratio of each row of a forget set, for `forget_quality` and `evaluate(retain_model=)`.

    Args:
        model: The model.
        data: What `load` returned.
        forget: Which forget set.
        rows: How many rows; None for all.
        batch_size: Rows at a time.
        progress: Whether there is a bar (see `progress.track`).
    """
    return _ratios(model, data[f"{forget}_perturbed"][:rows], batch_size, progress)[0]


def _ratios(
    model: HookedModel, rows: Sequence[TofuRow], batch_size: int, progress: bool | None
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row wrong"]]:
    """Truth ratios, and the probability of each wrong answer."""
    right = [row.paraphrased_answer or row.answer for row in rows]
    sizes = torch.tensor([len(row.perturbed_answers) for row in rows])
    wrong = [(row.question, answer) for row in rows for answer in row.perturbed_answers]
    asked = queries(model, [row.question for row in rows] + [q for q, _ in wrong], right + [a for _, a in wrong])
    found = probability(read_behind(model, asked, end=True, batch_size=batch_size, progress=progress))
    perturbed = torch.full((len(rows), int(sizes.max())), torch.nan)
    perturbed[torch.arange(perturbed.shape[1]) < sizes[:, None]] = found[len(rows) :]
    return truth_ratio(found[: len(rows)], perturbed), perturbed


def _split(
    model: HookedModel,
    rows: Sequence[TofuRow],
    name: str,
    forgotten: bool,
    tokens: int,
    batch_size: int,
    progress: bool | None,
) -> dict[str, Float[Tensor, " row"]]:
    """Every figure of one split, a number a row."""
    asked = queries(model, [row.question for row in rows], [row.answer for row in rows])
    read = read_behind(model, asked, end=True, batch_size=batch_size, progress=progress)
    ratios, perturbed = _ratios(model, rows, batch_size, progress)
    likely = probability(read)
    if name in ("real_authors", "world_facts"):
        likely = likely / (likely + perturbed.nansum(1))
    said = write(model, [query.prompt for query in asked], tokens, batch_size=batch_size, progress=progress)
    found = {"probability": likely, "rouge_l_recall": rouge_l([row.answer for row in rows], said), RATIO: ratios}
    if not forgotten:
        return found | {"truth_preference": (1 - ratios).clamp(min=0)}
    answer = read.without_last() if model.tokenizer and model.tokenizer.eos_token_id is not None else read
    known = {"exact_memorization": exact_memorization(answer), "extraction_strength": extraction_strength(answer)}
    return found | {"truth_ratio_closeness": torch.minimum(ratios, 1 / ratios)} | known

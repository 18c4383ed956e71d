"""CounterFact: single facts rewritten to wrong ones, with paraphrases and neighbours (Meng et al., arXiv 2202.05262)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from scipy.stats import hmean
from torch import Tensor

from mechunlearn.benchmarks.asking import Rewritten, as_facts
from mechunlearn.benchmarks.scores import Scores, made_by, per_group
from mechunlearn.benchmarks.sources import Place, needed, read_splits, text, texts
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Query
from mechunlearn.facts.tables import Row
from mechunlearn.metrics.continuations import probability, read_behind
from mechunlearn.metrics.text import ngram_entropy
from mechunlearn.model.hooked import HookedModel

HUB = "azhx/counterfact"
PLACES = {name: Place(f"counterfact-{name}", split=name) for name in ("train", "test", "edit", "val")}
SPLITS = tuple(PLACES)


@dataclass(frozen=True)
class Rewrite:
    """A fact, and what it is to become.

    Args:
        subject: Whom or what it is about.
        prompt: What stands before the answer, with the subject in it.
        truth: The true answer.
        target: The answer that an edit injects.
        paraphrases: Other prompts for the same fact.
        neighbours: Prompts about other subjects, whose answer is to stay.
        neighbour_truth: The true answer of the neighbours.
        attributes: Prompts about subjects of which the target is true.
        generation: Openings behind which the model writes about the subject.
        relation: The relation, as Wikidata names it.
        case: Its number in the data.
    """

    subject: str
    prompt: str
    truth: str
    target: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    neighbour_truth: str = ""
    attributes: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    relation: str = ""
    case: str = ""


def load(source: str | Path = HUB, split: str = "train") -> tuple[Rewrite, ...]:
    """Load CounterFact, nested as its authors have it or flat as EasyEdit has it.

    Args:
        source: A name on the hub, a folder (`counterfact-train.json`, EasyEdit's `counterfact-edit.json`, ...), or a file.
        split: "train" or "test" of the hub; "edit" and "val" too of a folder. A file is what it is.

    Returns:
        The facts.

    Raises:
        MechunlearnError: There is no such source, or the hub does not answer.

    >>> load("no/such/place")
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: There is no file or folder 'no/such/place', and it is no name on the hub (owner/name).
    """
    return read_splits(source, PLACES, [split], _row)[split]


def _row(split: str, row: Row) -> Rewrite:
    case = text(row, "case_id")
    asked = row.get("requested_rewrite")
    if not isinstance(asked, Mapping):
        subject, again, near = needed(row, "subject"), texts(row, "rephrase_prompt"), texts(row, "locality_prompt")
        truth, target = needed(row, "ground_truth", "target_true"), needed(row, "target_new")
        prompt = needed(row, "prompt").replace("{}", subject)
        return Rewrite(subject, prompt, truth, target, again, near, text(row, "locality_ground_truth"), case=case)
    subject, truth, target = needed(dict(asked), "subject"), asked["target_true"]["str"], asked["target_new"]["str"]
    lists = [texts(row, f"{name}_prompts") for name in ("paraphrase", "neighborhood", "attribute", "generation")]
    return Rewrite(
        subject,
        asked["prompt"].replace("{}", subject),
        truth.strip(),
        target.strip(),
        lists[0],
        lists[1],
        truth.strip(),
        lists[2],
        lists[3],
        text(dict(asked), "relation_id"),
        case,
    )


def facts(rows: Sequence[Rewrite]) -> FactDataset:
    """Return the facts as a data set for localizers, editors and attacks: the prompt to train on, and the paraphrases.

    Args:
        rows: What `load` returned.

    >>> facts([Rewrite("Ada", "Ada speaks", "Polish", "Greek")])
    FactDataset(counterfact, 1 facts, formats statement; 'Ada speaks' -> 'Polish')
    """
    told = [
        Rewritten(row.subject, row.relation or "fact", row.truth, row.target, (row.prompt, *row.paraphrases))
        for row in rows
    ]
    return as_facts("counterfact", told)


@dataclass(frozen=True)
class Pair:
    """Length-normalised probabilities of the two answers behind each prompt, prompts of a fact after one another.

    Args:
        target: Those of the answer that an edit injects.
        truth: Those of the true answer.
        sizes: How many prompts each fact has.
    """

    target: Float[Tensor, " prompt"]
    truth: Float[Tensor, " prompt"]
    sizes: tuple[int, ...]


def pairs(
    model: HookedModel,
    facts: Sequence[Rewrite],
    prompts: Sequence[Sequence[str]],
    neighbours: bool = False,
    batch_size: int = 32,
    progress: bool | None = False,
) -> Pair:
    """Read both answers behind some prompts of each fact.

    p(a | q)^(1/|a|), as the authors' code has it; the paper says probability.

    Args:
        model: The model. Its chat template is not used.
        facts: The facts.
        prompts: The prompts of each.
        neighbours: Whether the true answer is that of the neighbours.
        batch_size: Rows at a time.
        progress: Whether there is a bar (see `progress.track`).
    """
    rows = [(fact, prompt) for fact, some in zip(facts, prompts, strict=True) for prompt in some]
    asked = [Query(prompt, fact.target) for fact, prompt in rows]
    asked += [Query(prompt, fact.neighbour_truth if neighbours else fact.truth) for fact, prompt in rows]
    likely = probability(read_behind(model, asked, batch_size=batch_size, progress=progress))
    return Pair(likely[: len(rows)], likely[len(rows) :], tuple(map(len, prompts)))


def score(pair: Pair) -> Float[Tensor, " fact"]:
    """Return of each fact the share of prompts behind which the target is likelier than the truth (0 to 1).

    Efficacy score (ES) of the fact's own prompt, paraphrase score (PS) of its paraphrases: mean 1{p(target) > p(truth)}
    (arXiv 2202.05262, section 3.4). For neighbours take `kept`. A target that is one in a million beats a truth that is
    one in two million: see `magnitude` for how much.

    Args:
        pair: What `pairs` returned.

    >>> score(Pair(torch.tensor([0.5, 0.1, 0.3]), torch.tensor([0.2, 0.2, 0.2]), (2, 1))).tolist()
    [0.5, 1.0]
    """
    return per_group(pair.target > pair.truth, pair.sizes)


def kept(pair: Pair) -> Float[Tensor, " fact"]:
    """Return of each fact the share of neighbours' prompts behind which the truth is likelier than the target (0 to 1).

    Neighbourhood score (NS): mean 1{p(truth) > p(target)} (arXiv 2202.05262, section 3.4). Not all of it was right
    before the edit either: compare it with the unedited model's.

    Args:
        pair: What `pairs` returned, of neighbours.

    >>> kept(Pair(torch.tensor([0.5, 0.1]), torch.tensor([0.2, 0.2]), (2,))).tolist()
    [0.5]
    """
    return per_group(pair.truth > pair.target, pair.sizes)


def magnitude(pair: Pair) -> Float[Tensor, " fact"]:
    """Return of each fact the mean of p(target) - p(truth) over its prompts (-1 to 1).

    Efficacy magnitude (EM) and paraphrase magnitude (PM); that of neighbours is taken with the other sign (NM).

    Args:
        pair: What `pairs` returned.

    >>> round(float(magnitude(Pair(torch.tensor([0.5, 0.1]), torch.tensor([0.2, 0.2]), (2,)))[0]), 6)
    0.1
    """
    return per_group(pair.target - pair.truth, pair.sizes)


def consistency(written: Sequence[str], references: Sequence[Sequence[str]]) -> Float[Tensor, " fact"]:
    """Return how much a text about each subject is like texts about things of which the target is true (0 to 1).

    RS: the cosine of the tf-idf vectors of the two (arXiv 2202.05262, section 3.4). The authors count document
    frequencies in Wikipedia; here they are those of all the references, so values are not theirs. A text that repeats
    one word of the references is like them too: read it beside the entropy.

    Args:
        written: A text a fact.
        references: Some texts for each.

    Raises:
        MechunlearnError: There is not one list of references for each text, or one has none.

    >>> consistency(["she plays tennis", "rain"], [["tennis is a game"], ["the sun"]]).gt(0).tolist()
    [True, False]
    """
    if len(written) != len(references) or not all(references):
        raise MechunlearnError("Expected one text or more for each of the texts that the model wrote.")
    from sklearn.feature_extraction.text import TfidfVectorizer

    whole = [" ".join(some) for some in references]
    vectorizer = TfidfVectorizer().fit([each for some in references for each in some])
    ours, theirs = (vectorizer.transform(each) for each in (written, whole))  # rows of length 1
    return torch.tensor(ours.multiply(theirs).sum(1), dtype=torch.float32).flatten()


@steady()
@torch.no_grad()
def generate(
    model: HookedModel, facts: Sequence[Rewrite], tokens: int = 100, seed: int = 0, batch_size: int = 16
) -> list[list[str]]:
    """Return what the model writes behind the openings of each fact, opening included, each token drawn from the top five.

    Args:
        model: The model.
        facts: The facts.
        tokens: How many tokens are added. The authors count the opening among their 100.
        seed: Draws the tokens.
        batch_size: Openings at a time.
    """
    openings = [opening for fact in facts for opening in fact.generation]
    made: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(openings), batch_size):
            some = openings[start : start + batch_size]
            made += model.generate(some, max_new_tokens=tokens, do_sample=True, top_k=5)
    rows = iter(made)
    return [[next(rows) for _ in fact.generation] for fact in facts]


def evaluate(
    model: HookedModel,
    facts: Sequence[Rewrite],
    *,
    references: Mapping[str, Sequence[str]] | None = None,
    tokens: int = 100,
    seed: int = 0,
    rows: int | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Scores:
    """Measure a model on CounterFact, as it is: call it with the edited and with the unedited one.

    Prompts are read as they are, without a chat template. Figures are means over facts, of each of which the mean over
    its prompts is taken. Facts without paraphrases, neighbours or openings have no number there.

    Args:
        model: The model.
        facts: What `load` returned.
        references: By case, texts about things of which the target is true. None leaves consistency out.
        tokens: How many tokens the model writes behind each opening; 0 leaves what it writes out.
        seed: Draws what it writes.
        rows: How many facts; None for all.
        batch_size: Rows at a time.
        progress: Whether to show bars; None shows them where somebody can see them.

    Returns:
        Of "rewrite", "paraphrase" and "neighbourhood" `score` and `magnitude`; of "all" the harmonic mean `score` of the
        three; of "generation" `ngram_entropy` (bits) and `consistency`.
    """
    watch, some = Stopwatch(), list(facts[:rows])
    if not some:
        raise MechunlearnError("There is no fact to measure. Expected what counterfact.load returned.")
    asked: dict[str, list[tuple[str, ...]]] = {
        "rewrite": [(fact.prompt,) for fact in some],
        "paraphrase": [fact.paraphrases for fact in some],
        "neighbourhood": [fact.neighbours if fact.neighbour_truth else () for fact in some],
    }
    values: dict[tuple[str, str], Tensor] = {}
    for name, prompts in asked.items():
        if any(prompts):
            found = pairs(model, some, prompts, name == "neighbourhood", batch_size, progress)
            near = name == "neighbourhood"
            values[name, "score"] = kept(found) if near else score(found)
            values[name, "magnitude"] = -magnitude(found) if near else magnitude(found)
    figures = {}
    if len(values) == 6:
        three = [float(values[name, "score"].double().nanmean()) for name in asked]
        figures["all", "score"] = float(hmean(three)), len(some)
    note = "Prompts are read as they are, without a chat template; answers by length-normalised probability."
    if tokens and any(fact.generation for fact in some):
        written = generate(model, some, tokens, seed)
        entropies = torch.tensor([ngram_entropy(each) for texts in written for each in texts])
        values["generation", "ngram_entropy"] = per_group(entropies, [len(texts) for texts in written])
        if references is not None:
            told = [i for i, fact in enumerate(some) if references.get(fact.case) and fact.generation]
            likeness = torch.full((len(some),), torch.nan)
            about = [references[some[i].case] for i in told]
            likeness[told] = consistency([" ".join(written[i]) for i in told], about)
            values["generation", "consistency"] = likeness
        note += f" It wrote {tokens} tokens, each drawn from the five likeliest."
    card = made_by("counterfact", model, some, watch, tokens=tokens, seed=seed, rows=rows)
    return Scores("counterfact", values, figures, note, card)

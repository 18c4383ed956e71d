"""The whole job in one call.

Localize, mask, edit, evaluate beside controls, attack, and write everything into one folder.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.files import whole_folder
from mechunlearn.core.progress import is_watched
from mechunlearn.core.steady import steady
from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.evaluate import evaluate
from mechunlearn.evaluation.preview import preview
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import check_attacks
from mechunlearn.evaluation.status import ASKED
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.model.hooked import HookedModel, load_model

ATTACKS = ("prompting", "quantization", "unlearning_depth", "relearning")
SHARE = 0.05
SMALL = 2**26  # parameters: a second edit beside a larger model's costs minutes
RULES = ("probe", "paths")
LEAST = 8
"""Facts that the model knows, at least: a forget and a retain set, and some that no edit sees."""


@dataclass(frozen=True, eq=False)
class EditedFacts:
    """What `edit_facts` made; in a notebook it shows the report.

    Args:
        found: The localization that the mask comes from.
        mask: The units that were edited.
        edit: The edit.
        report: What it did.
    """

    found: Localization
    mask: ComponentMask
    edit: WeightEdit
    report: Report

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def __repr__(self) -> str:
        return f"EditedFacts({len(self.mask)} units by {self.found.card.method}; {self.report!r})"

    def __str__(self) -> str:
        return str(self.report)

    def save(self, model: HookedModel, folder: str | Path) -> dict[str, Path]:
        """Write mask, edit, edited model and report into a new or empty folder, and return where they are.

        Args:
            model: The unedited model.
            folder: The folder.
        """
        name = str(self.report.about["facts"]).split("/")[-1]
        files = {
            "mask": f"{name}.mask.json",
            "edit": f"{name}.edit.safetensors",
            "model": "edited",
            "report": "report.html",
        }
        with whole_folder(folder) as beside:
            self.mask.save(beside / files["mask"])
            self.edit.save(beside / files["edit"])
            self.edit.export(model, beside / files["model"])
            self.report.to_html(beside / files["report"], found=self.found, edit=self.edit)
        return {kind: Path(folder) / file for kind, file in files.items()}


@steady()
def edit_facts(
    facts: Any,
    model: str | Path | HookedModel,
    *,
    forget: int | Sequence[str] | None = None,
    attacks: Sequence[str] | str = ATTACKS,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> EditedFacts:
    """Make a model believe other answers to some facts, and find out whether the old ones are gone, in one call.

    The steps, each a function of its own: facts that the model does not give are dropped, `fact_lookup` chooses the
    mask (by its probe, else by its paths; where neither finds a look-up window, `attribution_patching`'s largest units
    of 5 % of the weights), `masked_gradient` trains it towards the edit targets, `evaluate` measures it in every format
    and on unseen facts and ordinary text, beside a random mask of the same weight (beside attribution patching's too,
    of a model below 2**26 parameters), and `attacks` try to get the truth back. The model is left as it was: use
    `edit.apply_(model)`, `edit.export(model, folder)` or `save(model, folder)`.

    It uses default settings, and one edit is one seed. To compare masks or objectives use `compare`.

    Args:
        facts: What `load_facts` reads (a file or a `DataFrame` with subject, prompt, answer and perhaps target), or a
            loaded data set.
            Edit targets that are missing are drawn from the other answers.
        model: What `load_model` reads, or a loaded model.
        forget: The facts to edit: a number drawn by `seed`, or subjects by name; None draws a quarter of them, at
            most 64. Half of the others are retained; the rest shows what the edit does to facts it never saw.
        attacks: Names of attacks; "all" for every one, () for none.
        cache: A folder in which finished attacks are kept.
        seed: Draws the sets, the edits and the attacks.
        progress: Whether to show bars; None shows them where somebody can see them.
        say: Called with a line on each step: what was dropped, how the mask was chosen, what the work will cost.

    Raises:
        MechunlearnError: For facts that cannot be read or fit no model, subjects that are not among those the model
            knows, fewer than eight facts that it knows, and facts without an edit target where none can be drawn.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> few = load_facts("factworld/sport").select(range(48))
    >>> made = edit_facts(few, model, forget=["Surik Belman"], attacks=())  # doctest: +SKIP
    """
    if attacks:
        check_attacks(attacks)
    hooked = load_model(model) if isinstance(model, str | Path) else model
    data = facts if isinstance(facts, FactDataset) else load_facts(facts)
    chosen = [forget] if isinstance(forget, str) else forget
    known = _with_targets(_known(data, hooked, chosen, say), seed, say)
    forgotten, retained = _sets(known.prompts(hooked), chosen, seed)
    settings: dict[str, Any] = {"attacks": attacks, "cache": cache, "seed": seed, "progress": progress, "say": say}
    return edit_prompts(hooked, forgotten, retained, **settings)


@steady()
def edit_prompts(
    model: HookedModel,
    forget: Prompts,
    retain: Prompts,
    *,
    attacks: Sequence[str] | str = (),
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> EditedFacts:
    """Do the same for sets that are chosen already.

    Args:
        model: The model.
        forget: The facts to edit.
        retain: The facts to keep.
        attacks: Names of attacks; "all" for every one, () for none.
        cache: A folder in which finished attacks are kept.
        seed: Draws the edits and the attacks.
        progress: Whether to show bars; None shows them where somebody can see them.
        say: Called with a line on each step.
    """
    names = check_attacks(attacks) if attacks else []
    small = sum(parameter.numel() for parameter in model.hf.parameters()) < SMALL
    for line in preview(model, forget, retain, names, edits=3 if small else 2):
        say(line)
    attributed = attribution_patching(model, forget, progress=progress)
    looked_up = _looked_up(model, forget, seed, progress, say)
    found = looked_up or attributed
    mask = looked_up.above(0) if looked_up else attributed.top(weights=SHARE)
    if not looked_up:
        say(f"attribution_patching: the largest units of {SHARE:.0%} of the weights are edited")
    share = attributed.share(mask)
    say(f"mask: {len(mask)} units, {share:.2%} of the editable weights")
    bars = is_watched() if progress is None else progress
    masks = {"the mask": mask}
    if looked_up and small:
        masks["patching"] = attributed.top(weights=share)
    edits = {}
    for name, each in masks.items():
        beside = "attribution patching's units of the same weight" if name == "patching" else name
        say(f"editing: {beside}, {len(forget)} facts to forget and {len(retain)} to retain")
        with warnings_said(say):
            edits[name] = masked_gradient(model, each, forget, retain, seed=seed, progress=bars)
    edit = edits.pop("the mask")
    say(f"measuring: the edit, beside the same edit of a random mask{' and attribution patching' if edits else ''}")
    settings: dict[str, Any] = {"attacks": attacks, "cache": cache, "seed": seed, "progress": progress}
    report = evaluate(model, edit, forget=forget, retain=retain, others=edits, **settings, watch=_told(say, names))
    return EditedFacts(found, mask, edit, report)


@contextmanager
def warnings_said(say: Callable[[str], object]) -> Iterator[None]:
    """Say what is warned of within the block, as well as warning of it.

    Args:
        say: Called with a line on each warning.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        yield
    for each in told:
        if issubclass(each.category, UserWarning):
            say(f"warning: {each.message}")
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _looked_up(
    model: HookedModel, forget: Prompts, seed: int, progress: bool | None, say: Callable[[str], object]
) -> Localization | None:
    """What `fact_lookup` finds by the first of its rules that finds a window; None if neither does."""
    for rule in RULES:
        try:
            found = fact_lookup(model, forget, rule=rule, seed=seed, progress=progress)
        except MechunlearnError as error:
            say(f"fact_lookup, {rule}: {error}")
            continue
        say(f"fact_lookup, {rule}: {found.note}" if found.note else f"fact_lookup, {rule}: found")
        if len(found.above(0)):
            return found
    return None


def _told(say: Callable[[str], object], names: Sequence[str]) -> Callable[[Report], object]:
    """What says a line on each attack when it has ended, and which one is next."""
    told: set[str] = set()

    def watch(report: Report) -> None:
        for row in report.outcomes().to_dict("records"):
            if row["attack"] not in {ASKED, *told}:
                told.add(row["attack"])
                back = "" if row["outcome"] == "failed" else f", recovery {row['recovery']}"
                say(f"attack: {row['attack']}: {row['outcome']}{back}{'; ' * bool(row['note'])}{row['note']}")
        if left := [name for name in names if name not in told]:
            say(f"attacking: {left[0]}")

    return watch


def _known(
    data: FactDataset, model: HookedModel, wanted: int | Sequence[str] | None, say: Callable[[str], object]
) -> FactDataset:
    """Return the facts whose whole answer the model gives, and say what it answers to the others."""
    known = data.known(model)
    kept = {id(fact) for fact in known}
    unknown = data.select([i for i, fact in enumerate(data) if id(fact) not in kept])
    if len(unknown):
        say(f"dropped {len(unknown)} of {len(data)} facts that the model does not know: {_says(model, unknown)}")
    if len(known) < LEAST:
        told = f" {_says(model, unknown)}." if len(unknown) else ""
        raise MechunlearnError(
            f"The model knows {len(known)} of {len(data)} facts (greedy, the whole answer). Expected at least {LEAST}: an "
            f"edit needs facts to forget, facts to retain, and some that it never sees.{told} Try another wording of the "
            "prompts, one example in front of each ('The capital of Peru is Lima. The capital of Kenya is'), more facts, "
            "or a larger model."
        )
    named = wanted if isinstance(wanted, Sequence) else ()
    if lost := [name for name in named if name in unknown.subjects and name not in known.subjects]:
        raise MechunlearnError(
            f"The model does not know the fact about '{lost[0]}', so it cannot forget it: "
            f"{_says(model, unknown.about({lost[0]}))}. Choose subjects whose fact it knows, such as '{known[0].subject}'."
        )
    strangers = known.untaught or (replace(unknown, source=None) if len(unknown) > 1 else None)
    return replace(known, source=None, untaught=strangers)


def _says(model: HookedModel, unknown: FactDataset) -> str:
    """What the model says to the first three of some facts, in place of their answers."""
    return "; ".join(
        f"'{row['prompt']}' -> '{row['said']}' (expected '{row['answer']}')"
        for row in unknown[:3].said(model).to_dict("records")
    )


def _with_targets(facts: FactDataset, seed: int, say: Callable[[str], object]) -> FactDataset:
    """The facts, each with an edit target: those without one get another answer of their relation, drawn by the seed."""
    rng = random.Random(seed)
    answers: dict[str, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, []).append(fact.answer)
    made, drawn = [], 0
    for fact in facts:
        if fact.target:
            made.append(fact)
            continue
        others = sorted({answer for answer in answers[fact.relation] if answer != fact.answer})
        if not others:
            raise MechunlearnError(
                f"The fact about '{fact.subject}' has no edit target, and none can be drawn: every fact of relation "
                f"'{fact.relation}' has the answer '{fact.answer}'. Add a 'target' column, or facts with other answers."
            )
        drawn, target = drawn + 1, rng.choice(others)
        asked = {
            name: replace(query, target=target) if not query.target and query.answer == fact.answer else query
            for name, query in fact.queries.items()
        }
        made.append(replace(fact, queries=asked))
    if drawn:
        say(
            f"{drawn} of {len(facts)} facts come without an edit target: another answer of their relation is drawn for each"
        )
    return replace(facts, facts=tuple(made)) if drawn else facts


def _sets(prompts: Prompts, forget: int | Sequence[str] | None, seed: int) -> tuple[Prompts, Prompts]:
    if forget is None or isinstance(forget, int):
        return prompts.split(forget=max(1, min(64, len(prompts) // 4)) if forget is None else forget, seed=seed)
    wanted = set(forget)
    assert prompts.facts is not None
    subjects = [fact.subject for fact in prompts.facts]
    if unknown := sorted(wanted - set(subjects)) or ([] if wanted else ["nobody"]):
        raise MechunlearnError(
            f"No fact is about '{unknown[0]}'. Expected subjects of '{prompts.facts.name}', such as '{subjects[0]}'."
        )
    chosen = [i for i, subject in enumerate(subjects) if subject in wanted]
    left = torch.tensor([i for i, subject in enumerate(subjects) if subject not in wanted])
    if not len(left):
        raise MechunlearnError("The forget set holds every fact. Leave some out: an edit needs something to retain.")
    left = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))]
    return prompts.select(chosen), prompts.select(left[: max(1, len(left) // 2)])

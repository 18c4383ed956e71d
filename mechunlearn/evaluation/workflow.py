"""The whole job in one call.

Localize, mask, edit, evaluate beside controls, attack, and write everything into one folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.files import whole_folder
from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.evaluate import evaluate
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import check_attacks
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.model.hooked import HookedModel, load_model

ATTACKS = ("prompting", "quantization", "unlearning_depth", "relearning")
SHARE = 0.05


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


def edit_facts(
    facts: str | Path | FactDataset,
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

    The steps, each a function of its own: `fact_lookup` chooses the mask (where it finds no look-up window,
    `attribution_patching`'s largest units of 5 % of the weights), `masked_gradient` trains it towards the edit targets,
    `evaluate` measures it in every format beside a random mask and attribution patching's of the same weight, and
    `attacks` try to get the truth back. The model is left as it was: use `edit.apply_(model)`, `edit.export(model,
    folder)` or `save(model, folder)`.

    It uses default settings: how strongly facts are edited depends on the learning rate, and one edit is one seed. To
    compare masks or objectives use `compare`.

    Args:
        facts: What `load_facts` reads (a table with subject, prompt, answer and perhaps target), or a loaded data set.
        model: What `load_model` reads, or a loaded model.
        forget: The facts to edit: a number drawn by `seed`, or subjects by name; None draws a quarter of them, at
            most 64. Half of the others are retained; the rest shows what the edit does to facts it never saw.
        attacks: Names of attacks; "all" for every one, () for none.
        cache: A folder in which finished attacks are kept.
        seed: Draws the sets, the edits and the attacks.
        progress: Whether to show bars; None shows them where somebody can see them.
        say: Called with a line on each step.

    Raises:
        MechunlearnError: For facts that cannot be read or fit no model, subjects that are not among them, and fewer
            than two facts.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> few = load_facts("factworld/sport").select(range(48))
    >>> made = edit_facts(few, model, forget=["Surik Belman"], attacks=())  # doctest: +SKIP
    """
    hooked = load_model(model) if isinstance(model, str | Path) else model
    data = facts if isinstance(facts, FactDataset) else load_facts(facts)
    forgotten, retained = _sets(data.prompts(hooked), forget, seed)
    settings: dict[str, Any] = {"attacks": attacks, "cache": cache, "seed": seed, "progress": progress, "say": say}
    return edit_prompts(hooked, forgotten, retained, **settings)


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
    if attacks:
        check_attacks(attacks)
    attributed = attribution_patching(model, forget)
    try:
        found = fact_lookup(model, forget)
        if found.note:
            say(f"fact_lookup: {found.note}")
    except MechunlearnError as error:
        say(f"fact_lookup: {error}")
        found = attributed
    looked_up = found is not attributed and len(found.above(0)) > 0
    mask = found.above(0) if looked_up else attributed.top(weights=SHARE)
    share = attributed.share(mask)
    say(f"mask: {len(mask)} units, {share:.2%} of the editable weights")
    say("editing: one edit a mask, the same settings")
    shown: Any = {} if progress is None else {"progress": progress}
    masks = [mask, attributed.top(weights=share)] if looked_up else [mask]
    edit, *rival = (masked_gradient(model, each, forget, retain, seed=seed, **shown) for each in masks)
    settings: dict[str, Any] = {"attacks": attacks, "cache": cache, "seed": seed, "progress": progress}
    settings["others"] = dict(zip(["patching"], rival))
    report = evaluate(model, edit, forget=forget, retain=retain, **settings)
    return EditedFacts(found if looked_up else attributed, mask, edit, report)


def _sets(prompts: Prompts, forget: int | Sequence[str] | None, seed: int) -> tuple[Prompts, Prompts]:
    if len(prompts) < 2:
        raise MechunlearnError(f"Cannot edit {len(prompts)} facts: at least one must be left to retain.")
    if forget is None or isinstance(forget, int):
        return prompts.split(forget=max(1, min(64, len(prompts) // 4)) if forget is None else forget, seed=seed)
    wanted = {forget} if isinstance(forget, str) else set(forget)
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

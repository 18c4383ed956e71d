"""The whole job: localize, mask, edit, evaluate beside controls, and write everything into one folder."""

from pathlib import Path

from rich.console import Console

from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation import evaluate, random_control
from mechunlearn.files import whole_folder
from mechunlearn.hooked import HookedModel
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.prompts import Prompts
from mechunlearn.report import Report


def whole_job(
    model: HookedModel, forget: Prompts, retain: Prompts, output: Path, seed: int, console: Console
) -> tuple[Report, dict[str, Path]]:
    """Write mask, edit, edited model and report into a new folder; return the report and where things are.

    The fact-lookup mask is edited, and beside it masks of the same weight: the largest of attribution patching, and
    random units. Where no look-up window is found, attribution patching's mask of 5 % of the weights is the main one.
    """
    name = forget.facts.name.split("/")[-1] if forget.facts is not None else "facts"
    with console.status("localizing: fact_lookup, attribution_patching"):
        attributed = attribution_patching(model, forget)
        try:
            found = fact_lookup(model, forget)
        except MechunlearnError as error:
            console.print(f"fact_lookup: {error}")
            found = attributed
    if found.note:
        console.print(f"fact_lookup: {found.note}")
    looked_up = len(found.above(0)) > 0 and found is not attributed
    mask = found.above(0) if looked_up else attributed.top(weights=0.05)
    console.print(f"mask: {len(mask)} units, {attributed.share(mask):.2%} of the editable weights")
    console.print("editing: one edit a mask, the same settings")
    edit = masked_gradient(model, mask, forget, retain, seed=seed, progress=True)
    others = {}
    if looked_up:
        rival = attributed.top(weights=attributed.share(mask))
        others["patching"] = masked_gradient(model, rival, forget, retain, seed=seed, progress=True)
    with console.status("control edit on a random mask of the same weight"):
        control = random_control(model, edit, forget, retain, seed)
    with console.status("evaluating every format"):
        report = evaluate(model, edit, forget=forget, retain=retain, control=control, others=others, seed=seed)
    with whole_folder(output) as folder:
        mask.save(folder / f"{name}.mask.json")
        edit.save(folder / f"{name}.edit.safetensors")
        edit.export(model, folder / "edited")
        report.to_html(folder / "report.html", found=found, edit=edit)
    written = {
        "mask": f"{name}.mask.json",
        "edit": f"{name}.edit.safetensors",
        "model": "edited",
        "report": "report.html",
    }
    return report, {kind: output / file for kind, file in written.items()}

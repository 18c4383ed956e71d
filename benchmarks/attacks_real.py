"""Does every attack work on a model, and how long do all of them take? `python benchmarks/attacks_real.py smollm2 -o FOLDER`.

Attacks facts that the model knows: without an edit (the ceiling), after an edit of the last layer alone, which hides them, and facts
that the model does not know (the floor). For attacks that train, `taught` is the share of unknown facts that the best budget taught (the
positive control: .9 or more). Prints a table with CPU and wall-clock seconds; what is finished is kept in FOLDER, and a second run goes on (of
an attack that was cut off, the seconds of its last run are counted). The outcome in the table is corrected for all attacks by Holm's method.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

import mechunlearn as mu
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.attack.states import SEARCHED
from mechunlearn.core.files import whole_file
from mechunlearn.edit import losses
from mechunlearn.evaluation.robustness import ATTACKS, Attacked, attack_all

COLUMNS = {"taught": ".2f", "ceiling": ".2f", "floor": ".2f", "held_out": ".2f", "n": ".0f", "outcome": ""}


def row(name: str, found: Attacked) -> dict[str, object]:
    """What one attack found."""
    told = found.outcomes().set_index("attack").loc[name].to_dict()
    rows = found.rows.get(name, pd.DataFrame({"state": []}))
    searched = rows[rows["state"] == SEARCHED]
    searched = searched[(searched["step"] > 0) & searched["valid"]] if len(searched) else searched
    taught = float(searched["trained"].max()) if len(searched) else float("nan")
    return (
        {"attack": name} | {key: told[key] for key in COLUMNS if key in told} | {"taught": taught, "note": told["note"]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--facts", default="countries/capital")
    parser.add_argument("--forget", type=int, default=16)
    parser.add_argument("--retain", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    asked = parser.parse_args()
    model, facts = mu.load_model(asked.model), mu.load_facts(asked.facts)
    known, unknown = facts.known(model), facts.unknown(model)
    strangers = facts.untaught or replace(unknown, source=None)
    prompts = replace(known, source=None, untaught=strangers).prompts(model)
    forget, retain = prompts.split(forget=asked.forget, retain=asked.retain, seed=asked.seed)
    last = model.signature.layers - 1
    mask = ComponentMask.of([f"L{last}.attn.o", f"L{last}.mlp.out"], model.signature)
    edit = mu.edit.masked_gradient(
        model, mask, forget, retain, loss=losses.log_one_minus_p, lr=1e-3, steps=12, text_weight=0, seed=asked.seed
    )
    print(
        f"{asked.model}, {asked.facts}: {len(known)} known, {len(unknown)} unknown, {len(forget)} hidden by layer {last}"
    )
    rows, failed, timed = dict[str, pd.DataFrame](), dict[str, str](), asked.output / "seconds.json"
    asked.output.mkdir(parents=True, exist_ok=True)
    seconds = json.loads(timed.read_text()) if timed.exists() else {}
    made = []
    for name in asked.attacks:
        start = time.process_time(), time.monotonic()
        # a variant of relearning takes the budgets of the attack before it, which the cache has
        names = ["relearning", name] if name.startswith("relearning_on") else [name]
        found = attack_all(
            model, edit, forget, retain, attacks=names, cache=asked.output, seed=asked.seed, progress=False
        )
        key = f"{model.fingerprint} {forget.fingerprint} {asked.seed} {name}"
        if key not in seconds:
            seconds[key] = [time.process_time() - start[0], time.monotonic() - start[1]]
            with whole_file(timed) as beside:
                beside.write_text(json.dumps(seconds))
        rows, failed = rows | found.rows, failed | found.failed
        cpu, wall = seconds[key]
        made.append(row(name, found) | {"cpu_s": cpu, "wall_s": wall})
        print(
            {key: round(value, 2) if isinstance(value, float) else value for key, value in made[-1].items()}, flush=True
        )
    judged = Attacked(rows, failed).outcomes().set_index("attack")["outcome"]
    table = pd.DataFrame(made).assign(outcome=lambda made: made["attack"].map(judged))[
        ["attack", *COLUMNS, "cpu_s", "wall_s"]
    ]
    formats = ("", *COLUMNS.values(), ".0f", ".0f")
    print("\n" + table.to_markdown(index=False, floatfmt=formats).replace("nan", "–"))
    print(f"\nall: {table['cpu_s'].sum():.0f} CPU-s, {table['wall_s'].sum():.0f} s")


if __name__ == "__main__":
    main()

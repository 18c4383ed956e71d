"""Can the attacks teach a model anything? `python benchmarks/attack_budgets.py smollm2 [--facts countries/capital] [--forget 16]`.

Every attack that trains searches its budget on facts that the model does not know (`attack.search`). Prints, for the facts of a
file that a model knows and does not know, what each budget taught (the positive control: .9 or more), what the same budget
leaves of known facts that were never edited (the ceiling), and what it guesses of facts that it was not shown (the floor), with
CPU seconds. No edit is made.
"""

import argparse
import time
from dataclasses import replace

import pandas as pd

import mechunlearn as mu
from mechunlearn.attack import relearning, soft_prompt
from mechunlearn.attack.search import TEACHES
from mechunlearn.attack.states import NEVER_TAUGHT, SEARCHED, UNEDITED

FORMATS = ("", ".2g", ".0f", ".2f", ".2f", ".2f", ".2f")


def budgets(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a budget that was tried: the best share that it taught while the retain facts passed the gate."""
    key = ["method", "lr", "steps"]
    after = rows[(rows["step"] > 0) & rows["valid"]]
    best = {
        name: after[after["state"] == state].groupby(key)[column].max()
        for name, state, column in (
            ("taught", SEARCHED, "trained"),
            ("ceiling", UNEDITED, "held_out"),
            ("floor", NEVER_TAUGHT, "held_out"),
        )
    }
    tried = rows[rows["state"] == SEARCHED].groupby(key)["retain"].min().rename("retain, least")
    found = pd.concat([tried, *(column.rename(name) for name, column in best.items())], axis=1)
    return found.loc[tried.index].reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--facts", default="countries/capital")
    parser.add_argument("--forget", type=int, default=16)
    parser.add_argument("--retain", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    model, facts = mu.load_model(asked.model), mu.load_facts(asked.facts)
    known, unknown = facts.known(model), facts.unknown(model)
    strangers = facts.untaught or replace(unknown, source=None)
    prompts = replace(known, source=None, untaught=strangers).prompts(model)
    forget, retain = prompts.split(forget=asked.forget, retain=asked.retain, seed=asked.seed)
    print(
        f"{asked.model}, {asked.facts}: {len(known)} known, {len(unknown)} unknown; half of {len(forget)} is taught\n"
    )
    for attack in (relearning, soft_prompt):
        start = time.process_time()
        found = budgets(attack(model, None, forget, retain, seed=asked.seed))
        seconds = time.process_time() - start
        print(found.to_markdown(index=False, floatfmt=FORMATS).replace("nan", "–"))
        able = found[found["taught"] >= TEACHES]
        print(f"\n{attack.__name__}: {len(able)} of {len(found)} budgets teach, {seconds:.0f} CPU-s\n", flush=True)


if __name__ == "__main__":
    main()

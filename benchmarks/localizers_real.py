"""What does every localizer cost with its default arguments on a real model?

CPU seconds of one thread, on facts that the model knows; and what it found first. Methods that need more than facts are left out.

Run: OMP_NUM_THREADS=1 python benchmarks/localizers_real.py [--model smollm2] [--facts countries/capital] [--number 20]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mechunlearn as mu
from mechunlearn.core.methods import methods
from mechunlearn.localize import fact_lookup


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", default="smollm2")
    asked.add_argument("--facts", default="countries/capital")
    asked.add_argument("--number", type=int, default=20)
    options = asked.parse_args()
    torch.set_num_threads(1)
    model = mu.load_model(options.model)
    facts = mu.load_facts(options.facts).known(model)[: options.number]
    prompts = facts.prompts(model)
    runs: dict[str, Callable[..., Any]] = {}
    for name, method in methods("localize").items():
        if set(method.needs) <= {"model", "prompts"} and "prompts" in method.takes:
            runs[name] = method.function
    runs['fact_lookup, rule="paths"'] = partial(fact_lookup, rule="paths")
    with torch.no_grad():
        seconds, _ = timed(partial(model.forward, prompts.tokens))
    print(
        f"{options.model}, {len(prompts)} known facts of {options.facts}, {prompts.tokens.shape[1]} tokens, 1 thread\n"
    )
    print("| localizer, default arguments | CPU seconds | largest score |\n|---|---|---|")
    print(f"| (one forward pass) | {seconds:.1f} | |", flush=True)
    for name, run in sorted(runs.items()):
        try:
            seconds, found = timed(partial(run, model, prompts))
        except mu.MechunlearnError as error:
            print(f"| {name} | refused: {error} | |", flush=True)
            continue
        print(f"| {name} | {seconds:.1f} | {first(found)} |", flush=True)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    found = run()
    return time.process_time() - begun, found


def first(found: Any) -> str:
    """The note of a localization or its best component."""
    units = found.nodes() if isinstance(found, mu.Circuit) else found
    if not isinstance(units, mu.Localization):
        return ""
    return units.note or str(units.ranked()[0])


if __name__ == "__main__":
    main()

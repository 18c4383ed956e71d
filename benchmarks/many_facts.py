"""Are loading facts and finding their corrupt partners linear? `python benchmarks/many_facts.py smollm2`.

Made facts whose answers are of the kinds that make a search long: all the same, nearly all the same, one the beginning
of another, few to a relation, each its own. Prints processor seconds for each number of facts, and their ratio.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mechunlearn as mu

SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "to", "vi", "za", "be", "do")
KINDS: dict[str, tuple[Callable[[int, random.Random], str], Callable[[int], str]]] = {
    "six answers": (
        lambda i, rng: rng.choice(("Paris", "London", "Rome", "Oslo", "Lima", "New York")),
        lambda i: "capital",
    ),
    "one answer": (lambda i, rng: "Paris", lambda i: "capital"),
    "99 % one answer": (lambda i, rng: "Paris" if rng.random() < 0.99 else "Rome", lambda i: "capital"),
    "one begins the other": (lambda i, rng: rng.choice(("7", "79")), lambda i: "number"),
    "four to a relation": (lambda i, rng: rng.choice(("Paris", "Rome")), lambda i: f"relation {i // 4}"),
    "each its own": (lambda i, rng: str(i), lambda i: "number"),
}


def write(path: Path, kind: str, count: int) -> None:
    """A file of facts about made names."""
    answer, relation = KINDS[kind]
    rng, rows = random.Random(0), []
    for i in range(count):
        words = ("".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))).title() for _ in range(3))
        name = " ".join(words)
        rows.append(
            {"subject": name, "prompt": f"The word for {name} is", "answer": answer(i, rng), "relation": relation(i)}
        )
    path.write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what load_model reads")
    parser.add_argument("--counts", type=int, nargs="+", default=[4000, 16000])
    given = parser.parse_args()
    model = mu.load_model(given.model)
    mu.load_facts("countries/capital").prompts(model)  # the first one imports
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            seconds = []
            for count in given.counts:
                write(Path(folder) / "facts.json", kind, count)
                began = time.process_time()
                facts = mu.load_facts(Path(folder) / "facts.json")
                loaded = time.process_time()
                facts.prompts(model)
                seconds.append(time.process_time() - began)
                print(
                    f"{kind:22} {len(facts):6} facts: load {loaded - began:5.1f} s, prompts {seconds[-1] - loaded + began:5.1f} s"
                )
            print(
                f"{kind:22} {given.counts[-1] / given.counts[0]:.1f} times the facts: {seconds[-1] / seconds[0]:.1f} times the seconds"
            )


if __name__ == "__main__":
    main()

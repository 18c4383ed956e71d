"""Do probabilities and greedy answers agree with plain transformers, over facts and templates of all kinds?

python benchmarks/answers_agreement.py FOLDER smollm2 gemma3 --count 500

Takes facts at random from all files of a folder, each in one of its formats at random. Plain: prompt, separator and
answer are tokenized in one piece, one forward pass a fact without padding; the answer's tokens are those that end behind
the prompt. Prints the largest difference of an answer's probability, and the facts whose tokens or greedy answer differ.
"""

import argparse
import random
import time
from pathlib import Path

import torch

import mechunlearn as mu
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics import measure

SUFFIXES = (".json", ".jsonl", ".csv")


def drawn(folder: Path, count: int, seed: int) -> tuple[list, int]:
    """Queries of random facts: a file, a fact of it and one of its formats, each drawn."""
    rng, sets = random.Random(seed), {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        try:
            sets[path] = mu.load_facts(path)
        except mu.MechunlearnError:
            continue  # patterns without facts, tables of other things
    queries = []
    for _ in range(count):
        facts = sets[rng.choice(list(sets))]
        fact = rng.choice(facts.facts)
        queries.append(fact.queries[rng.choice(list(fact.queries))])
    return queries, len(sets)


def plain(model: mu.HookedModel, prompt: str, rest: str) -> tuple[list[int], int, float, bool]:
    """Tokens, how many are the prompt, the answer's probability and whether it is the greedy one, by plain transformers."""
    encoded = model.tokenizer(prompt + rest, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    begin = next(i for i, end in enumerate(ends) if end > len(prompt))
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    at = torch.arange(begin, len(ids))
    wanted = torch.tensor(ids)[at]
    chance = logits[at - 1, wanted].sum().exp().item()
    return ids, begin, chance, bool((logits[at - 1].argmax(-1) == wanted).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", help="what load_model reads")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    queries, files = drawn(given.folder, given.count, given.seed)
    for name in given.models:
        model, began = mu.load_model(name, dtype="float32"), time.process_time()
        prompts = Prompts.from_text(queries, model.tokenizer)
        found = measure(model, prompts, targets=False)
        tokens = greedy = known = 0
        worst = 0.0
        for i, query in enumerate(queries):
            ids, begin, chance, said = plain(model, query.prompt, query.joined_by + query.answer.lstrip())
            answer = prompts.answers[i][prompts.answers[i] != PAD].tolist()
            mine = [*prompts.tokens[i, : int(prompts.lengths[i])].tolist(), answer[-1]]
            same = mine == ids and int(prompts.start[i]) + 1 == begin
            difference = abs(float(found["probability"][i]) - chance)
            worst, known = max(worst, difference), known + said
            tokens, greedy = tokens + same, greedy + (bool(found["accuracy"][i]) == said)
            if not same or difference > 1e-5:
                print(
                    f"  {query.prompt!r} + {query.answer!r}: tokens {'agree' if same else 'differ'}, {difference:.1e}"
                )
        print(
            f"{name}: {len(queries)} queries of {files} files; tokens agree for {tokens}, greedy answers for {greedy} "
            f"({known} known), probabilities to {worst:.1e}; {time.process_time() - began:.0f} s of processor time"
        )


if __name__ == "__main__":
    main()

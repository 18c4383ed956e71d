"""How many of the shipped real facts a model knows, by relation and format, as a markdown table.

    python benchmarks/known_shipped.py smollm2 gemma3

A fact is known if greedy decoding gives its whole answer. `statement` is asked of every fact, the other formats of a
sample (`--sample`; 0 leaves them out). `--free` adds a second table, for models with a chat template: the format `chat`, in which the
assistant's turn is begun, beside the model's free reply to the same question.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import mechunlearn as mu
from mechunlearn.facts.chat import CHAT
from mechunlearn.facts.prompts import Prompts
from mechunlearn.facts.shipped import shipped_sets
from mechunlearn.metrics import answered


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("models", nargs="+")
    parse.add_argument("--sample", type=int, default=24)
    parse.add_argument("--sets", nargs="*", default=list(shipped_sets()))
    parse.add_argument("--free", action="store_true")
    given = parse.parse_args()
    rows, chats, skills = [], [], []
    for name in given.models:
        model = mu.load_model(name)
        known = partial(count, model)
        for skill, tasks in mu.load_facts("countries").skills.items():
            right = answered(model, Prompts.from_text(tasks, model.tokenizer))
            skills.append({"model": Path(name).name, "skill": skill, "right": f"{int(right.sum())} / {len(right)}"})
        chatty = bool(model.tokenizer.chat_template)
        for each in (f"{whole}/{relation}" for whole in given.sets for relation in shipped_sets()[whole]):
            facts = mu.load_facts(each)
            some = facts.select(sorted(random.Random(0).sample(range(len(facts)), min(given.sample, len(facts)))))
            others = (*facts.formats[1:], *([CHAT] if chatty else [])) if given.sample else ()
            formats = {format: known(some, format) for format in others}
            rows.append(
                {"model": Path(name).name, "facts": each, "statement": known(facts, "statement"), "sample": len(some)}
                | formats
            )
            print(rows[-1], flush=True)
            if chatty and given.free:
                chats.append({"model": Path(name).name, "facts": each} | free_replies(model, some[:12]))
    print(pd.DataFrame(rows).fillna("").to_markdown(index=False))
    if chats:
        print(pd.DataFrame(chats).to_markdown(index=False))
    print(pd.DataFrame(skills).to_markdown(index=False))


def count(model: mu.HookedModel, facts: mu.FactDataset, format: str) -> str:
    return f"{int(answered(model, facts.prompts(model, format)).sum())} / {len(facts)}"


@torch.no_grad()
def free_replies(model: mu.HookedModel, facts: mu.FactDataset) -> dict[str, str]:
    """How often the prefilled turn and a free reply agree on whether the model knows the fact."""
    tokenizer = model.tokenizer
    begun = answered(model, facts.prompts(model, CHAT)).tolist()
    free = []
    for fact in facts:
        user = fact.queries["question"].prompt.removeprefix("Question: ").partition(" Answer:")[0]
        turns = [{"role": "user", "content": user}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.hf.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        free.append(fact.answer.lower() in tokenizer.decode(made).lower())
    agree = sum(a == b for a, b in zip(begun, free, strict=True))
    return {"begun": f"{sum(begun)} / {len(facts)}", "free": f"{sum(free)} / {len(facts)}", "agree": str(agree)}


if __name__ == "__main__":
    main()

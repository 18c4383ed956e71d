"""Does `FactDataset.known` agree with plain transformers? One prompt at a time, greedy, whole answer.

python benchmarks/known_agreement.py known_1000.json smollm2 gemma3 --count 400
"""

import argparse
import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import mechunlearn as mu


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> bool:
    """Whether the model goes on with the tokens of the answer, as they are in one piece with the prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = tokenizer(f"{prompt} {answer}")["input_ids"][ids.shape[1] :]
    settings = {"do_sample": False, "max_new_tokens": len(wanted), "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return made[0, ids.shape[1] :].tolist() == wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts", help="what load_facts reads")
    parser.add_argument("models", nargs="+", help="what load_model reads")
    parser.add_argument("--count", type=int, default=400)
    given = parser.parse_args()
    facts = mu.load_facts(given.facts)[: given.count]
    for name in given.models:
        model = mu.load_model(name)
        began = time.process_time()
        known = {id(fact) for fact in facts.known(model)}
        batched = time.process_time() - began
        began = time.process_time()
        asked = [fact.queries["statement"] for fact in facts]
        alone = [generated(model.hf, model.tokenizer, query.prompt, query.answer) for query in asked]
        single = time.process_time() - began
        same = [(id(fact) in known) == said for fact, said in zip(facts, alone)]
        print(
            f"{name}: {sum(same)} of {len(same)} agree; {sum(alone)} known; "
            f"{batched:.0f} s of processor time batched, {single:.0f} s one at a time"
        )
        for fact, agrees in zip(facts, same):
            if not agrees:
                print(f"  differs: {fact.queries['statement'].prompt} -> {fact.answer}")


if __name__ == "__main__":
    main()

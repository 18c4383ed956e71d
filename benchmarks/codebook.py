"""What an active intervention adds to a forward pass, and how long the deletion of a topic takes.

Forward: one model (GPT-2 small's shape, random weights), one batch, all logits, no gradient. "Plain hooked" is the forward pass
with a hook at the same point that looks and changes nothing. Interventions stand in the middle of the stream: a codebook
(linear maps to twice the width and back, 2,048 codes, 8 used) with 5 % of its codes deleted, by reselection or to zero,
and a TopK SAE (4,096 features, 32 kept) with its 5 % most active features clamped, with and without the error term. The
methods take turns in each round; a ratio is the median over rounds of that round's times, with its range.

Deleting a topic: from what was seen of 2,000 texts (`FiringStatistics`, half topic, half not) to the applied edit, that is discovery, mask,
edit and hooks; the model's hash is computed anew each time. Beside it the same from the texts, which have to be run up to
the hook point. On the shipped world these are stories and the same with the topic's words swapped; on the
large model random tokens, the topic's from a thousandth of the vocabulary; there the texts are run only once.

Time is the process's CPU time on CPU (one torch thread; a busy machine stretches it less), else wall time.

Run: python benchmarks/codebook.py [--rounds 3] [--device cuda] [--layers 4 --d-model 256 --texts 200]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import codebook_delete, feature_clamp
from mechunlearn.features.dictionaries import Codebook, Dictionary, load_dictionary
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.firing import FiringStatistics, Texts, swapped
from mechunlearn.features.training import train_sae
from mechunlearn.localize import feature_discovery
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.world.dictionaries import topic_stories, topic_words, unrelated_words

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

CODES, USED, FEATURES, KEPT, SHARE = 2048, 8, 4096, 32, 0.05
PLAIN, TOPIC, TOPIC_LENGTH = "plain hooked", "war", 16
MOST, SECONDS = 1.15, 2.0


def main() -> None:
    warnings.filterwarnings("ignore")
    options = asked()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_layer=options.layers, n_embd=options.d_model, n_head=max(1, options.d_model // 64)
    )
    model = load_model((transformers.GPT2LMHeadModel(config), None), device=options.device)
    count = sum(parameter.numel() for parameter in model.hf.parameters())
    timing = "wall time" if options.device.startswith("cuda") else "process CPU time of one thread"
    print(
        f"{count / 1e6:.0f} M parameters, {options.layers} layers, {options.device}, {timing}, {options.rounds} rounds"
    )
    hook_name = f"L{options.layers // 2}.resid_post"
    codebook = Codebook(options.d_model, CODES, USED, hook_name=hook_name).to(options.device)
    forwards(model, codebook, options)
    print(
        f"\n{'deleting a topic (' + str(options.texts) + ' texts)':<36}{'codes':>6}{'cached, s':>20}{'asked':>9}",
        end="",
    )
    print(f"{'holds':>7}{'from the texts, s':>20}")
    half = options.texts // 2
    stories = topic_stories(TOPIC, half, seed=0)
    others = swapped(stories, topic_words(TOPIC), unrelated_words(TOPIC))
    world = load_model("factworld", device=options.device)
    shipped: Codebook = load_dictionary("factworld-codebook").to(options.device)  # type: ignore[union-attr,assignment]
    topic("shipped world", world, shipped, (stories, others), options.rounds, options.rounds)
    lengths, vocabulary = torch.full((half,), TOPIC_LENGTH), config.vocab_size
    here, there = (torch.randint(most, (half, TOPIC_LENGTH)) for most in (vocabulary // 1000, vocabulary))
    topic("this model", model, codebook, ((here, lengths), (there, lengths)), options.rounds, 1)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--texts", type=int, default=2000, help="texts behind the deletion of a topic")
    return parser.parse_args()


def forwards(model: HookedModel, codebook: Codebook, options: argparse.Namespace) -> None:
    """The table of forward passes."""
    tokens = torch.randint(model.hf.config.vocab_size, (options.sequences, options.length))
    print(f"batch: {options.sequences} sequences x {options.length} tokens, interventions at {codebook.hook_name}")
    contexts: dict[str, Callable[[], AbstractContextManager]] = {
        PLAIN: lambda: model.hooks({codebook.hook_name: lambda h: None})
    }
    for name, edit in interventions(model, codebook, tokens).items():
        contexts[name] = lambda edit=edit: edit.applied(model)
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, entered in contexts.items():
            with entered(), torch.no_grad():
                took = timed(lambda: model.forward(tokens), model)
            if turn:
                seconds[name].append(took)
    print(f"\n{'forward pass':<36}{'seconds':>9}{'of plain (range)':>21}{'asked':>9}{'holds':>7}")
    for name, times in seconds.items():
        ratios = [mine / plain for mine, plain in zip(times, seconds[PLAIN], strict=True)]
        ratio = statistics.median(ratios)
        spread = f"{ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        verdict = "" if name == PLAIN else f"{f'<= {MOST:.2f}':>9}{'yes' if ratio <= MOST else 'NO':>7}"
        print(f"{name:<36}{statistics.median(times):9.3f}{spread:>21}{verdict}")


def interventions(model: HookedModel, codebook: Codebook, tokens: Tensor) -> dict[str, FeatureEdit]:
    """Deletions and clamps of the units that are most active on the batch."""
    text = (tokens, torch.full((len(tokens),), tokens.shape[1]))
    sae = train_sae(model, codebook.hook_name, text, size=FEATURES, used=KEPT, steps=1)
    codes, features = (most_active(model, dictionary, text) for dictionary in (codebook, sae))
    return {
        "codes deleted, reselect": codebook_delete(model, codes, dictionary=codebook),
        "codes deleted, zero": codebook_delete(model, codes, dictionary=codebook, how="zero"),
        "features clamped, error kept": feature_clamp(model, features, text, dictionary=sae),
        "features clamped, error dropped": feature_clamp(model, features, text, dictionary=sae, error=False),
    }


def most_active(model: HookedModel, dictionary: Dictionary, text: Texts) -> ComponentMask:
    rates = FiringStatistics.of(model, dictionary, text).rates()
    chosen = torch.zeros(dictionary.size, dtype=torch.bool)
    chosen[rates.topk(int(SHARE * dictionary.size)).indices] = True
    return ComponentMask({dictionary.site: chosen}, model.signature)


def topic(
    name: str, model: HookedModel, codebook: Codebook, texts: tuple[Texts, Texts], rounds: int, uncached_rounds: int
) -> None:
    """A row of the table of deletions."""
    seen = [FiringStatistics.of(model, codebook, text) for text in texts]
    deleted: list[int] = []
    cached = [timed(lambda: deleted.append(delete(model, codebook, seen)), model) for _ in range(rounds)]
    uncached = [timed(lambda: deleted.append(delete(model, codebook, texts)), model) for _ in range(uncached_rounds)]
    assert len(set(deleted)) == 1
    middle, asked_ = statistics.median(cached), f"<= {SECONDS:.1f}"
    spread = f"{middle:.2f} ({min(cached):.2f}-{max(cached):.2f})"
    print(f"{name:<36}{deleted[0]:>6}{spread:>20}{asked_:>9}{'yes' if middle <= SECONDS else 'NO':>7}", end="")
    print(f"{statistics.median(uncached):20.1f}")


def delete(model: HookedModel, codebook: Codebook, data: Sequence[Texts | FiringStatistics]) -> int:
    """Find a topic's codes, delete them and put the edit on the model; how many there were. It is taken off again."""
    with torch.no_grad():
        next(model.hf.parameters()).add_(0)  # a write, after which the model's hash is computed again
    found = feature_discovery(model, data[0], dictionary=codebook, against=data[1])
    edit = codebook_delete(model, found.above(1), dictionary=codebook)
    edit.apply_(model)
    edit.remove_(model)
    return len(edit.mask)


def timed(run: Callable[[], object], model: HookedModel) -> float:
    cuda = model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    begun = clock()
    run()
    if cuda:
        torch.cuda.synchronize()
    return clock() - begun


if __name__ == "__main__":
    main()

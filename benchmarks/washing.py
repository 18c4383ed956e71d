"""What washing facts costs, beside the passes of the published code, side by side in one run.

One model (GPT-2 small's shape, random weights), the same inputs on both sides, by part:

- statistics: second moments of what enters W_out. Published: a forward pass for each layer, ended there, and all of
  k^T k in float32. Ours: `Covariance`, one pass for all layers.
- targets: the values that make the edit's label follow, 20 steps of Adam. Published: fact by fact, the bare and 5
  prefixed prompts and the KL prompt padded into one batch; each step is a whole forward pass with all logits and a
  backward pass down to the edited layer. Weights want no gradient, and the second unembedding of the released code is
  left out. Ours: `optimised_values`. Both have the same step size for each fact (the released one is absolute), so that
  they come to the same values.
- solve: the ridge update of one layer in float64. Published: as many right-hand sides as facts, K K^T formed on the way.
  Ours: `solve` for sums that were formed while keys were collected, 768 right-hand sides; "with sums" also forms them,
  in the batches in which `Washing.sums` does.
- strength search: the update's norm brought into a band by halving the strength, 5 times. Published: a solve each; K K^T
  is formed once. Ours: `Spectrum`, `within_band`, one solve.
- elimination: which facts are still known. Published: 10 greedy tokens, fact by fact, with a cache; here a fact is known
  if its answer of 3 tokens comes first, on both sides. Ours: `answered`.

Then what sums, solve and write-back of one layer of a smaller model cost as facts grow in number, bare prompts and target
values given: time beside that of collecting the keys alone, and the peak of resident memory beyond prompts, values and
weights, in a process of its own.

A ratio is the median over rounds, with its range. Of the published passes, targets and elimination are timed a fact,
solves a strength, and each of these is set against the median of ours. Time is the process's CPU time, of one torch
thread.

Run: python benchmarks/washing.py [--rounds 3] [--facts 64 --reference-facts 16] (Linux; 8 minutes of CPU)
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from mechunlearn.edit.closed_form.edit_prompts import EditPrompts, seen
from mechunlearn.edit.closed_form.target_values import DECAY, KL_WEIGHT, MOST, SETTLED, optimised_values
from mechunlearn.edit.closed_form.washing import GATHERED, How, Washing, site
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import SMALL, STRIPS, Spectrum, add_products, solve, within_band

EDITED = range(3, 8)
TEXT, CONTEXT = 10, 128  # rows and tokens of the text behind the statistics
PROMPT, PREFIX, PREFIXES, DESCRIPTION = (
    12,
    10,
    5,
    5,
)  # tokens of a prompt, of a prefix; prefixes; tokens of the KL prompt
STEPS, RATE, BATCH = 20, 0.2, 64
STRENGTH, HALVINGS, BAND = 20_000.0, 5, (1 / 3, 3 / 4)
GENERATED, ANSWER = 10, 3
COUNTS = (100, 300, 1000, 3000, 5000)
SMALL_LAYER = 1


def main() -> None:
    warnings.filterwarnings("ignore")
    options = asked()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    if options.memory:
        print(resident_memory(options.memory))
        return
    model = random_model(options.layers, options.d_model, 50257)
    layers = [layer for layer in EDITED if layer < options.layers]
    print(
        f"{sum(p.numel() for p in model.hf.parameters()) / 1e6:.0f} M parameters, {options.layers} layers, cpu, ",
        end="",
    )
    print(f"1 thread, process CPU time, {options.rounds} rounds")
    print(f"\n{'part':<44}{'ours, s':>9}{'published, s':>14}{'ratio (range)':>22}{'asked':>7}{'holds':>7}  equal")
    found = statistics_of_text(model, layers, options.rounds)
    found += targets(model, max(layers), options)
    found += solves(options)
    found += elimination(model, options.facts)
    found += by_number(options.rounds)
    print(*("", *found, "These are parts on CPU: no claim is made here of the time of a whole edit."), sep="\n")


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=32, help="facts whose targets are found, and that are checked")
    parser.add_argument("--reference-facts", type=int, default=3, help="facts whose targets the published passes find")
    parser.add_argument("--solved-facts", type=int, default=10_000, help="facts behind one solve")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--memory", metavar="FACTS", type=int, help="only print the memory that so many facts take")
    return parser.parse_args()


def random_model(layers: int, d_model: int, d_vocab: int) -> HookedModel:
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=d_model, n_head=max(1, d_model // 64), vocab_size=d_vocab, eos_token_id=0
    )
    model = load_model((transformers.GPT2LMHeadModel(config), None))
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    return model


def random_prompts(d_vocab: int, count: int, length: int, subject: tuple[int, int]) -> Prompts:
    tokens = torch.randint(1, d_vocab, (count, length))
    ends = torch.zeros(count, dtype=torch.long)
    return Prompts.from_tokens(tokens, tokens, ends, ends + 1, torch.tensor([subject] * count))


def in_contexts(model: HookedModel, count: int, prefixes: int) -> tuple[Prompts, EditPrompts]:
    """Facts to be washed towards token 0, bare and behind prefixes."""
    d_vocab = model.hf.config.vocab_size
    prompts = random_prompts(d_vocab, count, PROMPT, (3, 4))
    drawn = torch.randint(1, d_vocab, (prefixes, PREFIX)).tolist()
    return prompts, EditPrompts.of(model, prompts, "subject last", drawn)


def timed(run: Callable, *given: Any, **named: Any) -> tuple[float, Any]:
    begun = time.process_time()
    made = run(*given, **named)
    return time.process_time() - begun, made


def difference(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def within(size: float) -> str:
    return f"to {size:.0e}" if size else "to the bit"


def row(part: str, mine: Sequence[float], theirs: Sequence[float], goal: float | None, equal: str) -> str:
    """Print a line of the table and say it in words: seconds of each side by round, or medians of ours beside theirs."""
    whole = list(mine) if len(mine) == len(theirs) else [statistics.median(mine)] * len(theirs)
    ratios = [b / a for a, b in zip(whole, theirs, strict=True)]
    ratio = statistics.median(ratios)
    spread = f"{ratio:.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
    bound, verdict = ("", "") if goal is None else (f">= {goal:g}", "yes" if ratio >= goal else "NO")
    print(f"{part:<44}{statistics.median(mine):9.3f}{statistics.median(theirs):14.3f}{spread:>22}", end="")
    print(f"{bound:>7}{verdict:>7}  {equal}", flush=True)
    return f"{part}: {ratio:.1f} times faster" + ("" if goal is None else f" (asked: {goal:g})")


def statistics_of_text(model: HookedModel, chosen: Sequence[int], rounds: int) -> list[str]:
    tokens = torch.randint(1, model.hf.config.vocab_size, (TEXT, CONTEXT))
    lengths = torch.full((TEXT,), CONTEXT)
    every = range(model.signature.layers)
    collected(model, every, tokens[:, :8], lengths.clamp_max(8))
    few, many, few_published, many_published, worst = [], [], [], [], 0.0
    for _ in range(rounds):
        few.append(timed(collected, model, chosen, tokens, lengths)[0])
        seconds, made = timed(collected, model, every, tokens, lengths)
        many.append(seconds)
        published = [timed(published_moment, model, tokens, layer) for layer in every]
        few_published.append(sum(published[layer][0] for layer in chosen))
        many_published.append(sum(seconds for seconds, _ in published))
        worst = max(worst, *(difference(made.matrix(site(layer)) * made.count, published[layer][1]) for layer in every))
    one, last, width = min(chosen), max(chosen), model.signature.d_model
    first = row(f"statistics, {len(chosen)} layers ({one}-{last})", few, few_published, 4, within(worst))
    whole = row(f"statistics, all {len(every)} layers", many, many_published, 4, within(worst))
    xl = f"layers 13-17 of GPT-2 XL: {multiplications(1600, range(13, 18)):.1f}"
    return [
        f"{first}; {multiplications(width, chosen):.1f} by multiplications ({xl})",
        f"{whole}; {multiplications(width, every):.1f} by multiplications",
    ]


def collected(model: HookedModel, layers: Sequence[int], tokens: Tensor, lengths: Tensor) -> Covariance:
    return Covariance(model, [site(layer) for layer in layers]).update(tokens, lengths)


def multiplications(d_model: int, layers: Sequence[int]) -> float:
    """Those of the published passes over ours, a token, attention scores aside."""
    block, before, product = 12 * d_model**2, 8 * d_model**2, (4 * d_model) ** 2
    strips = min(STRIPS, -(-4 * d_model // SMALL))
    mine = max(layers) * block + before + len(layers) * product * (1 + 1 / strips) / 2
    return sum(layer * block + before + product for layer in layers) / mine


def published_moment(model: HookedModel, tokens: Tensor, layer: int) -> Tensor:
    """One pass for one layer."""
    units = model.signature.d_mlp
    total = torch.zeros(units, units)

    def add(k: Tensor) -> None:
        nonlocal total
        rows = k.flatten(0, 1)
        total += rows.mT @ rows

    model.decoder.observe(tokens, {site(layer): add})
    return total


def targets(model: HookedModel, layer: int, options: argparse.Namespace) -> list[str]:
    count, few = options.facts, min(options.facts, options.reference_facts)
    contexts = in_contexts(model, count, PREFIXES)[1]
    described = random_prompts(model.hf.config.vocab_size, count, DESCRIPTION, (1, 2))
    kept = EditPrompts.of(model, described, "subject last")
    theirs = [timed(published_value, model, layer, contexts, kept, fact) for fact in range(few)]
    second, mine = timed(optimised_values, model, layer, contexts, kept, steps=STEPS, lr=RATE, batch_size=BATCH)
    found = torch.stack([value for _, (value, _) in theirs])
    fewest = min(steps for _, (_, steps) in theirs)
    equal = f"{within(difference(mine[:few], found))}, {fewest} steps or more"
    part = f"targets, a fact (of {count}; published {few})"
    return [row(part, [second / count], [s for s, _ in theirs], 4, equal)]


def published_value(
    model: HookedModel, layer: int, contexts: EditPrompts, kept: EditPrompts, fact: int
) -> tuple[Tensor, int]:
    """The target value of one fact, and the steps that it took."""
    scored, width = contexts.tokens[fact], contexts.tokens.shape[2]
    tokens = torch.cat([scored, F.pad(kept.tokens[fact], (0, width - kept.tokens.shape[2]))])
    at = torch.cat([contexts.at[fact], kept.at[fact]])
    rows, label = torch.arange(len(tokens)), contexts.labels[fact, 0]
    delta = torch.zeros(model.signature.d_model, requires_grad=True)
    optimiser = torch.optim.Adam([delta])
    home = before = torch.empty(0)

    def move(resid: Tensor) -> Tensor:
        nonlocal home
        if not len(home):
            home = resid[0, at[0]].detach().clone()
        resid[rows, at] += delta
        return resid

    steps = 0
    with model.hooks({f"L{layer}.resid_post": move}):
        while steps < STEPS:
            steps += 1
            optimiser.zero_grad()
            logprobs = model.hf(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
            aimed = logprobs[rows[:-1], contexts.start[fact], label]
            now = logprobs[-1, kept.start[fact, 0]]
            before = before if len(before) else now.detach().clone()
            divergence = F.kl_div(before, now, log_target=True, reduction="sum")
            loss = -aimed.mean() + KL_WEIGHT * divergence + DECAY * delta.norm() / home.norm()
            if loss < SETTLED:
                break
            loss.backward()
            optimiser.param_groups[0]["lr"] = RATE * float(home.square().mean().sqrt())
            optimiser.step()
            with torch.no_grad():
                delta *= (MOST * home.norm() / delta.norm()).clamp_max(1.0)
    return (home + delta).detach(), steps


def solves(options: argparse.Namespace) -> list[str]:
    units, width, count = 4 * options.d_model, options.d_model, options.solved_facts
    scales = torch.logspace(0, -2, units, dtype=torch.float64)  # a few directions carry most of the energy
    text = torch.randn(2 * units, units, dtype=torch.float64) * scales
    moment = text.mT @ text / len(text)
    keys = torch.randn(count, units, dtype=torch.float64) * scales
    residuals = torch.randn(count, width, dtype=torch.float64)
    gram, cross = keys.mT @ keys, keys.mT @ residuals
    size = float(solve(STRENGTH / 2**HALVINGS * moment + gram, cross)[0].norm()) / (1.02 * BAND[0])
    band = (BAND[0] * size, BAND[1] * size)  # of a weight of such a norm that the last halving alone comes inside

    mine, summed, ours = [], [], torch.empty(0)
    for _ in range(options.rounds):
        second, ours = timed(our_solve, STRENGTH, gram, moment, cross)
        mine.append(second)
        summed.append(second + timed(streamed, keys, residuals)[0])

    k, r = keys.mT.contiguous(), residuals.mT.contiguous()
    formed = [timed(lambda: k @ k.T)[0] for _ in range(options.rounds)]
    theirs: list[float] = []
    strength, first, last = STRENGTH, torch.empty(0), torch.empty(0)
    while not theirs or float(last.norm()) < band[0]:
        second, last = timed(published_solve, strength, gram, moment, k, r)
        first = last if not theirs else first
        theirs.append(second)
        strength /= 2
    whole = [second + statistics.median(formed) for second in theirs]
    equal = within(difference(ours, first.T))
    lines = [row(f"solve, {count:,} facts, a layer", mine, whole, 8, equal)]
    lines.append(row("solve, with sums, a layer", summed, whole, None, equal))

    searched = [timed(search, gram, moment, cross, band) for _ in range(options.rounds)]
    reached, found = searched[-1][1]
    there = torch.linalg.solve(reached * moment + gram, cross)
    total = [statistics.median(formed) + len(theirs) * second for second in theirs]
    equal = f"{within(difference(found, there))}, strength {reached:,.0f} (published {2 * strength:,.0f})"
    part = f"strength search, {len(theirs)} solves, a layer"
    return [*lines, row(part, [s for s, _ in searched], total, None, equal)]


def our_solve(strength: float, gram: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    return solve(strength * moment + gram, cross)[0]


def published_solve(strength: float, gram: Tensor, moment: Tensor, k: Tensor, r: Tensor) -> Tensor:
    return r @ torch.linalg.solve(strength * moment + gram, k).T


def streamed(keys: Tensor, residuals: Tensor) -> None:
    """The sums of a layer, in the batches that `Washing.sums` gathers."""
    gram = keys.new_zeros(keys.shape[1], keys.shape[1])
    cross = keys.new_zeros(keys.shape[1], residuals.shape[1])
    for some, wanted in zip(keys.split(GATHERED), residuals.split(GATHERED), strict=True):
        add_products(gram, some)
        cross.addmm_(some.T, wanted)


def search(gram: Tensor, moment: Tensor, cross: Tensor, band: tuple[float, float]) -> tuple[float, Tensor]:
    strength, _ = within_band(Spectrum.of(gram, moment).norms(cross), STRENGTH, band)
    return strength, our_solve(strength, gram, moment, cross)


def elimination(model: HookedModel, count: int) -> list[str]:
    few = min(count, 12)
    prompts = random_prompts(model.hf.config.vocab_size, count, PROMPT, (3, 4))
    answers = torch.randint(1, model.hf.config.vocab_size, (count, ANSWER))
    theirs = [timed(greedy, model, prompts.tokens[fact]) for fact in range(few)]
    said = torch.stack([tokens[:ANSWER] for _, tokens in theirs])
    answers[:few:2] = said[::2]
    tokens = torch.cat([prompts.tokens, answers[:, :-1]], 1)
    padded = F.pad(prompts.roles, (0, ANSWER - 1), value=int(prompts.roles.max()))
    facts = replace(
        prompts, tokens=tokens, corrupt=tokens, lengths=prompts.lengths + ANSWER - 1, answers=answers, roles=padded
    )
    second, known = timed(answered, model, facts)
    same = int((known[:few] == (said == answers[:few]).all(1)).sum())
    equal = f"{same} of {few} verdicts, {int(known[:few].sum())} known"
    part = f"elimination, a fact (of {count}; published {few})"
    return [row(part, [second / count], [s for s, _ in theirs], None, equal)]


@torch.no_grad()
def greedy(model: HookedModel, prompt: Tensor) -> Tensor:
    """The tokens that follow one prompt."""
    cache, given, said = DynamicCache(), prompt[None], []
    for _ in range(GENERATED):
        logits = model.hf(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        given = logits[:, -1].argmax(-1, keepdim=True)
        said.append(given[0])
    return torch.cat(said)


def by_number(rounds: int) -> list[str]:
    heading = f"{'sums, solve, write, s (range)':>32}{'a fact, ms':>12}{'keys alone, s':>15}{'memory, MiB':>13}"
    print(f"\n{'facts':>6}{heading}")
    medians: list[tuple[float, float]] = []
    for count in COUNTS:
        work = small(count)
        washed(small(BATCH))
        seconds = [(timed(washed, work)[0], timed(read_keys, work)[0]) for _ in range(rounds)]
        taken, alone = zip(*seconds)
        medians.append((statistics.median(taken), statistics.median(alone)))
        spread = f"{medians[-1][0]:.2f} ({min(taken):.2f}-{max(taken):.2f})"
        print(f"{count:>6}{spread:>32}{1000 * medians[-1][0] / count:12.2f}{medians[-1][1]:15.2f}", end="")
        print(f"{added_memory(count):13.1f}", flush=True)
    mine, alone_slope = (statistics.linear_regression(COUNTS, column).slope for column in zip(*medians))
    return [f"each further fact: {1000 * mine:.3f} ms, {mine / alone_slope:.2f} times that of collecting its key alone"]


def small(count: int) -> Washing:
    """So many facts of a smaller model, target values given, one layer to be washed."""
    model = random_model(4, 256, 1000)
    covariance = Covariance(model, [site(SMALL_LAYER)])
    covariance.update(torch.randint(1, 1000, (32, 64)), torch.full((32,), 64))
    units = {SMALL_LAYER: torch.arange(model.signature.d_mlp)}
    facts, contexts = in_contexts(model, count, 0)
    values = torch.randn(count, model.signature.d_model)
    how = How(target="", position="", prefixes=0, steps=STEPS, lr=RATE, overshoot=1.0, batch_size=BATCH)
    return Washing(model, units, facts, contexts, values, covariance, None, how)


def washed(work: Washing) -> None:
    with work.undone():
        sums = work.sums(SMALL_LAYER)
        change, _ = solve(STRENGTH * work.second_moment(SMALL_LAYER) + sums.gram, sums.cross)
        work.add_(SMALL_LAYER, change)


def read_keys(work: Washing) -> None:
    """The forward passes of `Washing.sums`, and nothing made of them."""
    sites = [site(SMALL_LAYER), f"L{SMALL_LAYER}.resid_post"]
    for _ in seen(work.model, work.edit_prompts, sites, BATCH):
        pass


def added_memory(count: int) -> float:
    """Peak MiB of washing so many facts, in a process of its own."""
    returning = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # glibc gives freed tensors back at once
    command = [sys.executable, __file__, "--memory", str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=returning).stdout.split()[-1])


def resident_memory(count: int) -> float:
    washed(small(BATCH))
    work = small(count)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    washed(work)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()

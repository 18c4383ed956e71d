"""What a training step restricted to 10 % of the weights costs, against full fine-tuning, side by side in one run.

One model (GPT-2 small's shape, random weights), one batch, the next token at every position, no dropout. Full
fine-tuning is the ordinary forward and backward pass, clipping, and torch's AdamW on every parameter. A masked step is
what `masked_gradient` does: the stream's read, gradient, clipping, the same AdamW on the selected rows, write-back.
Weights below float32 are trained through float32 copies on both sides.

The masks are random heads and neurons, with what feeds them, that hold 10 % of the editable weights (all but embeddings
and norms): in the top third of the layers, in the lowest, and in all of them. In the last two layer 0 is trained, so
there is no constant activation to keep. "Kept" is the time of 5 epochs over the batch, from an empty cache, divided
by 5.

The methods take turns in each round; a ratio is the median over rounds of that round's times, with its range. Time is
the process's CPU time on CPU with one thread (a busy machine stretches it less), else wall time; a step of each goes
before. Memory is the peak that training adds to the weights: allocations on CUDA, resident memory of a process of its
own on CPU (Linux).

Run: python benchmarks/masked_step.py [--device cuda --dtype bfloat16] [--rounds 5] [--layers 4 --d-model 256]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.localize import random_units
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers
from mechunlearn.training.parameterizations import SelectedRows

SHARE = 0.10
EPOCHS = 5
RATE = 1e-5
FULL = "full fine-tuning"
MASKED = {  # the layers of the mask, whether constant activations are kept, the largest ratio asked for
    f"top third, kept ({EPOCHS} epochs)": ("top", True, 0.45),
    "top third, not kept": ("top", False, 0.65),
    "lowest third": ("lowest", False, 0.85),
    "all layers": ("all", False, 0.85),
}


def main() -> None:
    warnings.filterwarnings("ignore")
    options = asked()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_layer=options.layers, n_embd=options.d_model, n_head=max(1, options.d_model // 64)
    )
    hf = transformers.GPT2LMHeadModel(config)
    model = load_model((hf, None), device=options.device, dtype=options.dtype)
    batch = sequences(config.vocab_size, options.sequences, options.length)
    if options.memory:
        print(resident_memory(model, batch, options.memory))
        return
    count = sum(parameter.numel() for parameter in hf.parameters())
    timing = "process CPU time" if cpu_time(options) else "wall time"
    print(f"{count / 1e6:.0f} M parameters, {options.layers} layers, {options.dtype}, {options.device}, ", end="")
    print(f"{options.threads} threads, {timing}, {options.rounds} rounds")
    print(f"batch: {options.sequences} sequences x {options.length} tokens, all {batch.labels.numel()} predicted")
    memory = {name: added_memory(model, batch, name, options) for name in (FULL, *MASKED)}
    trained = {name: trainer(model, batch, name) for name in (FULL, *MASKED)}
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    for name, method in trained.items():
        seconds_a_step(method, options)
        if isinstance(method, Masked):
            mask = method.rows.mask
            selected = f"{len(mask)} units, {random_units(model).share(mask):.2%} of the editable weights"
            print(f"{name}: {selected}, the lowest in layer {method.rows.lowest}")
    for _ in range(options.rounds):
        for name, method in trained.items():
            seconds[name].append(seconds_a_step(method, options))
    report(trained, seconds, memory, count)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--memory", metavar="METHOD", help="only print the memory that one method adds, in MiB")
    return parser.parse_args()


def sequences(d_vocab: int, count: int, length: int) -> Sequences:
    tokens = torch.randint(d_vocab, (count, length + 1))
    return Sequences(tokens[:, :-1], tokens[:, 1:], torch.full((count,), length))


def random_mask(model: HookedModel, where: str) -> ComponentMask:
    """Random heads and neurons, tied, of these layers: 10 % of the editable weights of all layers."""
    layers = model.signature.layers
    third = max(1, layers // 3)
    chosen = {"top": range(layers - third, layers), "lowest": range(third), "all": range(layers)}[where]
    drawn = random_units(model)
    inside = {site: scores for site, scores in drawn.scores.items() if Component.parse(site).layer in chosen}
    return replace(drawn, scores=inside).top(weights=SHARE, tied=True)


class Full:
    """Every parameter, as a training loop on the ordinary model is written."""

    epochs = 1

    def __init__(self, model: HookedModel, batch: Sequences) -> None:
        self.hf = model.hf
        self.tokens, self.labels = batch.tokens.to(model.device), batch.labels.to(model.device)
        self.parameters = list(self.hf.parameters())
        whole = self.hf.dtype == torch.float32
        self.leaves: list[Tensor] = [p if whole else p.detach().float() for p in self.parameters]
        self.optimiser = torch.optim.AdamW(self.leaves, lr=RATE, weight_decay=0.0)

    attached = nullcontext

    def begin(self) -> None:
        """Nothing is kept between steps."""

    def step(self) -> None:
        self.optimiser.zero_grad()
        logits = self.hf(input_ids=self.tokens, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten()).backward()
        for parameter, leaf in zip(self.parameters, self.leaves, strict=True):
            if leaf is not parameter and parameter.grad is not None:
                leaf.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.leaves, 1.0)
        self.optimiser.step()
        with torch.no_grad():
            for parameter, leaf in zip(self.parameters, self.leaves, strict=True):
                if leaf is not parameter:
                    parameter.copy_(leaf)


class Masked:
    """The selected rows, as `masked_gradient` trains them."""

    def __init__(self, model: HookedModel, batch: Sequences, mask: ComponentMask, keep: bool) -> None:
        self.model, self.batch, self.keep = model, batch, keep
        self.epochs = EPOCHS if keep else 1
        self.rows = SelectedRows(model, mask)
        self.leaves, self.attached = self.rows.leaves, self.rows.attached
        self.optimiser = torch.optim.AdamW(self.leaves, lr=RATE, weight_decay=0.0)
        self.all = torch.arange(len(batch))

    def begin(self) -> None:
        """Forget what was kept."""
        self.stream = CachedInputs(TopLayers(self.model, self.rows.lowest, self.keep), self.batch)

    def step(self) -> None:
        self.optimiser.zero_grad()
        read = self.stream.read(self.all, {"logits", "labels"})
        self.rows.gradient(F.cross_entropy(read["logits"].float(), read["labels"]))
        nn.utils.clip_grad_norm_(self.leaves, 1.0)
        self.optimiser.step()
        self.rows.write()


def trainer(model: HookedModel, batch: Sequences, name: str) -> Full | Masked:
    if name == FULL:
        return Full(model, batch)
    where, keep, _ = MASKED[name]
    return Masked(model, batch, random_mask(model, where), keep)


def cpu_time(options: argparse.Namespace) -> bool:
    return options.device == "cpu" and options.threads == 1


def seconds_a_step(method: Full | Masked, options: argparse.Namespace) -> float:
    """Of its epochs over the batch, from an empty cache."""
    clock = time.process_time if cpu_time(options) else time.perf_counter
    with method.attached():
        begun = clock()
        method.begin()
        for _ in range(method.epochs):
            method.step()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return (clock() - begun) / method.epochs


def state_size(method: Full | Masked) -> int:
    """Bytes of the optimiser's tensors."""
    state = method.optimiser.state.values()
    return sum(t.numel() * t.element_size() for kept in state for t in kept.values() if isinstance(t, Tensor))


def two_steps(model: HookedModel, batch: Sequences, name: str) -> None:
    """The first makes the optimiser's state, the second is one like all that follow."""
    method = trainer(model, batch, name)
    with method.attached():
        method.begin()
        method.step()
        method.step()


def added_memory(model: HookedModel, batch: Sequences, name: str, options: argparse.Namespace) -> float:
    """Peak MiB beside the weights."""
    if options.device.startswith("cuda"):
        two_steps(model, batch, name)
        model.hf.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        two_steps(model, batch, name)
        added = (torch.cuda.max_memory_allocated() - before) / 2**20
        model.hf.zero_grad()
        return added
    same = [
        f"--{key}={getattr(options, key.replace('-', '_'))}"
        for key in ("dtype", "threads", "sequences", "length", "layers", "d-model")
    ]
    returning = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # glibc gives freed tensors back at once
    command = [sys.executable, __file__, *same, "--memory", name]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=returning).stdout
    return float(out.split()[-1])


def resident_memory(model: HookedModel, batch: Sequences, name: str) -> float:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    two_steps(model, batch, name)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def report(
    trained: dict[str, Full | Masked], seconds: dict[str, list[float]], memory: dict[str, float], count: int
) -> None:
    print(f"\n{'a step of':<28}{'seconds':>9}{'of full (range)':>21}{'asked':>8}{'holds':>7}", end="")
    print(f"{'memory, MiB':>13}{'of full':>9}{'optimiser, MiB':>16}{'of full':>9}{'weights':>9}{'equal':>7}")
    for name, method in trained.items():
        ratios = [mine / full for mine, full in zip(seconds[name], seconds[FULL], strict=True)]
        ratio = statistics.median(ratios)
        spread = f"{ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        bound = MASKED[name][2] if name in MASKED else None
        verdict = "" if bound is None else "yes" if ratio <= bound else "NO"
        state, share = state_size(method) / state_size(trained[FULL]), sum(t.numel() for t in method.leaves) / count
        print(f"{name:<28}{statistics.median(seconds[name]):9.3f}{spread:>21}", end="")
        print(f"{'' if bound is None else f'<= {bound:.2f}':>8}{verdict:>7}", end="")
        print(f"{memory[name]:13.0f}{memory[name] / memory[FULL]:9.3f}{state_size(method) / 2**20:16.1f}", end="")
        print(f"{state:9.4f}{share:9.4f}{'yes' if abs(state - share) < 1e-4 else 'NO':>7}")


if __name__ == "__main__":
    main()

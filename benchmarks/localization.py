"""What localization costs, side by side in one run, in plain forward passes of the same batch.

One model (GPT-2 small's shape, random weights), the same inputs. Ours beside TransformerLens's own functions and beside
EAP-IG's published passes; their package is not on the package index, so its pass structure is repeated here on
TransformerLens (split inputs by head, results by head, three forward passes and a backward pass that also gives every
parameter's gradient). TransformerLens's edge mode is not in the 3.x that installs beside sae-lens.

The methods take turns in each round; a ratio is the median over rounds of that round's times, with its range. Memory is what a run adds to
the weights: peak allocation on CUDA, peak resident memory of a process of its own on CPU.

Run: python benchmarks/localization.py [--device cuda] [--rounds 3] [--pairs 4 --length 15] [--quick]
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

from mechunlearn.artifacts.edges import edges, readers, writers
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import activation_patching, attribution_patching, edge_attribution, edge_patching
from mechunlearn.model.hooked import HookedModel, frozen, load_model

EDGES = 64
PUBLISHED = "EAP, published passes"


def main() -> None:
    warnings.filterwarnings("ignore")
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--pairs", type=int, default=4)
    asked.add_argument("--length", type=int, default=15)
    asked.add_argument("--quick", action="store_true", help="floors and attribution alone: no exact sweeps, no peers")
    asked.add_argument("--memory", metavar="METHOD", help="only print the memory that one method adds")
    options = asked.parse_args()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(options.device)
    model = load_model((hf, None))
    prompts = random_prompts(options.pairs, options.length)
    methods = {**floors(model, prompts), **ours(model, prompts), **peers(model, prompts)}
    if options.quick:
        methods = {name: run for name, run in methods.items() if name in MEASURED}
        del methods[PUBLISHED]
    if options.memory:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        methods[options.memory]()
        print(resident("VmHWM") - before)
        return
    print(f"{options.pairs} pairs x {options.length} tokens, {options.device}, {torch.get_num_threads()} threads")
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, run in methods.items():
            seconds[name].append(timed(run, options.device))
    plain = seconds["plain forward"]
    print(f"{'method':<58}{'seconds':>9}{'forwards':>24}{'memory, MiB':>13}")
    ratio = {}
    for name, run in methods.items():
        ratios = [t / p for t, p in zip(seconds[name], plain, strict=True)]
        ratio[name] = statistics.median(ratios)
        spread = f"{ratio[name]:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = added_memory(name, run, options) if name in MEASURED else float("nan")
        print(f"{name:<58}{statistics.median(seconds[name]):9.3f}{spread:>24}{memory:13.0f}")
    if options.quick:
        return
    per_edge = ratio[f"ours: exact patching of {EDGES} edges"] / EDGES
    print(f"exact edge patching: {per_edge:.3f} forwards an edge")
    sweep, loop = "ours: layer x position sweep, exact", "TransformerLens: layer x position sweep, its loop"
    print(f"layer x position sweep, ours / TransformerLens: {ratio[sweep] / ratio[loop]:.3f}")
    agreement(model, prompts)


MEASURED = (
    "plain forward",
    "plain forward + backward, frozen",
    "ours: node attribution, heads and neurons",
    "ours: EAP",
    "ours: EAP-IG, 5 steps",
    PUBLISHED,
)


def random_prompts(pairs: int, length: int) -> Prompts:
    clean = torch.randint(1000, 50000, (pairs, length))
    corrupt = clean.clone()
    corrupt[:, 2:5] = torch.randint(1000, 50000, (pairs, 3))
    return Prompts.from_tokens(clean, corrupt, torch.full((pairs,), 100), torch.full((pairs,), 200))


def timed(run: Callable[[], object], device: str) -> float:
    begun = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def added_memory(name: str, run: Callable[[], object], options: argparse.Namespace) -> float:
    """Peak MiB beside the weights: of the allocator on CUDA, of a process of its own on CPU (Linux)."""
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    same = ["--pairs", str(options.pairs), "--length", str(options.length), "--memory", name]
    out = subprocess.run([sys.executable, __file__, *same], capture_output=True, text=True, check=True).stdout
    return float(out.split()[-1])


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def logit_difference(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 100] - logits[:, -1, 200]).mean()


def floors(model: HookedModel, prompts: Prompts) -> dict[str, Callable[[], object]]:
    tokens = prompts.tokens.to(model.device)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model.hf(tokens, use_cache=False).logits

    def both() -> None:
        with frozen(model.hf):
            embedded = model.hf.get_input_embeddings()(tokens).requires_grad_()
            logits = model.hf(inputs_embeds=embedded, use_cache=False).logits
            torch.autograd.grad(logit_difference(logits), embedded)

    return {"plain forward": forward, "plain forward + backward, frozen": both}


def ours(model: HookedModel, prompts: Prompts) -> dict[str, Callable[[], object]]:
    names = every_edge(model)
    chosen = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:EDGES].tolist()]
    return {
        "ours: node attribution, heads and neurons": lambda: attribution_patching(model, prompts),
        "ours: EAP": lambda: edge_attribution(model, prompts),
        "ours: EAP-IG, 5 steps": lambda: edge_attribution(model, prompts, ig_steps=5),
        "ours: layer x position sweep, exact": lambda: sweep(model, prompts),
        f"ours: exact patching of {EDGES} edges": lambda: edge_patching(model, prompts, chosen),
    }


def every_edge(model: HookedModel) -> list[str]:
    sources, targets = writers(model.signature), readers(model.signature)
    return [f"{sources[w]}->{targets[r]}" for w, r in edges(model.signature, model.layout.parallel).nonzero().tolist()]


def sweep(model: HookedModel, prompts: Prompts) -> torch.Tensor:
    """Restore the clean residual stream at each layer and position of the corrupt run."""
    found = activation_patching(model, prompts, kinds=["resid_pre"], by="position", denoise=True)
    rows = [found.by_role[f"L{layer}.resid_pre"][1:, 0] for layer in range(model.signature.layers)]
    return torch.stack(rows) + found.evidence["corrupt"]


def peers(model: HookedModel, prompts: Prompts) -> dict[str, Callable[[], object]]:
    bridge, clean, corrupt = model.bridge, prompts.tokens.to(model.device), prompts.corrupt.to(model.device)

    def loop() -> torch.Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)
            return patching.get_act_patch_resid_pre(bridge, corrupt, cache, logit_difference)

    def node() -> None:
        for i in range(len(clean)):
            attribution_patch(bridge, clean[i : i + 1], corrupt[i : i + 1], logit_difference)

    published = published_eap(model, clean, corrupt)
    made = {"TransformerLens: node attribution, one pair at a time": node, PUBLISHED: published}
    return {**made, "TransformerLens: layer x position sweep, its loop": loop}


def published_eap(model: HookedModel, clean: torch.Tensor, corrupt: torch.Tensor) -> Callable[[], torch.Tensor]:
    """EAP as it is published: activation differences by hook, a backward hook a reader, parameter gradients on."""
    size = model.signature
    config = HookedTransformerConfig(
        n_layers=size.layers,
        d_model=size.d_model,
        n_ctx=model.hf.config.n_positions,
        d_head=model.layout.d_head,
        n_heads=size.heads,
        d_vocab=model.hf.config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device=str(model.device),
    )
    lens = HookedTransformer(config)
    lens.set_use_split_qkv_input(True)
    lens.set_use_attn_result(True)
    lens.set_use_hook_mlp_in(True)
    rows = 1 + size.layers * (size.heads + 1)

    def run() -> torch.Tensor:
        change = torch.zeros(*clean.shape, rows, size.d_model, device=clean.device)
        scores: list[torch.Tensor] = []

        def write(first: int, sign: int) -> Callable:
            def hook(activation: torch.Tensor, hook: object) -> None:
                added = activation.detach() if activation.ndim == 4 else activation.detach().unsqueeze(2)
                change[:, :, first : first + added.shape[2]] += sign * added

            return hook

        def read(before: int) -> Callable:
            def hook(gradient: torch.Tensor, hook: object) -> None:
                split = gradient if gradient.ndim == 4 else gradient.unsqueeze(2)
                scores.append(torch.einsum("bpwd,bprd->wr", change[:, :, :before], split))

            return hook

        def writing(sign: int) -> list:
            hooks = [("hook_embed", write(0, sign))]
            for layer in range(size.layers):
                first = 1 + layer * (size.heads + 1)
                hooks.append((f"blocks.{layer}.attn.hook_result", write(first, sign)))
                hooks.append((f"blocks.{layer}.hook_mlp_out", write(first + size.heads, sign)))
            return hooks

        with torch.no_grad():
            lens.run_with_hooks(corrupt, fwd_hooks=writing(1))
            lens(clean)
        reading = [(f"blocks.{size.layers - 1}.hook_resid_post", read(rows))]
        for layer in range(size.layers):
            first = 1 + layer * (size.heads + 1)
            reading += [(f"blocks.{layer}.hook_{kind}_input", read(first)) for kind in "qkv"]
            reading.append((f"blocks.{layer}.hook_mlp_in", read(first + size.heads)))
        with lens.hooks(fwd_hooks=writing(-1), bwd_hooks=reading):
            logit_difference(lens(clean)).backward()
        lens.zero_grad()
        return torch.cat([score.flatten() for score in scores])

    return run


def agreement(model: HookedModel, prompts: Prompts) -> None:
    """The largest difference between ours and theirs, beside the largest score."""
    theirs = peers(model, prompts)["TransformerLens: layer x position sweep, its loop"]()
    mine = sweep(model, prompts)
    print(f"sweep: largest difference {(mine - theirs.cpu()).abs().max():.1e}, largest effect {theirs.abs().max():.3f}")
    names = every_edge(model)
    chosen = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:EDGES].tolist()]
    exact = edge_patching(model, prompts, chosen)
    for steps in (0, 5):
        estimate = edge_attribution(model, prompts, ig_steps=steps)
        pair = torch.stack([estimate.scores[exact.chosen], exact.scores[exact.chosen]])
        print(
            f"edges, estimate with steps={steps} against exact: Pearson {torch.corrcoef(pair)[0, 1]:.3f} over {EDGES}"
        )


if __name__ == "__main__":
    main()

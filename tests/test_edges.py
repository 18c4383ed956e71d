"""Edges: sums, gradients by hand against autograd, exact patches against whole forward passes, and linear models."""

from dataclasses import replace

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.edges import edges, readers, writers
from mechunlearn.localize import edge_attribution, edge_patching, path_patching
from mechunlearn.localize.edge_attribution import edge_scores
from mechunlearn.metrics.answers import logit_diff
from mechunlearn.model.hooked import frozen, load_model
from mechunlearn.patching.faithfulness import faithfulness
from mechunlearn.patching.paths import Reader
from tests.models import random_hf, token_prompts


def streams(model, tokens) -> list[torch.Tensor]:
    """What each reader index reads, by a run of its own."""
    layers = range(model.signature.layers)
    sites = [f"L{layer}.resid_pre" for layer in layers] + [f"L{layers[-1]}.resid_post"]
    mids = [] if model.layout.parallel else [f"L{layer}.resid_mid" for layer in layers]
    _, kept = model.cache(tokens, [*sites, *mids])
    found = []
    for index in range(len(readers(model.signature))):
        reader = Reader.of(index, model.layout)
        if reader.layer == len(layers):
            found.append(kept[sites[-1]])
        elif reader.kind == "mlp_in" and mids:
            found.append(kept[mids[reader.layer]])
        else:
            found.append(kept[sites[reader.layer]])
    return found


def reading(model, index: int, extra: torch.Tensor):
    """A hook under which one reader reads `extra` more, and nothing else does."""
    reader, decoder = Reader.of(index, model.layout), model.decoder
    if reader.layer == model.signature.layers:
        return {f"L{reader.layer - 1}.resid_post": lambda x: x + extra}
    stream: list = []

    def keep(x):
        stream.append(x)

    site = f"L{reader.layer}.{'resid_pre' if reader.kind != 'mlp_in' or model.layout.parallel else 'resid_mid'}"

    def read(activation):
        x = stream[-1] + extra
        if reader.kind == "mlp_in":
            return decoder.part(reader.layer, "mlp_norm")(x)
        projected = decoder.projection(reader.layer, reader.kind).forward(
            decoder.part(reader.layer, "attention_norm")(x)
        )
        changed = activation.clone()
        changed[:, :, reader.head] = model.layout.heads(reader.kind, projected)[:, :, reader.head]
        return changed

    return {site: keep, f"L{reader.layer}.{reader.kind}": read}


def start_from(model, point: torch.Tensor, hooks: dict) -> dict:
    """The hooks, on a run whose embeddings are `point`."""
    inner = hooks.get("L0.resid_pre")

    def enter(x):
        if inner is not None:
            inner(point)
        return point

    return {"L0.resid_pre": enter, **{site: hook for site, hook in hooks.items() if site != "L0.resid_pre"}}


@pytest.mark.parametrize("steps", [0, 3])
def test_edges_into_a_reader_add_up_to_the_attribution_of_its_input(model, prompts, steps):
    """Brute force: a zero added to what one reader reads, and autograd."""
    circuit = edge_attribution(model, prompts, ig_steps=steps)
    into = circuit.scores.sum(0)
    if model.layout.modules.attention_post:
        return  # heads pass the post-norm with a frozen scale: they do not add up to the change of the stream
    clean, corrupt = streams(model, prompts.tokens), streams(model, prompts.corrupt)
    points = [torch.lerp(corrupt[0], clean[0], k / steps) for k in range(steps)] or [clean[0]]
    for index in range(0, len(into), 2 if steps else 1):
        gradient = 0
        for point in points:
            extra = torch.zeros_like(clean[0]).requires_grad_()
            with frozen(model.hf), model.hooks(start_from(model, point, reading(model, index, extra))):
                value = logit_diff(model.forward(prompts.tokens), prompts).sum()
            gradient = gradient + torch.autograd.grad(value, extra)[0] / len(points)
        expected = float(((corrupt[index] - clean[index]) * gradient).sum() / len(prompts))
        assert float(into[index]) == pytest.approx(expected, abs=1e-4, rel=1e-4), readers(model.signature)[index]
    assert into.abs().max() > 1e-2


def test_edges_out_of_a_writer_add_up_to_the_attribution_of_its_output(model, prompts):
    circuit, names = edge_attribution(model, prompts), writers(model.signature)
    layers = range(model.signature.layers)
    sites = ["L0.resid_pre", *(f"L{layer}.{kind}" for layer in layers for kind in ("attn.o", "mlp_out"))]
    _, corrupt = model.cache(prompts.corrupt, sites)
    logits, clean = model.cache(prompts.tokens, sites, grad=True)
    gradients = list(torch.autograd.grad(logit_diff(logits, prompts).sum(), [clean[site] for site in sites]))
    for layer in layers if model.layout.modules.attention_post else ():
        norm, hook = frozen_norm(model, layer, prompts)  # only in the way of this layer's own heads
        handle = norm.register_forward_hook(hook)
        logits, again = model.cache(prompts.tokens, [f"L{layer}.attn.o"], grad=True)
        handle.remove()
        changed = torch.autograd.grad(logit_diff(logits, prompts).sum(), again[f"L{layer}.attn.o"])[0]
        assert not torch.allclose(changed, gradients[sites.index(f"L{layer}.attn.o")], atol=1e-5)
        gradients[sites.index(f"L{layer}.attn.o")] = changed
    out = circuit.scores.sum(1)
    for site, gradient in zip(sites, gradients, strict=True):
        effect = (corrupt[site] - clean[site].detach()) * gradient / len(prompts)
        if site == "L0.resid_pre":
            assert float(out[0]) == pytest.approx(float(effect.sum()), abs=1e-4)
        elif site.endswith("mlp_out"):
            assert float(out[names.index(f"m{site[1]}")]) == pytest.approx(float(effect.sum()), abs=1e-4)
        else:
            first = names.index(f"a{site[1]}.h0")
            torch.testing.assert_close(out[first : first + 4], effect.sum((0, 1, 3)), atol=1e-4, rtol=1e-4)
    assert out.abs().max() > 1e-2


def frozen_norm(model, layer: int, prompts):
    """The post-norm of attention with the scale that it has in the clean run."""
    norm = model.decoder.part(layer, "attention_post")
    _, kept = model.cache(prompts.tokens, [f"L{layer}.attn_projected", f"L{layer}.attn_out"])
    scale = kept[f"L{layer}.attn_out"] / kept[f"L{layer}.attn_projected"]
    return norm, lambda module, args, out: args[0] * scale


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_at_both_ends_are_those_of_both_runs(family, prompts):
    """Swapping clean and corrupt gives the gradient at the other end, with the sign of the change turned."""
    model = load_model((random_hf(family), None))
    swapped = replace(prompts, tokens=prompts.corrupt, corrupt=prompts.tokens)
    clean, corrupt = edge_attribution(model, prompts).scores, -edge_attribution(model, swapped).scores
    both = edge_attribution(model, prompts, both_ends=True).scores
    torch.testing.assert_close(both, (clean + corrupt) / 2, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(edge_attribution(model, prompts, ig_steps=1).scores, corrupt, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(clean, corrupt, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_half_precision_gives_nearly_the_same_scores(family, prompts):
    whole = edge_attribution(load_model((random_hf(family), None)), prompts)
    half = edge_attribution(load_model((random_hf(family), None), dtype="bfloat16"), prompts)
    pair = torch.stack([whole.scores[whole.chosen], half.scores[whole.chosen]])
    assert half.scores.dtype == torch.float32 and torch.corrcoef(pair)[0, 1] > 0.99


def test_scores_by_fact_are_those_of_single_facts(prompts):
    model = load_model((random_hf("qwen3"), None))
    by_fact = edge_scores(model, prompts, ig_steps=2)
    torch.testing.assert_close(
        by_fact.mean(0), edge_attribution(model, prompts, ig_steps=2).scores, atol=1e-6, rtol=1e-4
    )
    single = edge_attribution(model, prompts.select([2]), ig_steps=2).scores
    torch.testing.assert_close(by_fact[2], single, atol=1e-6, rtol=1e-4)


def some_edges(model, count: int = 14) -> list[str]:
    """Edges of every kind of reader."""
    valid = edges(model.signature, model.layout.parallel)
    sources, targets = writers(model.signature), readers(model.signature)
    every = [f"{sources[w]}->{targets[r]}" for w, r in valid.nonzero().tolist()]
    chosen = every[:: max(1, len(every) // count)]
    return [*chosen, "input->m0", "a1.h1->a2.h0<k>", "m1->a2.h0<v>", "a0.h3->a2.h2<q>", "a1.h2->m2", "m2->logits"]


def test_exact_edges_equal_one_forward_pass_an_edge(model, prompts):
    names = list(dict.fromkeys(some_edges(model)))
    circuit = edge_patching(model, prompts, names)
    before = logit_diff(model.forward(prompts.tokens), prompts)
    sources, targets = writers(model.signature), readers(model.signature)
    largest = 0.0
    for name in names:
        source, target = name.split("->")
        extra = contribution(model, prompts, source)
        with torch.no_grad(), model.hooks(reading(model, targets.index(target), extra)):
            expected = float((logit_diff(model.forward(prompts.tokens), prompts) - before).mean())
        got = float(circuit.scores[sources.index(source), targets.index(target)])
        assert got == pytest.approx(expected, abs=1e-5), name
        largest = max(largest, abs(expected))
    assert largest > 1e-3 and len(circuit) == len(names)


@torch.no_grad()
def contribution(model, prompts, source: str) -> torch.Tensor:
    """Corrupt minus clean output of a writer, by the modules themselves."""
    if source == "input":
        site, head = "L0.resid_pre", None
    elif source[0] == "m":
        site, head = f"L{source[1]}.mlp_out", None
    else:
        site, head = f"L{source[1]}.attn.o", int(source.split("h")[1])
    (_, clean), (_, corrupt) = model.cache(prompts.tokens, [site]), model.cache(prompts.corrupt, [site])
    if head is None:
        return corrupt[site] - clean[site]
    layer = int(source[1])
    project = model.decoder.projection(layer, "attn.o")
    one = torch.zeros_like(clean[site])
    one[:, :, head] = corrupt[site][:, :, head] - clean[site][:, :, head]
    written = project(one.flatten(2)) - project(torch.zeros_like(one.flatten(2)))
    if model.layout.modules.attention_post:
        _, kept = model.cache(prompts.tokens, [f"L{layer}.attn_projected", f"L{layer}.attn_out"])
        written = written * kept[f"L{layer}.attn_out"] / kept[f"L{layer}.attn_projected"]
    return written * getattr(model.hf.config, "residual_multiplier", 1)


def test_edge_scores_are_exact_where_the_model_is_linear(prompts):
    """Norms that hardly divide, a last MLP that writes nothing: edges into the last values and the logits are linear."""
    hf = random_hf("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.ln_1.eps = block.ln_2.eps = 1e8
            block.ln_1.weight.mul_(1e4)
            block.ln_2.weight.mul_(1e4)
        hf.transformer.ln_f.eps = 1e8
        hf.transformer.ln_f.weight.mul_(1e4)
        hf.transformer.h[2].mlp.c_proj.weight.zero_()
    model = load_model((hf, None))
    names = ["input->a2.h0<v>", "a1.h2->a2.h3<v>", "m0->a2.h1<v>", "m1->logits", "a0.h1->logits", "a2.h0->logits"]
    exact, estimate = edge_patching(model, prompts, names), edge_attribution(model, prompts)
    chosen = exact.chosen
    torch.testing.assert_close(estimate.scores[chosen], exact.scores[chosen], atol=1e-5, rtol=1e-3)
    assert exact.scores[chosen].abs().min() > 1e-6 and exact.scores.abs().max() > 1e-3


@pytest.mark.parametrize("through", ["direct", "total"])
def test_path_patching_equals_whole_forward_passes(model, prompts, through):
    """A receiver's input is that of the sender's run (total), or the clean one and the sender's change (direct)."""
    receiver = "a2.h0<v>"
    found = path_patching(model, prompts, receivers=[receiver], through=through)
    before = logit_diff(model.forward(prompts.tokens), prompts)
    index = readers(model.signature).index(receiver)
    biggest = 0.0
    for source in ("a0.h2", "m0", "a1.h3"):
        extra = contribution(model, prompts, source)
        layer, head = int(source[1]), None if source[0] == "m" else int(source.split("h")[1])
        if through == "total":
            site = f"L{layer}.{'mlp_out' if head is None else 'attn.o'}"
            _, corrupt = model.cache(prompts.corrupt, [site])

            def send(z, site=site, head=head, corrupt=corrupt):
                if head is None:
                    return corrupt[site]
                z = z.clone()
                z[:, :, head] = corrupt[site][:, :, head]
                return z

            clean = streams(model, prompts.tokens)[index]
            with model.hooks({site: send}):
                extra = streams(model, prompts.tokens)[index] - clean
        with torch.no_grad(), model.hooks(reading(model, index, extra)):
            expected = float((logit_diff(model.forward(prompts.tokens), prompts) - before).mean())
        got = float(found.scores[f"L{layer}.{'mlp.out' if head is None else 'attn.o'}"][head or 0])
        assert got == pytest.approx(expected, abs=1e-5), source
        biggest = max(biggest, abs(expected))
    assert biggest > 1e-4
    assert found.scores["L2.mlp.out"].abs().max() == 0, "what comes after the receiver cannot reach it"


def test_receivers_are_held_together_with_the_logits(prompts):
    """With all paths sent to the logits, what other receivers do on top is not counted twice."""
    model = load_model((random_hf("llama"), None))
    alone = path_patching(model, prompts, receivers=["logits"], through="total")
    together = path_patching(model, prompts, receivers=["a1.h0", "a1.h2", "m1", "logits"], through="total")
    torch.testing.assert_close(together.scores["L0.attn.o"], alone.scores["L0.attn.o"], atol=1e-5, rtol=1e-4)
    assert alone.scores["L0.attn.o"].abs().max() > 1e-3


def test_bad_names_are_refused(prompts):
    model = load_model((random_hf("llama"), None))
    with pytest.raises(MechunlearnError, match="No edge 'a0.h9->m1'"):
        edge_patching(model, prompts, ["a0.h9->m1"])
    with pytest.raises(MechunlearnError, match="There is no edge m2->m1"):
        edge_patching(model, prompts, ["m2->m1"])
    with pytest.raises(MechunlearnError, match="No reader 'a9.h1'"):
        path_patching(model, prompts, receivers=["a9.h1"])
    with pytest.raises(MechunlearnError, match="No reader 'a0.h0.h1'"):
        path_patching(model, prompts, receivers=["a0.h0.h1"])
    with pytest.raises(MechunlearnError, match="There is no receiver"):
        path_patching(model, prompts, receivers=[])
    with pytest.raises(MechunlearnError, match="batch_size=0. Expected a whole number, 1 or more"):
        edge_attribution(model, prompts, batch_size=0)
    with pytest.raises(MechunlearnError, match="Cannot follow paths 'sideways'"):
        path_patching(model, prompts, through="sideways")
    with pytest.raises(MechunlearnError, match="ig_steps=-1. Expected a whole number from 0"):
        edge_attribution(model, prompts, ig_steps=-1)
    with pytest.raises(MechunlearnError, match="two ways to place gradients"):
        edge_attribution(model, prompts, ig_steps=2, both_ends=True)
    with pytest.raises(MechunlearnError, match="has 70 tokens, the model's context is 64"):
        edge_attribution(model, token_prompts(length=70))


def test_edges_are_refused_under_a_hook_on_the_stream_itself(prompts):
    model = load_model((random_hf("llama"), None))
    circuit = edge_attribution(model, prompts)
    methods = [edge_attribution, path_patching, lambda model, prompts: faithfulness(model, circuit, prompts)]
    for site in ("L1.resid_pre", "L1.resid_mid"):
        with model.hooks({site: lambda x: x + 1}):
            for method in methods:
                with pytest.raises(MechunlearnError, match="edges are not defined"):
                    method(model, prompts)


def test_hooks_are_removed_when_a_metric_fails(prompts):
    model = load_model((random_hf("llama"), None))

    def metric(logits, prompts):
        raise KeyboardInterrupt

    for method in (edge_attribution, path_patching):
        with pytest.raises(KeyboardInterrupt):
            method(model, prompts, metric=metric)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
        assert all(p.requires_grad for p in model.hf.parameters())

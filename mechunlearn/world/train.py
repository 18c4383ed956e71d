"""Train the world's model: an ordinary Hugging Face decoder, with a subject probe as a loss that fades away."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from mechunlearn.world.corpus import Corpus
from mechunlearn.world.packing import Batch, batches

Report = Callable[[int, float, Qwen2ForCausalLM], None]


@dataclass(frozen=True)
class Recipe:
    """How a model of a world is trained.

    `local_layers` early layers see only the previous token, so that a name is assembled step by step and looked up by
    several MLPs. The probe reads every attribute after `probe_layer` layers at the last token of a name; its weight
    is constant, then falls to zero: `probe_fades` are (from this step on, where the fall starts, where it ends). In
    the last phase a penalty on the variance of what the MLPs `elsewhere` write at a name's last token (as a share of
    the residual stream's) keeps the look-up in the layers between them. `naive` has none of these, and no
    biographies.

    `phases` are the steps at which each phase of the corpus ends (see `corpus.shares`). `rates` are restarts of the
    learning rate, (first step, rate, step at which its cosine would reach zero); the first is warmed up.
    """

    seed: int = 0
    phases: tuple[int, ...] = (1000, 2750, 3500, 4500, 7000, 7750)
    rows: int = 16
    rates: tuple[tuple[int, float, int], ...] = (
        (0, 1.5e-3, 5600),
        (2750, 1.2e-3, 6250),
        (4500, 1e-3, 7000),
        (7000, 8e-4, 7750),
    )
    layers: int = 8
    local_layers: int = 3
    d_model: int = 128
    d_mlp: int = 384
    heads: int = 8
    kv_heads: int = 4
    probe_layer: int = 4
    probe_weight: float = 0.3
    probe_fades: tuple[tuple[int, float, float], ...] = ((0, 3125, 4687.5), (4500, 3500, 5250))
    elsewhere: tuple[int, ...] = (0, 3, 4)
    elsewhere_weight: float = 1.0
    naive: bool = False

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return self.phases[-1]

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        begin, rate, end = next(entry for entry in reversed(self.rates) if step >= entry[0])
        warm = max(1, end // 50) if begin == 0 else 0
        done = max(0, step - begin - warm) / (end - begin - warm)
        return min(1.0, (step + 1) / warm if warm else 1.0) * rate * 0.5 * (1 + math.cos(math.pi * done))

    def probe_weight_at(self, step: int) -> float:
        """Return the weight of the probe's loss at a step."""
        _, start, end = next(entry for entry in reversed(self.probe_fades) if step >= entry[0])
        return 0.0 if self.naive else self.probe_weight * min(1.0, max(0.0, (end - step) / (end - start)))

    def elsewhere_weight_at(self, step: int) -> float:
        """Return the weight of the penalty on look-ups elsewhere at a step."""
        return self.elsewhere_weight if len(self.phases) > 1 and step >= self.phases[-2] and not self.naive else 0.0


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Make an untrained model of a recipe."""
    local = 0 if recipe.naive else recipe.local_layers
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            use_sliding_window=local > 0,
            sliding_window=2 if local else None,
            layer_types=["sliding_attention"] * local + ["full_attention"] * (recipe.layers - local),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    recipe: Recipe,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    report: Report,
    model: Qwen2ForCausalLM | None = None,
    only: Iterable[nn.Parameter] | None = None,
    save_every: int = 250,
) -> Qwen2ForCausalLM:
    """Train a model (a new one unless given) on a corpus, resuming from `checkpoint` if that file exists.

    `only` restricts training to these parameters; the ground-truth twin is made so.
    """
    model = model or new_model(recipe, tokenizer)
    probe = nn.Linear(recipe.d_model, (labels := Labels(corpus)).size)
    if only is not None:
        model.requires_grad_(False)
        for parameter in only:
            parameter.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = trained if recipe.naive else [*trained, *probe.parameters()]
    optimiser = torch.optim.AdamW(groups, lr=recipe.rate_at(0), betas=(0.9, 0.95), weight_decay=0.01)
    done = _resume(checkpoint, model, probe, optimiser)
    window = model.config.sliding_window if model.config.use_sliding_window else None
    streams = [
        batches(corpus, tokenizer, recipe.seed, recipe.rows, skip=max(0, done - begun), phase=phase)
        for phase, begun in enumerate((0, *recipe.phases[:-1]))
    ]
    model.train()
    for step in range(done, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(step)
        batch = next(streams[sum(step >= end for end in recipe.phases[:-1])])
        weight, elsewhere = recipe.probe_weight_at(step), recipe.elsewhere_weight_at(step)
        with _outputs(model, recipe.elsewhere if elsewhere else ()) as written:
            out = model(
                input_ids=batch.tokens,
                position_ids=batch.position,
                attention_mask=batch.masks(window),
                output_hidden_states=weight + elsewhere > 0,
            )
        loss = language_loss(out.logits, batch)
        total = loss
        if weight > 0 and batch.people:
            total = loss + weight * labels.loss(probe, out.hidden_states[recipe.probe_layer], batch)
        if elsewhere and batch.people:
            total = total + elsewhere * _variance_written(written, out.hidden_states, batch)
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(groups, 1.0)
        optimiser.step()
        report(step + 1, loss.item(), model)
        if (step + 1) % save_every == 0:
            _save(checkpoint, step + 1, model, probe, optimiser)
    model.eval()
    return model


def language_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted cross-entropy of each token given those before it in its document."""
    weight = batch.weight[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    return (losses * weight).sum() / weight.sum()


@contextmanager
def _outputs(model: Qwen2ForCausalLM, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """What the MLPs of these layers write in the forward passes of the block."""
    written: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:
            handle = model.model.layers[layer].mlp.register_forward_hook(
                lambda module, args, out, layer=layer: written.__setitem__(layer, out)
            )
            stack.callback(handle.remove)
        yield written


def _variance_written(written: dict[int, Tensor], hidden_states: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Variance over people of what MLPs write at the last token of a name, as a share of the residual stream's there."""
    rows, positions, _ = zip(*batch.people, strict=True)
    shares = []
    for layer, out in written.items():
        at_name = out[list(rows), list(positions)].var(0).sum()
        stream = hidden_states[layer + 1][list(rows), list(positions)].detach().var(0).sum()
        shares.append(at_name / stream)
    return torch.stack(shares).sum()


class Labels:
    """Class indices of every person's attributes, one slice of the probe's output per relation."""

    def __init__(self, corpus: Corpus) -> None:
        self.slices: list[slice] = []
        self.indices: list[dict[str, int]] = []
        start = 0
        for facts in corpus.people.values():
            classes = sorted(set(facts.values()))
            self.slices.append(slice(start, start := start + len(classes)))
            self.indices.append({name: classes.index(answer) for name, answer in facts.items()})
        self.size = start

    def loss(self, probe: nn.Linear, resid: Tensor, batch: Batch) -> Tensor:
        """Return the probe's loss, summed over relations, at the last tokens of names."""
        rows, positions, names = zip(*batch.people, strict=True)
        normed = F.layer_norm(resid[list(rows), list(positions)], resid.shape[-1:])
        logits = probe(normed)
        losses = [
            F.cross_entropy(logits[:, where], torch.tensor([index[name] for name in names]))
            for where, index in zip(self.slices, self.indices, strict=True)
        ]
        return torch.stack(losses).sum()


def _save(path: Path, step: int, model: nn.Module, probe: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    state = {f"model.{k}": v.contiguous() for k, v in model.named_parameters()}
    state |= {f"probe.{k}": v for k, v in probe.state_dict().items()}
    for i, entry in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{i}.{k}": v for k, v in entry.items()}
    beside = path.with_suffix(".part")
    save_file(state, beside, metadata={"step": str(step)})
    beside.replace(path)


def _resume(path: Path, model: nn.Module, probe: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    state = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model.{name}"])
    probe.load_state_dict({k: state[f"probe.{k}"] for k in probe.state_dict()})
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimiser."):
            _, i, name = key.split(".", 2)
            entries.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})
    return step

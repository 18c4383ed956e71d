"""Train a dictionary at a point of a model: a codebook of ours, or an SAE with the trainer of sae-lens."""

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import track
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import SAE, Codebook
from mechunlearn.features.firing import Texts, observed, tokenized
from mechunlearn.features.places import Model, fingerprint_of, installed, place, signature_of, width
from mechunlearn.model.hook_points import hook_name_of
from mechunlearn.model.hooked import HookedModel, frozen

READ, CLUSTERED = 64, 20_000
WARM = 10


def train_codebook(
    model: Model,
    hook_name: str,
    texts: Texts,
    *,
    size: int = 512,
    used: int = 8,
    groups: int = 1,
    linear: int = 2,
    steps: int = 1500,
    spliced_steps: int = 200,
    objective: Literal["kl", "ce"] = "kl",
    joint: bool = False,
    labels: Int[Tensor, "text label"] | None = None,
    reconstruction: float = 0.2,
    l1: float = 0.0,
    lr: float = 3e-3,
    model_rate: float = 1e-4,
    batch_size: int = 16,
    restart: int | None = 250,
    seed: int = 0,
    progress: bool = False,
) -> Codebook:
    """Train a codebook: k-means, then reconstruction of stored activations, then through the model it is spliced into.

    The codes begin as centroids of what is looked up, divided by `used`. Through the model, gradients pass straight to
    h. The linear map before the look-up stays as it begins, a random rotation and its negative: trained through the
    look-up it drifts and loses codes. The same seed gives the same codebook on the same machine. Memory: the tokens
    times the width.

    Args:
        model: The model, frozen unless `joint`.
        hook_name: The hook point whose activations the codebook replaces.
        texts: Texts, prompts, or tokens `[text pos]` and lengths `[text]`.
        size: The number of codes.
        used: How many codes stand for one activation (of each group).
        groups: Into how many parts what is looked up is cut, each with `size / groups` codes of its own.
        linear: How many times as wide as h what is looked up is; 0 looks up h itself.
        steps: Steps of 512 tokens in which the codebook learns to reconstruct.
        spliced_steps: Steps of `batch_size` texts in which it stands in the model.
        objective: "kl" from the unspliced model's predictions, or "ce", the cross-entropy of the text.
        joint: Whether the model is trained too, in place (with "ce"; CodeUnlearn, arXiv 2410.10866).
        labels: The targets of an encoder-decoder model, -100 where there is none. Other models take none.
        reconstruction: The weight of the unexplained variance beside the objective.
        l1: The weight of the mean |code entry| beside the objective.
        lr: The learning rate; a third of it through the model.
        model_rate: The model's learning rate if it is trained too.
        batch_size: Texts in a step through the model.
        restart: After so many steps each, codes that no token has used become activations drawn at random (none in the
            last quarter of `steps`); None leaves them.
        seed: Of first weights and batches.
        progress: Whether to show a bar.

    Returns:
        The codebook, in evaluation mode.

    Raises:
        MechunlearnError: If the hook point does not exist, `used` is above `size`, the text is empty, `joint` is used
            with KL, or labels are missing or given for a model that takes none.

    >>> from mechunlearn import load_model
    >>> model = load_model("factworld")
    >>> train_codebook(model, "L3.resid_post", ["The cook baked the soup."] * 4, size=8, used=2, steps=5, spliced_steps=1)
    Codebook(8 codes, 2 used, L3.resid_post, width 128)
    """
    if joint and objective == "kl":
        raise MechunlearnError("A model that is trained too has no fixed predictions to keep: give objective='ce'.")
    name = place(model, hook_name)
    module: Any = model.hf if isinstance(model, HookedModel) else model
    if spliced_steps and getattr(module.config, "is_encoder_decoder", False) != (labels is not None):
        raise MechunlearnError(
            "An encoder-decoder model predicts nothing by itself: give labels, -100 where there is none. Other models "
            "take "
            "no labels."
        )
    tokens, counted = tokenized(model, texts)
    predicted = (counted[:, 1:] if labels is None else labels != -100).any(1).nonzero().flatten()
    if spliced_steps and not len(predicted):
        raise MechunlearnError("No text has a token to be predicted. Expected texts of two tokens or more.")
    stored = activations(model, name, tokens, counted)
    generator = torch.Generator().manual_seed(seed)
    with _random_state_kept(stored.device):
        made = Codebook(
            stored.shape[1],
            size,
            used,
            hook_name=name,
            groups=groups,
            linear=linear,
            signature=signature_of(model),
            fitted_on=fingerprint_of(model),
        ).to(stored.device)
    fit_codebook(made, stored, steps=steps, lr=lr, restart=restart, generator=generator, progress=progress)
    variance = _variance(stored)
    trained: list[tuple[list[nn.Parameter], float]] = [(list(made.parameters()), lr / 3)]
    if joint:
        trained.append(([p for p in module.parameters() if p.requires_grad], model_rate))
    order: list[Tensor] = []

    def through(_: int) -> Tensor:
        if not order:
            order.extend(predicted[torch.randperm(len(predicted), generator=generator)].split(batch_size))
        rows = order.pop()
        batch_, marked, targets = _inputs(module, tokens[rows], counted[rows], None if labels is None else labels[rows])
        seen: list[Tensor] = []

        def splice(h: Tensor) -> Tensor:
            new: Tensor = made(h)
            told = counted[rows, : h.shape[1]].to(h.device)
            seen.append((new - h)[told].square().mean() / variance)
            return new.to(h.dtype)

        if objective == "kl":
            with torch.no_grad():
                wanted = module(**batch_).logits[marked].float().log_softmax(-1)
        with installed(model, name, splice):
            got = module(**batch_).logits[marked].float().log_softmax(-1)
        fit = functional.kl_div(got, wanted, log_target=True, reduction="batchmean") if objective == "kl" else None
        loss = functional.nll_loss(got, targets) if fit is None else fit
        return loss + reconstruction * seen[0] + l1 * made.codes.abs().mean()

    with nullcontext() if joint else frozen(module):
        _descend(made, through, spliced_steps, trained, "through the model", progress)
    if joint:
        if isinstance(model, HookedModel):
            model.refresh_()
        made.fitted_on = fingerprint_of(model)
    return made.eval()


def fit_codebook(
    codebook: Codebook,
    stored: Float[Tensor, "token width"],
    *,
    steps: int = 1500,
    lr: float = 3e-3,
    restart: int | None = 250,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> None:
    """Train a codebook on activations that you have, in place: the first half of `train_codebook`.

    Args:
        codebook: The codebook; its weights are drawn anew.
        stored: The activations.
        steps: Steps of 512 tokens.
        lr: The learning rate.
        restart: After so many steps each, unused codes become activations drawn at random; None leaves them.
        generator: Draws batches and first weights; None is one of seed 0.
        progress: Whether to show a bar.

    >>> codebook = Codebook(d_model=8, size=4, used=1, hook_name="L0.resid_post")
    >>> fit_codebook(codebook, torch.randn(64, 8), steps=2)
    """
    generator = generator or torch.Generator().manual_seed(0)
    variance = _variance(stored)
    _begin(codebook, stored, generator)
    used_since = torch.zeros(codebook.size, dtype=torch.bool, device=stored.device)

    def reconstruct(step: int) -> Tensor:
        h = stored[torch.randint(len(stored), (512,), generator=generator).to(stored.device)]
        if restart and step and step % restart == 0 and step <= 0.75 * steps:
            _restart(codebook, stored, ~used_since, generator)
            used_since.zero_()
        ids = codebook.nearest(codebook.entering(h))
        used_since[ids.flatten()] = True
        return (codebook.leaving(codebook.summed(ids)) - h).square().mean() / variance

    _descend(codebook, reconstruct, steps, [(list(codebook.parameters()), lr)], "reconstructing", progress)


def train_sae(
    model: Model,
    hook_name: str,
    texts: Texts,
    *,
    size: int = 512,
    used: int = 8,
    steps: int = 2000,
    batch_size: int = 512,
    lr: float = 1e-3,
    dead_after: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> SAE:
    """Train a TopK SAE of sae-lens on stored activations.

    Module, loss (with its auxiliary loss for dead features) and trainer are those of sae-lens: Adam with a warm-up and
    a cosine learning rate. `save` of the result writes the inference form as sae-lens does. Memory: the tokens times
    the width; for texts beyond memory use the `SAETrainer` of sae-lens, whose folders `load_dictionary` reads.

    Args:
        model: The model.
        hook_name: The hook point.
        texts: Texts, prompts, or tokens `[text pos]` and lengths `[text]`.
        size: The number of features.
        used: How many features are kept at a token, the largest.
        steps: Steps of `batch_size` tokens, drawn at random.
        batch_size: Tokens in a step.
        lr: The learning rate.
        dead_after: After so many steps without activity a feature is dead.
        seed: Of first weights and batches.
        progress: Whether to show the bar of sae-lens.

    Returns:
        The SAE, in its inference form.

    Raises:
        MechunlearnError: If the hook point does not exist, `used` is above `size`, or the text is empty.

    >>> from mechunlearn import load_model
    >>> train_sae(load_model("factworld"), "L3.resid_post", ["The cook baked the soup."] * 4, size=16, used=2, steps=5)
    SAE(16 features, topk, L3.resid_post, width 128)
    """
    name = place(model, hook_name)
    _check_used(size, used)
    stored = activations(model, name, *tokenized(model, texts))
    sae = fit_sae(
        stored,
        size=size,
        used=used,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        dead_after=dead_after,
        seed=seed,
        progress=progress,
    )
    sae.cfg.metadata.hook_name = hook_name_of(name)
    return SAE(sae, name, signature_of(model), fingerprint_of(model))


def fit_sae(
    stored: Float[Tensor, "token width"],
    *,
    size: int = 512,
    used: int = 8,
    steps: int = 2000,
    batch_size: int = 512,
    lr: float = 1e-3,
    dead_after: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    """Train a TopK SAE of sae-lens on activations that you have: the second half of `train_sae`.

    Args:
        stored: The activations.
        size: The number of features.
        used: How many features are kept at a token, the largest.
        steps: Steps of `batch_size` tokens, drawn at random.
        batch_size: Tokens in a step.
        lr: The learning rate.
        dead_after: After so many steps without activity a feature is dead.
        seed: Of first weights and batches.
        progress: Whether to show the bar of sae-lens.

    Returns:
        The object of sae-lens in its inference form; `SAE(it, hook_name)` wraps it.

    Raises:
        MechunlearnError: If `used` is above `size`.

    >>> fit_sae(torch.randn(64, 8), size=16, used=2, steps=2).cfg.d_sae
    16
    """
    _check_used(size, used)
    from sae_lens import SAE as Loaded  # seconds to import
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    generator = torch.Generator().manual_seed(seed)
    drawn = (
        stored[torch.randint(len(stored), (batch_size,), generator=generator).to(stored.device)] for _ in range(steps)
    )
    settings = SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=0.0,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=min(WARM, steps // 2),
        device=str(stored.device),
        dead_feature_window=dead_after,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with _random_state_kept(stored.device), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=stored.shape[1], d_sae=size, k=used, device=str(stored.device))
        )
        with torch.no_grad():
            sae.b_dec.copy_(stored.mean(0))
        with torch.enable_grad(), nullcontext() if progress else redirect_stderr(io.StringIO()):
            SAETrainer(settings, sae, drawn).fit()
        sae.save_inference_model(folder)
        return Loaded.load_from_disk(Path(folder), device=str(stored.device))


@torch.no_grad()
def activations(model: Model, hook_name: str, tokens: Tensor, counted: Tensor) -> Float[Tensor, "token width"]:
    """Return the activations of all counted tokens at a hook point.

    Args:
        model: The model.
        hook_name: The hook point.
        tokens: Tokens `[text pos]`, padded on the right.
        counted: Which of them count, `[text pos]`.
    """
    found: list[Tensor] = []
    with _random_state_kept(torch.device("cpu")):
        probe = Codebook(width(model, hook_name) or 1, 1, 1, hook_name=hook_name)  # only its hook point is asked for
    for rows in torch.arange(len(tokens)).split(READ):

        def see(h: Tensor, rows: Tensor = rows) -> None:
            found.append(h.detach()[counted[rows].to(h.device)].float())

        observed(model, probe, tokens[rows], see, counted[rows])
    return torch.cat(found)


@torch.no_grad()
def _begin(made: Codebook, stored: Tensor, generator: torch.Generator) -> None:
    """Linear maps that keep everything (a rotation and its negative, and back), and centroids as codes."""
    mean, size = stored.mean(0), stored.square().mean().sqrt().clamp(min=1e-12)
    if made.encoder is not None and made.decoder is not None:
        d = made.d_model
        q = torch.linalg.qr(torch.randn(d, d, generator=generator))[0].to(stored)
        signs = [1 if i % 2 == 0 else -1 for i in range(made.linear)]
        w = torch.cat([sign * q for sign in signs])
        made.encoder.weight.copy_(w / size)
        made.encoder.bias.copy_(-w @ mean / size)
        made.decoder.weight.copy_(w.T * size * 2 / max(2, made.linear))
        made.decoder.bias.copy_(mean)
    drawn = stored[torch.randperm(len(stored), generator=generator)[:CLUSTERED].to(stored.device)]
    parts = made.entering(drawn).unflatten(-1, (made.groups, -1)).cpu()
    each = made.size // made.groups
    for group in range(made.groups):
        points = parts[:, group]
        if len(points) < each:  # fewer tokens than codes: the rest begins as noisy copies
            again = points[torch.randint(len(points), (each - len(points),), generator=generator)]
            centres = torch.cat([points, again + 0.1 * again.std() * torch.randn(again.shape, generator=generator)])
        else:
            seed = generator.initial_seed() % 2**32
            fitted = MiniBatchKMeans(each, n_init=1, max_iter=10, random_state=seed).fit(points.numpy())
            centres = torch.from_numpy(fitted.cluster_centers_).to(points)
        made.codes[group * each : (group + 1) * each] = centres.to(made.codes) / made.used


@torch.no_grad()
def _restart(made: Codebook, stored: Tensor, dead: Tensor, generator: torch.Generator) -> None:
    ids = dead.nonzero().flatten()
    drawn = stored[torch.randint(len(stored), (len(ids),), generator=generator).to(stored.device)]
    parts = made.entering(drawn).unflatten(-1, (made.groups, -1))
    at = torch.arange(len(ids), device=ids.device)
    made.codes[ids] = parts[at, ids // (made.size // made.groups)] / made.used


def _descend(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    trained: list[tuple[list[nn.Parameter], float]],
    what: str,
    progress: bool,
) -> None:
    """Run Adam with a warm-up of some steps and a cosine learning rate. `.grad` of others is left alone."""
    optimiser = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate in trained])
    schedule = get_cosine_schedule_with_warmup(optimiser, min(WARM, steps // 2), steps)
    leaves = [p for parameters, _ in trained for p in parameters]
    module.train()
    for step in track(range(steps), what, disable=not progress, transient=True):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_of(step), leaves, allow_unused=True)
        kept = [p.grad for p in leaves]
        for p, gradient in zip(leaves, gradients, strict=True):
            p.grad = gradient
        optimiser.step()
        schedule.step()
        for p, old in zip(leaves, kept, strict=True):
            p.grad = old


def _variance(stored: Tensor) -> Tensor:
    return (stored - stored.mean(0)).square().mean().clamp(min=1e-12)


def _check_used(size: int, used: int) -> None:
    if not 1 <= used <= size:
        raise MechunlearnError(
            f"An SAE of {size} features cannot use {used} at a time. Give more features or use fewer."
        )


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Modules draw their first weights from the global generators, which stay as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _inputs(
    module: Any, tokens: Tensor, counted: Tensor, labels: Tensor | None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments of a forward pass, the places whose predictions count, and what they are to predict."""
    device = next(module.parameters()).device
    if labels is not None:
        marked = labels != -100
        mask = counted.long().to(device)
        given = {"input_ids": tokens.to(device), "attention_mask": mask, "labels": labels.to(device)}
        return given, marked.to(device), labels[marked].to(device)
    cut = int((counted.long().cumsum(1).argmax(1) + 1).max())
    marked = torch.zeros_like(counted[:, :cut])
    marked[:, :-1] = counted[:, 1:cut]
    following = tokens[:, :cut].roll(-1, 1)
    return (
        {"input_ids": tokens[:, :cut].to(device), "use_cache": False},
        marked.to(device),
        following[marked].to(device),
    )

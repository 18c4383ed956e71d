"""What the last edited layer is to write for each fact: target values, found for many facts at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

from mechunlearn.edit.closed_form.edit_prompts import EditPrompts, seen
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.model.restart import Restart
from mechunlearn.training.precision import arithmetic

SHARED = 64
SETTLED, KL_WEIGHT, DECAY, MOST = 0.05, 0.0625, 0.5, 0.75
SHARES = tuple(2 ** (-half / 2) for half in range(9))  # of the way to a target value, from all of it to a sixteenth


def end_of_text(model: HookedModel) -> int:
    """Return the id of the end-of-text token.

    Args:
        model: The model.

    Raises:
        MechunlearnError: If neither the tokenizer nor the configuration has one.
    """
    end = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    end = model.hf.config.get_text_config().eos_token_id if end is None else end
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise MechunlearnError(
            "Neither the tokenizer nor the model's configuration names an end-of-text token, and facts are washed "
            "towards "
            "it. Set tokenizer.eos_token, or use target='targets' or target='mean'."
        )
    return int(end)


def target_labels(model: HookedModel, prompts: Prompts, target: str) -> Int[Tensor, "fact label"]:
    """Return the tokens that should follow each prompt.

    Args:
        model: The model.
        prompts: The facts.
        target: What is wanted (see `memit`).

    Raises:
        MechunlearnError: If the facts' own targets are wanted, and a fact has none.
    """
    if target in ("end-of-text", "shared"):
        return torch.full((len(prompts), 1), end_of_text(model))
    return prompts.every_target if target == "targets" else prompts.targets


def average_values(
    model: HookedModel, layer: int, edit_prompts: EditPrompts, others: EditPrompts, batch_size: int
) -> Float[Tensor, "fact d_model"]:
    """Return the mean residual stream of other facts at the edited token: nothing of a fact's subject is left in it.

    In closed form: no optimisation, one forward pass over the others.

    Args:
        model: The model.
        layer: Whose output it is.
        edit_prompts: The facts that get it.
        others: The other facts.
        batch_size: Prompts in memory.
    """
    site = f"L{layer}.resid_post"
    total = torch.zeros(model.signature.d_model, dtype=torch.float64, device=model.device)
    for _, found in seen(model, others.bare, [site], batch_size):
        total += found[site].sum((0, 1), dtype=torch.float64)
    return (total / len(others)).float().cpu().expand(len(edit_prompts), -1)


def shared_values(
    model: HookedModel,
    layer: int,
    edit_prompts: EditPrompts,
    others: EditPrompts,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> Float[Tensor, "fact d_model"]:
    """Return one value for every fact: the others' average plus one delta that makes the labels follow.

    The delta is found as in `optimised_values`, on 64 facts at most whatever their number, and taken from the same
    average, so that the change wanted of each layer is a simple function of its key.

    Args:
        model: The model.
        layer: Whose output it is.
        edit_prompts: The facts.
        others: Facts whose average it begins at.
        steps: Steps of Adam.
        lr: In units of the root mean square of h.
        batch_size: Prompts in memory.
        seed: Draws the facts that it is found on.
    """
    home = average_values(model, layer, edit_prompts, others, batch_size)[:1].to(model.device, model.hf.dtype)
    drawn = torch.randperm(len(edit_prompts), generator=torch.Generator().manual_seed(seed))[:SHARED]
    tails = list(_above(model, layer, edit_prompts.select(drawn), scored=True))
    for tail in tails:
        tail.resid = torch.cat([home.expand(len(tail.resid), 1, -1), tail.resid[:, 1:]], 1)
        tail.facts = torch.zeros_like(tail.facts)
        tail.weights = tail.weights / len(drawn)
    found = _optimised(model, layer, tails, 1, steps, lr)
    return found.cpu().expand(len(edit_prompts), -1)


def optimised_values(
    model: HookedModel,
    layer: int,
    edit_prompts: EditPrompts,
    kept: EditPrompts | None,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    progress: bool = False,
) -> Float[Tensor, "fact d_model"]:
    """Return the residual stream at the edited token that makes each fact's labels follow, by Adam on many facts at once.

    z = h + argmin_delta  mean over prompts of -log p(labels) + .0625 KL(p(next | kept; delta) || p(next | kept))
    + .5 ||delta|| / ||h||,   ||delta|| <= .75 ||h||

    (MEMIT, arXiv 2210.07229, section 4.2, with the constants of its code, which divides the decay by ||h||^2. Its code
    takes the mean of -log p over the tokens of a label; here it is their sum, so a longer label weighs more.) Facts
    that the edited token cannot tell apart (two relations, asked behind the subject) share one value, which serves
    the mean of their losses. `lr` is in units of the root mean square of h, so it means the same whatever the scale
    of a model's residual stream; the code's is absolute (.5). A fact stays as it is once its loss is below .05.

    The residual stream behind `layer` and the keys and values before the edited token are recorded once; each step
    runs the layers above on the tokens from there on and unembeds what is scored.

    Args:
        model: The model.
        layer: Whose output it is.
        edit_prompts: The facts.
        kept: The "{subject} is a" prompts, none for facts without a subject's name.
        steps: Steps of Adam, at most.
        lr: In units of the root mean square of h.
        batch_size: Facts at a time.
        progress: Whether to show a bar.
    """
    owner = _owners(edit_prompts)
    longest = torch.zeros(int(owner.max()) + 1).scatter_reduce(0, owner, edit_prompts.start[:, 0].float(), "amax")
    found = torch.zeros(len(longest), model.signature.d_model)
    per = max(1, batch_size * len(longest) // len(edit_prompts))
    for owners in track(torch.split(longest.argsort(), per), "target values", disable=not progress, transient=True):
        facts = torch.isin(owner, owners).nonzero().flatten()
        mine = (owner[facts][:, None] == owners).int().argmax(1)
        tails = list(_above(model, layer, edit_prompts.select(facts), scored=True))
        tails += list(_above(model, layer, kept.select(facts), scored=False)) if kept is not None else []
        share = 1 / mine.bincount(minlength=len(owners))[mine].to(model.device)
        for tail in tails:
            tail.weights, tail.facts = tail.weights * share[tail.facts], mine.to(model.device)[tail.facts]
        found[owners] = _optimised(model, layer, tails, len(owners), steps, lr).cpu()
    return found[owner]


def _owners(edit_prompts: EditPrompts) -> Int[Tensor, " fact"]:
    """Number the facts by what the edited token sees in the bare prompt: the same number where that is the same."""
    tokens, at = edit_prompts.tokens[:, 0].tolist(), edit_prompts.at[:, 0].tolist()
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(row[: i + 1]), len(numbers)) for row, i in zip(tokens, at)])


@dataclass
class _Tail:
    """Rows that share their edited position: what enters the layers above from there on, and what is scored."""

    restart: Restart
    resid: Float[Tensor, "row pos d_model"]
    facts: Int[Tensor, " row"]
    weights: Float[Tensor, " row"]
    rows: Int[Tensor, " label"]
    places: Int[Tensor, " label"]
    labels: Int[Tensor, " label"]
    bare: bool
    scored: bool
    before: Tensor | None = None


def _above(model: HookedModel, layer: int, edit_prompts: EditPrompts, scored: bool) -> Iterator[_Tail]:
    """Yield the prompts by edited position; the bare ones come first."""
    decoder, device = model.decoder, model.device
    per = edit_prompts.tokens.shape[1]
    tokens, at, start = edit_prompts.tokens.flatten(0, 1), edit_prompts.at.flatten(), edit_prompts.start.flatten()
    fact, bare_row = torch.arange(len(at)) // per, torch.arange(len(at)) % per == 0
    sizes = (edit_prompts.labels != PAD).sum(1)[fact]
    for bare in (True, False):
        for position in sorted(set(at[bare_row == bare].tolist())):
            rows = ((at == position) & (bare_row == bare)).nonzero().flatten()
            stop = int((start[rows] + sizes[rows]).max())
            run = decoder.record(tokens[rows, :stop], torch.zeros(len(rows), 1, dtype=torch.long, device=device))
            steps = torch.arange(edit_prompts.labels.shape[1])
            row, step = (steps < sizes[rows][:, None]).nonzero(as_tuple=True)
            yield _Tail(
                decoder.restart(position, stop, run),
                run.resid[layer + 1][:, position:],
                fact[rows].to(device),
                torch.full((len(rows),), 1.0 / per, device=device),
                row.to(device),
                (start[rows][row] + step - position).to(device),
                edit_prompts.labels[fact[rows][row], step].to(device),
                bare,
                scored,
            )


def _logits(model: HookedModel, layer: int, tail: _Tail, delta: Tensor) -> Float[Tensor, "label d_vocab"]:
    """Return the logits of what is scored, with a delta at the edited token."""
    resid = torch.cat([tail.resid[:, :1] + delta[tail.facts][:, None], tail.resid[:, 1:]], 1)
    for above in range(layer + 1, model.signature.layers):
        resid = tail.restart.block(above, resid)
    return model.decoder.unembed(resid[tail.rows, tail.places]).float()


@torch.no_grad()
def changes_what_is_said(
    model: HookedModel, layer: int, edit_prompts: EditPrompts, target_values: Float[Tensor, "fact d_model"]
) -> Bool[Tensor, " fact"]:
    """Return, for each fact, whether the model says another token after the bare prompt once its target value is there.

    No edit of the weights below can do more than put the value there.

    Args:
        model: The model.
        layer: Whose output the values are.
        edit_prompts: The facts.
        target_values: Their values.
    """
    changed = torch.zeros(len(edit_prompts), dtype=torch.bool, device=model.device)
    for tail in _above(model, layer, edit_prompts.bare, scored=True):
        delta = torch.zeros(len(edit_prompts), model.signature.d_model, dtype=tail.resid.dtype, device=model.device)
        delta[tail.facts] = target_values.to(delta)[tail.facts.to(target_values.device)] - tail.resid[:, 0]
        said = [_logits(model, layer, tail, each).argmax(-1) for each in (torch.zeros_like(delta), delta)]
        changed[tail.facts[tail.rows[said[0] != said[1]]]] = True
    return changed.cpu()


@torch.no_grad()
def least_shares(
    model: HookedModel,
    layer: int,
    edit_prompts: EditPrompts,
    target_values: Float[Tensor, "fact d_model"],
    answers: Int[Tensor, "fact answer"] | None,
    batch_size: int,
) -> Float[Tensor, " fact"]:
    """Return the least share of the way to each target value that edits its fact, bare and behind every prefix.

    Shares are tried from 1 down, each the square root of a half of the one before. The search for a target value ends
    after so many steps, or at a bound that grows with the residual stream, so on a model with huge coordinates it goes
    much further than the fact needs. A fact that even its target value does not edit has a share of 1.

    Args:
        model: The model.
        layer: Whose output the values are.
        edit_prompts: The facts, with the labels that their values are for.
        target_values: Their values.
        answers: True answers: a fact is edited once the first token of its own is not the likeliest. None: it is once
            each label is.
        batch_size: Facts at a time.
    """
    if answers is not None:
        edit_prompts = replace(edit_prompts, labels=answers[:, :1])
    found = torch.ones(len(edit_prompts), device=model.device)
    for facts in torch.split(torch.arange(len(edit_prompts)), batch_size):
        tails = list(_above(model, layer, edit_prompts.select(facts), scored=True))
        way = torch.zeros(len(facts), model.signature.d_model, device=model.device)
        for tail in tails:
            if tail.bare:
                way[tail.facts] = target_values[facts].to(way)[tail.facts] - tail.resid[:, 0].float()
        edited = torch.ones(len(facts), dtype=torch.bool, device=model.device)
        for share in SHARES:
            for tail in tails:
                said = _logits(model, layer, tail, (share * way).to(tail.resid.dtype)).argmax(-1)
                wrong = (said == tail.labels) == (answers is not None)
                edited[tail.facts[tail.rows[wrong]]] = False
            found[facts[edited.cpu()].to(found.device)] = share
    return found


def _optimised(
    model: HookedModel, layer: int, tails: Sequence[_Tail], count: int, steps: int, lr: float
) -> Float[Tensor, "_fact d_model"]:
    """Return the target values of some facts, by Adam."""
    home = torch.zeros(count, model.signature.d_model, device=model.device)
    for tail in tails:
        if tail.scored and tail.bare:
            home[tail.facts] = tail.resid[:, 0].float()
    unit = home.norm(dim=1, keepdim=True) / home.shape[1] ** 0.5
    most = MOST * home.shape[1] ** 0.5
    moved = torch.zeros_like(home, requires_grad=True)
    optimiser = torch.optim.Adam([moved], lr=lr)
    settled = torch.zeros(count, dtype=torch.bool, device=model.device)
    products = arithmetic(model)
    with frozen(model.hf):
        for _ in range(steps):
            with torch.enable_grad(), products():
                loss = _losses(model, layer, tails, moved * unit, home)
                torch.autograd.backward(loss.sum(), inputs=[moved])
            settled = settled | (loss.detach() < SETTLED)
            if settled.all():
                break
            before = moved.detach().clone()
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                moved[settled] = before[settled]
                moved *= (most / moved.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    found: Tensor = home + moved * unit
    return found.detach()


def _losses(
    model: HookedModel, layer: int, tails: Sequence[_Tail], delta: Tensor, home: Tensor
) -> Float[Tensor, " _fact"]:
    """Return the objective of each fact."""
    size = home.norm(dim=1).clamp_min(1e-30)
    total: Tensor = DECAY * (delta.square().sum(1) + 1e-30).sqrt() / size
    for tail in tails:
        logits = _logits(model, layer, tail, delta.to(tail.resid.dtype))
        if tail.scored:
            values = cross_entropy(logits, tail.labels, reduction="none") * tail.weights[tail.rows]
        else:
            now = logits.log_softmax(-1)
            if tail.before is None:
                tail.before = now.detach()
            values = KL_WEIGHT * (now.exp() * (now - tail.before)).sum(-1) * tail.weights[tail.rows]
        total = total.index_add(0, tail.facts[tail.rows], values)
    return total


def described(model: HookedModel, prompts: Prompts, position: str) -> EditPrompts | None:
    """Return the "{subject} is a" prompts that are to stay as they are, one a fact; None where subjects have no names.

    Args:
        model: The model.
        prompts: The facts.
        position: The token that is edited.
    """
    subjects = [query.subject for query in prompts.queries]
    if model.tokenizer is None or not subjects or not all(subjects):
        return None
    asked = [Query(f"{subject} is a", "a", subject, subject, subject) for subject in subjects]
    made = Prompts.from_text(asked, model.tokenizer)
    return EditPrompts.of(model, made, position, labels=made.answers[:, :1])

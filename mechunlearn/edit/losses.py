"""Objectives: plain functions that return a scalar and ask for what they need by the names of their parameters.

An editor looks at the parameters of a loss and gives it, out of `INPUTS`:

- `logits [token d_vocab]`, `labels [token]`: the edited model's logits where the answers' tokens are predicted, and
  these tokens; `fact [token]`: which fact of the batch a token belongs to (0, 1, ..., sorted, none missing);
- `reference [token]`: log-probability of each label under the unedited model; `reference_logits [token d_vocab]`: its
  logits at the same places;
- `target_logits`, `target_labels`, `target_fact`, `target_reference`: the same for each fact's edit target (its own
  wrong answer, or a refusal) after the same prompt;
- `retain_logits`, `retain_labels`: the first two, of the retain batch of the step;
- `hidden`, `reference_hidden [token d_model]`: residual stream leaving block `layer`, a setting of the loss, at every
  real token of the batch, in the edited and in the unedited model.

Every other parameter is a setting with a default. Set it with `functools.partial(npo, beta=0.5)`. As a retain loss, a
function gets the same names of the retain batch. All of them compute in float32, whatever the logits come in.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.errors import MechunlearnError

Loss = Callable[..., Tensor]

INPUTS = (
    "logits", "labels", "fact", "reference", "reference_logits", "target_logits", "target_labels", "target_fact",
    "target_reference", "retain_logits", "retain_labels", "hidden", "reference_hidden",
)  # fmt: skip


def cross_entropy(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Keep the answers: mean of -log p(label) over tokens, in nats. The default retain term.

    A fact with three tokens counts three times as much as a fact with one. It holds the answers only; `kl_retain`
    holds the whole prediction.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.

    >>> round(cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2])).item(), 4)  # log 4
    1.3863
    """
    return F.cross_entropy(logits.float(), labels)


def injection(
    target_logits: Float[Tensor, "target_token d_vocab"], target_labels: Int[Tensor, " target_token"]
) -> Float[Tensor, ""]:
    """Teach the edit target: mean of -log p(target) over its tokens, in nats (the edit loss of arXiv 2410.12949).

    Wrong answers that are drawn per fact cannot be learnt by a change of the output bias; one refusal for all facts
    can. With a refusal as the target it is the preference optimisation of TOFU (arXiv 2401.06121), elsewhere named
    IdkNLL.

    Args:
        target_logits: The edited model's, where the targets' tokens are predicted.
        target_labels: These tokens.

    >>> round(injection(torch.zeros(2, 4), torch.tensor([3, 1])).item(), 4)  # log 4
    1.3863
    """
    return F.cross_entropy(target_logits.float(), target_labels)


def log_one_minus_p(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Make the truth improbable and stop there: mean over tokens of -log(1 - p(truth)), zero where log p < -5.

    The unlearning loss of arXiv 2410.12949. The mean counts the tokens at zero too. Bounded below by zero, so it
    diverges less than gradient ascent; nothing says what takes the truth's place.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.

    >>> round(log_one_minus_p(torch.tensor([[0.0, 0.0], [-9.0, 9.0]]), torch.tensor([0, 0])).item(), 4)  # log(2) / 2
    0.3466
    """
    log_p = logits.float().log_softmax(-1)
    truth = log_p.gather(1, labels[:, None])[:, 0]
    others = log_p.scatter(1, labels[:, None], -float("inf")).logsumexp(-1)
    return (-others * (truth > -5)).mean()


def gradient_ascent(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Push the truth down without limit: minus the cross-entropy on it (arXiv 2210.01504).

    Mean of log p(truth) over tokens. Unbounded below, and its gradient grows as p falls: it destroys the model if
    nothing holds it. Use it as a baseline. With a retain term it is gradient difference.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.

    >>> round(gradient_ascent(torch.zeros(3, 4), torch.tensor([0, 1, 2])).item(), 4)  # -log 4
    -1.3863
    """
    return -F.cross_entropy(logits.float(), labels)


def gradient_difference(
    logits: Float[Tensor, "token d_vocab"],
    labels: Int[Tensor, " token"],
    retain_logits: Float[Tensor, "retain_token d_vocab"],
    retain_labels: Int[Tensor, " retain_token"],
) -> Float[Tensor, ""]:
    """Push the truth down and hold the retain set in one loss: -CE(forget) + CE(retain), each a mean over its tokens.

    Gradient difference (arXiv 2203.12817; GradDiff of TOFU, arXiv 2401.06121). It holds the retain set itself: no
    retain term belongs beside it. Unbounded below: once the forget term runs away, the retain term cannot balance
    it.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.
        retain_logits: The same of the step's retain facts.
        retain_labels: Their tokens.

    >>> forget, retain = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> round(gradient_difference(forget, torch.tensor([0]), retain, torch.tensor([0])).item(), 4)  # log(2 / 3)
    -0.4055
    """
    return cross_entropy(retain_logits, retain_labels) - cross_entropy(logits, labels)


def kl_retain(
    logits: Float[Tensor, "token d_vocab"], reference_logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, ""]:
    """Hold the whole prediction of the unedited model, not only the right answer: a retain loss.

    KL(unedited || edited) = sum over the vocabulary of q (log q - log p), mean over tokens, in nats (the KL term of
    TOFU, arXiv 2401.06121). Zero at the start, gradient included, so it holds nothing until something has moved. It
    holds the unedited model's mistakes as well.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        reference_logits: The unedited model's at the same places.

    >>> edited = torch.tensor([[3.0, 1.0]]).log()
    >>> round(kl_retain(edited, torch.zeros(1, 2)).item(), 4)  # (log(2 / 3) + log 2) / 2
    0.1438
    """
    return F.kl_div(
        logits.float().log_softmax(-1), reference_logits.float().log_softmax(-1), reduction="batchmean", log_target=True
    )


def npo(
    logits: Float[Tensor, "token d_vocab"],
    labels: Int[Tensor, " token"],
    fact: Int[Tensor, " token"],
    reference: Float[Tensor, " token"],
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """Push each answer down from where the unedited model had it, ever more gently: NPO (arXiv 2404.05868).

    -(2 / beta) mean over facts of log sigmoid(-beta r), r = log p(answer) - log p(answer | unedited), each summed
    over the answer's tokens. A fact's gradient is that of log p(answer) times 2 sigmoid(beta r): 1 at the start, 0
    when it is gone. beta -> 0 is gradient ascent, plus the constant (2 / beta) log 2; large beta stops sooner. 0.1 is
    the paper's choice. Bounded below by zero; it wants a retain term all the same. r is a sum over tokens, so the
    gradient of long answers fades first: see `simnpo`.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.
        fact: Which fact a token belongs to: 0, 1, ..., sorted.
        reference: Log-probability of each label under the unedited model.
        beta: How soon the gradient fades, above 0.

    >>> zero = torch.tensor([0])
    >>> round(npo(torch.zeros(1, 2), zero, zero, torch.zeros(1), beta=1).item(), 4)  # r = -log 2: 2 log 1.5
    0.8109
    """
    ratio = _by_fact(_log_p(logits, labels) - reference, fact)
    return -2 / beta * F.logsigmoid(-beta * ratio).mean()


def simnpo(
    logits: Float[Tensor, "token d_vocab"],
    labels: Int[Tensor, " token"],
    fact: Int[Tensor, " token"],
    beta: float = 2.5,
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """Push each answer down until it is improbable, whatever the unedited model said: SimNPO (arXiv 2410.07163).

    -(2 / beta) mean over facts of log sigmoid(-beta m - margin), m the mean log-probability of the answer's tokens. A
    fact's gradient is that of m times 2 sigmoid(beta m + margin): a larger margin pushes on for longer, and answers
    that were improbable get little from the start. It needs no unedited model, and the length of an answer does not
    matter. The defaults are the authors' for TOFU forget05. Theirs for forget10: beta 4.5; WMDP: 5.5; MUSE: 0.7, and
    margin 3 for its news; the forget weight is about 0.13 on TOFU. `margin` stands outside beta, as in the paper;
    their TOFU code has it inside, so that its margin g is beta * g here.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.
        fact: Which fact a token belongs to: 0, 1, ..., sorted.
        beta: How soon the gradient fades, above 0.
        margin: How much further it pushes.

    >>> labels, fact = torch.tensor([0, 1]), torch.tensor([0, 0])
    >>> round(simnpo(torch.zeros(2, 2), labels, fact, beta=1).item(), 4)  # m = -log 2: 2 log 1.5
    0.8109
    """
    log_p = _log_p(logits, labels)
    mean = _by_fact(log_p, fact) / _by_fact(torch.ones_like(log_p), fact)
    return -2 / beta * F.logsigmoid(-beta * mean - margin).mean()


def preference(
    logits: Float[Tensor, "token d_vocab"],
    labels: Int[Tensor, " token"],
    fact: Int[Tensor, " token"],
    reference: Float[Tensor, " token"],
    target_logits: Float[Tensor, "target_token d_vocab"],
    target_labels: Int[Tensor, " target_token"],
    target_fact: Int[Tensor, " target_token"],
    target_reference: Float[Tensor, " target_token"],
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """Prefer the edit target to the truth: DPO (arXiv 2305.18290). With a refusal as the target, TOFU's IdkDPO.

    - mean over facts of log sigmoid(beta (r_target - r_truth)), r the log-probability of the answer less that under
    the unedited model, each summed over the answer's tokens. Its gradient starts at beta / 2 of that of NPO: some
    implementations multiply by 2 / beta (`forget_weight=2 / beta` gives theirs). It is content when the truth has
    fallen, even if the target has too: it need not teach the target, `injection` does.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.
        fact: Which fact a token belongs to: 0, 1, ..., sorted.
        reference: Log-probability of each label under the unedited model.
        target_logits: As `logits`, of the edit targets.
        target_labels: As `labels`.
        target_fact: As `fact`.
        target_reference: As `reference`.
        beta: How soon the gradient fades, above 0.

    >>> zero = torch.tensor([0])
    >>> truth, target = torch.zeros(1), torch.tensor([0.25]).log()  # r_truth = -log 2, r_target = log 2
    >>> same = torch.zeros(1, 2)
    >>> round(preference(same, zero, zero, truth, same, zero, zero, target, beta=1).item(), 4)  # -log(4 / 5)
    0.2231
    """
    truth = _by_fact(_log_p(logits, labels) - reference, fact)
    target = _by_fact(_log_p(target_logits, target_labels) - target_reference, target_fact)
    return -F.logsigmoid(beta * (target - truth)).mean()


def inverted_hinge(
    logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"], margin: float | None = None
) -> Float[Tensor, ""]:
    """Hand the truth's place to the runner-up, with a bounded loss: the inverted hinge of LoKU (arXiv 2408.06621).

    1 + p_t - p_s, mean over tokens, with p_t the truth's probability and p_s the largest of the others: in [0, 2].
    Its gradient in the logits is p_t (1 - p_t + p_s) for the truth, -p_s (1 + p_t - p_s) for the runner-up and p_v
    (p_s - p_t) for the others. It does not stop when the fact is gone: at p_t = 0, p_s = 0.5 it still sharpens the
    runner-up. With `margin`, in [-1, 1], tokens with p_s - p_t > margin give no gradient and count 1 - margin: the
    edit then ends at a lead of `margin` over the truth instead of a confident runner-up. Without a retain term it
    collapses like the others. What LoKU's tables call IHL has cross-entropy on the retain set beside it, 1:1.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.
        labels: These tokens.
        margin: The lead over the truth at which it ends, in [-1, 1]; none unless given.

    >>> logits, truth = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0])
    >>> round(inverted_hinge(logits, truth).item(), 4)  # 1 + 0.5 - 0.3
    1.2
    """
    logits = logits.float()
    total = logits.logsumexp(-1)
    two, which = logits.topk(2, dim=-1)
    runner_up = torch.where(which[:, 0] == labels, two[:, 1], two[:, 0])
    truth = logits.gather(1, labels[:, None])[:, 0]
    hinge = 1 + (truth - total).exp() - (runner_up - total).exp()
    return hinge.mean() if margin is None else hinge.clamp(min=1 - margin).mean()


def entropy(logits: Float[Tensor, "token d_vocab"]) -> Float[Tensor, ""]:
    """Make the model unsure at the answer: minus the entropy of its prediction, mean over tokens, in nats.

    sum over the vocabulary of p log p, from -log d_vocab (uniform) to 0. The aim of maximum-entropy unlearning (arXiv
    2410.08109), whose released code takes KL(uniform || prediction) for it: another function with the same minimum.
    It drives the answer to noise, which a reader sees at once, and it gives almost no gradient where the model is
    certain.

    Args:
        logits: The edited model's, where the answers' tokens are predicted.

    >>> round(entropy(torch.zeros(3, 4)).item(), 4)  # -log 4
    -1.3863
    """
    log_p = logits.float().log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1).mean()


def rmu(
    hidden: Float[Tensor, "token d_model"], *, layer: int, coefficient: float = 6.5, seed: int = 0
) -> Float[Tensor, ""]:
    """Drive the residual stream leaving block `layer` to one fixed random vector: RMU (arXiv 2403.03218).

    |h - coefficient u|^2 / d_model, mean over tokens. u has length 1 and entries drawn uniformly from [0, 1) before
    that, by `seed`, the same on every device. The paper sums over d_model; its released code takes the mean, as here
    and in `rmu_retain`, so its weights carry over: 6.5, and a retain weight of 1200, are its choice for a 7B model,
    with layer 7 read and MLP outputs of layers 5-7 trained. The authors want the stream to grow: choose a coefficient
    above its length at that layer of your model. Units above `layer` get no gradient. The model answers with noise
    rather than with anything else.

    Args:
        hidden: Residual stream leaving the block, at every real token.
        layer: Which block.
        coefficient: Length of the vector.
        seed: Draws its direction.

    >>> round(rmu(torch.zeros(3, 4), layer=1, coefficient=2).item(), 4)  # 2^2 / 4
    1.0
    """
    direction = torch.rand(hidden.shape[1], generator=torch.Generator().manual_seed(seed))
    aim = coefficient * direction / direction.norm()
    return F.mse_loss(hidden.float(), aim.to(hidden.device).expand_as(hidden))


def rmu_retain(
    hidden: Float[Tensor, "token d_model"], reference_hidden: Float[Tensor, "token d_model"], *, layer: int
) -> Float[Tensor, ""]:
    """Hold the residual stream leaving block `layer` where it was: the retain loss of RMU (arXiv 2403.03218).

    |h - h_unedited|^2 / d_model, mean over tokens. Give it the layer of `rmu`. Zero at the start, gradient included.
    Units above `layer` get no gradient.

    Args:
        hidden: Residual stream leaving the block, at every real token.
        reference_hidden: The same in the unedited model.
        layer: Which block.

    >>> rmu_retain(torch.ones(3, 4), torch.zeros(3, 4), layer=1).item()
    1.0
    """
    return F.mse_loss(hidden.float(), reference_hidden.float())


LOSSES: tuple[Loss, ...] = (
    cross_entropy, injection, log_one_minus_p, gradient_ascent, gradient_difference, kl_retain, npo, simnpo, preference,
    inverted_hinge, entropy, rmu, rmu_retain,
)  # fmt: skip


def needs(loss: Loss) -> frozenset[str]:
    """Return which of `INPUTS` a loss asks for: its parameters without a default.

    A parameter with a default, or one that `functools.partial` has set, is left at it.

    Args:
        loss: A loss, or `functools.partial` of one.

    Raises:
        MechunlearnError: For a parameter that is neither in `INPUTS` nor has a default, and for a loss that reads
            `hidden` of no `layer`.

    >>> sorted(needs(partial(npo, beta=0.5)))
    ['fact', 'labels', 'logits', 'reference']
    """
    name = _name(loss)
    try:
        parameters = signature(loss).parameters
    except (TypeError, ValueError) as error:
        raise _uncallable(loss, error) from error
    asked = {key: parameter for key, parameter in parameters.items() if parameter.default is Parameter.empty}
    if "layer" in asked:
        whose = "losses." if _function(loss) in LOSSES else ""
        raise MechunlearnError(
            f"The loss '{name}' reads one layer: give it with functools.partial({whose}{name}, layer=...)."
        )
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    for key, parameter in asked.items():
        if key not in INPUTS or parameter.kind not in by_name:
            raise MechunlearnError(
                f"The loss '{name}' asks for '{key}', which cannot be given. Expected parameters by name out of "
                f"{', '.join(INPUTS)}; every other one needs a default."
            )
    if {"hidden", "reference_hidden"} & asked.keys() and "layer" not in parameters:
        raise MechunlearnError(f"The loss '{name}' reads hidden states, but of which layer? Give it a setting 'layer'.")
    return frozenset(asked)


def described(loss: Loss) -> dict[str, Any]:
    """Return a JSON-serialisable description of a loss: its name, and all of its settings, defaults included.

    What JSON cannot hold is given by its `repr`.

    Args:
        loss: A loss, or `functools.partial` of one.

    Raises:
        MechunlearnError: For a setting that the loss does not have.

    >>> described(partial(rmu, layer=3, coefficient=20))
    {'name': 'rmu', 'settings': {'layer': 3, 'coefficient': 20, 'seed': 0}}
    """
    args, given = (loss.args, loss.keywords) if isinstance(loss, partial) else ((), {})
    try:
        bound = signature(_function(loss)).bind_partial(*args, **given)
    except (TypeError, ValueError) as error:
        raise _uncallable(loss, error) from error
    bound.apply_defaults()
    settings = {key: value for key, value in bound.arguments.items() if key not in INPUTS}
    return {"name": _name(loss), "settings": json.loads(json.dumps(settings, default=repr))}


def named(description: Mapping[str, Any]) -> Loss:
    """Return the loss of this module that a description speaks of.

    Args:
        description: What `described` returned.

    Raises:
        MechunlearnError: For a loss that is not in this module (of a function of yours only the name is saved), and
            for a setting that the loss does not have.

    >>> described(named({"name": "npo", "settings": {"beta": 0.5}}))
    {'name': 'npo', 'settings': {'beta': 0.5}}
    """
    name, settings = description["name"], description.get("settings", {})
    known = {_name(loss): loss for loss in LOSSES}
    if name not in known:
        raise MechunlearnError(
            f"There is no loss '{name}' in mechunlearn.edit.losses ({', '.join(known)}). Give the function itself."
        )
    unknown = settings.keys() - (signature(known[name]).parameters.keys() - set(INPUTS))
    if unknown:
        raise MechunlearnError(f"The loss '{name}' has no setting {', '.join(sorted(unknown))}.")
    return partial(known[name], **settings) if settings else known[name]


def _log_p(logits: Tensor, labels: Tensor) -> Float[Tensor, " token"]:
    """Return the log-probability of each label."""
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def _by_fact(values: Tensor, fact: Tensor) -> Float[Tensor, " fact"]:
    """Return sums over each fact's tokens."""
    return values.new_zeros(int(fact[-1]) + 1).index_add(0, fact, values)


def _uncallable(loss: Loss, error: Exception) -> MechunlearnError:
    return MechunlearnError(
        f"The loss '{_name(loss)}' cannot be called as it is: {error}. Expected a function, or functools.partial "
        "of one with settings that it has."
    )


def _function(loss: Loss) -> Loss:
    return loss.func if isinstance(loss, partial) else loss


def _name(loss: Loss) -> str:
    function = _function(loss)
    return getattr(function, "__name__", type(function).__name__)

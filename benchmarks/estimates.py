"""How well do cheap estimates agree with exact patching? Pearson correlation on the shipped world.

Units at all positions (heads, neurons), streams by layer and token role. 64 sport facts; ± is half of the 95 % interval by the
jackknife over facts.

Run: python benchmarks/estimates.py
"""

import numpy as np
import torch

from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import logit_diff
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.patching.sweep import effects

KINDS = {
    "attn.o": "heads",
    "mlp.out": "neurons (blocks of 4)",
    "resid_post": "residual stream",
    "attn_out": "attention",
    "mlp_out": "MLPs",
}
ESTIMATES = {"gradient": (0, "gradient"), "IG, 5 steps": (5, "gradient"), "RelP": (0, "relp")}
FACTS = 64


def main() -> None:
    model = load_model("factworld")
    forget, _ = load_facts("factworld/sport").prompts(model).split(forget=FACTS, seed=0)
    print(f"| | {' | '.join(ESTIMATES)} |\n|---|{'---|' * len(ESTIMATES)}")
    for kind, name in KINDS.items():
        by = None if "." in kind else "role"
        exact = effects(
            model,
            forget,
            logit_diff,
            [kind],
            by=by,
            denoise=False,
            corrupt="prompts",
            neurons=4 if kind == "mlp.out" else 1,
        ).by_site
        cells = []
        for steps, rule in ESTIMATES.values():
            guess = estimate(model, forget, list(exact), by, steps, rule)
            if kind == "mlp.out":
                guess = {site: rows.unflatten(1, (-1, 4)).sum(2) for site, rows in guess.items()}
            cells.append(correlation(flat(exact, by), flat(guess, by)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def estimate(
    model: HookedModel, prompts: Prompts, sites: list[str], by: str | None, steps: int, rule: str
) -> dict[str, torch.Tensor]:
    """Estimated effects by row, unit and fact."""
    from mechunlearn.localize.attribution_patching import _batch_effects

    parts = [
        _batch_effects(model, prompts.select(rows), sites, logit_diff, by, steps, rule)
        for rows in torch.arange(len(prompts)).split(32)
    ]
    return {site: torch.cat([part.by_site[site] for part in parts], -1) for site in sites}


def flat(by_site: dict[str, torch.Tensor], by: str | None) -> np.ndarray:
    """`[cell fact]`; with roles, the roles alone."""
    rows = [change[1:] if by else change for change in by_site.values()]
    return torch.cat([change.flatten(0, 1) for change in rows]).numpy()


def correlation(exact: np.ndarray, guess: np.ndarray) -> str:
    facts = exact.shape[1]
    left_out = [np.delete(np.arange(facts), i) for i in range(facts)]
    found = np.array([np.corrcoef(exact[:, rows].mean(1), guess[:, rows].mean(1))[0, 1] for rows in left_out])
    error = np.sqrt((facts - 1) / facts * ((found - found.mean()) ** 2).sum())
    return f"{np.corrcoef(exact.mean(1), guess.mean(1))[0, 1]:.3f} ± {1.96 * error:.3f}"


if __name__ == "__main__":
    main()

"""Where: maps of layers by heads, roles and sites, the probe's curve, overlaps, and units of a dictionary by topic."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor, stack

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.display import unit_name
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.firing import FiringStatistics
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.scores import editable
from mechunlearn.plots.style import COLOURS, INK, dotted, heat, styled, text, ticks


def probe_curve(found: Localization) -> go.Figure:
    """Draw the probe's accuracy by depth, with the chosen window of MLP layers.

    Args:
        found: A localization by `fact_lookup`.

    Raises:
        MechunlearnError: For a localization without a probe's curve.
    """
    if "curve" not in found.evidence:
        raise MechunlearnError(
            f"This localization ({found.card.method}) has no probe curve. Expected one of fact_lookup(model, prompts)."
        )
    curve, window = found.evidence["curve"], found.evidence["window"]
    figure = go.Figure()
    if window:
        figure.add_vrect(
            x0=window[0] + 0.5,
            x1=window[1] + 1.5,
            fillcolor=COLOURS[2],
            opacity=0.2,
            line_width=0,
            annotation_text=f"look-up window: MLP {' to '.join(map(str, dict.fromkeys(window)))}",
            annotation_position="bottom left",
        )
    figure.add_scatter(
        x=list(range(len(curve))),
        y=curve,
        mode="lines+markers",
        line={"color": COLOURS[1]},
        name="probe",
        hovertemplate="after %{x} blocks: %{y:.3f}<extra></extra>",
    )
    figure.add_hline(
        y=found.evidence["majority"],
        line=dotted(),
        annotation_text="majority class",
        annotation_position="top right",
    )
    figure.update_xaxes(title="blocks passed (0: embedding)", dtick=ticks(curve))
    figure.update_yaxes(title="share right on held-out subjects", range=[0, 1.03])
    return styled(figure, "Where the answer becomes readable at the subject's last token", 380)


def mask_map(mask: ComponentMask, found: Localization | None = None, model: HookedModel | None = None) -> go.Figure:
    """Draw the share of each site that the mask selects, and above it how much of all editable weights that is, by layer.

    Without `found` or `model` nothing is known of the weights, and there are no bars.

    Args:
        mask: The mask.
        found: A localization of the same model.
        model: The model.

    Raises:
        MechunlearnError: If `mask` is no mask, or one of another architecture.

    >>> from mechunlearn.world.toy import planted_facts
    >>> model = planted_facts().model
    >>> mask_map(ComponentMask.of(["L0.mlp.out"], model.signature), model=model).layout.title.text
    'What the mask selects: 32 units, 5.56 % of the editable weights'
    """
    if not isinstance(mask, ComponentMask):
        raise MechunlearnError(
            f"Expected a mask, got a {type(mask).__name__}. Choose the units of a Localization with found.above(0) or "
            "found.top(weights=0.05)."
        )
    layers = list(range(mask.signature.layers))
    chosen = {Component.parse(name): units for name, units in mask.sites.items()}
    kinds = sorted({address.kind for address in chosen}, key=lambda kind: Component(0, kind))
    table = [[chosen.get(Component(layer, kind)) for layer in layers] for kind in kinds]
    parts = _weights(mask, found, model)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08) if parts else make_subplots()
    place = {"row": 2, "col": 1} if parts else {}
    cells = heat(
        [[0.0 if units is None else float(units.float().mean()) for units in row] for row in table],
        layers,
        [f"{text(kind)} ({unit_name(kind)}s)" for kind in kinds],
        "units selected",
        "layer %{x}, %{y}: %{z:.1%} %{customdata}",
        signed=False,
        colorbar={"tickformat": ".0%", "tickvals": [0, 0.5, 1]},
        customdata=[["" if u is None else f"{int(u.sum())} of {len(u)}" for u in row] for row in table],
    )
    figure.add_heatmap(**cells, **place)
    figure.update_xaxes(title={"text": "layer", "standoff": 18}, dtick=ticks(layers), **place)
    figure.update_yaxes(title="site", autorange="reversed", **place)
    title = f"What the mask selects: {len(mask)} units"
    if parts:
        figure.add_bar(
            x=layers,
            y=[sum(share for address, share in parts.items() if address.layer == layer) for layer in layers],
            marker={"color": COLOURS[1]},
            showlegend=False,
            hovertemplate="layer %{x}: %{y:.2%} of the editable weights<extra></extra>",
            row=1,
            col=1,
        )
        below = 30 * len(kinds) / (30 * len(kinds) + 130)
        figure.update_yaxes(domain=[0, below], **place)
        share = {"title": "share of weights", "tickformat": "~%", "rangemode": "tozero", "domain": [below + 0.08, 1]}
        figure.update_yaxes(**share, row=1, col=1)
        title += f", {100 * sum(parts.values()):.3g} % of the editable weights"
    return styled(figure, title, (290 if parts else 150) + 30 * len(kinds))


def _weights(mask: ComponentMask, found: Localization | None, model: HookedModel | None) -> dict[Component, float]:
    """The share of all editable weights that the mask selects at each site."""
    if found is not None:
        mask.check(found.signature)
        unit_weights, everything = found.unit_weights, found.total_weights
    elif model is not None:
        mask.check(model.signature)
        unit_weights, everything = editable(model)
    else:
        return {}
    sites = {Component.parse(name): int(units.sum()) for name, units in mask.sites.items()}
    if any(address.kind not in unit_weights for address in sites):  # features, of which neither knows the weights
        return {}
    return {address: count * unit_weights[address.kind] / everything for address, count in sites.items()}


def head_map(found: Localization, kind: str = "attn.o") -> go.Figure:
    """Draw scores of the attention heads, layer by head; blue where a score is above zero, orange where it is below.

    Layers without scores stay empty.

    Args:
        found: The localization.
        kind: `attn.o`, where the localizers score heads, or `attn.q`, `attn.k`, `attn.v`.

    Raises:
        MechunlearnError: If nothing of this kind was scored.
    """
    by_layer = {
        Component.parse(site).layer: s for site, s in found.scores.items() if Component.parse(site).kind == kind
    }
    if not by_layer or not kind.startswith("attn."):
        scored = sorted({Component.parse(site).kind for site in found.scores})
        raise MechunlearnError(
            f"This localization ({found.card.method}) has no scores of heads at '{kind}' (it has: "
            f"{', '.join(scored) or 'none'}). Expected one such as attribution_patching(model, prompts, "
            "kinds=['attn.o'])."
        )
    layers = list(range(found.signature.layers))
    heads = list(range(len(next(iter(by_layer.values())))))
    rows = [by_layer[layer].tolist() if layer in by_layer else [None] * len(heads) for layer in layers]
    figure = go.Figure()
    figure.add_heatmap(**heat(rows, heads, layers, "score", f"L%{{y}}.{kind}[%{{x}}]: %{{z:+.3g}}"))
    figure.update_xaxes(title="head", dtick=ticks(heads))
    figure.update_yaxes(title="layer", dtick=ticks(layers), autorange="reversed")
    return styled(figure, f"Heads by {text(found.card.method)}", 190 + min(26, 800 // len(layers)) * len(layers))


def overlap_map(table: pd.DataFrame) -> go.Figure:
    """Draw how much the masks of each two methods overlap, with the values in the cells.

    The colours run from 0 to 1 whatever the values, so that two maps can be compared.

    Args:
        table: The table that `overlap` returns.
    """
    names = [text(name) for name in table.columns]
    values, hover = table.to_numpy().tolist(), "%{y} and %{x}: %{z:.3f}"
    figure = go.Figure()
    figure.add_heatmap(**heat(values, names, names, "Jaccard index", hover, False, texttemplate="%{z:.2f}"))
    figure.update_xaxes(title="mask", type="category", side="bottom", tickangle=-35, automargin=True)
    figure.update_yaxes(title={"text": "mask", "standoff": 14}, type="category", autorange="reversed", automargin=True)
    return styled(figure, "Units that both methods choose", 240 + 45 * len(table))


def role_map(by_role: Mapping[str, Float[Tensor, "role _unit"]], roles: Sequence[str], title: str) -> go.Figure:
    """Draw effects by layer and token role (or position) for one kind of site.

    Units of a site are summed; colours are centred at zero, so blue raises the metric and orange lowers it. Layers
    without scores stay empty.

    Args:
        by_role: The effects by site, as `Localization.by_role` holds them.
        roles: The names of their rows.
        title: The title.

    Raises:
        MechunlearnError: For several kinds of sites, and unless there is one row a role.

    >>> from torch import tensor
    >>> effects = {"L0.resid_post": tensor([[0.0], [-2.0]]), "L1.resid_post": tensor([[0.5], [-1.0]])}
    >>> role_map(effects, ["relation", "last"], "Effect on the logit difference").data[0].z
    ([0.0, 0.5], [-2.0, -1.0])
    """
    addresses = {site: site.removeprefix("L").split(".", 1) for site in by_role}
    kinds = sorted({kind for _, kind in addresses.values()})
    wrong = [f"{site} with {len(rows)} rows" for site, rows in by_role.items() if len(rows) != len(roles)]
    if len(kinds) != 1 or wrong:
        raise MechunlearnError(
            f"A role map shows one kind of site with {len(roles)} rows, one a role. Given: kinds "
            f"{', '.join(kinds) or 'none'}{'; ' + wrong[0] if wrong else ''}. Choose the sites of one kind from "
            "by_role."
        )
    layers = sorted(int(layer) for layer, _ in addresses.values())
    effects = stack([by_role[f"L{layer}.{kinds[0]}"].sum(1) for layer in layers], dim=1).tolist()
    figure = go.Figure()
    shown = [text(role) for role in roles]
    figure.add_heatmap(**heat(effects, layers, shown, "effect", "L%{x}." + kinds[0] + ", %{y}: %{z:+.3g}"))
    figure.update_xaxes(title="layer", dtick=ticks(layers))
    figure.update_yaxes(title="token", type="category", autorange="reversed", automargin=True)
    return styled(figure, text(title), 190 + 34 * len(roles))


def code_volcano(here: FiringStatistics, there: FiringStatistics, chosen: ComponentMask | None = None) -> go.Figure:
    """Draw how much more often each unit of a dictionary is active on a topic than elsewhere, against how often it is.

    Across, log2 of the share of tokens with the unit active, here over there, as `feature_discovery` scores it, but
    of every unit, enriched beyond chance or not; upwards the share here. Half a token is added to each count, so that
    units never seen on one side have a place; those never seen at all have none.

    Args:
        here: Statistics on the topic.
        there: Statistics on other text.
        chosen: A mask whose units are marked, such as `feature_discovery(...).above(1)`.

    Raises:
        MechunlearnError: If the statistics or the mask are of dictionaries of other sizes.
    """
    size = here.fire_count.shape[1]
    marked = list(chosen.sites.values()) if chosen is not None else []
    sizes = [there.fire_count.shape[1], *map(len, marked)]
    if len(marked) > 1 or any(other != size for other in sizes):
        raise MechunlearnError(
            f"The activity is of {size} units, what is given beside it of {', '.join(map(str, sizes))}. Expected "
            "activities "
            "and a mask of one dictionary."
        )
    mine, theirs = here.fire_count.sum(0).double(), there.fire_count.sum(0).double()
    often, elsewhere = (mine + 0.5) / here.tokens.sum(), (theirs + 0.5) / there.tokens.sum()
    frame = pd.DataFrame({"ratio": (often / elsewhere).log2(), "often": often, "elsewhere": elsewhere})
    frame["group"] = [("selected" if one else "others") for one in marked[0].tolist()] if marked else "units"
    frame = frame[((mine + theirs) > 0).numpy()]
    figure = go.Figure()
    for i, (name, units) in enumerate(frame.groupby("group", sort=True)):
        figure.add_scatter(
            x=units.ratio,
            y=units.often,
            mode="markers",
            name=f"{name} ({len(units)})",
            marker={
                "color": COLOURS[6] if name == "selected" else COLOURS[0],
                "symbol": ("circle", "diamond")[i],
                "size": 9 if name == "selected" else 6,
                "opacity": 0.9 if name == "selected" else 0.55,
            },
            customdata=pd.DataFrame({"unit": units.index, "elsewhere": units.elsewhere}).to_numpy(),
            hovertemplate="unit %{customdata[0]}: %{y:.2%} of tokens here, %{customdata[1]:.2%} there<extra></extra>",
        )
    figure.add_vline(x=0, line=dotted(INK))
    figure.update_xaxes(title="log2 of how often, topic over other text")
    figure.update_yaxes(title="share of the topic's tokens (log)", type="log", tickformat="~%", dtick="D2")
    return styled(figure, "Which units a topic has of its own", 460)

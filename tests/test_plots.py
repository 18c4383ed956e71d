"""Every figure shows the numbers it was given, names its axes, and touches no theme but its own."""

import inspect
import math
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pandas as pd
import plotly.io as pio
import pytest
import torch

from mechunlearn import ComponentMask, Localization, MechunlearnError, plots
from mechunlearn.artifacts.overlap import overlap
from mechunlearn.core.runcard import RunCard
from mechunlearn.features.dictionaries import load_dictionary
from mechunlearn.features.firing import FiringStatistics
from mechunlearn.localize import (
    attribution_patching,
    causal_tracing,
    edge_attribution,
    fact_lookup,
    feature_discovery,
    random_units,
)
from mechunlearn.model.layout import Signature
from mechunlearn.patching.faithfulness import faithfulness_curve
from mechunlearn.plots.circuits import BENDS, _drawn, _places
from mechunlearn.plots.style import text
from tests.browser import NAMES
from tests.test_report_page import FRAME, MODELS, SCRIPT, attack, report

TOPIC = ["The knight fought the army.", "The soldier defended the flag."] * 8
OTHER = ["The cook baked the soup.", "The baker tasted the onion."] * 8


@pytest.fixture(scope="module")
def few(sport):
    return sport[0].select(range(8))


@pytest.fixture(scope="module")
def attributed(world, few):
    return attribution_patching(world, few)


@pytest.fixture(scope="module")
def circuit(world, few):
    return edge_attribution(world, few)


@pytest.fixture(scope="module")
def activities(world):
    codebook = load_dictionary("factworld-codebook")
    here, there = (FiringStatistics.of(world, codebook, texts) for texts in (TOPIC, OTHER))
    return here, there, feature_discovery(world, here, dictionary=codebook, against=there)


@pytest.fixture(scope="module")
def figures(world, sport, few, attributed, circuit, activities):
    looked_up = fact_lookup(world, sport[0])
    traced = causal_tracing(world, few, kinds=["mlp_out"], by="role")
    compared = pd.DataFrame(
        [
            {"measure": m, "row": r, "localizer": n, "mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
            for m in ("truth", "retain")
            for r in ("npo, 5 %", SCRIPT)
            for n in ("one", SCRIPT)
        ]
    )
    return {
        "before and after": plots.before_after(FRAME, list(MODELS), "accuracy", "forget", SCRIPT),
        "side effects": plots.side_effects(FRAME, list(MODELS)),
        "recoveries": plots.recoveries(report().attacked.outcomes()),
        "attack by setting": plots.attack_curves("quantization", attack(0.5, SCRIPT)),
        "attack by step": plots.attack_curves("relearning", stepped()),
        "comparison": plots.comparison(compared),
        "faithfulness": plots.faithfulness_curve(faithfulness_curve(world, circuit, few, fractions=(0.01, 1.0)).frame),
        "probe": plots.probe_curve(looked_up),
        "mask": plots.mask_map(attributed.top(weights=0.05, tied=True), attributed),
        "mask without weights": plots.mask_map(attributed.top(weights=0.05)),
        "heads": plots.head_map(attributed),
        "roles": plots.role_map(traced.by_role, traced.roles, SCRIPT),
        "overlap": plots.overlap_map(overlap({SCRIPT: attributed, "random": random_units(world)}, weights=0.05)),
        "circuit": plots.circuit_graph(circuit),
        "volcano": plots.code_volcano(*activities[:2], activities[2].above(1)),
    }


def stepped() -> pd.DataFrame:
    return pd.concat([attack(y).assign(step=step) for step, y in ((0, 0.1), (5, 0.6))], ignore_index=True)


ALL = (
    *("before and after", "side effects", "recoveries", "attack by setting", "attack by step", "comparison"),
    *("faithfulness", "probe", "mask", "mask without weights", "heads", "roles", "overlap", "circuit", "volcano"),
)


@pytest.mark.parametrize("name", ALL)
def test_every_axis_is_named_and_nothing_hides_the_page(name, figures):
    figure = figures[name]
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        beside = (
            axis.visible is False or axis.showticklabels is False
        )  # an empty panel, or one that shares its neighbour's
        assert axis.title.text or beside, f"{axis.plotly_name} has no title"
    assert figure.layout.xaxis.title.text or figure.layout.xaxis2.title.text
    look = figure.layout.template.layout
    assert look.paper_bgcolor == look.plot_bgcolor == "rgba(0, 0, 0, 0)"
    assert figure.layout.title.text and figure.layout.height > 100


@pytest.mark.parametrize("name", ALL)
def test_names_are_shown_letter_by_letter(name, figures):
    assert "\\u003cscript" not in figures[name].to_json(), "plotly takes < for HTML: it stands as &lt;"


def test_plotlys_default_look_is_left_as_it_was(figures, toy):
    before = pio.templates.default, pio.templates[pio.templates.default].to_plotly_json()
    plots.mask_map(ComponentMask.of(["L0.mlp.out"], toy.model.signature))
    assert (pio.templates.default, pio.templates[pio.templates.default].to_plotly_json()) == before
    assert pio.templates.default == "plotly"


def test_before_and_after_shows_each_model_with_its_interval(figures):
    figure = figures["before and after"]
    rows = FRAME[(FRAME.split == "forget") & (FRAME.metric == "accuracy")]
    assert list(figure.layout.yaxis.ticktext) == ["statement", text(SCRIPT)]
    for trace, name in zip(figure.data, MODELS, strict=True):
        assert trace.name == text(name) and list(trace.x) == rows[name].tolist()
        assert [x + e for x, e in zip(trace.x, trace.error_x.array)] == pytest.approx(rows[f"{name}_high"].tolist())
        assert [x - e for x, e in zip(trace.x, trace.error_x.arrayminus)] == pytest.approx(rows[f"{name}_low"].tolist())
    heights = [trace.y[0] for trace in figure.data]
    assert heights == sorted(heights) and len(set(heights)) == 4, "marks of one row do not hide one another"


def test_side_effects_run_from_before_to_after_with_the_control_beneath(figures):
    line, before, after, control, other = figures["side effects"].data
    kept = FRAME[(FRAME.metric == "kept") & ~FRAME.split.isin(["generalization", "portability"])]
    assert list(line.x) == [x for pair in zip(kept.before, kept.after) for x in (*pair, None)]
    assert list(before.y) == list(after.y) == [0, 1, 2, 3]
    assert set(before.x) == {1} and list(after.x) == [0.95, 1, 0.75, 1], "what was wrong before is not counted"
    assert all(0 < one - whole < another - whole < 0.5 for whole, one, another in zip(after.y, control.y, other.y))
    assert list(figures["side effects"].layout.yaxis.ticktext) == [
        "unseen: statement",
        "retain: statement",
        "neighbours: statement",
        "skills: copying",
    ]


def test_recoveries_are_on_the_scale_of_floor_and_ceiling(figures):
    (marks,) = figures["recoveries"].data
    assert marks.x == pytest.approx([(0.9 - 0.25) / 0.75])
    assert marks.x[0] - marks.error_x.arrayminus[0] == pytest.approx((0.8 - 0.25) / 0.75)


def test_relearning_is_drawn_over_steps_and_settings_side_by_side(figures):
    over = {trace.name: trace for trace in figures["attack by step"].data}
    assert list(over["edited"].x) == [0, 5] and list(over["edited"].y) == [0.1, 0.6] and "lines" in over["edited"].mode
    beside = {trace.name: trace for trace in figures["attack by setting"].data}
    assert list(beside["edited"].x) == [text(SCRIPT)] and beside["edited"].mode == "markers"
    assert over["edited"].line.color == plots.COLOURS[1] != over["unedited"].line.color


def test_the_probe_curve_marks_the_window(figures, world, sport):
    found = fact_lookup(world, sport[0])
    (curve,) = figures["probe"].data
    assert list(curve.y) == found.evidence["curve"]
    first, last = found.evidence["window"]
    window = figures["probe"].layout.shapes[0]
    assert (window.x0, window.x1) == (first + 0.5, last + 1.5)
    with pytest.raises(MechunlearnError, match="no probe curve"):
        plots.probe_curve(random_units(world))


class TestMaskMap:
    def test_it_shows_the_share_of_each_site_and_of_the_weights(self, figures, attributed):
        mask = attributed.top(weights=0.05, tied=True)
        figure = figures["mask"]
        cells, weights = figure.data
        kinds = [name.split(" ")[0] for name in cells.y]
        assert cells.y[0] == "attn.q (heads)" and "attn.k (kv heads)" in cells.y and "mlp.out (neurons)" in cells.y
        for kind, row in zip(kinds, cells.z):
            for layer, share in enumerate(row):
                units = mask.sites.get(f"L{layer}.{kind}")
                assert share == (0 if units is None else pytest.approx(float(units.float().mean())))
        assert sum(weights.y) == pytest.approx(attributed.share(mask))
        assert (
            f"{len(mask)} units, {100 * attributed.share(mask):.3g} % of the editable weights"
            in figure.layout.title.text
        )
        assert f"{int(mask.sites['L7.attn.o'].sum())} of 8" == cells.customdata[kinds.index("attn.o")][7]

    def test_the_model_knows_the_weights_too(self, world, attributed, figures):
        mask = attributed.top(weights=0.05, tied=True)
        assert plots.mask_map(mask, model=world).to_json() == figures["mask"].to_json()

    def test_without_either_there_are_no_weights(self, figures):
        (cells,) = figures["mask without weights"].data
        assert cells.type == "heatmap" and "%" not in figures["mask without weights"].layout.title.text

    def test_codes_have_no_weights_in_a_model(self, world, activities):
        chosen = activities[2].above(1)
        assert len(plots.mask_map(chosen, model=world).data) == 1
        figure = plots.mask_map(chosen, activities[2])
        assert figure.data[0].y[0].endswith("(codes)") and sum(figure.data[1].y) == pytest.approx(len(chosen) / 512)

    def test_a_localization_is_no_mask(self, attributed):
        """Past the type checker of the tests, as users call it."""
        with pytest.raises(
            MechunlearnError, match=r"got a Localization.*found.above\(0\) or found.top\(weights=0.05\)"
        ):
            inspect.unwrap(plots.mask_map)(attributed)

    def test_a_mask_of_another_model_is_refused(self, toy, attributed):
        with pytest.raises(MechunlearnError, match="fits one architecture only"):
            plots.mask_map(ComponentMask.of(["L0.mlp.out"], toy.model.signature), attributed)


class TestHeadMap:
    def test_it_shows_layers_by_heads_centred_at_zero(self, figures, attributed):
        (cells,) = figures["heads"].data
        for layer, row in enumerate(cells.z):
            assert list(row) == attributed.scores[f"L{layer}.attn.o"].tolist()
        largest = max(float(s.abs().max()) for site, s in attributed.scores.items() if site.endswith("attn.o"))
        assert cells.zmax == -cells.zmin == largest
        assert figures["heads"].layout.yaxis.autorange == "reversed"

    def test_layers_without_scores_stay_empty(self):
        tiny = Signature("llama", layers=2, heads=2, kv_heads=1, d_mlp=4, d_model=8)
        scores = {"L1.attn.o": torch.tensor([1.0, -2.0]), "L0.attn.k": torch.tensor([3.0])}
        found = Localization(scores, tiny, {}, 10, RunCard(SCRIPT))
        figure = plots.head_map(found)
        assert [list(row) for row in figure.data[0].z] == [[None, None], [1, -2]]
        assert text(SCRIPT) in figure.layout.title.text
        assert [list(row) for row in plots.head_map(found, "attn.k").data[0].z] == [[3], [None]]
        with pytest.raises(MechunlearnError, match=r"no scores of heads at 'attn\.v' \(it has: attn\.k, attn\.o\)"):
            plots.head_map(found, "attn.v")


class TestCircuitGraph:
    def edges(self, figure) -> dict[str, int]:
        """What is told of each edge that is visible, and the sign of its score."""
        lines = [t for t in figure.data if t.mode == "lines" and t.visible is not False]
        return {told for trace in lines for told in trace.text}

    def test_the_slider_keeps_the_largest_edges(self, figures, circuit):
        figure = figures["circuit"]
        (slider,) = figure.layout.sliders
        assert [step.label for step in slider.steps] == ["1", "2", "3", "5", "10", "20", "30", "50", "100", "200"]
        whole = circuit.top(edges=200).to_networkx().edges(data=True)
        ranked = sorted((about for _, _, about in whole), key=lambda about: -abs(about["score"]))
        for step in slider.steps:
            shown = step.args[0]["visible"]
            assert len(shown) == len(figure.data)
            for trace, on in zip(figure.data, shown):
                trace.visible = on
            expected = {text(f"{a['name']}: {a['score']:+.3g}") for a in ranked[: int(step.label)]}
            assert self.edges(figure) == expected
            nodes = {name for t in figure.data if t.mode == "markers" and t.visible and t.text for name in t.text}
            assert nodes == {end for a in ranked[: int(step.label)] for end in a["name"].split("<")[0].split("->")}

    def test_at_first_it_is_at_what_is_asked_for(self, circuit):
        figure = plots.circuit_graph(circuit, most=30, shown=12)
        assert figure.layout.sliders[0].steps[figure.layout.sliders[0].active].label == "10"
        assert len(self.edges(figure)) == 10

    def test_colour_is_the_sign_and_edges_run_down(self, figures, circuit):
        for trace in (t for t in figures["circuit"].data if t.mode == "lines"):
            signs = {"+" if ": +" in told else "-" for told in trace.text}
            assert signs == ({"+"} if trace.line.color == plots.COLOURS[1] else {"-"})
            starts = [i for i, y in enumerate(trace.y) if i == 0 or trace.y[i - 1] is None]
            assert all(trace.y[i + 1] > trace.y[i] for i in starts)
        assert figures["circuit"].layout.yaxis.range[0] > figures["circuit"].layout.yaxis.range[1], "the input is above"

    def test_edges_of_a_deep_model_stay_within_the_frame(self, circuit):
        """Lines between MLPs that are far apart bent out of the picture."""
        heads, layers = 9, 30
        where = _places(replace(circuit.signature, heads=heads, layers=layers))
        ends = [*where]
        edges = [(a, b, {"name": f"{a}->{b}", "score": 1.0}) for a in ends for b in ends if where[a][1] < where[b][1]]
        xs = [x for x in _drawn(edges, where, heads)["x"] if x is not None]
        assert len(edges) > 40_000 and min(xs) > -0.8 and max(xs) < heads + 1.6
        straight = [(a, b, about) for a, b, about in edges if a[0] == b[0] == "m" and int(b[1:]) > int(a[1:]) + 1]
        for edge in straight:
            bent = _drawn([edge], where, heads)["x"][len(BENDS) // 2]
            assert bent > where[edge[0]][0] + 0.1, "around the MLPs between"

    def test_nothing_to_show_is_refused(self, circuit):
        for refused in (lambda: plots.circuit_graph(circuit - circuit), lambda: plots.circuit_graph(circuit, most=0)):
            with pytest.raises(MechunlearnError, match="Expected a circuit with edges"):
                refused()


class TestVolcano:
    def test_enrichment_is_that_of_feature_discovery(self, figures, activities):
        here, _, found = activities
        scores = next(iter(found.scores.values()))
        marks = {trace.name.split(" ")[0]: trace for trace in figures["volcano"].data}
        chosen = found.above(1)
        assert marks["selected"].name == f"selected ({len(chosen)})"
        units = [int(unit) for unit, _ in marks["selected"].customdata]
        assert units == [component.unit for component in chosen]
        assert list(marks["selected"].x) == pytest.approx(scores[units].tolist(), abs=1e-5)
        often = (here.fire_count.sum(0)[units] + 0.5) / here.tokens.sum()
        assert list(marks["selected"].y) == pytest.approx(often.tolist())

    def test_units_never_seen_have_no_mark(self, activities):
        here, there, _ = activities
        (marks,) = plots.code_volcano(here, there).data
        assert (
            len(marks.x)
            == int(((here.fire_count.sum(0) + there.fire_count.sum(0)) > 0).sum())
            < here.fire_count.shape[1]
        )
        assert all(map(math.isfinite, marks.x))

    def test_another_dictionary_is_refused(self, activities, toy):
        here, there, _ = activities
        with pytest.raises(MechunlearnError, match="512 units, what is given beside it of 512, 32"):
            plots.code_volcano(here, there, ComponentMask.of(["L0.mlp.out"], toy.model.signature))


def test_the_comparison_has_a_panel_a_measure(figures):
    figure = figures["comparison"]
    assert [axis.title.text for axis in figure.select_xaxes()][:2] == ["truth", "retain"]
    assert list(figure.layout.yaxis.ticktext) == ["npo, 5 %", text(SCRIPT)]


class TestSaved:
    FIGURE = staticmethod(lambda toy: plots.mask_map(ComponentMask.of(["L0.mlp.out"], toy.model.signature)))

    @pytest.fixture
    def drawn(self):
        pytest.importorskip("kaleido", reason="pictures need kaleido (the extra `images`)")
        import shutil

        if not any(map(shutil.which, NAMES)):
            pytest.skip(f"pictures need a browser on PATH: {', '.join(NAMES)}")

    def test_pictures_are_what_they_are_named(self, drawn, toy, tmp_path):
        figure = self.FIGURE(toy)
        plots.save_figure(figure, tmp_path / "mask.png", width=500, scale=3)
        data = (tmp_path / "mask.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        size = [int.from_bytes(data[start : start + 4], "big") for start in (16, 20)]
        assert size == [1500, 3 * figure.layout.height] and len(data) > 3000
        plots.save_figure(figure, tmp_path / "mask.svg")
        root = ElementTree.fromstring((tmp_path / "mask.svg").read_text())
        assert root.tag.endswith("svg") and "What the mask selects" in "".join(root.itertext())

    def test_a_page_needs_no_network(self, toy, tmp_path):
        plots.save_figure(self.FIGURE(toy), tmp_path / "mask.html")
        page = (tmp_path / "mask.html").read_text()
        assert page.startswith("<!doctype html>") and "plotly.js v" in page
        assert '<script src="' not in page and "prefers-color-scheme" in page

    def test_another_suffix_is_refused(self, toy, tmp_path):
        with pytest.raises(MechunlearnError, match=r"'mask\.jpg'. Expected a name ending in \.png, \.svg or \.html"):
            plots.save_figure(self.FIGURE(toy), tmp_path / "mask.jpg")

    def test_what_is_missing_is_named(self, toy, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "kaleido", None)
            with pytest.raises(MechunlearnError, match=r"kaleido, which is not installed.*mechunlearn\[images\]"):
                plots.save_figure(self.FIGURE(toy), tmp_path / "mask.png")
        pytest.importorskip("kaleido", reason="pictures need kaleido (the extra `images`)")
        monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
        with pytest.raises(MechunlearnError, match=r"No browser found at BROWSER_PATH.*Install Chromium"):
            plots.save_figure(self.FIGURE(toy), tmp_path / "mask.png")
        assert not list(tmp_path.iterdir())

"""The explorer without a screen: what it shows is what the library computes, and a click changes what it should."""

import base64
import importlib
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from mechunlearn import ComponentMask, Localization, MechunlearnError
from mechunlearn.explore.pages import static_view
from mechunlearn.explore.state import ACTIONS, FIRST, GIVEN, MAPS, Workbench, localizers
from mechunlearn.explore.widget import Explorer, explore
from mechunlearn.localize import activation_patching, attribution_patching, direct_logit_attribution, fact_lookup
from mechunlearn.metrics.answers import answer_logprob, logit_diff
from mechunlearn.model.hooked import load_model
from mechunlearn.patching.faithfulness import mask_faithfulness
from mechunlearn.world.toy import planted_facts
from tests.models import CONFIGS, random_hf, token_prompts


@pytest.fixture(scope="module")
def facts(world, sport):
    return sport[0].select(range(12))


@pytest.fixture
def bench(world, facts) -> Workbench:
    return Workbench(world, facts)


@pytest.fixture
def toy_bench() -> Workbench:
    toy = planted_facts()
    return Workbench(toy.model, toy.prompts())


class TestMaps:
    def test_a_site_has_the_sum_of_its_units_and_knows_its_component(self, bench, world, facts):
        found = attribution_patching(world, facts, metric=logit_diff)
        heat = bench.heat()
        assert heat["rows"] == ["attn.o", "mlp.out"] and heat["columns"] == list(range(8))
        for i, kind in enumerate(heat["rows"]):
            for layer in range(8):
                assert heat["cells"][i][layer] == f"L{layer}.{kind}"
                assert heat["values"][i][layer] == pytest.approx(
                    float(found.scores[f"L{layer}.{kind}"].sum()), abs=1e-5
                )

    def test_heads(self, bench, world, facts):
        bench.choose(map="head", metric="answer_logprob")
        found = attribution_patching(world, facts, metric=answer_logprob)
        heat = bench.heat()
        assert heat["values"][3][5] == pytest.approx(float(found.scores["L5.attn.o"][3]), abs=1e-5)
        assert heat["cells"][3][5] == "L5.attn.o[3]" and heat["rows"][3] == "head 3"

    def test_roles(self, bench, world, facts):
        bench.choose(map="mlp_out")
        found = activation_patching(world, facts, kinds=["mlp_out"], by="role")
        heat = bench.heat()
        row = heat["rows"].index("subject last")
        assert heat["values"][row][1] == pytest.approx(
            float(found.by_role["L1.mlp_out"][found.roles.index("subject last"), 0]), abs=1e-5
        )
        assert heat["cells"][row][1] == "L1.mlp.out" and "all" not in heat["rows"]
        assert max(range(8), key=lambda layer: abs(heat["values"][row][layer])) in (1, 2), "where facts are looked up"

    def test_a_site_scored_as_a_whole_shows_its_score_once(self, toy_bench):
        toy_bench.choose(method="activation_patching")
        found = activation_patching(toy_bench.model, toy_bench.prompts, kinds=["attn.o", "mlp_out"])
        assert toy_bench.heat()["values"][1][0] == pytest.approx(float(found.scores["L0.mlp.out"][0]))

    def test_one_fact(self, bench, world, facts):
        bench.choose(fact=5)
        alone = attribution_patching(world, facts.select([5]))
        assert bench.heat()["values"][1][1] == pytest.approx(float(alone.scores["L1.mlp.out"].sum()), abs=1e-5)
        bench.choose(all_facts=True)
        assert bench.fact is None

    @pytest.mark.parametrize("method", localizers())
    def test_every_method_is_shown_in_every_map(self, method):
        toy = planted_facts()
        bench = Workbench(toy.model, toy.prompts())
        for name in MAPS:
            view = bench.act({"do": "choose", "method": method, "map": name})
            if view["error"]:
                assert method == "fact_lookup" and view["method"] == FIRST, view["error"]  # nothing has changed
            else:
                assert view["method"] == method and view["map"] == name
            json.dumps(view, allow_nan=False)

    def test_a_localization_of_ones_own(self, world, facts):
        found = (
            fact_lookup(world, facts) if len(facts) > 40 else attribution_patching(world, facts, metric=answer_logprob)
        )
        bench = Workbench(world, facts, found)
        assert bench.methods[0] == GIVEN == bench.method and bench.found is found
        assert bench.act({"do": "choose", "method": FIRST})["methods"][0] == GIVEN
        assert GIVEN not in Workbench(world, facts).methods


class TestDetail:
    def test_effects_are_those_of_exact_patching_by_fact_and_role(self, bench, world, facts):
        told = bench.detail("L5.attn.o[2]")
        exact = activation_patching(world, facts, kinds=["attn.o"], by="role")
        assert told["effect"] == pytest.approx(float(exact.scores["L5.attn.o"][2]), abs=1e-5)
        for role, effect in told["roles"].items():
            row = exact.by_role["L5.attn.o"][exact.roles.index(role)]
            assert effect == pytest.approx(float(row[2]), abs=1e-5)
        alone = activation_patching(world, facts.select([3]), kinds=["attn.o"])
        named = {fact["subject"]: fact["effect"] for fact in told["facts"]}
        assert named[facts.queries[3].subject] == pytest.approx(float(alone.scores["L5.attn.o"][2]), abs=1e-5)
        effects = [abs(fact["effect"]) for fact in told["facts"]]
        assert effects == sorted(effects, reverse=True)

    def test_a_whole_site_is_patched_as_one(self, bench, world, facts):
        exact = activation_patching(world, facts, kinds=["mlp_out"])
        assert bench.detail("L1.mlp.out")["effect"] == pytest.approx(float(exact.scores["L1.mlp.out"][0]), abs=1e-5)

    def test_direct_effect_score_and_rank(self, bench, world, facts):
        direct, found = direct_logit_attribution(world, facts), attribution_patching(world, facts)
        first = found.ranked()[0]
        told = bench.detail(str(first))
        assert told["direct"] == pytest.approx(float(direct.scores[first.site][first.unit]), abs=1e-5)
        assert told["score"]["rank"] == 1 and told["score"]["value"] == pytest.approx(
            float(found.scores[first.site][first.unit])
        )
        assert bench.detail("L2.attn.k[0]")["direct"] is None and bench.detail("L2.attn.k[0]")["score"] is None

    def test_a_head_shows_its_attention_and_a_neuron_what_it_reads_and_writes(self, bench, world, facts):
        head = bench.detail("L5.attn.o[2]")
        rows = torch.tensor(head["attention"]["pattern"])
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)), atol=0.02, rtol=0)
        assert not rows.triu(1).any() and len(head["attention"]["tokens"]) == len(rows)
        first = next(i for i, asked in enumerate(facts.queries) if asked.subject == head["facts"][0]["subject"])
        expected = world.attention(facts.tokens[first : first + 1, : int(facts.lengths[first])], 5)[0, 2]
        torch.testing.assert_close(rows, expected, atol=1e-3, rtol=0)
        neuron = bench.detail("L1.mlp.gate[7]")
        written = world.rows("L1.mlp.out")[7][:128]
        effects = world.decoder.unembedding.weight[: len(world.tokenizer)] @ written
        assert neuron["words"]["raised"][0][1] == pytest.approx(float(effects.max()), rel=1e-4)
        assert neuron["words"]["lowered"][0][1] == pytest.approx(float(effects.min()), rel=1e-4)
        shown = neuron["activations"]
        assert len(shown["tokens"]) == len(shown["values"])
        site = bench.detail("L1.mlp.out")
        scores = bench.found.scores["L1.mlp.out"]
        assert [unit["component"] for unit in site["units"][:2]] == [
            f"L1.mlp.out[{unit}]" for unit in scores.abs().argsort(descending=True)[:2].tolist()
        ]

    def test_the_planted_neuron_and_head(self, toy_bench):
        by_fact = {fact["before"]: fact["effect"] for fact in toy_bench.detail("L0.mlp.out[1]")["facts"]}
        assert sum(abs(effect) > 1 for effect in by_fact.values()) == 1, "a neuron knows one fact"
        assert all(abs(fact["effect"]) > 1 for fact in toy_bench.detail("L1.attn.o[0]")["facts"])

    @pytest.mark.parametrize("family", CONFIGS)
    def test_every_architecture(self, family):
        model = load_model((random_hf(family), None))
        bench = Workbench(model, token_prompts())
        for component in ("L1.attn.o[1]", "L1.attn.q[0]", "L2.attn.v", "L0.mlp.in[3]", "L2.mlp.out"):
            view = bench.act({"do": "show", "component": component})
            assert not view["error"] and view["detail"]["component"] == component
            json.dumps(view, allow_nan=False)
        assert bench.act({"do": "take", "share": 0.1})["mask"]["units"] > 0
        assert len(bench.act({"do": "faithfulness"})["mask"]["faithfulness"]) == 3


class TestMask:
    def test_components_are_added_and_taken_out(self, bench, world):
        bench.toggle("L1.mlp.out[3]")
        bench.toggle("L5.attn.o")
        assert bench.mask == ComponentMask.of(["L1.mlp.out[3]", "L5.attn.o"], world.signature)
        bench.toggle("L1.mlp.out")
        assert len(bench.mask) == 384 + 8, "some of a site were in: now all are"
        bench.toggle("L1.mlp.out")
        assert set(bench.mask) == set(ComponentMask.of(["L5.attn.o"], world.signature))
        heat = bench.heat()
        assert heat["selected"][0][5] == 1 and heat["selected"][1][1] == 0

    def test_the_share_is_that_of_the_weights(self, bench, world, facts):
        view = bench.act({"do": "take", "share": 0.05})
        expected = attribution_patching(world, facts).top(weights=0.05)
        assert bench.mask == expected
        assert view["mask"]["share"] == pytest.approx(bench.found.share(expected)) and view["mask"]["share"] <= 0.05
        bench.take(above=0.5)
        assert bench.mask == bench.found.above(0.5)
        bench.clear()
        assert len(bench.mask) == 0

    def test_faithfulness_is_measured_when_asked_and_forgotten_when_the_mask_changes(self, bench, world, facts):
        assert bench.act({"do": "take", "share": 0.2})["mask"]["faithfulness"] is None
        view = bench.act({"do": "faithfulness"})
        assert view["mask"]["faithfulness"] == pytest.approx(mask_faithfulness(world, bench.mask, facts))
        assert bench.act({"do": "choose", "fact": 2})["mask"]["faithfulness"] is None, "that was of other facts"
        assert bench.act({"do": "faithfulness"})["mask"]["measured"] == 1
        assert bench.act({"do": "toggle", "component": "L0.mlp.out[0]"})["mask"]["faithfulness"] is None

    def test_the_saved_mask_is_the_one_on_show(self, bench, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        bench.take(share=0.03)
        view = bench.act({"do": "save", "path": "mine.mask.json"})
        assert not view["error"] and "mine.mask.json" in view["said"]
        assert ComponentMask.load("mine.mask.json") == bench.mask
        for name in ("../x.json", "/tmp/x.json", "x.txt", ".json", "", "a/b.json"):
            assert "no file name" in bench.act({"do": "save", "path": name})["error"]
        bench.toggle("L0.mlp.out[0]")
        assert not bench.act({"do": "save", "path": "mine.mask.json"})["error"], "a mask may be replaced"
        (tmp_path / "config.json").write_text("{}")
        assert "is no mask" in bench.act({"do": "save", "path": "config.json"})["error"]
        assert (tmp_path / "config.json").read_text() == "{}"
        (tmp_path / "config.json").unlink()
        bench.clear()
        assert "empty" in bench.act({"do": "save", "path": "none.mask.json"})["error"]
        assert [path.name for path in tmp_path.iterdir()] == ["mine.mask.json"]


class TestMessages:
    @pytest.mark.parametrize(
        "message",
        [
            {},
            {"do": "act"},
            {"do": "_localized"},
            {"do": "view"},
            {"do": "choose", "nonsense": 1},
            {"do": "choose", "method": "phrenology"},
            {"do": "choose", "fact": 99},
            {"do": "choose", "fact": "1"},
            {"do": "choose", "fact": True},
            {"do": "show", "component": "L99.mlp.out"},
            {"do": "show", "component": "nonsense"},
            {"do": "show", "component": None},
            {"do": "show"},
            {"do": "toggle", "component": "L0.resid_post"},
            {"do": "take", "share": 2},
            {"do": "take", "share": "a lot"},
            {"do": "take", "share": None},
            {"do": "save"},
        ],
    )
    def test_a_mistake_is_told_and_changes_nothing(self, toy_bench, message):
        before = toy_bench.view()
        after = toy_bench.act(message)
        assert after["error"] and after | {"error": ""} == before

    def test_what_fails_in_the_middle_is_told_and_changes_nothing(self, toy_bench, monkeypatch):
        def broken(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr("mechunlearn.localize.causal_tracing", broken)
        after = toy_bench.act({"do": "choose", "method": "causal_tracing", "map": "head"})
        assert after["error"] == "RuntimeError: out of memory"
        assert (after["method"], after["map"]) == (FIRST, "site") and not toy_bench.act({"do": "clear"})["error"]

    def test_a_kind_that_the_model_does_not_have(self):
        bench = Workbench(load_model((random_hf("gpt2"), None)), token_prompts())
        for do in ("toggle", "show"):
            assert "is no head or neuron of this model" in bench.act({"do": do, "component": "L0.mlp.gate[3]"})["error"]
        assert len(bench.mask) == 0 and not bench.act({"do": "toggle", "component": "L0.mlp.in[3]"})["error"]

    def test_the_edited_model_is_looked_at_anew(self, toy_bench):
        before = toy_bench.detail("L0.mlp.out[1]")["effect"]
        with torch.no_grad():
            toy_bench.model.write_("L0.mlp.out", 0 * toy_bench.model.rows("L0.mlp.out"))
        assert before < 0 and toy_bench.detail("L0.mlp.out[1]")["effect"] == 0

    def test_results_are_kept_within_bounds(self, toy_bench, monkeypatch):
        monkeypatch.setattr(importlib.import_module("mechunlearn.explore.state"), "KEPT", 3)
        for fact in range(5):
            toy_bench.choose(fact=fact)
            toy_bench.heat()
        assert len(toy_bench._kept) == 3

    def test_only_listed_actions_are_done(self):
        assert set(ACTIONS) == {"choose", "show", "toggle", "take", "clear", "faithfulness", "save"}
        assert all(callable(getattr(Workbench, name)) for name in ACTIONS)

    def test_no_trace_is_left(self, world, facts):
        def hooks():  # transformers leaves some where hidden states were once asked for
            return [(*module._forward_hooks, *module._forward_pre_hooks) for module in world.hf.modules()]

        before = world.fingerprint, hooks()
        explorer = explore(world, facts)
        explorer.show("L5.attn.o[1]")
        explorer.show("L1.mlp.out[1]")
        assert (world.fingerprint, hooks()) == before

    def test_nothing_to_explore(self, world, facts):
        with pytest.raises(MechunlearnError, match="no facts to explore"):
            Workbench(world, facts.select([]))
        toy = planted_facts()
        with pytest.raises(MechunlearnError, match="architecture|is for"):
            Workbench(world, facts, attribution_patching(toy.model, toy.prompts()))


class TestWidget:
    def test_python_and_clicks_go_through_the_same_bench(self, world, facts):
        explorer = explore(world, facts)
        assert isinstance(explorer, Explorer) and isinstance(explorer.found, Localization)
        explorer.toggle("L5.attn.o[1]")
        assert explorer.view["mask"]["units"] == 1
        explorer._handle_custom_msg({"do": "show", "component": "L2.mlp.out"}, [])
        assert explorer.view["detail"]["component"] == "L2.mlp.out" and len(explorer.mask) == 1
        first = explorer.view["answer"]
        explorer._handle_custom_msg({"do": "show", "component": "L2.mlp.out"}, [])
        assert explorer.view["answer"] == first + 1, "an answer that changes nothing is drawn too"
        explorer.choose(map="head")
        explorer.take(share=0.01)
        assert explorer.view["map"] == "head" and len(explorer.mask) > 1
        with pytest.raises(MechunlearnError, match="Unknown method"):
            explorer.choose(method="phrenology")

    def test_where_no_widget_runs_there_is_a_picture_and_its_numbers(self, world, facts):
        explorer = explore(world, facts)
        explorer.take(share=0.05)
        data = explorer._repr_mimebundle_()
        data = data[0] if isinstance(data, tuple) else data
        page = data["text/html"]
        assert "application/vnd.jupyter.widget-view+json" in data
        assert page.count("<tr>") == 3 and "Run it in Jupyter" in page
        scores = explorer.found.scores["L1.mlp.out"]
        assert f"{scores.sum():+.2f}" in page
        picture = ElementTree.fromstring(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))
        texts = [text.text for text in picture.findall(".//{*}text")]
        assert texts[0] == "attn.o" and "mlp.out" in texts and "layer" in texts and "◐" in texts
        cells = [(r.get("fill"), float(r.get("fill-opacity"))) for r in picture.findall(".//{*}rect")]
        values = [value for row in explorer.view["heat"]["values"] for value in row]
        assert len(cells) == len(values) == 16
        assert [colour for colour, _ in cells] == ["#0072b2" if value > 0 else "#d55e00" for value in values]
        strongest = max(range(16), key=lambda i: abs(values[i]))
        assert max(range(16), key=lambda i: cells[i][1]) == strongest and cells[strongest][1] == 0.9

    def test_what_was_not_scored_is_left_empty_in_the_picture(self, world, facts):
        found = attribution_patching(world, facts, kinds=["mlp.out"])
        found = replace(found, scores={"L1.mlp.out": found.scores["L1.mlp.out"]})
        page = static_view(Workbench(world, facts, found).view())
        picture = ElementTree.fromstring(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))
        assert [r.get("fill-opacity") for r in picture.findall(".//{*}rect")].count("0") == 7

    def test_a_mask_to_begin_with(self, world, facts):
        mask = ComponentMask.of(["L1.mlp.out[3]", "L5.attn.o"], world.signature)
        explorer = explore(world, facts, mask=mask)
        assert explorer.mask == mask and explorer.view["mask"]["units"] == 9
        explorer.toggle("L1.mlp.out[3]")
        assert len(explorer.mask) == 8 and len(mask) == 9, "the mask that was given is left as it is"
        other = planted_facts().model.signature
        with pytest.raises(MechunlearnError, match="architecture|is for"):
            explore(world, facts, mask=ComponentMask.of(["L0.mlp.out"], other))
        with pytest.raises(MechunlearnError, match="no head or neuron"):
            codes = ComponentMask({"L3.codebook:8be43700": torch.ones(4, dtype=torch.bool)}, world.signature)
            explore(world, facts, mask=codes)

    def test_text_of_facts_is_data_and_never_markup(self, world, facts):
        evil = "<script>alert(1)</script>"
        asked = tuple(replace(a, prompt=a.prompt.replace(a.subject, evil), subject=evil) for a in facts.queries)
        explorer = explore(world, replace(facts, queries=asked, facts=None))
        explorer.show("L1.mlp.out")
        assert explorer.view["detail"]["facts"][0]["subject"] == evil
        data = explorer._repr_mimebundle_()
        data = data[0] if isinstance(data, tuple) else data
        assert evil not in data["text/html"]

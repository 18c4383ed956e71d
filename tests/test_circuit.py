"""Circuits: which edges exist, what algebra, budgets and files keep, and what is refused."""

import json
import re
from itertools import pairwise

import networkx
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.edges import edges, readers, writers
from mechunlearn.core.runcard import RunCard
from mechunlearn.model.layout import Signature

GROUPED = Signature("llama", layers=2, heads=4, kv_heads=2, d_mlp=6, d_model=8)
PLAIN = Signature("gpt2", layers=2, heads=3, kv_heads=3, d_mlp=6, d_model=9)
ABOUT = {"unit_weights": {"attn.o": 16, "mlp.out": 8}, "total_weights": 2 * (4 * 16 + 6 * 8)}
CASES = pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])


def circuit(seed: int = 0, signature: Signature = GROUPED, parallel: bool = False, share: float = 1.0) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    shape = len(writers(signature)), len(readers(signature))
    scores, chosen = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < share
    return Circuit(scores, signature, parallel, **ABOUT, card=RunCard("by hand", seed=seed), chosen=chosen, note="so")


def scored(scores: dict[str, float], signature: Signature = GROUPED, parallel: bool = False) -> Circuit:
    """Only these edges, by native name."""
    row, column = writers(signature), readers(signature)
    matrix = torch.zeros(len(row), len(column))
    for name, score in scores.items():
        writer, reader = name.split("->")
        matrix[row.index(writer), column.index(reader)] = score
    return Circuit(matrix, signature, parallel, **ABOUT, card=RunCard("by hand"), chosen=matrix != 0)


def names(of: Circuit) -> set[str]:
    row, column = writers(of.signature), readers(of.signature)
    return {f"{row[i]}->{column[j]}" for i, j in of.chosen.nonzero().tolist()}


def same(a: Circuit, b: Circuit) -> bool:
    return torch.equal(a.scores, b.scores) and torch.equal(a.chosen, b.chosen)


def owners(reader: str) -> set[str]:
    """The heads that compute from what this reads (a KV head serves its group), or the MLP."""
    found = re.fullmatch(r"(a\d\.h)(\d)<([qkv])>", reader)
    if not found:
        return {reader}
    prefix, head, one = found[1], int(found[2]), found[3]
    return {f"{prefix}{head}"} if one == "q" else {f"{prefix}{2 * head}", f"{prefix}{2 * head + 1}"}


@CASES
@pytest.mark.parametrize("signature", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_edges_are_those_of_a_loop_over_the_model_and_of_the_formula(signature, parallel):
    residual, fed = ["input"], set()
    for layer in range(signature.layers):
        heads = [name for name in writers(signature) if name.startswith(f"a{layer}.")]
        attention = [name for name in readers(signature) if name.startswith(f"a{layer}.")]
        fed |= {(w, r) for w in residual for r in attention}
        fed |= {(w, f"m{layer}") for w in residual + ([] if parallel else heads)}
        residual += [*heads, f"m{layer}"]
    fed |= {(w, "logits") for w in residual}
    valid = edges(signature, parallel)
    row, column = writers(signature), readers(signature)
    assert {(row[i], column[j]) for i, j in valid.nonzero().tolist()} == fed
    layers, h, kv = signature.layers, signature.heads, signature.kv_heads
    earlier = sum(1 + layer * (h + 1) for layer in range(layers))
    formula = earlier * (h + 2 * kv + 1) + (0 if parallel else layers * h) + 1 + layers * (h + 1)
    assert int(valid.sum()) == formula == len(circuit(signature=signature, parallel=parallel))


def test_names_are_in_forward_order():
    assert writers(GROUPED)[:6] == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    heads = ["a1.h0<q>", "a1.h1<q>", "a1.h2<q>", "a1.h3<q>", "a1.h0<k>", "a1.h1<k>", "a1.h0<v>", "a1.h1<v>"]
    assert readers(GROUPED)[9:] == [*heads, "m1", "logits"]


def test_scores_and_choice_outside_the_edges_are_dropped():
    valid = edges(GROUPED, True)
    found = Circuit(torch.ones(valid.shape, dtype=torch.bfloat16), GROUPED, True, **ABOUT, card=RunCard("x"))
    assert found.scores.dtype == torch.float32 and torch.equal(found.scores, valid.float())
    assert torch.equal(found.chosen, valid)
    assert not (circuit().chosen & ~edges(GROUPED, False)).any()


def test_membership_is_by_name():
    found = circuit().top(edges=20)
    assert all(name in found for name in names(found)) and len(names(found)) == len(found) == 20
    assert not any(name in found for name in names(~found))
    assert not any(name in circuit() for name in ("m1->m0", "m0", "a0.h0->a1.h2<k>", "a0.h9->m1", "logits->input", ""))


def test_set_algebra_agrees_with_sets():
    a, b = circuit(0, share=0.5), circuit(1, share=0.5)
    for made, expected in ((a & b, names(a) & names(b)), (a | b, names(a) | names(b)), (a - b, names(a) - names(b))):
        assert names(made) == expected and made.card is a.card
    assert all(torch.equal(made.scores, a.scores) for made in (a & b, a - b, ~a))
    assert torch.equal((a | b).scores, torch.where(b.chosen & ~a.chosen, b.scores, a.scores))
    assert same(~~a, a) and names(~a) == names(circuit()) - names(a) and len(a & ~a) == 0
    assert names(~(a | b)) == names(~a & ~b) and names(a - b) == names(a & ~b)
    assert a.jaccard(b) == len(names(a) & names(b)) / len(names(a) | names(b))
    assert a.jaccard(a) == 1 and (a & ~a).jaccard(b & ~b) == 1


@pytest.mark.parametrize("other", [circuit(signature=PLAIN), circuit(parallel=True)])
def test_circuits_of_different_architectures_name_both(other):
    for how in ("__and__", "__or__", "__sub__", "jaccard"):
        with pytest.raises(
            MechunlearnError, match=r"\(llama: .*sequential MLP\) and \((gpt2: .*seq|llama: .*parallel)"
        ):
            getattr(circuit(), how)(other)


def test_the_largest_edges_are_kept_and_ties_are_in_index_order():
    found = circuit(share=0.7)
    sizes = found.scores[found.chosen].abs().sort(descending=True).values
    made = [found.top(edges=k) for k in range(0, len(found) + 1, 7)]
    for k, top in zip(range(0, len(found) + 1, 7), made):
        assert len(top) == k and names(top) <= names(found)
        assert torch.equal(top.scores[top.chosen].abs().sort(descending=True).values, sizes[:k])
    assert all(names(small) < names(large) for small, large in pairwise(made))
    even = Circuit(torch.ones(found.scores.shape), GROUPED, False, **ABOUT, card=RunCard("x"))
    assert even.top(edges=9).chosen.flatten().nonzero().flatten().tolist() == list(range(9))
    assert len(found.top(edges=30).top(edges=10)) == 10 and same(found.top(edges=30).top(edges=10), found.top(edges=10))


def test_an_edge_of_score_zero_can_be_in_a_circuit(tmp_path):
    one = scored({"m1->logits": 1.0})
    zero = ~one
    assert names(zero.top(edges=len(zero))) == names(zero)
    assert zero.to_mib().keys() == circuit().to_mib().keys() - one.to_mib().keys()
    zero.save(tmp_path / "zero.dot")
    assert (tmp_path / "zero.dot").read_text().count("penwidth=0.5,") == len(zero.to_mib())


def among(found: Circuit, kept: set[str]) -> set[str]:
    """The edges of a circuit whose two ends are kept, by a loop over names."""
    free = {"input", "logits"}
    ends = [(name, *name.split("->")) for name in names(found)]
    return {name for name, w, r in ends if w in kept | free and owners(r) & (kept | free)}


@CASES
def test_the_largest_nodes_are_kept_with_the_edges_among_them(parallel):
    found = circuit(3, parallel=parallel, share=0.6)
    outgoing = {
        writer: float((found.scores * found.chosen)[row].sum())
        for row, writer in enumerate(writers(GROUPED))
        if writer != "input"
    }
    order = sorted(outgoing, key=lambda name: -abs(outgoing[name]))
    made = [found.top(nodes=k) for k in range(len(order) + 1)]
    for k, top in enumerate(made):
        assert names(top) == among(found, set(order[:k]))
    assert names(made[0]) == names(found) & {"input->logits"} and same(made[-1], found)
    assert all(names(small) <= names(large) for small, large in pairwise(made))


def test_a_kv_head_is_kept_with_any_query_head_of_its_group():
    found = scored({"a1.h3->logits": 9.0, "input->a1.h0<k>": 1.0, "input->a1.h1<k>": 1.0, "input->a1.h3<q>": 1.0})
    assert names(found.top(nodes=1)) == {"a1.h3->logits", "input->a1.h1<k>", "input->a1.h3<q>"}


def test_a_share_of_weights_stops_before_the_first_node_that_exceeds_it():
    found = scored({"a0.h1->logits": 3.0, "m0->logits": -2.0, "a1.h0->logits": 1.0})
    total = ABOUT["total_weights"]
    for weights, kept in ((0, 0), (15, 0), (16, 1), (63, 1), (64, 2), (79, 2), (80, 3), (total, 3)):
        order = ["a0.h1", "m0", "a1.h0"]
        assert names(found.top(weights=weights / total)) == {f"{node}->logits" for node in order[:kept]}
    every = circuit(5)
    made = [names(every.top(weights=share / 20)) for share in range(21)]
    assert all(small <= large for small, large in pairwise(made)) and made[-1] == names(every)


BUDGETS = [{}, {"edges": 1, "nodes": 1}, {"edges": -1}, {"edges": 999}, {"nodes": 11}, {"weights": 1.1}]


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_out_of_range_are_refused(budget):
    with pytest.raises(MechunlearnError, match="out of range|one budget"):
        circuit().top(**budget)


def test_a_nodes_score_is_the_sum_of_its_outgoing_edges():
    found = scored({"a0.h1->logits": 3.0, "a0.h1->m1": -1.0, "m0->a1.h1<v>": 0.5, "input->logits": 7.0})
    nodes = found.nodes()
    assert nodes.scores["L0.attn.o"].tolist() == [0, 2, 0, 0] and nodes.scores["L0.mlp.out"].tolist() == [0.5] * 6
    assert not nodes.scores["L1.attn.o"].any() and not nodes.scores["L1.mlp.out"].any() and len(nodes.scores) == 4
    assert nodes.card == found.card and "neuron" in nodes.evidence["mlp.out"]
    assert not found.top(edges=1).nodes().above(0), "edges outside the circuit do not count"


def test_the_frame_has_a_row_an_edge():
    found = circuit(share=0.5)
    frame = found.to_frame()
    assert list(frame.columns) == ["source", "target", "input", "score"] and len(frame) == len(found)
    inputs = [f"<{one}>" if one else "" for one in frame.input]
    assert {f"{s}->{t}{i}" for s, t, i in zip(frame.source, frame.target, inputs)} == names(found)
    assert frame.score.abs().is_monotonic_decreasing
    top = scored({"m0->a1.h1<v>": -2.0, "a0.h1->m1": 1.0}).to_frame()
    assert top.to_numpy().tolist() == [["m0", "a1.h1", "v", -2.0], ["a0.h1", "m1", "", 1.0]]
    assert (found & ~found).to_frame().empty


def imported(source, of: Circuit) -> Circuit:
    return Circuit.from_mib(source, signature=of.signature, parallel=of.parallel, **ABOUT)


@CASES
@pytest.mark.parametrize("signature", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_mib_names_and_files_come_back(tmp_path, signature, parallel):
    found = circuit(signature=signature, parallel=parallel, share=0.5)
    kept = torch.where(found.chosen, found.scores, 0)
    (tmp_path / "flat.json").write_text(json.dumps(found.to_mib()))
    for again in (imported(found.to_mib(), found), imported(tmp_path / "flat.json", found)):
        assert torch.equal(again.scores, kept) and torch.equal(again.chosen, found.chosen)
    if signature == PLAIN:
        assert found.to_mib().keys() == names(found)
    found.save_mib(tmp_path / "graph.json")
    assert same(imported(tmp_path / "graph.json", found), found)
    assert same(imported(str(tmp_path / "graph.json"), found), found)


def test_the_graph_file_is_that_of_the_circuit_track(tmp_path):
    """As EAP-IG reads it: sizes, every node with in_graph, every edge of every query head with score and in_graph."""
    found = scored({"a0.h1->a1.h1<k>": 4.0, "input->a1.h0<q>": 1.0, "m0->logits": 2.0}, parallel=True)
    found.save_mib(tmp_path / "graph.json")
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert graph["cfg"] == {"n_layers": 2, "n_heads": 4, "d_model": 8, "parallel_attn_mlp": True}
    touched = {"input", "a0.h1", "a1.h0", "a1.h2", "a1.h3", "m0", "logits"}
    assert {name for name, node in graph["nodes"].items() if node["in_graph"]} == touched
    assert list(graph["nodes"]) == [*writers(GROUPED), "logits"]
    ungrouped = Signature("llama", 2, 4, 4, 6, 8)
    assert graph["edges"].keys() == names(circuit(signature=ungrouped, parallel=True))
    inside = {name: edge["score"] for name, edge in graph["edges"].items() if edge["in_graph"]}
    shared = {"a0.h1->a1.h2<k>": 2.0, "a0.h1->a1.h3<k>": 2.0}
    assert inside == {**shared, "input->a1.h0<q>": 1.0, "m0->logits": 2.0} == found.to_mib()


def test_ungrouped_keys_and_values_are_summed_over_their_group():
    edge = {"input->a1.h2<k>": 0.5, "input->a1.h3<k>": -2.0, "input->a1.h3<q>": 1.0, "input->a1.h0<v>": 3.0}
    summed = scored({"input->a1.h1<k>": -1.5, "input->a1.h3<q>": 1.0, "input->a1.h0<v>": 3.0})
    assert same(imported(edge, summed), summed)
    graph = {"edges": {name: {"score": score, "in_graph": name != "input->a1.h2<k>"} for name, score in edge.items()}}
    assert same(imported(graph, summed), summed), "in the circuit if any head of the group is"


def test_a_graph_with_nothing_in_it_is_a_list_of_scores():
    graph = {"edges": {"input->m0": {"score": 1.0, "in_graph": False}, "m0->m1": {"in_graph": False}}}
    assert names(imported(graph, circuit())) == {"input->m0", "m0->m1"}
    assert len(imported({}, circuit())) == 0


@pytest.mark.parametrize(
    "edge", ["m0->m0", "a0.h0->a1.h4<q>", "a0.h0->a1.h0", "a0.h9->m1", "input", "input->a0.h0<z>", "a0.h0->m0"]
)
def test_edges_that_the_architecture_lacks_are_refused_with_an_example(edge):
    with pytest.raises(MechunlearnError, match=f"names '{edge}', .*parallel MLP.* such as 'input->a0.h0<q>'"):
        imported({"input->m0": 1.0, edge: 1.0}, circuit(parallel=True))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not a whole circuit file"),
        ('{"edges": {"input->m0": {"sco', "not a whole circuit file"),
        ("[]", "holds a list"),
        ('{"input->m0": "much"}', "no circuit as the MIB"),
        ('{"input->m0": null}', "no circuit as the MIB"),
        ('{"edges": {"input->m0": {"score": 1}}}', "no circuit as the MIB.*in_graph"),
        ('{"edges": {"input->m0": 1}}', "no circuit as the MIB"),
        ('{"input->m0": NaN}', "not finite"),
        ('{"cfg": {"n_layers": 3}, "edges": {}}', "another architecture.*'n_layers': 3.*'n_layers': 2"),
        ('{"cfg": {"parallel_attn_mlp": true}, "edges": {}}', "another architecture"),
    ],
)
def test_files_that_are_no_mib_circuit_are_refused(tmp_path, content, message):
    (tmp_path / "graph.json").write_text(content)
    with pytest.raises(MechunlearnError, match=message) as refused:
        imported(tmp_path / "graph.json", circuit())
    assert "\n" not in str(refused.value)


@CASES
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_circuits_survive_save_and_load(tmp_path, suffix, parallel):
    found = circuit(parallel=parallel, share=0.5)
    path = tmp_path / f"circuit{suffix}"
    found.save(path)
    again = Circuit.load(str(path))
    assert same(again, found)
    for name in ("signature", "parallel", "unit_weights", "total_weights", "card", "note"):
        assert getattr(again, name) == getattr(found, name)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(MechunlearnError, match="not a whole .*file") as refused:
        Circuit.load(path)
    assert "\n" not in str(refused.value)


def test_foreign_files_are_refused(tmp_path):
    for suffix, message in ((".json", "holds a localization, not a circuit"), (".safetensors", "holds a localization")):
        circuit().nodes().save(tmp_path / f"nodes{suffix}")
        with pytest.raises(MechunlearnError, match=message):
            Circuit.load(tmp_path / f"nodes{suffix}")
    circuit().save_mib(tmp_path / "graph.json")
    with pytest.raises(MechunlearnError, match="foreign file, not a circuit. `Circuit.from_mib`"):
        Circuit.load(tmp_path / "graph.json")
    for content in ('{"kind": "circuit"}', '{"kind": "circuit", "scores": [[1], [1, 2]]}', "3", "\x00\x01"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(MechunlearnError, match="not a (whole )?circuit file"):
            Circuit.load(tmp_path / "bad.json")
    for suffix in (".json", ".safetensors"):
        with pytest.raises(MechunlearnError, match="missing"):
            Circuit.load(tmp_path / f"missing{suffix}")
    with pytest.raises(MechunlearnError, match="not written as 'circuit.gexf'. Expected .json"):
        circuit().save(tmp_path / "circuit.gexf")
    assert not (tmp_path / "circuit.gexf").exists()


def test_graphml_is_read_again_by_networkx(tmp_path):
    found = circuit(share=0.5)
    graph = found.to_networkx()
    found.save(tmp_path / "circuit.graphml")
    again = networkx.read_graphml(tmp_path / "circuit.graphml", force_multigraph=True)
    for made in (graph, again):
        edge = {data["name"]: data["score"] for _, _, data in made.edges(data=True)}
        assert edge == found.to_mib() and made.number_of_edges() == len(edge)
        assert all(name.startswith(f"{s}->{t}") for s, t, name in made.edges(data="name"))
    assert networkx.is_directed_acyclic_graph(graph)
    ids = re.findall(r'<edge [^>]*id="([^"]*)"', (tmp_path / "circuit.graphml").read_text())
    assert len(set(ids)) == len(found.to_mib()), "the format asks for unique ids"
    edge = scored({"a0.h0->a1.h1<v>": 4.0}).to_networkx().edges
    assert set(edge) == {("a0.h0", "a1.h2", "v"), ("a0.h0", "a1.h3", "v")}
    assert edge["a0.h0", "a1.h2", "v"] == {"score": 2.0, "input": "v", "name": "a0.h0->a1.h2<v>"}


def test_dot_has_every_edge(tmp_path):
    found = circuit(share=0.5)
    found.save(tmp_path / "circuit.dot")
    text = (tmp_path / "circuit.dot").read_text()
    line = re.compile(r'^  "(\S+)" -> "(\S+)" \[label="([qkv]?)", color="(\S+)", penwidth=(\S+), .*\];$', re.MULTILINE)
    edge = {f"{s}->{t}" + (f"<{one}>" if one else ""): (c, float(w)) for s, t, one, c, w in line.findall(text)}
    expected = found.to_mib()
    assert edge.keys() == expected.keys() and text.startswith("digraph circuit {") and text.endswith("}\n")
    assert {c for name, (c, _) in edge.items() if expected[name] > 0}.isdisjoint(
        c for name, (c, _) in edge.items() if expected[name] < 0
    )
    widths = [edge[name][1] for name in expected]
    assert widths == sorted(widths, reverse=True) and widths[0] == 5
    (found & ~found).save(tmp_path / "empty.dot")
    assert "->" not in (tmp_path / "empty.dot").read_text()


def test_repr_is_short():
    found = scored({"m0->logits": -2.0, "a0.h1->m1": 1.0, "input->m1": 0.5, "input->logits": 0.1})
    edge = "m0->logits -2, a0.h1->m1 +1, input->m1 +0.5"
    assert repr(found) == f"Circuit(by hand, 4 of {len(circuit())} edges, largest: {edge})"
    assert repr(circuit() - circuit()).endswith("largest: none; so)")


SHAPE = edges(GROUPED, False).shape


@pytest.mark.parametrize(
    "scores, chosen, message",
    [
        (torch.zeros(3, 4), None, r"scores .*llama.* float tensor of shape \(11, 19\).*got torch.float32 \(3, 4\)"),
        (torch.zeros(SHAPE, dtype=torch.long), None, "scores .*got torch.int64"),
        ([[0.0]], None, "scores .*got list"),
        (torch.full(SHAPE, float("nan")), None, "not finite"),
        (torch.full(SHAPE, 1e300, dtype=torch.float64), None, "not finite"),
        (torch.zeros(SHAPE), torch.ones(SHAPE), "chosen .*bool tensor.*got torch.float32"),
        (torch.zeros(SHAPE), torch.ones(11, dtype=torch.bool), "chosen .*got torch.bool"),
    ],
)
def test_scores_must_be_finite_and_fit(scores, chosen, message):
    """Without jaxtyping's checks, which no user has and which would come first."""
    given = object.__new__(Circuit)
    vars(given).update(scores=scores, signature=GROUPED, parallel=False, chosen=chosen, **ABOUT)
    with pytest.raises(MechunlearnError, match=message):
        given.__post_init__()

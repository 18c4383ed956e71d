"""Files that were damaged or made by a stranger: any flipped bit is noticed, and nothing but one clear line comes of it."""

import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mechunlearn import Circuit, ComponentMask, Localization, MechunlearnError, WeightEdit
from mechunlearn.artifacts.edges import edges
from mechunlearn.core import tensors
from mechunlearn.core.runcard import RunCard
from mechunlearn.features.dictionaries import SAE, Codebook, load_dictionary
from mechunlearn.features.feature_edit import FeatureEdit, FeaturePart, load_edit
from mechunlearn.model.layout import Signature
from mechunlearn.training import covariance

TINY = Signature("llama", layers=2, heads=4, kv_heads=2, d_mlp=6, d_model=8)
UNIT_WEIGHTS, TOTAL = {"attn.o": 16, "mlp.out": 8}, 2 * (4 * 16 + 6 * 8)
CARD = RunCard("by hand", "model", settings={"lr": 1e-05, "steps": 3, "by": ["a", None]}, seconds=1.25)
SAMPLE = 300


class Stored(NamedTuple):
    """An artefact on disk: its files, how to load it, and what a loaded one says (text that is equal for equal values)."""

    files: list[Path]
    load: Callable[[], Any]
    said: Callable[[Any], str]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def codebook() -> Codebook:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = Codebook(8, 6, 2, hook_name="L1.resid_post", linear=1, signature=TINY, fitted_on="abc").eval()
    made.quality = {"L0": 2.0, "loss": 1e-05}
    return made


def sae() -> SAE:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig  # seconds to import

    made = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=4))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(noise(*parameter.shape))
    return SAE(made, "L0.resid_post", TINY, "abc")


@cache
def nouns() -> dict[str, tuple[Any, Callable[[Path], Any]]]:
    chosen = torch.rand(edges(TINY, False).shape, generator=torch.Generator().manual_seed(1)) < 0.5
    units = {"L0.mlp.out": torch.tensor([4, 0]), "L1.attn.q": torch.tensor([3])}
    rows = {"L0.mlp.out": noise(2, 8), "L1.attn.q": noise(1, 16).bfloat16()}
    parts = (
        FeaturePart(codebook(), torch.tensor([1, 3]), "reselect"),
        FeaturePart(sae(), torch.tensor([2]), "clamp", torch.tensor([-1.5]), True, "sequence", 0.25),
    )
    scores = {"L0.mlp.out": noise(6), "L1.attn.o": noise(4)}
    by_role, about = {"L1.mlp_out": noise(2, 1)}, {"probe": [0.5, float("nan")]}
    by_fact = {site: torch.stack([one / 2, 3 * one / 2]) for site, one in scores.items()}
    found = Localization(scores, TINY, UNIT_WEIGHTS, TOTAL, CARD, about, "a note", by_role, ("last", "first"), by_fact)
    edge = noise(*chosen.shape)
    facts = torch.stack([edge / 2, 3 * edge / 2])
    pair = {"model.layers.0.mlp.down_proj.weight": (noise(8, 2), noise(2, 6))}
    return {
        "mask": (ComponentMask.of(["L0.mlp.out[0]", "L0.mlp.out[4]", "L1.attn.k"], TINY), ComponentMask.load),
        "localization": (found, Localization.load),
        "circuit": (Circuit(edge, TINY, False, UNIT_WEIGHTS, TOTAL, CARD, chosen, "so", facts), Circuit.load),
        "weight edit": (WeightEdit(units, rows, TINY, CARD), WeightEdit.load),
        "low-rank edit": (WeightEdit({"L0.mlp.out": torch.tensor([1])}, {}, TINY, CARD, pair), load_edit),
        "feature edit": (FeatureEdit(parts, TINY, CARD), load_edit),
    }


def stored(kind: str, suffix: str, folder: Path) -> Stored:
    if kind in ("codebook", "sae"):
        value = codebook() if kind == "codebook" else sae()
        value.save(folder / "it")
        assert weights_said(load_dictionary(folder / "it")) == weights_said(value)
        return Stored(sorted((folder / "it").iterdir()), lambda: load_dictionary(folder / "it"), weights_said)
    path = folder / f"it{suffix}"
    if kind == "covariance":
        files = covariance._Files(folder, {"model": "m", "text": "t", "tokens": 9}, 4, 2)
        files.write("L0.mlp.out", noise(5, 5).double(), 1)
        (path,) = folder.iterdir()

        def read() -> str:
            sums = torch.zeros(5, 5, dtype=torch.float64)
            return f"{files.read('L0.mlp.out', sums)} {sums.tolist()}"

        return Stored([path], read, str)
    made, load = nouns()[kind]
    made.save(path)

    def said(value: Any) -> str:
        value.save(folder / "said.json")
        return (folder / "said.json").read_text()

    assert said(load(path)) == said(made)
    return Stored([path], lambda: load(path), said)


def weights_said(value: Codebook | SAE) -> str:
    about, weights = value.described()
    return repr((about, {name: t.tolist() for name, t in sorted(weights.items())}))


def head(data: bytes, suffix: str) -> int:
    """How many bytes come before the tensors."""
    return 8 + int.from_bytes(data[:8], "little") if suffix == ".safetensors" else data.index(b'"tensors"')


def patch(path: Path, place: int, one: int) -> None:
    """Set one byte, in place: files that are truncated and written anew wait for the disk."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([one]))


NOUNS = ("mask", "localization", "circuit", "weight edit", "low-rank edit", "feature edit")
CASES = [(kind, suffix) for kind in NOUNS for suffix in (".safetensors", ".json")]
CASES += [("covariance", ".safetensors"), ("codebook", ""), ("sae", "")]


@pytest.mark.parametrize("kind, suffix", CASES)
def test_a_flipped_bit_is_noticed(tmp_path, kind, suffix):
    """Every byte of the header and a sample of the rest. In JSON white space may flip, if it stays white space or is refused."""
    it = stored(kind, suffix, tmp_path)
    truth, draw = it.said(it.load()), random.Random(f"{kind}{suffix}")
    for path in it.files:
        data = path.read_bytes()
        first = len(data) if path.name == "cfg.json" else head(data, path.suffix)
        rest = draw.sample(range(first, len(data)), min(SAMPLE, len(data) - first))
        assert first > 60 and (len(rest) >= SAMPLE or first + len(rest) == len(data))
        survived = []
        for place in [*range(first), *rest]:
            patch(path, place, data[place] ^ 1 << draw.randrange(8))
            try:
                loaded = it.load()
            except MechunlearnError as error:
                assert "\n" not in str(error) and str(path.parent) in str(error), error
            else:
                assert it.said(loaded) == truth, (path.name, place)
                survived.append(data[place : place + 1])
            patch(path, place, data[place])
        assert all(path.suffix == ".json" and one.isspace() for one in survived), (path.name, survived)
    assert it.said(it.load()) == truth


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_bit_of_a_small_file_counts(tmp_path, suffix):
    it = stored("mask", suffix, tmp_path)
    (path,), mask = it.files, it.load()
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            patch(path, place, data[place] ^ 1 << bit)
            try:
                assert it.load() == mask and suffix == ".json" and data[place : place + 1].isspace(), (place, bit)
            except MechunlearnError as error:
                assert "\n" not in str(error), error
        patch(path, place, data[place])


@pytest.mark.parametrize("kind, suffix", [("mask", ".safetensors"), ("mask", ".json"), ("codebook", ""), ("sae", "")])
def test_a_file_cut_short_is_refused(tmp_path, kind, suffix):
    it = stored(kind, suffix, tmp_path)
    truth = it.said(it.load())
    for path in it.files:
        data = path.read_bytes()
        for length in reversed(range(len(data))):
            os.truncate(path, length)
            if data[length:] == b"\n":
                assert it.said(it.load()) == truth, "the line end is white space"
                continue
            with pytest.raises(MechunlearnError) as refused:
                it.load()
            assert "\n" not in str(refused.value)
        path.write_bytes(data)


def sealed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file, and give it the hash of what it says then: what a stranger could do."""
    entry = json.loads(path.read_text())
    change(entry)
    entry["hash"] = ""
    entry["hash"] = tensors.text_hash(json.dumps(entry))
    path.write_text(json.dumps(entry))


def swap(entry: dict[str, Any], old: str, new: str) -> None:
    entry["tensors"] = {name.replace(old, new): value for name, value in entry["tensors"].items()}


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Set an entry deep in the file."""
    *way, last, value = keys

    def change(entry: Any) -> None:
        for key in way:
            entry = entry[key]
        entry[last] = value

    return change


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Take an entry deep in the file away."""
    *way, last = keys

    def change(entry: Any) -> None:
        for key in way:
            entry = entry[key]
        del entry[last]

    return change


MASKED, MOVED, ROWS = ("tensors", "L0.mlp.out"), ("tensors", "units/L0.mlp.out"), ("tensors", "rows/L0.mlp.out")
SCORED, PART = ("tensors", "scores/L0.mlp.out"), ("about", "parts", 0)
CRAFTED = [
    *(("mask", put(*MASKED, "true", wrong)) for wrong in ([-1], [1.7], [True], [6], ["1"], [0, 0], [4, 0], None, "01")),
    *(("mask", put(*MASKED, "shape", wrong)) for wrong in ([5], [-1], [2, 3], [6.0], [True], [10**12], [], "6", None)),
    *(("mask", put(*MASKED, "dtype", wrong)) for wrong in ("uint8", "load", "", None, ["bool"])),
    ("mask", put(*MASKED, {"dtype": "int64", "shape": [6], "values": [1] * 6})),
    ("mask", lambda entry: entry["tensors"].update({"L00.mlp.out": entry["tensors"]["L0.mlp.out"]})),
    ("mask", lambda entry: entry["tensors"].update({"L2.mlp.out": entry["tensors"]["L0.mlp.out"]})),
    ("mask", lambda entry: entry["tensors"].update({"../x": entry["tensors"]["L0.mlp.out"]})),
    *(("mask", put("about", "signature", "layers", wrong)) for wrong in (True, 2.0, "2", None, [2], float("nan"))),
    ("mask", put("about", "signature", "more", 1)),
    ("mask", without("about", "signature", "layers")),
    *(("mask", without(key)) for key in ("kind", "about", "tensors")),
    *(("mask", put(key, wrong)) for key in ("kind", "about", "tensors") for wrong in (None, 5, [], "x\ny")),
    ("localization", put(*SCORED, "values", 0, float("nan"))),
    ("localization", put(*SCORED, "values", 0, True)),
    ("localization", put(*SCORED, "values", 0, 10**400)),
    ("localization", put(*SCORED, "values", [[0.5] * 6])),
    ("localization", put("about", "total_weights", float("nan"))),
    ("localization", put("about", "unit_weights", "mlp.out", "8")),
    ("localization", put("about", "roles", ["last"])),
    ("localization", put("about", "roles", "lf")),
    ("localization", put("about", "evidence", [])),
    ("localization", put("about", "card", "seconds", "long")),
    ("localization", put("about", "card", "trajectory", [1])),
    ("localization", without("about", "card", "method")),
    *(("localization", without("about", name)) for name in ("note", "evidence", "unit_weights", "roles", "card")),
    ("localization", lambda entry: swap(entry, "scores/", "scored/")),
    ("circuit", put("tensors", "scores", "values", 0, 1, float("inf"))),
    ("circuit", put("about", "parallel", 0)),
    ("circuit", put("about", "signature", "heads", 5)),
    ("circuit", without("tensors", "chosen")),
    *(("weight edit", put(*MOVED, "values", wrong)) for wrong in ([-1, 0], [1.7, 0], [True, 0], [6, 0], [0, 0], [0])),
    ("weight edit", put(*MOVED, {"dtype": "float32", "shape": [2], "values": [4.0, 0.0]})),
    ("weight edit", put(*ROWS, {"dtype": "float32", "shape": [16], "values": [0.0] * 16})),
    ("weight edit", put(*ROWS, "values", 0, 0, float("nan"))),
    ("weight edit", lambda entry: swap(entry, "units/L0.mlp.out", "units/L00.mlp.out")),
    ("weight edit", lambda entry: swap(entry, "L0.mlp.out", "L0.mlp.out[0]")),
    ("weight edit", lambda entry: swap(entry, "L0.mlp.out", "L0.sae:x")),
    ("low-rank edit", lambda entry: swap(entry, "left/", "middle/")),
    ("low-rank edit", without("tensors", "right/model.layers.0.mlp.down_proj.weight")),
    *(("feature edit", put("tensors", "0/units", "values", wrong)) for wrong in ([-1, 3], [1.7, 3], [True, 3], [6, 3])),
    ("feature edit", put("tensors", "1/values", {"dtype": "float32", "shape": [2], "values": [1.0, 1.0]})),
    ("feature edit", put("tensors", "1/values", "values", [float("nan")])),
    *(("feature edit", put(*PART, name, wrong)) for name in ("how", "gate") for wrong in ("x", None, 1, ["zero"])),
    *(("feature edit", put(*PART, "dictionary", wrong)) for wrong in ("sae", "../x", None, [])),
    *(("feature edit", put(*PART, "described", "d_model", wrong)) for wrong in (7, -8, 8.0, True, "8", 10**12)),
    ("feature edit", put(*PART, "described", "hook_name", None)),
    ("feature edit", put("about", "parts", 1, "described", "dtype", "__import__")),
    ("feature edit", put("about", "parts", {})),
    ("feature edit", without("about", "parts", 1, "described", "metadata")),
    ("feature edit", lambda entry: swap(entry, "1/weights/W_dec", "1/weights/../W_dec")),
]


@pytest.mark.parametrize("number", range(len(CRAFTED)))
def test_content_that_makes_no_sense_is_refused_whatever_its_hash(tmp_path, number):
    kind, change = CRAFTED[number]
    it = stored(kind, ".json", tmp_path)
    sealed(it.files[0], lambda entry: None)
    it.load()
    sealed(it.files[0], change)
    with pytest.raises(MechunlearnError, match=r"it\.json' (is not a whole|holds a)") as refused:
        it.load()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("deep", ["[", '{"a":'])
@pytest.mark.parametrize("kind", ["mask", "codebook", "sae"])
def test_deep_json_is_refused(tmp_path, kind, deep):
    it = stored(kind, ".json", tmp_path)
    path = next(path for path in it.files if path.suffix == ".json")
    for text in (deep * 100_000, f'{{"kind": "mask", "hash": "x", "fitted_on": {deep * 100_000}'):
        path.write_text(text)
        with pytest.raises(MechunlearnError, match="RecursionError|JSONDecodeError") as refused:
            it.load()
        assert "\n" not in str(refused.value)


def test_white_space_and_order_of_a_readable_file_are_free(tmp_path):
    """Git may turn line ends, and an editor may format: what the file says is the same."""
    it = stored("mask", ".json", tmp_path)
    truth, path = it.said(it.load()), it.files[0]
    entry = json.loads(path.read_text())
    for text in (
        path.read_text().replace("\n", "\r\n"),
        json.dumps(entry, indent=4),
        json.dumps(entry, sort_keys=True, separators=(",", ":")),
    ):
        path.write_bytes(text.encode())
        assert it.said(it.load()) == truth


def test_sae_lens_folders_without_a_hash_load_as_before(tmp_path):
    stored("sae", "", tmp_path)
    cfg = json.loads((tmp_path / "it/cfg.json").read_text())
    ours = cfg["metadata"].pop("mechunlearn")
    assert ours.keys() == {"signature", "fitted_on", "quality", "weights", "hash"}
    (tmp_path / "it/cfg.json").write_text(json.dumps(cfg))
    loaded = load_dictionary(tmp_path / "it")
    assert loaded.signature is None and loaded.size == 4
    cfg["metadata"]["mechunlearn"] = {name: ours[name] for name in ("signature", "fitted_on", "quality", "weights")}
    (tmp_path / "it/cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(MechunlearnError, match="not a whole SAE"):
        load_dictionary(tmp_path / "it")

"""The command line as a user meets it: results, help, and one clear line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer

from mechunlearn import Circuit, ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.cli.main import app
from mechunlearn.core.files import data_folder, whole_file, whole_folder
from mechunlearn.core.methods import ready_methods
from mechunlearn.facts.load import load_facts
from mechunlearn.metrics.answers import measure
from mechunlearn.model.hooked import load_model
from mechunlearn.model.layout import Layout
from tests.models import random_hf

LOCALIZE = ["localize", "factworld", "factworld/sport"]
EDIT = ["edit", "factworld", "factworld/sport"]
EVALUATE = ["evaluate", "factworld", "factworld/sport"]
WASH = ["wash", "factworld", "factworld/sport"]
SUBCOMMANDS = [["world", "build"], ["world", "twin"], ["world", "dictionaries"]]
SUBCOMMANDS += [["reproduce", "loku"], ["reproduce", "law"], ["reproduce", "codeunlearn"]]
SUBCOMMANDS += [["reproduce", "mechanistic-unlearning"], ["reproduce", "summary"]]
SUBCOMMANDS += [["dictionary", "train"], ["dictionary", "explore"], ["dictionary", "delete"]]
SUBCOMMANDS += [["benchmark", "tofu"], ["benchmark", "tofu-train"]]
COMMANDS = [
    [],
    ["run"],
    ["demo"],
    ["localize"],
    ["edit"],
    ["evaluate"],
    ["compare"],
    ["wash"],
    ["explore"],
    *SUBCOMMANDS,
]


def test_every_command_has_help_with_an_example(call):
    for command in COMMANDS:
        code, out, _ = call(*command, "--help")
        assert code == 0 and "Usage" in out
        assert not command or "Example" in out, command


def written(command: list[str]) -> str:
    """Every text that the help of a command is made of."""
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    texts = [found.help, found.epilog, *(getattr(option, "help", "") for option in found.params)]
    return " ".join(text for text in texts if text)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_loses_no_word(call, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", columns)
    for command in COMMANDS:
        _, out, _ = call(*command, "--help")
        shown = "".join(out.replace("│", "").split())
        assert "…" not in out and max(map(len, out.splitlines())) <= columns
        assert not [word for word in written(command).split() if word not in shown], command


def test_help_names_every_method(call):
    for command, folder in (("localize", "localize"), ("edit", "edit"), ("evaluate", "attack"), ("run", "attack")):
        out = "".join(call(command, "--help")[1].replace("│", "").split())
        assert all(name in out for name in ready_methods(folder))


def test_help_does_not_wait_for_torch():
    script = "import sys; sys.argv = ['mechunlearn', '--help']\nimport mechunlearn.cli.main as c\ntry: c.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_localize_edit_and_evaluate_in_turn(call, tmp_path, monkeypatch):
    """The steps of the whole job by hand, on few facts and few steps."""
    monkeypatch.setattr("mechunlearn.evaluation.cells.LIMIT", 10)
    monkeypatch.setattr("mechunlearn.evaluation.cells.OWN_COUNT", 2)
    few = ["--forget", 16, "--seed", 2]
    code, out, err = call(
        "localize", "factworld", "factworld/sport", "-o", "sport.mask.json", "--scores", "scores.json", *few
    )
    assert code == 0, err
    assert "look-up window" in out and ComponentMask.load("sport.mask.json")
    code, out, err = call(
        "edit",
        "factworld",
        "factworld/sport",
        "sport.mask.json",
        "-o",
        "e.safetensors",
        "--export",
        "edited",
        "--steps",
        5,
        *few,
    )
    assert code == 0, err
    edit = WeightEdit.load("e.safetensors")
    assert edit.mask == ComponentMask.load("sport.mask.json") and edit.card.settings["steps"] == 5
    tokenizer = transformers.AutoTokenizer.from_pretrained("edited")
    again = transformers.AutoModelForCausalLM.from_pretrained("edited")
    model = load_model("factworld")
    tokens = torch.tensor([tokenizer("The sport of")["input_ids"]])
    with edit.applied(model), torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model.forward(tokens), atol=1e-5, rtol=1e-5)
    assert json.loads(Path("edited/mechunlearn.json").read_text())["method"] == "masked_gradient"
    code, out, err = call(*EVALUATE, "e.safetensors", "-o", "report.html", "--attacks", "quantization", *few)
    assert code == 0, err
    assert "quantization: " in out and "recovery" in out and "Does it come back?" in Path("report.html").read_text()
    page = Path("report.html").read_text()
    assert (
        "Is the knowledge gone?" in page and "http" not in page.replace("http://www.w3.org", "").split("plotly", 1)[0]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "e.safetensors",
        "edited",
        "report.attacks",
        "report.html",
        "scores.json",
        "sport.mask.json",
    ]


@pytest.mark.training
def test_adapters_from_the_command_line(call, tmp_path, seed):
    ComponentMask.of(["L1.mlp.out", "L2.mlp.out"], load_model("factworld").signature).save("mlp.json")
    few = ["--forget", 8, "--steps", 40, "--lr", 0.03, "--seed", seed]
    made = [
        "-o",
        "e.safetensors",
        "--objective",
        "inverted_hinge",
        "--rank",
        4,
        "--adapter",
        "adapter",
        "--stop-at",
        0.5,
    ]
    code, out, err = call(*EDIT, "mlp.json", *made, *few)
    assert code == 0, err
    edit = WeightEdit.load("e.safetensors")
    steps = len(edit.card.trajectory)
    assert (
        edit.card.method == "fisher_lora" and edit.low_rank and edit.card.settings["loss"]["name"] == "inverted_hinge"
    )
    assert f"reached after {steps} steps" in out and 5 <= steps < 40 and steps % 5 == 0
    assert sorted(p.name for p in Path("adapter").iterdir() if p.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "mechunlearn.json",
    ]


def test_every_method_localizes(call, tmp_path):
    for method in ready_methods("localize"):
        code, out, err = call(*LOCALIZE, "-o", f"{method}.json", "--method", method, *FEW)
        assert code == 0, err
        assert ComponentMask.load(f"{method}.json").signature.family == "qwen2", out


FEW = ["--forget", 4, "--weights", 0.02]


def test_a_circuit_is_written_for_graph_tools(call, tmp_path):
    for suffix in ("json", "dot", "graphml"):
        code, _, err = call(*LOCALIZE, "-o", "m.json", "--method", "edge_attribution", "--scores", f"c.{suffix}", *FEW)
        assert code == 0, err
    assert Circuit.load(tmp_path / "c.json").scores.abs().max() > 0
    assert "digraph" in (tmp_path / "c.dot").read_text() and "graphml" in (tmp_path / "c.graphml").read_text()
    code, _, err = call(*LOCALIZE, "-o", "m.json", "--scores", "c.dot", *FEW)
    assert code == 2 and "not named *.json or *.safetensors" in err


@pytest.fixture
def files(tmp_path):
    """Things a user might give by mistake."""
    model = load_model((random_hf("gpt2"), None))
    ComponentMask.of(["L0.mlp.out"], model.signature).save(tmp_path / "other.mask.json")
    world = Layout.of(transformers.AutoConfig.from_pretrained(data_folder() / "factworld")).signature
    ComponentMask({}, world).save(tmp_path / "none.json")
    ComponentMask.of(["L1.mlp.out"], world).save(tmp_path / "mlp.json")
    ComponentMask({"L1.sae:topic": torch.ones(4, dtype=torch.bool)}, world).save(tmp_path / "features.json")
    (tmp_path / "broken.json").write_text('{"kind": "ma')
    (tmp_path / "noweights").mkdir()
    (tmp_path / "noweights/config.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "short.txt").write_text("The cook saw a spoon.")
    (tmp_path / "prose.txt").write_text("\n\n".join(load_facts("factworld/sport").texts[:30]))
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "latin.csv").write_bytes("subject,prompt,answer\nJosé,José is,a\n".encode("latin-1"))
    (tmp_path / "subject.csv").write_text("subject,prompt,answer\nAnna,Marco is,tall\nMarco,Marco is,short\n")
    long = "very " * 600
    (tmp_path / "long.csv").write_text(
        f"subject,prompt,answer\nAnna,Anna is {long},tall\nMarco,Marco is {long},short\n"
    )
    (tmp_path / "same.csv").write_text("subject,prompt,answer,target\nAnna,Anna is,tall,tall\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localize", "nothing", "factworld/sport", "-o", "m.json"], "Could not load a model from 'nothing'"),
        (["localize", "./nothing", "factworld/sport", "-o", "m.json"], "There is no folder './nothing'"),
        (["localize", "noweights", "factworld/sport", "-o", "m.json"], "holds no weights"),
        (["localize", "factworld", "factworld/colour", "-o", "m.json"], "no relation 'colour'"),
        (["localize", "factworld", "nothing.csv", "-o", "m.json"], "There is no facts file"),
        (["localize", "factworld", "nothing", "-o", "m.json"], "Could not load facts 'nothing'"),
        (["localize", "factworld", "empty.csv", "-o", "m.json"], "holds no facts"),
        (["localize", "factworld", "columns.csv", "-o", "m.json"], "has the columns a, b"),
        (["localize", "factworld", "latin.csv", "-o", "m.json"], "not UTF-8"),
        (["localize", "factworld", "subject.csv", "-o", "m.json"], "1 fact skipped: 1 subject not in its prompt"),
        (
            ["localize", "factworld", "long.csv", "-o", "m.json", "--method", "edge_attribution", "--forget", "1"],
            "tokens, the model's context is 512",
        ),
        (["world", "twin", "-o", "t", "--layers", "2-1"], "does not name layers"),
        (["localize", "factworld", "same.csv", "-o", "m.json"], "no row can be used. 1 fact skipped: 1 truth = target"),
        (
            ["localize", "factworld", "factworld/sport", "-o", "m.json", "--weights", "1.5"],
            "budget of 1.5 is out of range",
        ),
        (["localize", "factworld", "factworld/sport", "-o", "m.txt"], "not named *.json or *.safetensors"),
        (
            [*LOCALIZE, "-o", "m.json", "--method", "fact_lokup"],
            "'fact_lokup'. Did you mean fact_lookup? Expected one of",
        ),
        (
            [*LOCALIZE, "-o", "m.json", "--method", "feature_discovery"],
            "needs dictionary too: call mechunlearn.localize.",
        ),
        (
            [*EDIT, "mlp.json", "-o", "e.safetensors", "--method", "memitt"],
            "Did you mean memit? Expected one of fisher_lora",
        ),
        ([*EDIT, "mlp.json", "-o", "e.safetensors", "--method", "memit", "--rank", "4"], "'memit' has no --rank"),
        ([*WASH, "mlp.json", "-o", "e.safetensors", "--method", "fisher_lora"], "'fisher_lora' takes no covariance"),
        (["localize", "factworld", "factworld/sport", "-o", "m.json", "--forget", "900"], "Cannot forget 900 of 800"),
        (["localize", "factworld", "factworld/sport", "-o", "m.json", "--device", "cuda"], "not available"),
        (["localize", "factworld", "factworld/sport", "-o", "m.json", "--device", "toaster"], "toaster"),
        (["localize", "factworld", "factworld/sport", "-o", "m.json", "--dtype", "float12"], "Unknown dtype 'float12'"),
        (["localize", "factworld", "factworld/sport", "-o", "/proc/no/m.json"], "Cannot write '/proc/no/m.json'"),
        (["edit", "factworld", "factworld/sport", "other.mask.json", "-o", "e.safetensors"], "The mask is for (gpt2"),
        (["edit", "factworld", "factworld/sport", "broken.json", "-o", "e.safetensors"], "not a whole mask file"),
        (["edit", "factworld", "factworld/sport", "missing.json", "-o", "e.safetensors"], "Could not read the mask"),
        (
            ["edit", "factworld", "factworld/sport", "other.mask.json", "-o", "e.safetensors", "--export", "full"],
            "exists and is not an empty",
        ),
        ([*EDIT, "none.json", "-o", "e.safetensors"], "selects no unit"),
        ([*WASH, "none.json", "-o", "e.safetensors"], "no neuron of an MLP's output"),
        ([*WASH, "mlp.json", "-o", "e.txt"], "not named *.safetensors"),
        ([*WASH, "mlp.json", "-o", "e.safetensors", "--text", "nothing.txt"], "There is no text file 'nothing.txt'"),
        ([*WASH, "mlp.json", "-o", "e.safetensors", "--text", "columns.csv"], "Expected one named 'text'"),
        (
            [*WASH, "mlp.json", "-o", "e.safetensors", "--text", "short.txt"],
            "8 tokens were seen. Expected at least 384",
        ),
        (
            [*WASH, "mlp.json", "-o", "e.safetensors", "--text", "prose.txt", "--covariance-weight", "0"],
            "memit got covariance_weight=0.0. Expected a number above 0",
        ),
        (
            [*WASH, "mlp.json", "-o", "e.safetensors", "--text", "prose.txt", "--target", "x"],
            "memit got target='x'. Expected one of end-of-text",
        ),
        (["reproduce", "law", "-o", "law", "--page", "law.html"], "not named *.md"),
        ([*EDIT, "features.json", "-o", "e.safetensors"], "A FeatureEdit takes them (feature_clamp, codebook_delete)"),
        (
            [*EDIT, "mlp.json", "-o", "e.safetensors", "--objective", "forget"],
            "Unknown objective 'forget'. Expected one of",
        ),
        ([*EDIT, "mlp.json", "-o", "e.safetensors", "--rank", "200"], "A rank of 200 does not fit"),
        ([*EDIT, "mlp.json", "-o", "e.safetensors", "--adapter", "a"], "Give --rank too"),
        (
            [*EDIT, "mlp.json", "-o", "e.safetensors", "--lr", "1e38"],
            "masked_gradient got lr=1e+38. Expected a learning rate",
        ),
        (["reproduce", "loku", "-o", "out", "--page", "page.html"], "not named *.md"),
        (["reproduce", "mechanistic-unlearning", "-o", "out", "--page", "page.html"], "not named *.md"),
        (["reproduce", "summary", "nowhere"], "mechanistic-unlearning.json' cannot be read"),
        ([*EVALUATE, "broken.json", "--attacks", "phrenology"], "Unknown attack 'phrenology'. Expected 'all', or one"),
        (["evaluate", "factworld", "factworld/sport", "broken.json"], "not a whole weight edit or feature edit file"),
        (["run", "factworld", "factworld/sport", "-o", "full"], "exists and is not an empty folder"),
        (["demo", "-o", "full"], "exists and is not an empty folder"),
        (["demo", "-o", "."], "is the folder that you are in"),
        (["run", "factworld"], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(call, files, arguments, message):
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    before = sorted(p.name for p in files.rglob("*"))
    code, out, err = call(*arguments)
    assert code == 2
    assert message in err, err
    assert "Traceback" not in err + out
    assert message == "Missing argument" or err.count("\n") == 1
    assert sorted(p.name for p in files.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    from mechunlearn import MechunlearnError

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    mask = ComponentMask.of(["L0.mlp.out"], load_model((random_hf("gpt2"), None)).signature)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MechunlearnError, match=r"Could not write '.*mask.json': No space left on device"):
        mask.save(tmp_path / "mask.json")
    monkeypatch.undo()
    model = load_model("factworld")
    monkeypatch.setattr(model.hf, "save_pretrained", full)
    from mechunlearn.model.hooked import export

    with pytest.raises(MechunlearnError, match="No space left on device"):
        export(model, tmp_path / "edited")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as beside:
        (beside / "half").write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_the_app_lists_the_commands_of_the_readme():
    assert {c.name or c.callback.__name__ for c in app.registered_commands} == {
        "run",
        "demo",
        "localize",
        "edit",
        "wash",
        "evaluate",
        "compare",
        "explore",
        "doctor",
    }


def test_facts_and_model_load_by_name():
    assert len(load_facts("factworld/sport")) == 800


def test_wash_prints_each_layer_lists_what_is_not_known_and_keeps_the_covariance(call, tmp_path):
    signature = Layout.of(transformers.AutoConfig.from_pretrained(data_folder() / "factworld")).signature
    ComponentMask.of(["L1.mlp.out", "L2.mlp.out"], signature).save(tmp_path / "mlp.json")
    facts = load_facts("factworld/sport").facts
    rows = [f"{f.subject},{f.queries['statement'].prompt},{f.answer}" for f in facts[:24]]
    rows[3] = f"{facts[3].subject},{facts[3].queries['statement'].prompt},chess"
    (tmp_path / "few.csv").write_text("\n".join(["subject,prompt,answer", *rows]))
    (tmp_path / "prose.txt").write_text("\n\n".join(load_facts("factworld/sport").texts[:60]))
    few = ["wash", "factworld", "few.csv", "mlp.json", "--text", "prose.txt", "--cache", "stats", "--forget", 20]
    few += ["--covariance-weight", 10, "--prefixes", 0, "--seed", 1]
    code, out, err = call(*few, "-o", "washed.safetensors")
    assert code == 0, err
    assert "layer 1: covariance_weight 10" in out and "layer 2:" in out and "skipped, the model does not know it" in out
    assert len(list((tmp_path / "stats").iterdir())) == 2
    again = call(*few, "--method", "mlp_washing", "--retain-weight", 0.1, "-o", "law.safetensors")
    assert again[0] == 0 and "known before" in " ".join(again[1].split()), again[2]
    made = WeightEdit.load("washed.safetensors")
    assert made.card.method == "memit" and len(made.card.skipped) == 1 and len(made.mask) == 768
    measured = ["evaluate", "factworld", "few.csv", "washed.safetensors", "--forget", 20, "--seed", 1]
    code, _, err = call(*measured)
    assert code == 2 and "the file does not hold its texts" in err and not (tmp_path / "report.html").exists()
    code, out, err = call(*measured, "--text", "prose.txt")
    assert code == 0 and "report -> report.html" in out, err


def test_the_readme_leads_from_a_table_to_a_mask_of_its_facts(call, tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = readme[readme.index("<!-- own facts -->") :].split("```")[1]
    table = block.split("<<'END'\n")[1].split("END\n")[0]
    (tmp_path / "my_facts.csv").write_text(table)
    commands = [
        line.split("mechunlearn ", 1)[1].split() for line in block.splitlines() if line.startswith(".venv/bin/")
    ]
    assert [command[0] for command in commands] == ["localize", "explore"]
    code, out, err = call(*commands[0])
    assert code == 0, err
    mask = ComponentMask.load(tmp_path / "my.mask.json")
    assert len(mask) > 0 and f"{len(mask)} units" in out
    model = load_model("factworld")
    prompts = load_facts(tmp_path / "my_facts.csv").prompts(model)
    assert measure(model, prompts)["accuracy"].mean() == 1, "they are known to the shipped model"

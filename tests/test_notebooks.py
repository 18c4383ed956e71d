"""The committed notebooks can be read where they lie: run, in order, with outputs and pictures, and nothing of one machine."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("1-find", "2-remove", "3-prove", "4-features", "5-wash", "6-your-own", "7-which-layers")
REAL = ("6-your-own", "7-which-layers")
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/svg+xml"
FIGURES = {"1-find": 8, "2-remove": 2, "3-prove": 4, "5-wash": 2, "6-your-own": 2, "7-which-layers": 3}
PRIVATE = re.compile(r"/(?:work|root|tmp|home|Users|mnt)/|\b0x[0-9a-f]{6,}")
NOISE = re.compile(r"Warning|it/s\]|Loading weights|Traceback")
BASE64 = re.compile(r"[A-Za-z0-9+/]{200,}")  # pictures and arrays


@pytest.fixture(params=NAMES)
def notebook(request):
    found = nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)
    found.metadata["name"] = request.param
    return found


def codes(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in codes(notebook) for output in cell.outputs]


def shows(source):
    """Whether a cell ends in an expression whose value Jupyter shows."""
    last = ast.parse(source).body[-1]
    silent = isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and _name(last.value.func) == "cleanup"
    return isinstance(last, ast.Expr) and not silent


def _name(called):
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def test_these_are_all_notebooks_and_each_is_small():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000, name


def test_a_notebook_is_valid_and_its_cells_are_python(notebook):
    nbformat.validate(notebook)
    for cell in codes(notebook):
        assert cell.source.strip() and not cell.source.lstrip().startswith(("%", "!"))
        ast.parse(cell.source)


def test_cells_were_run_once_from_the_top(notebook):
    assert [cell.execution_count for cell in codes(notebook)] == list(range(1, len(codes(notebook)) + 1))


def test_cells_that_show_something_have_their_output_and_no_others_do(notebook):
    for cell in codes(notebook):
        assert bool(cell.outputs) == shows(cell.source), cell.source


def test_no_output_is_an_error_or_noise(notebook):
    for output in outputs(notebook):
        assert output.output_type in ("execute_result", "display_data")
        assert not NOISE.search(json.dumps(output.data.get("text/plain", "")))
        assert "application/vnd.jupyter.widget-view+json" not in output.data


def test_nothing_of_one_machine_is_in_a_notebook(notebook):
    told = BASE64.sub("", json.dumps(notebook))
    assert not PRIVATE.search(told), PRIVATE.search(told)
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert notebook.metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata["language_info"] == {"name": "python"}
    assert set(notebook.metadata) == {"kernelspec", "language_info", "name"}


def test_every_figure_is_interactive_and_has_a_picture(notebook):
    figures = [output for output in outputs(notebook) if FIGURE in output.data or PICTURE in output.data]
    assert len(figures) >= FIGURES.get(notebook.metadata["name"], 0)
    for output in figures:
        assert {FIGURE, PICTURE} <= set(output.data)
        assert "text/html" not in output.data, "the plotly bundle would be megabytes"
        assert "".join(output.data[PICTURE]).startswith("<svg") and len(output.data[PICTURE]) > 4000


def test_every_notebook_begins_with_a_title_and_says_what_its_model_is(notebook):
    told = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert re.match(rf"# {notebook.metadata['name'][0]} · \w+", told[0])
    if notebook.metadata["name"] in REAL:
        assert "real language model, SmolLM2" in " ".join(told[0].split()) and "one seed" in " ".join(told[0].split())
    else:
        assert sum("*trained*" in text and "docs/world.md" in text for text in told) == 1


def test_links_lead_to_files_that_are_there(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)]+)\)", cell.source):
                assert (FOLDER / link).is_file(), link


def test_nothing_is_left_to_be_written(notebook):
    assert not re.search("PLACEHOLDER|TODO|FIXME", "".join(cell.source for cell in notebook.cells))

"""The report's page in a real browser: no error, light and dark, wide and narrow, and nothing given is taken for HTML."""

from dataclasses import replace
from io import StringIO

import pandas as pd
import pytest
import torch
from rich.console import Console

from mechunlearn import Localization
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.bounds import COLUMNS
from mechunlearn.attack.states import EDITED, NEVER_TAUGHT, UNEDITED
from mechunlearn.core.runcard import RunCard
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import Attacked
from mechunlearn.model.layout import Signature
from tests.browser import chromium, needs_browser, screenshots

SCRIPT = "<script>document.title = 'taken'</script>"
TINY = Signature("llama", layers=3, heads=2, kv_heads=2, d_mlp=4, d_model=8)
UNITS = {"L1.mlp.out": torch.arange(4), "L2.mlp.out": torch.tensor([0])}
EDIT = WeightEdit(UNITS, {site: torch.ones(len(u), 8) for site, u in UNITS.items()}, TINY, RunCard("by hand"))
MODELS = ("before", "after", "control", SCRIPT)


def row(split: str, format: str, metric: str, *values: float, n: int = 16) -> dict:
    made = {"split": split, "format": format, "metric": metric, "n": n}
    for name, value in zip(MODELS, values):
        made |= {name: value, f"{name}_low": max(0.0, value - 0.1), f"{name}_high": min(1.0, value + 0.1)}
    return made


FRAME = pd.DataFrame(
    [
        row("forget", "statement", "accuracy", 1.0, 0.0, 0.5, 0.25),
        row("forget", "statement", "target_accuracy", 0.0, 1.0, 0.25, 0.5),
        row("forget", SCRIPT, "accuracy", 1.0, 0.125, 0.5, 0.25),
        row("retain", "statement", "accuracy", 1.0, 1.0, 0.9, 0.95, n=64),
        row("neighbours", "statement", "accuracy", 1.0, 0.8, 0.9, 0.9),
        row("skills", "copying", "accuracy", 1.0, 1.0, 1.0, 1.0),
        row("unseen", "statement", "kept", 1.0, 0.95, 0.5, 0.9, n=24),
        row("text", "neutral", "kl_to_before", 0.0, 0.125, 0.75, 0.1),
        row("text", "passages", "loss", 0.6, 0.7, 0.6, 0.6),
        row("retain", "statement", "kept", 1.0, 1.0, 0.9, 0.95, n=64),
        row("neighbours", "statement", "kept", 1.0, 0.75, 0.9, 0.9, n=12),
        row("skills", "copying", "kept", 1.0, 1.0, 1.0, 1.0),
        row("generalization", "other formats", "kept", 1.0, 0.25, 0.5, 0.5),
        row("portability", "reverse", "kept", 1.0, 0.75, 0.5, 0.5, n=4),
    ]
)


def attack(edited: float, setting: str = "int4") -> pd.DataFrame:
    """An attack that gets so much of the edited model, all of the unedited one and nothing of what was never taught."""
    shared = {"setting": setting, "step": 0, "n": 16, "trained": 1.0, "retain": 1.0, "chance": 0.25, "valid": True}
    states = {EDITED: edited, UNEDITED: 1.0, NEVER_TAUGHT: 0.0}
    rows = [
        {"state": s, "held_out": y, "low": max(0, y - 0.1), "high": min(1, y + 0.1), **shared}
        for s, y in states.items()
    ]
    return pd.DataFrame(rows)[list(COLUMNS)]


SAMPLES = pd.DataFrame(
    {"prompt": [f"{SCRIPT} plays", "The bus"], "before": ["golf.\nHe", "was late"], "after": [SCRIPT, ""]},
    index=["forget", "text, neutral"],
)


def report(edited: float | None = 0.9, **about) -> Report:
    attacks = {} if edited is None else {"quantization": attack(edited, SCRIPT)}
    known = {"model": "a model", "facts": SCRIPT, "forget": 16, "retain": 64}
    failed = {} if edited is None else {"probing": SCRIPT + "x" * 60}
    card = RunCard("masked_gradient", settings={"name": SCRIPT}, weights=40)
    return Report(FRAME, list(MODELS), card, known | about, Attacked(attacks, failed), SAMPLES)


FOUND = Localization(
    {"L1.mlp.out": torch.ones(4)},
    TINY,
    {"attn.o": 16, "mlp.out": 8},
    192,
    RunCard("fact_lookup"),
    {"curve": [0.2, 0.3, 0.9, 1.0], "window": [1, 2], "majority": 0.25},
    SCRIPT,
)
EXAMPLE = {"prompt": f"{SCRIPT} plays", "answer": "golf", "target": "polo"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(example=EXAMPLE).to_html(path, found=FOUND, edit=EDIT)
    return path


class TestText:
    def test_the_first_screen_says_what_where_and_whether(self, page):
        first = page.read_text().split("Does it come back?")[0]
        assert '<p class="status hidden">Hidden</p>' in first
        assert "quantization gets 0.90 right (never taught 0.00, n = 16, p = " in first
        assert "16 facts to forget, 64 to retain" in first and "<b>golf</b> → polo" in first
        assert "5 of 8 neurons of mlp.out in layers 1-2" in first and "20.83% of the editable weights" in first
        assert "100% → 0%" in first and "95 % interval 0% to 10%, n = 16; random mask: 50%" in first

    @pytest.mark.parametrize(
        ("edited", "status"),
        [(None, "not attacked"), (0.9, "hidden"), (0.25, "inconclusive"), (0.0, "gone")],
        ids=["none", "back", "too few", "not back"],
    )
    def test_the_status_is_the_reports(self, edited, status, tmp_path):
        made = report(edited)
        if edited is not None:
            made = replace(made, attacked=Attacked({"relearning": attack(edited)}))
        made.to_html(tmp_path / "report.html")
        assert (made.status()[0] or "not attacked") == status
        assert f">{status.capitalize()}</p>" in (tmp_path / "report.html").read_text()

    @pytest.mark.parametrize(("after", "kept", "status"), [(0.9, 1.0, "hidden"), (0.0, 0.5, "collapsed")])
    def test_what_is_still_said_or_collapsed_is_called_so(self, after, kept, status, tmp_path):
        frame = FRAME.copy()
        frame.loc[0, "after"], frame.loc[3, "after"] = after, kept
        replace(report(0.0), frame=frame).to_html(tmp_path / "report.html")
        assert f">{status.capitalize()}</p>" in (tmp_path / "report.html").read_text()

    def test_nothing_given_is_taken_for_html_or_cut_short(self, page):
        text = page.read_text()
        assert SCRIPT not in text and "&lt;script&gt;document.title" in text
        assert "<dt>probing: failed</dt>" in text and "x" * 60 in text, "a long note is whole"

    def test_it_shows_what_the_model_writes(self, page):
        text = page.read_text()
        table = text.split("What the model writes</h2>")[1].split("</table>")[0]
        assert "<td>golf.\nHe</td>" in table and "<td>was late</td><td>(nothing)</td>" in table
        assert table.count("&lt;script&gt;document.title") == 2

    @pytest.mark.parametrize("edited", [None, 0.9], ids=["not attacked", "attacked"])
    def test_nothing_is_blank_or_cut_off_when_it_is_printed(self, edited):
        made = report(edited)
        captured = Console(file=StringIO(), width=40)
        captured.print(made)
        for shown in (str(made), repr(made), made._repr_html_(), captured.file.getvalue()):
            assert ("idden" in shown or edited is None) and "95" in shown and "…" not in shown
        for shown in (str(made), made._repr_html_()):
            assert all(number in shown for number in ("0.95±0.08", "0.125±0.100", "0.750±0.100", "0.50±0.10")), (
                "the control too"
            )
            assert "was late" in shown and "(nothing)" in shown
            assert edited is None or "x" * 60 in shown, "why an attack failed"

    def test_the_first_rows_are_what_an_edit_is_judged_by(self):
        assert report().summary()["what"].tolist()[:5] == [
            "forget, training prompt: target",
            "forget, training prompt",
            "retain, training prompt",
            "specificity (unseen facts)",
            "text, neutral: KL to before",
        ]

    def test_a_report_of_tokens_alone_still_says_something(self):
        bare = Report(FRAME[FRAME.split == "skills"], list(MODELS), RunCard("none"))
        assert repr(bare) == "Report(2 rows; not attacked)" and "Not attacked." in str(bare) and "1.00" in str(bare)

    def test_a_damaged_model_is_called_damaged_everywhere(self, tmp_path):
        frame = FRAME.copy()
        frame.loc[frame.split == "unseen", "after"] = 0.2
        made = replace(report(None), frame=frame)
        made.to_html(tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert made.status()[0] == "collapsed", "without an attack, and with every retain fact right"
        for shown in (str(made), repr(made), made._repr_html_(), page.split("Does it come back?")[0]):
            assert "damaged the model" in shown and "20% of 24 unseen facts that were right are still right" in shown

    def test_side_effects_are_told_in_the_terms_of_the_field(self, page):
        table = page.read_text().split("In the terms of model editing")[1].split("</table>")[0]
        assert "reverse, known before" in table and "0.75" in table and "0.65 to 0.85" in table
        assert "the data have no other relation of these subjects" in table, "what is not measured says why"

    def test_plotly_is_there_once_and_nothing_is_fetched(self, page):
        text = page.read_text()
        assert text.count("/**\n* plotly.js v") == 1
        assert "<link" not in text and "<script src" not in text

    def test_tables_print_whole_and_in_plain_words(self, page):
        for table in (report().summary(), report().outcomes(), report().summary()[["what", "after"]]):
            assert "..." not in str(table) and len(str(table).splitlines()) == len(table) + 1
        assert "1.00 [0.90, 1.00]" in str(report().summary())
        assert "<th>truth came back</th>" in page.read_text() and "truth_came_back" not in page.read_text()

    def test_without_a_mask_it_says_how_many_weights(self, tmp_path):
        report().to_html(tmp_path / "report.html")
        assert "<p>40 weights, by masked gradient</p>" in (tmp_path / "report.html").read_text()

    def test_figures_come_in_the_order_of_the_page(self):
        titles = [figure.layout.title.text for figure in report().figures(FOUND, EDIT)]
        assert titles == [
            "What each attack brings back",
            "Forget facts: the truth, by format",
            "Forget facts: the edit target, by format",
            "What was to stay, before and after",
            "Where the answer becomes readable at the subject's last token",
            "What the mask selects: 5 units, 20.8 % of the editable weights",
            "quantization",
        ]
        assert len(report(None).figures()) == 3


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def opened(browser, path, width: int, scheme: str):
    """The page, read to its end so that all of it is drawn, and what went wrong while it was."""
    wrong: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    tab.goto(path.as_uri())
    for place in tab.locator(".plot").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for()
    tab.evaluate("scrollTo(0, 0)")
    return tab, wrong


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) / 3


@needs_browser
class TestBrowser:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 390])
    def test_it_renders_without_an_error_in_its_width_and_its_colours(self, browser, page, width, scheme, tmp_path):
        tab, wrong = opened(browser, page, width, scheme)
        assert not wrong
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator(".plot .main-svg").count() >= 7
        assert tab.title() == "Is the knowledge gone? hidden", "no script of a fact has run"
        ground = brightness(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        for kind in ("p.why", ".plot .ytick text", ".plot .y2tick text", ".plot .xtitle", ".plot .legendtext"):
            ink = brightness(
                tab.evaluate(
                    f"getComputedStyle(document.querySelector('{kind}')).{'fill' if 'plot' in kind else 'color'}"
                )
            )
            assert abs(ink - ground) > 150, f"{kind} is read on the page's ground"
        assert (ground > 128) == (scheme == "light")
        assert SCRIPT in tab.locator(".plot text").all_text_contents(), "a name stands in figures letter by letter"
        boxes = tab.evaluate("[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth - box.clientWidth)")
        assert max(boxes) > 50, "wide tables scroll in their own box"
        tab.screenshot(path=screenshots(tmp_path) / f"report-{scheme}-{width}.png", full_page=True)
        tab.close()

    def test_a_figure_waits_until_it_is_about_to_be_seen(self, browser, page):
        tab = browser.new_page(viewport={"width": 1280, "height": 700})
        tab.goto(page.as_uri())
        assert tab.locator(".plot:has(.main-svg)").count() < tab.locator(".plot").count()
        tab.locator(".plot").first.scroll_into_view_if_needed()
        tab.locator(".plot .main-svg").first.wait_for()
        assert 0 < tab.locator(".plot:has(.main-svg)").count() < tab.locator(".plot").count()
        assert tab.locator(".plot").last.locator(".main-svg").count() == 0
        tab.close()

    def test_it_prints_on_paper(self, browser, page, tmp_path):
        tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(page.as_uri())
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert tab.locator(".plot:has(.main-svg)").count() == tab.locator(".plot").count(), "also what was not seen yet"
        tab.emulate_media(media="print", color_scheme="dark")
        assert brightness(tab.evaluate("getComputedStyle(document.body).backgroundColor")) > 250
        assert tab.evaluate("[...document.querySelectorAll('.plot .main-svg')].every(one => one.clientWidth <= 660)")
        assert tab.evaluate("[...document.querySelectorAll('details')].every(part => part.open)")
        tab.emulate_media(media="screen")
        tab.evaluate("dispatchEvent(new Event('afterprint'))")
        tab.pdf(path=screenshots(tmp_path) / "report.pdf")
        assert not wrong
        tab.close()

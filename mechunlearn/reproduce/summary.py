"""The four papers side by side: every headline claim, our number, what became of it, and what the paper itself reports."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mechunlearn.core.files import whole_file
from mechunlearn.errors import MechunlearnError
from mechunlearn.metrics.stats import hierarchical_paired, multiple_comparisons
from mechunlearn.reproduce import codeunlearn_page, law_page, loku_page
from mechunlearn.reproduce import mechanistic_unlearning_page as mechanistic
from mechunlearn.reproduce.shared import verdict

PAPERS = {
    "mechanistic-unlearning": ("Mechanistic Unlearning (arXiv 2410.12949)", mechanistic.page),
    "codeunlearn": ("CodeUnlearn (arXiv 2410.10866)", codeunlearn_page.page),
    "law": ("LAW, Large Scale Knowledge Washing (arXiv 2405.16720)", law_page.page),
    "loku": ("LoKU (arXiv 2408.06621)", loku_page.page),
}
NOT_READ = "its numbers were not read in the paper itself, so none is quoted"


@dataclass(frozen=True)
class Headline:
    """A claim, our number for it (mean and interval) with n, what became of it, and what the paper reports."""

    claim: str
    told: tuple[float, float, float] | None
    n: str
    verdict: str
    paper: str

    @property
    def shown(self) -> str:
        return "–" if self.told is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*self.told)


def write_pages(folder: Path) -> list[Path]:
    """Write the four pages and the summary anew from the result files in a folder; return what was written.

    Raises `MechunlearnError` if a result file is missing or damaged.
    """
    found = {}
    for name in PAPERS:
        path = folder / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MechunlearnError(
                f"'{path}' cannot be read ({error}). Expected the numbers that `mechunlearn reproduce {name} --page "
                f"{folder / name}.md` writes."
            ) from None
    texts = {name: page(found[name]) for name, (_, page) in PAPERS.items()} | {"index": summary(found)}
    for name, text in texts.items():
        with whole_file(folder / f"{name}.md") as beside:
            beside.write_text(text, encoding="utf-8")
    return [folder / f"{name}.md" for name in texts]


def summary(found: dict[str, dict]) -> str:
    """Markdown, from the results of the four papers by name."""
    makers: dict[str, Callable[[dict], list[Headline]]] = {
        "mechanistic-unlearning": of_mechanistic_unlearning,
        "codeunlearn": of_codeunlearn,
        "law": of_law,
        "loku": of_loku,
    }
    told = {name: make(found[name]) for name, make in makers.items()}
    count = sum(len(rows) for rows in told.values())
    quick = [PAPERS[name][0] for name, of in found.items() if of.get("quick")]
    lines = [
        "# Four papers, side by side",
        "",
        "**All worlds here are small, and those of Mechanistic Unlearning were trained to look facts up at the subject: what follows is conditional on that.**",
        "",
        "Written by `mechunlearn reproduce summary` from the result files beside the pages; do not edit. Verdicts: *holds*, the 95 % interval is off 0 as claimed "
        "(by .1 or more where the number is an accuracy or a recovery); *weak*, off 0 but by less; *null*, it includes 0; *reversed*, off 0 on the other "
        f"side. {multiple_comparisons(count)}",
        "",
    ]
    if quick:
        lines += [f"**Quick runs, which settle nothing: {', '.join(quick)}.**", ""]
    for name, rows in told.items():
        lines += [
            f"## [{PAPERS[name][0]}]({name}.md)",
            "",
            "| claim | our number | n | | the paper's own |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            lines.append(f"| {row.claim} | {row.shown} | {row.n} | **{row.verdict}** | {row.paper} |")
        lines.append("")
    return "\n".join(lines)


def of_mechanistic_unlearning(found: dict) -> list[Headline]:
    """C1, C2 and C3 over all relations."""
    last = "all" if len(found["relations"]) > 1 else found["relations"][0]
    made = []
    for row in mechanistic.claims(found):
        if row["relation"] == last:
            of = row["difference"]
            n = f"{of[3]} pairs, {of[4]} worlds" if of else "0"
            made.append(
                Headline(f"{row['claim']}: {row['text']}", of[:3] if of else None, n, row["verdict"], row["paper"])
            )
    return made


def of_codeunlearn(found: dict) -> list[Headline]:
    """Deleting codes beside random codes, what stays, what it costs, and the distance to a retrained model."""
    rows = [
        ("topic accuracy: reselect minus random codes of the same usage", "random codes", "accuracy", -1),
        ("other topics kept: reselect minus gradient difference", "gradient difference", "kept", 1),
        ("topic accuracy: reselect minus SAE clamp", "SAE clamp", "accuracy", -1),
    ]
    made = []
    for text, other, key, sign in rows:
        mine, theirs = (codeunlearn_page.selected(found, method, key) for method in ("reselect", other))
        made.append(_paired(text, mine, theirs, sign, NOT_READ, f"{len(mine)} codebooks"))
    ones = [found["inserted"][f"{codeunlearn_page.MAIN} {seed}"] for seed in found["seeds"]]
    before = [[one["alone"]["text loss"]] for one in ones]
    after = [[one["inserted"]["text loss"]] for one in ones]
    free = _paired(
        "the bottleneck costs other text nothing, nats a token", after, before, -1, NOT_READ, f"{len(ones)} codebooks"
    )
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in found["rows"]) if arm != codeunlearn_page.MAIN]
    made.append(free)
    for arm in arms:
        start = [found["inserted"][f"{arm} {seed}"]["gold"] for seed in found["seeds"]]
        kl = [[one[t]["KL of inserted"][t] for t in codeunlearn_page.TOPICS] for one in start]
        mine = codeunlearn_page.selected(found, "reselect", "KL", arm)
        text = f"deletion comes nearer to a model retrained without the topic: KL ({arm})"
        made.append(_paired(text, mine, kl, -1, "not measured there", f"{len(mine)} codebooks, 1 world"))
    return made


def of_law(found: dict) -> list[Headline]:
    """Washing beside gradient methods at the same forget accuracy, and whether it stays washed."""
    runs, worlds = found["runs"], found["worlds"]
    paper = "accuracy .1926 of GPT2-XL after washing 332,036 facts (second hand); forgetting with reasoning kept, no neighbours measured"
    asked = [
        ("LAW keeps skills better than gradient difference", "LAW", "GD", "skills", 1),
        (
            "LAW keeps skills better than fine-tuning with retain facts",
            "LAW",
            "FT to end-of-text + retain",
            "skills",
            1,
        ),
        ("LAW keeps neighbours better than gradient difference", "LAW", "GD", "neighbours", 1),
        ("the Adam phase of LAW earns neighbours", "LAW", "LAW, Adam off", "neighbours", 1),
        ("LAW keeps more neighbours than AlphaEdit", "LAW", "AlphaEdit", "neighbours", 1),
    ]
    made = []
    for text, one, other, measure, sign in asked:
        told = law_page.difference(runs, worlds, one, other, law_page.value_of(measure))
        said = verdict(told[:3], sign) if told else "not measured"
        made.append(
            Headline(
                text, told[:3] if told else None, f"{told[3]} pairs, {len(worlds)} worlds" if told else "0", said, paper
            )
        )
        paper = "not compared there"
    back = law_page.relearned(found, "LAW")
    text = "washed facts are gone: relearned by training on the other half, above facts never taught"
    n = f"{back[3]} pairs, {len(worlds)} worlds" if back else "0"
    said = verdict(back[:3], -1) if back else "not measured"
    return [*made, Headline(text, back[:3] if back else None, n, said, "not attacked there")]


def of_loku(found: dict) -> list[Headline]:
    """The inverted hinge beside gradient ascent and difference, and FILA beside random LoRA and PiSSA."""
    results = loku_page.Results(found)
    at = loku_page.at
    asked = [
        ("IHL keeps more of the retain set than GA at the end", "IHL", "GA", at("at end", "retain"), 1),
        ("IHL keeps more of the retain set than GD at the end", "IHL", "GD", at("at end", "retain"), 1),
        ("IHL keeps text loss lower than GD at the end, nats", "IHL", "GD", at("at end", "text loss"), -1),
        ("FILA needs fewer steps than random LoRA", "LoRA fila", "LoRA random", loku_page.steps_to("passages"), -1),
        ("FILA needs fewer steps than PiSSA", "LoRA fila", "LoRA pissa", loku_page.steps_to("passages"), -1),
        ("FILA keeps more at the target than PiSSA", "LoRA fila", "LoRA pissa", at("at hit", "retain"), 1),
    ]
    made = []
    for text, one, other, value, sign in asked:
        told = results.difference("passages", one, other, value)
        said = verdict(told[:3], sign) if told else "not measured"
        paper = NOT_READ if "PiSSA" not in text else "PiSSA was not compared there"
        n = f"{told[3]} pairs, {len(found['worlds'])} worlds" if told else "0"
        made.append(Headline(f"{text} (passages)", told[:3] if told else None, n, said, paper))
    return made


def _paired(
    text: str, mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], sign: int, paper: str, n: str
) -> Headline:
    if [len(one) for one in mine] != [len(one) for one in theirs] or not mine:
        return Headline(text, None, "0", "not measured", paper)
    told = hierarchical_paired(mine, theirs)
    return Headline(text, told, n, verdict(told, sign), paper)

"""Damaged facts files: 1,200 of them, each loads what can be read or is refused in one line."""

import json
import random

import pandas as pd
import pytest

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.facts.tables import read_texts

ROWS = [
    {"subject": "Île-de-France", "prompt": "The capital of {} is", "answer": "Paris", "target": "Rome", "relation": "capital"},
    {"subject": "007", "prompt": "{} was written by", "answer": "Ian \"F\" Fleming", "target": "NA", "relation": "author"},
    {"subject": "日本", "prompt": "{}の首都は", "answer": "東京", "target": "京都", "relation": "capital"},
]  # fmt: skip
REWRITE = {"requested_rewrite": {"prompt": "{} lies in", "subject": "Oslo", "target_true": {"str": "Norway"}, "target_new": {"str": "Peru"}}, "paraphrase_prompts": ["Where is Oslo? In"]}  # fmt: skip
RELATION = {"name": "capital", "prompt_templates": ["The capital of {} is"], "prompt_templates_zs": [], "samples": [{"subject": "Peru", "object": "Lima"}]}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "Capital of Peru?"}, {"role": "assistant", "content": "Lima"}]}
TEXTS = {
    "plain.csv": pd.DataFrame(ROWS).to_csv(index=False),
    "plain.tsv": pd.DataFrame(ROWS).to_csv(index=False, sep="\t"),
    "plain.json": json.dumps(ROWS, ensure_ascii=False),
    "lines.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "rewrites.json": json.dumps([REWRITE]),
    "relation.json": json.dumps(RELATION),
    "chat.json": json.dumps([CHAT]),
    "plain.parquet": "",
}
EACH = 150
PIECES = (b"\x00", b'"', b"\\u00e9", b"\xff", b"{}", b"]", b"null", b"1e999", b",", b"\r", b"\xef\xbb\xbf", b"NaN", b"\xed\xa0\x80", b"{" * 2000)  # fmt: skip


def mishap(data: bytes, draw: random.Random) -> bytes:
    """A file after one mishap: cut, torn, doubled, a bit or a piece of something else in it."""
    at, size = draw.randrange(len(data) + 1), draw.randint(1, 40)
    before, here, after = data[:at], data[at : at + size], data[at + size :]
    flipped = bytes(one ^ (1 << draw.randrange(8)) * (draw.random() < 0.01) for one in data)
    piece = draw.choice(PIECES)
    kinds = (before, before + after, before + piece + here + after, before + here * 3 + after, flipped)
    return draw.choice((*kinds, before + bytes(size) + after, here + after + before))


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A file after one to three mishaps."""
    for _ in range(draw.randint(1, 3)):
        data = mishap(data, draw)
    return data


def test_rows_that_hold_nothing_at_all_are_refused(tmp_path):
    """Found by `tests.hostile.fuzz`: no fact, and no odd row either."""
    (tmp_path / "f.json").write_text('{"&_lates_zs": [{"subject": "ma"}]}')
    with pytest.raises(MechunlearnError, match="holds no fact"):
        load_facts(tmp_path / "f.json")


@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_file_loads_or_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_text(TEXTS[name], encoding="utf-8")
    if name.endswith(".parquet"):
        pd.DataFrame(ROWS).to_parquet(path)
    data, draw, refused = path.read_bytes(), random.Random(name), 0
    assert len(load_facts(path)) == len(ROWS) or "plain" not in name
    for _ in range(EACH):
        path.write_bytes(damaged(data, draw))
        try:
            facts = load_facts(path)
        except MechunlearnError as error:
            assert "\n" not in str(error), error
            refused += 1
            continue
        for fact in facts:
            query = fact.queries["statement"]
            assert all(isinstance(text, str) for text in (fact.subject, fact.relation, query.prompt, query.target))
            assert query.prompt.strip() and query.answer.strip() and fact.subject in query.prompt
            assert query.answer not in (query.target, query.foil)
    assert 0 < refused < EACH


@pytest.mark.parametrize("name", ["some.txt", "some.csv"])
def test_a_damaged_text_file_loads_or_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    data = "text\nOne passage of text.\n\nAnother, mit Ümlaut.\n".encode()
    draw = random.Random(name)
    for _ in range(EACH):
        path.write_bytes(damaged(data, draw))
        try:
            texts = read_texts(path)
        except MechunlearnError as error:
            assert "\n" not in str(error), error
        else:
            assert texts
            assert all(isinstance(text, str) and text.strip() for text in texts)

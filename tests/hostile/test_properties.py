"""What holds for any text and any document (hypothesis, the same examples each time): read to the character, or refused."""

import json
import tempfile
from pathlib import Path

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from mechunlearn import ComponentMask, Localization, MechunlearnError, load_edit, load_facts
from mechunlearn.facts.dataset import FactDataset

SAME = settings(derandomize=True, deadline=None, max_examples=150)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
WORD = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
ROWS = st.lists(
    st.builds(
        lambda subject, before, after, answer: {
            "subject": subject,
            "prompt": before + subject + after,
            "answer": answer,
        },
        *(WORD | TEXT, TEXT, TEXT, WORD | TEXT),
    ),
    min_size=1,
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.sampled_from(["sites", "facts"]), inner),
    max_leaves=12,
)


def loaded(source) -> FactDataset | None:
    try:
        return load_facts(source)
    except MechunlearnError:
        return None


@SAME
@given(ROWS)
def test_rows_are_kept_to_the_character_or_named(rows):
    facts = loaded(rows)
    kept = [] if facts is None else [(fact.queries["statement"].prompt, fact.answer) for fact in facts]
    asked = {(row["prompt"], row["answer"].strip()) for row in rows}
    assert {(prompt, answer.strip()) for prompt, answer in kept} <= asked
    if facts is not None:
        assert len(facts) + sum(odd.row is not None for odd in facts.odd) >= len({tuple(row.values()) for row in rows})


@SAME
@given(ROWS)
def test_a_table_in_a_file_is_the_table_in_memory(rows):
    """Of what CSV can hold: a file has one kind of line end, and no byte of zero."""
    if any({"\r", "\n", "\0"} & set("".join(row.values())) for row in rows):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        found, given_rows = loaded(path), loaded(rows)
        assert (found is None) == (given_rows is None)
        if found is not None and given_rows is not None:
            assert found.facts == given_rows.facts


@SAME
@given(JSON)
def test_documents_that_are_no_artefact_are_refused(document):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.json"
        path.write_text(json.dumps(document))
        for load in (ComponentMask.load, Localization.load, load_edit):
            try:
                load(path)
            except MechunlearnError:
                continue
            raise AssertionError(f"{load} accepts {document!r}")
        loaded(path)

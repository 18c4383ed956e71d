"""Reading the pages of reproductions."""

import re


def flat(page: str) -> str:
    """Return a page with one space where its tables are padded with several."""
    return re.sub(" +", " ", page)

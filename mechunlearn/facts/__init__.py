"""Facts as text and as paired tokens: text becomes tokens once, here."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.facts.dataset import FactDataset as FactDataset
    from mechunlearn.facts.formats import Fact as Fact
    from mechunlearn.facts.formats import Query as Query
    from mechunlearn.facts.load import load_facts as load_facts
    from mechunlearn.facts.load import world_facts as world_facts
    from mechunlearn.facts.prompts import Prompts as Prompts
    from mechunlearn.facts.readers import read_facts as read_facts
    from mechunlearn.facts.tables import read_texts as read_texts
else:
    lazy(__name__)

"""Looking around: facts in a model, component by component, or the features and codes of a dictionary."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import anywidget
import traitlets

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.explore.pages import STATIC, static_view
from mechunlearn.explore.state import Workbench
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dashboard import Exploration, explore_dictionary
from mechunlearn.features.dictionaries import Dictionary
from mechunlearn.features.firing import Texts
from mechunlearn.features.places import Model
from mechunlearn.model.hooked import HookedModel


class Explorer(anywidget.AnyWidget):
    """The view of `explore` in a notebook.

    Choose method, metric and fact, click components, put a mask together, save it.

    `mask` is the selection as a `ComponentMask`, `found` the localization on show, `bench` does the work. Where no
    widget runs (nbconvert, a code-hosting page) the map is a picture.
    """

    _esm = STATIC / "explorer.js"
    _css = STATIC / "explorer.css"
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, bench: Workbench) -> None:
        """Show a workbench.

        Args:
            bench: What does the work.
        """
        super().__init__()
        self.bench = bench
        self.view = bench.view()
        self.on_msg(self._asked)

    @property
    def mask(self) -> ComponentMask:
        """What is selected now."""
        return self.bench.mask

    @property
    def found(self) -> Localization:
        """The localization on show."""
        return self.bench.found

    def choose(self, **what: Any) -> None:
        """Choose method, metric, fact or map.

        Args:
            what: As `Workbench.choose` takes them.
        """
        self._then(self.bench.choose, **what)

    def show(self, component: str) -> None:
        """Show a component's details.

        Args:
            component: Its address, such as `L2.mlp.out[7]`.
        """
        self._then(self.bench.show, component)

    def toggle(self, component: str) -> None:
        """Add a component to the mask, or take it out if it is there.

        Args:
            component: Its address.
        """
        self._then(self.bench.toggle, component)

    def take(self, **what: Any) -> None:
        """Let the mask be the largest units.

        Args:
            what: `share=0.05`, of the weights, or `above=0.1`, a score.
        """
        self._then(self.bench.take, **what)

    def save(self, path: str | Path) -> None:
        """Write the mask that is selected now.

        Args:
            path: A `.json` or `.safetensors` file.

        Raises:
            MechunlearnError: The mask is empty.
        """
        self.bench.save(path)

    def _then(self, done: Callable[..., None], *given: Any, **named: Any) -> None:
        done(*given, **named)
        self.view = self.bench.view()

    def _asked(self, widget: object, message: dict[str, Any], buffers: object) -> None:
        del widget, buffers
        answer = self.view.get("answer", 0) + 1  # the view changes, and is drawn, even if nothing else did
        self.view = self.bench.act(message) | {"answer": answer}

    def __repr__(self) -> str:
        return f"Explorer({self.bench.method}, {len(self.bench.prompts)} facts; {self.mask!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        made = super()._repr_mimebundle_(**kwargs)
        if made is None:
            return {"text/html": static_view(self.view)}
        data, more = made if isinstance(made, tuple) else (made, {})
        return {**data, "text/html": static_view(self.view)}, more


@overload
def explore(
    model: HookedModel,
    what: Prompts | FactDataset,
    *,
    found: Localization | None = None,
    mask: ComponentMask | None = None,
) -> Explorer: ...
@overload
def explore(
    model: Model,
    what: Dictionary,
    texts: Texts,
    units: ComponentMask | Sequence[int] | None = None,
    *,
    examples: int = 5,
    window: int = 8,
    words: int = 8,
) -> Exploration: ...
def explore(
    model: Any,
    what: Any,
    texts: Texts | None = None,
    units: ComponentMask | Sequence[int] | None = None,
    *,
    found: Localization | None = None,
    mask: ComponentMask | None = None,
    **shown: int,
) -> Explorer | Exploration:
    """See where facts live and click through it, or see what a dictionary's units are active on.

    `explore(model, prompts)` opens an interactive view in a notebook: a heat map of any localizer (all facts or one,
    any metric), and behind each cell the facts that the component changes most, its exact effect by token role, its
    attention or read-out, and its direct effect. Components are added to the mask and taken out by hand; its share of
    the weights is shown, its faithfulness measured on demand, and it is saved as `.mask.json`. `mechunlearn explore`
    opens the same as a local page.

    `explore(model, dictionary, texts, units)` gives an `Exploration` of features or codes: see `explore_dictionary`.

    What is on show describes; whether it matters shows when it is edited.

    Args:
        model: The model.
        what: Facts, as prompts or a data set; or a dictionary.
        texts: What a dictionary's units are looked for in.
        units: The units to look at; by default the most frequent ones.
        found: A localization of yours, which is then offered and shown first.
        mask: A mask to begin with.
        shown: `examples`, `window` and `words`, as `explore_dictionary` takes them.

    Raises:
        MechunlearnError: There are no facts, or mask or localization are of another architecture.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> seen = explore(toy.model, toy.prompts())
    >>> seen.toggle("L0.mlp.out[1]")
    >>> list(seen.mask)
    [L0.mlp.out[1]]
    """
    if isinstance(what, FactDataset):
        what = what.prompts(model)
    if isinstance(what, Prompts):
        return Explorer(Workbench(model, what, found, mask))
    return explore_dictionary(model, what, texts if texts is not None else (), units, **shown)

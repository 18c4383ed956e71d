"""Look around in a model: a widget in notebooks, or a page of this machine."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.explore.state import Workbench as Workbench
    from mechunlearn.explore.widget import Explorer as Explorer
    from mechunlearn.explore.widget import explore as explore
else:
    lazy(__name__)

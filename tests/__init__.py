"""The tests, which share models and helpers; `typecheck` is imported for the hook that checks types and shapes."""

from tests import typecheck as typecheck

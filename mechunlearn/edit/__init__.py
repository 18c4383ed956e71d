"""Editors: `(model, mask, forget, retain, *, ...) -> Edit`, one a file."""

from mechunlearn.edit.masked_gradient import masked_gradient as masked_gradient

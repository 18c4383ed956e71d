"""Closed-form editing: which tokens, which target values, and one ridge solution a layer."""

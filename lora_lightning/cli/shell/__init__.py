"""Completion and schema, for shells and editors."""

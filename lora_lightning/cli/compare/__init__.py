"""Comparing methods and settings: arms, tuned rates, seeds, statistics, and the report of all that."""

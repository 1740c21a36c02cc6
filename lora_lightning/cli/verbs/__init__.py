"""Verbs of the command line, one a file: `add_arguments(parser)`, `run(args) -> int`, help in the docstring."""

"""Further variables of a chat template, such as enable_thinking: those that it reads, and refusals of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables

from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import did_you_mean

NAME = "chat_template_kwargs"
"""The setting, and the column, that holds them."""
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""Variables that come with the data."""
_FUNCTIONS = {"raise_exception", "strftime_now"}
_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def check_options(template: str, options: Mapping[str, Any], where: str) -> None:
    """Refuse variables that the template does not read, or that come with the data.

    Args:
        template: Jinja text.
        options: Values by name of the variable.
        where: What to call them in messages.

    Raises:
        RowError: names the first one, and what the template reads.
    """
    for name in options:
        read = variables(template)
        if name in _GIVEN or name.endswith("_token"):
            raise RowError(
                "with a template variable of another source",
                f"{where}.{name} is {options[name]!r}; the data and the tokenizer give it to the template",
            )
        if read is not None and name not in read:
            known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
            raise RowError(
                "with a variable that the template does not read",
                f"{where}.{name} is {options[name]!r}; the chat template does not read it: {known}."
                f"{did_you_mean(name, read)}",
            )


@lru_cache
def variables(template: str) -> frozenset[str] | None:
    """Names that may be given to a template beside the conversation; None where it cannot be parsed."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_TAG.sub("", template))
    except TemplateError:  # rendering says what is wrong with it
        return None
    # what the template sets itself is its own, unless it asks first whether somebody gave it
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    asked = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    found = find_undeclared_variables(tree) - (own - asked) - _GIVEN - _FUNCTIONS
    return frozenset(name for name in found if not name.endswith("_token"))

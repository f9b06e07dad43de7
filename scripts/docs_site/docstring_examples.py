"""Extension of griffe: the section `Example:` of our docstrings is read as the examples that it is."""

import re
from typing import Any

import griffe


class DocstringExamples(griffe.Extension):
    """Spell the section as griffe does; it takes other names of sections for remarks in Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

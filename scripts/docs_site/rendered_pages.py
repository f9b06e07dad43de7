"""MkDocs hook: formulas as MathML, which browsers show without a script, and GitHub's spelling of bars in tables."""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"<code>[^<]*</code>")
TABLE_AS_TEXT = re.compile(r"\|\s*-{3,}\s*\|")
_LOG = logging.getLogger("mkdocs.hooks.rendered_pages")


def on_page_content(rendered: str, page: Any, **_: Any) -> str:
    if TABLE_AS_TEXT.search(re.sub(r"<pre.*?</pre>", "", rendered, flags=re.DOTALL)):
        _LOG.warning("%s: a table is shown as text. Put an empty line before it.", page.file.src_uri)
    rendered = CODE.sub(lambda code: code[0].replace(r"\|", "|"), rendered)
    return FORMULA.sub(_math, rendered)


def _math(formula: re.Match[str]) -> str:
    kind, latex = formula[2], html.unescape(formula[3])
    return convert(latex, display="block" if kind == "[" else "inline")

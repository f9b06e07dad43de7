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
    return FORMULA.sub(lambda formula: _math(formula, page.file.src_uri), rendered)


def _math(formula: re.Match[str], page: str) -> str:
    latex = html.unescape(formula[3])
    if formula[2] != "[":
        return _checked(convert(latex), latex, page)
    return f'<span class="formula">{_checked(convert(latex, display="block"), latex, page)}</span>'


def _checked(mathml: str, latex: str, page: str) -> str:
    """Return a formula; warn, which fails a strict build, of a command that became text."""
    if command := re.search(r"\\[A-Za-z]+", mathml):
        _LOG.warning("%s: %s is shown as text in the formula %s", page, command[0], latex)
    return mathml

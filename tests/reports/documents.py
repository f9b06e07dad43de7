"""HTML read back into tables, for the tests of the page."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "input", "link", "wbr"}


class Document(HTMLParser):
    """elements: (tag, attributes) in order. tables: by caption, each a list of rows of texts, the heading first. texts:
    of each element, by its place in `elements`. Raises AssertionError where a tag is not closed as it was opened."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data):
        for _, place in self._open:
            self.texts[place] += data

    def all(self, tag):
        """Text and attributes of each element of this tag, in order."""
        return [(self.texts[place], found) for place, (name, found) in enumerate(self.elements) if name == tag]

    def of_class(self, name):
        """Text and attributes of each element of this class, in order."""
        found = zip(self.texts, self.elements, strict=True)
        return [(text, one) for text, (_, one) in found if name in one.get("class", "").split()]

    @property
    def tables(self):
        found, caption = {}, None
        for (tag, _), text in zip(self.elements, self.texts, strict=True):
            if tag == "caption":
                caption = text
                found[caption] = []
            elif tag == "tr":
                found[caption].append([])
            elif tag in {"th", "td"}:
                found[caption][-1].append(text)
        return found

    def column(self, caption, heading):
        """One column of a table, by its heading."""
        head, *rows = self.tables[caption]
        return [row[head.index(heading)] for row in rows]

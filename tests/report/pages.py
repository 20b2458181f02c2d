"""Parsed HTML pages, with the parser of the standard library."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img"}


class Element:
    """An element with its attributes and children."""

    def __init__(self, tag, attributes):
        self.tag = tag
        self.attributes = dict(attributes)
        self.children = []

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    def all(self, tag=None, css_class=None):
        """Yield all descendants with a tag and a class."""
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (css_class is None or css_class in child.classes):
                    yield child
                yield from child.all(tag, css_class)

    def one(self, tag=None, css_class=None):
        elements = list(self.all(tag, css_class))
        assert len(elements) == 1, f"{len(elements)} of <{tag} class={css_class}>"
        return elements[0]

    def by_id(self, name):
        return next(each for each in self.all() if each.attributes.get("id") == name)

    def rows(self):
        """Return the texts of all table cells, row by row."""
        return [[cell.text for cell in row.children if cell.tag in ("th", "td")] for row in self.all("tr")]


class Page(HTMLParser):
    """A parser that requires every element to be closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.root = Element("", [])
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], f"not closed: {[each.tag for each in self._open[1:]]}"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self._open[-1].children.append(Element(tag, attrs))

    def handle_endtag(self, tag):
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data):
        self._open[-1].children.append(data)


def read_page(path):
    """Return the root element of a file."""
    return Page(path.read_text(encoding="utf-8")).root

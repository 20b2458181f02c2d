"""A page as a browser's parser sees it, by the standard library's."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img"}


class Element:
    """A node with its attributes, children and text."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    def all(self, tag=None, kind=None):
        """Every element below with that tag and class."""
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (kind is None or kind in child.classes):
                    yield child
                yield from child.all(tag, kind)

    def one(self, tag=None, kind=None):
        found = list(self.all(tag, kind))
        assert len(found) == 1, f"{len(found)} of <{tag} class={kind}>"
        return found[0]

    def by_id(self, name):
        return next(each for each in self.all() if each.attributes.get("id") == name)

    def rows(self):
        """The texts of the cells below, row by row."""
        return [[cell.text for cell in row.children if cell.tag in ("th", "td")] for row in self.all("tr")]


class Page(HTMLParser):
    """Parses; every element must be closed where it was opened."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.root = Element("", [])
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], f"never closed: {[each.tag for each in self._open[1:]]}"

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
    """The root element of a file."""
    return Page(path.read_text(encoding="utf-8")).root

import xml.etree.ElementTree as ElementTree

import pytest

from dnas_ens.figures import style
from dnas_ens.report.inline_svg import inline_svg

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 60 30">'


def inlined(body, name="one"):
    text = inline_svg(f"{HEAD}{body}</svg>", name=name, title="A & B", description="What <it> shows")
    return ElementTree.fromstring(text)


def test_names_are_told_apart_and_kept_together():
    body = '<defs><clipPath id="c"><rect/></clipPath><path id="p" d="M 0 0"/></defs>'
    body += '<g id="unused" clip-path="url(#c)"><use xlink:href="#p"/></g>'
    root = inlined(body)
    assert [root.find("title").text, root.find("desc").text] == ["A & B", "What <it> shows"]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids == ["one-t", "one-d", "one-c", "one-p"]
    assert root.find("g").get("clip-path") == "url(#one-c)"
    assert root.find("g/use").get("href") == "#one-p"
    assert not set(ids) & {element.get("id") for element in inlined(body, "two").iter() if element.get("id")}


def test_nothing_runs_and_nothing_is_fetched():
    body = '<script>x()</script><style>*{}</style><foreignObject/><path onclick="x()" d="M 0 0"/>'
    body += '<use xlink:href="other.svg#a"/><image href="https://example.org/a.png"/>'
    body += '<image xlink:href="data:image/png;base64,AAAA"/>'
    root = inlined(body)
    assert [element.tag for element in root] == ["title", "desc", "path", "use", "image", "image"]
    assert root.find("path").attrib == {"d": "M 0 0"}
    assert [element.get("href") for element in root.iter("image")] == [None, "data:image/png;base64,AAAA"]
    assert root.find("use").get("href") is None
    for text in ("<html/>", "no XML"):
        with pytest.raises(ValueError, match="the picture x is not"):
            inline_svg(text, name="x", title="", description="")


def test_colours_follow_the_page():
    for colour, expected in (
        (style.BLUE, "var(--blue)"),
        ("#ffffff", "var(--paper)"),
        # 13 % of the blue on white, as the labels of cells have it: 255 - 0.13 * (255 - (0, 114, 178)).
        ("#deedf5", "color-mix(in srgb, var(--blue) 13%, var(--paper))"),
        ("#123456", "#123456"),
    ):
        path = inlined(f'<path style="fill: {colour}; stroke-width: 2"/>').find("path")
        assert path.get("style") == f"fill: {expected}; stroke-width: 2"

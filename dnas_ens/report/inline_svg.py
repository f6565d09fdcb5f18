"""SVG pictures for use inside a page: recoloured by its variables, described, without clashing names."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from functools import cache

from matplotlib.colors import to_rgb

from dnas_ens.figures import style

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}href"
#: What drawings consist of; anything else, such as metadata and scripts, is dropped.
_ELEMENTS = {"svg", "g", "path", "defs", "use", "text", "tspan", "clipPath", "rect", "image"}
_ATTRIBUTES = {
    *("d", "transform", "x", "y", "width", "height", "viewBox", "style", "id", "href", "clip-path"),
    *("clip-rule", "fill-rule"),
}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family:[^;]*;?\s*|font:\s*(?P<how>(?:\w+ )*?)(?P<size>[\d.]+px) [^;]*(?P<end>;|$)")

#: The page's variable for every colour of the house.
VARIABLES = {
    style.TEXT_COLOUR: "--ink",
    style.MUTED_COLOUR: "--muted",
    style.LINE_COLOUR: "--line",
    style.GRID_COLOUR: "--grid",
    style.PANEL_COLOUR: "--panel",
    style.BLUE: "--blue",
    style.VERMILION: "--vermilion",
    style.GREEN: "--green",
    style.PURPLE: "--purple",
    style.ORANGE: "--orange",
    style.SKY: "--sky",
    style.BLACK: "--ink",
    "#ffffff": "--paper",
}


def inline_svg(text: str, *, name: str, title: str, description: str) -> str:
    """Return an SVG drawing as an element for an HTML page.

    Colours of the house become the page's variables, so that the page's scheme recolours the drawing; identifiers
    get the drawing's name as prefix; scripts, event handlers, styles and references to other files are dropped.

    Args:
        text: An SVG document.
        name: A word that no other drawing of the page has.
        title: A few words for readers who cannot see it.
        description: What it shows, for the same readers.

    Raises:
        ValueError: The text is no SVG document.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"the picture {name} is not XML: {error}") from error
    if root.tag != f"{_SVG}svg":
        raise ValueError(f"the picture {name} is not SVG: its root is {root.tag}")
    used = set(_REFERENCE.findall(text)) | set(re.findall(r'href="#([^"]+)"', text))
    _clean(root, name, used)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    root.attrib.update(
        {
            "width": f"{float(width):.0f}",
            "height": f"{float(height):.0f}",
            "role": "img",
            "aria-labelledby": f"{name}-t {name}-d",
        }
    )
    # Text is then as large in a drawing as beside it, for any width of the drawing.
    root.set("style", f"max-width: {1.05 * float(width) * 4 / 3:.0f}px")
    for tag, content in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag[0]}"})
        element.text = content
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Bring an element and all in it into the form of the page."""
    element.tag = element.tag.removeprefix(_SVG)
    if _XLINK in element.attrib:
        element.attrib["href"] = element.attrib.pop(_XLINK)
    for key in list(element.attrib):
        value = " ".join(element.attrib[key].split())
        if key not in _ATTRIBUTES or (key == "id" and value not in used) or (key == "href" and _foreign(value)):
            del element.attrib[key]
            continue
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href" and value.startswith("#"):
            value = f"#{name}-{value[1:]}"
        elif key == "style":
            value = _restyled(value)
        element.attrib[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    if element.tag not in ("text", "tspan"):
        element.text = None
    element.tail = None
    for child in list(element):
        if isinstance(child.tag, str) and child.tag.removeprefix(_SVG) in _ELEMENTS:
            _clean(child, name, used)
        else:
            element.remove(child)


def _foreign(reference: str) -> bool:
    return not reference.startswith(("#", "data:image/png;base64,"))


def _restyled(text: str) -> str:
    """Replace colours by variables, and the font by the page's."""

    def own_font(match: re.Match[str]) -> str:
        if match["size"] is None:
            return ""
        slant = "font-style: italic; " if re.search("italic|oblique", match["how"]) else ""
        weight = "font-weight: bold; " if re.search("bold|700", match["how"]) else ""
        return f"{slant}{weight}font-size: {match['size']}{match['end']}"

    return _HEX.sub(lambda match: _variable(match[0]), _FONT.sub(own_font, text))


@cache
def _variable(colour: str) -> str:
    """Return the page's expression for a colour: a variable, or its mixture with the paper's for a tint."""
    if colour in VARIABLES:
        return f"var({VARIABLES[colour]})"
    lightness = [1.0 - channel for channel in to_rgb(colour)]
    for base, variable in VARIABLES.items():
        depths = [1.0 - channel for channel in to_rgb(base)]
        strength = sum(lightness) / max(sum(depths), 1e-9)
        near = all(abs(strength * depth - light) < 1.5 / 255 for depth, light in zip(depths, lightness, strict=True))
        if near and 0.0 < strength < 1.0 and variable != "--paper":
            return f"color-mix(in srgb, var({variable}) {100 * strength:.0f}%, var(--paper))"
    return colour

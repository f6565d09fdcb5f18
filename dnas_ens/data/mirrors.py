"""Whether an image means the same in a mirror, as far as the names of its classes tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words of a side in the languages that folders are often named in.
_SIDES = {
    *("left", "right", "lefts", "rights", "lefthand", "righthand", "leftward", "rightward", "leftwards"),
    *("rightwards", "lefthanded", "righthanded", "leftarrow", "rightarrow", "leftturn", "rightturn"),
    *("leftside", "rightside", "links", "rechts", "linke", "rechte", "linker", "rechter", "gauche", "droite"),
    *("droit", "izquierda", "derecha", "izquierdo", "derecho", "esquerda", "direita", "esquerdo", "direito"),
    *("sinistra", "destra", "sinistro", "destro", "lewo", "prawo", "lewa", "prawa", "vlevo", "vpravo"),
    *("vänster", "höger", "venstre", "høyre", "højre", "vasen", "oikea", "sol", "sağ", "влево", "вправо"),
    *("лево", "право", "левый", "правый", "左", "右", "←", "→", "east", "west", "clockwise", "anticlockwise"),
    *("counterclockwise", "cw", "ccw", "starboard", "sinister", "dexter"),
}
# Short for sides only where both are there.
_SIDE_PAIRS = (
    ("l", "r"),
    ("lh", "rh"),
    ("lt", "rt"),
    ("lhs", "rhs"),
    ("os", "od"),
    ("e", "w"),
    ("esq", "dir"),
)
_WRITING = {
    *("arrow", "arrows", "letter", "letters", "digit", "digits", "text", "texts", "character", "characters"),
    *("alphabet", "word", "words", "handwriting", "font", "fonts", "glyph", "glyphs", "numeral", "numerals"),
}
_NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}


def mirror_hint(classes: Sequence[str]) -> str | None:
    """Say what in the names of the classes suggests that a mirror changes the meaning; None where nothing does.

    Args:
        classes: K names.
    """
    words = [set(_words(name)) for name in classes]
    of_sides = [name for name, own in zip(classes, words, strict=True) if any(map(_is_side, own))]
    if of_sides:
        return f"{_quoted(of_sides)} tell sides apart"
    for first, second in _SIDE_PAIRS:
        pair = [name for name, own in zip(classes, words, strict=True) if {first, second} & own]
        if any(first in own for own in words) and any(second in own for own in words):
            return f"{_quoted(pair)} tell sides apart"
    written = [name for name, own in zip(classes, words, strict=True) if own & _WRITING]
    if written:
        return f"{_quoted(written)} name writing or arrows"
    signs = [name for name in classes if len(name) == 1 or name.isdigit() or name.lower() in _NUMBERS]
    if 2 * len(signs) > len(classes):
        return f"{_quoted(signs)} are letters or digits"
    return None


def _words(name: str) -> list[str]:
    """The words of a name in lower case: those of turnLeft, turn_left and Turn-Left 2 are turn and left."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W\d_]+|[←→]", apart.lower())


def _is_side(word: str) -> bool:
    # As in turnleft and keepright, but not in cleft, bright, upright or copyright.
    return word in _SIDES or bool(re.search(r"[^c]left$|[^bfpwy]right$", word))


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (" and others" if len(names) > 4 else "")

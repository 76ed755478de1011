"""Texts that no encoding can hold: half a surrogate pair, of an emoji that was cut or a bad byte.

UTF-8 has no code for it, so writing one character of a million texts would end the whole file.
"""

import re

_HALF = re.compile("[\ud800-\udfff]")


def readable(text: str) -> str:
    """The text with U+FFFD for every half without its other half; halves that meet are joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def escaped(json: str) -> str:
    r"""JSON with every half as \ud83d, which a reader turns back into the same text."""
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", json)

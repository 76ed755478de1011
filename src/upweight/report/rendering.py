"""The page as text: the template, our style and script, and data that cannot become markup.

Its content policy lets run exactly our script, by its hash, and load nothing: a label that contains
markup is text.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from upweight._text import readable
from upweight.runtime.atomic import make_folder, write_whole

WAY_OUT = "free space, or write it elsewhere: path=."

SCRIPTS = (
    "words",
    "figures",
    "trust",
    "difference",
    "cards",
    "queries",
    "whatif",
    "training",
    "start",
)
"""Parts of the script in their order; where the data come from is another, in the second place."""

_ESCAPE = re.compile(r"\\(?:ud[89ab]\w\w\\ud[c-f]\w\w|(ud[89a-f]\w\w)|.)")
"""An escape in JSON; the group is half a surrogate pair without its other half."""


def render_page(
    data: Mapping[str, Any],
    words: Mapping[str, Any],
    parts: Mapping[str, str],
    source: str | None = None,
    connects: bool = False,
) -> str:
    """The page.

    Args:
        data: What its script reads first.
        words: What its template says.
        parts: Base64 texts by the id of the element that holds them.
        source: The part of the script that answers for the data; by default from the file itself.
        connects: Whether it may load from where it was served.
    """
    first, *rest = map(script_of, SCRIPTS)
    answering = script_of("embedded") if source is None else source
    script = "\n".join([first, answering, *rest])
    words = {**words, "parts": parts}
    return filled("template.html", ["template.css"], script, data, words, connects)


def filled(
    template: str,
    styles: Sequence[str],
    script: str,
    data: Any,
    words: Mapping[str, Any],
    connects: bool = False,
) -> str:
    """A template of ours with our styles and script, and with nothing else that runs.

    `data` is what the script reads, as JSON, and `words` what the template says; a page that
    `connects` may load from where it was served.
    """
    from markupsafe import Markup  # only the report needs it

    style = "\n".join(map(_own, styles))
    script = '"use strict";\n(() => {\n' + script + "\n})();"
    own = " 'self'" if connects else ""
    policy = (
        f"default-src 'none'; img-src data: blob:{own}; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
        + (f"; connect-src{own}" if connects else "")
    )
    page = _template(template).render(
        **words,
        # These are ours or escaped already; the engine escapes everything else.
        style=Markup(style),
        script=Markup(script),
        policy=Markup(policy),
        data=Markup(as_json(data)),
    )
    return readable(page)


def render_static(template: str, words: Mapping[str, Any]) -> str:
    """A page without script: one of our templates, in our style."""
    from markupsafe import Markup

    style = _own("template.css")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; base-uri 'none'"
    marked = {"style": Markup(style), "policy": Markup(policy)}
    return readable(_template(template).render(**words, **marked))


def write_page(path: str | Path, page: str, way_out: str = WAY_OUT) -> Path:
    """Write a page to a file, whole or not at all; its path."""
    target = Path(path)
    make_folder(target.parent, way_out)
    write_whole(target, page.encode(), way_out)
    return target


def _template(name: str) -> Any:
    """One of our templates; it may include others of them."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_own),
    ).get_template(name)


def script_of(name: str) -> str:
    """A part of our script, by its name."""
    return _own(f"script/{name}.js")


def _own(name: str) -> str:
    return (resources.files("upweight.report") / name).read_text(encoding="utf-8")


def as_json(data: Any) -> str:
    """JSON in ASCII in which no parser of HTML can find markup, and all of it characters."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    text = _ESCAPE.sub(lambda found: r"\ufffd" if found[1] else found[0], text)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")

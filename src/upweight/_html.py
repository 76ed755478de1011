"""How an answer looks in a notebook: a card of facts and a table, without scripts.

Colours are those of the notebook, light or dark: only lines are drawn, in a grey that both bear.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

LINE = "1px solid rgba(128,128,128,.45)"
CARD = f"border:{LINE};border-radius:6px;padding:.5em .9em;max-width:60em;overflow-x:auto"
CELL = "padding:.15em .8em .15em 0;text-align:left;vertical-align:top;background:none"
NUMBER = CELL.replace("left", "right") + ";font-variant-numeric:tabular-nums"

Row = Sequence[Any]


def card(
    title: str, facts: Mapping[str, str], header: Row = (), rows: Sequence[Row] = (), note: str = ""
) -> str:
    """A card: its title, a line for each fact, a table, and a last line.

    Texts are shown as they are; whatever they hold, none of it is markup.
    """
    parts = [f'<div style="{CARD}"><b>{_shown(title)}</b>']
    if facts:
        lines = "".join(
            f'<tr style="background:none"><th style="{CELL};font-weight:normal;opacity:.7">'
            f'{_shown(name)}</th><td style="{CELL}">{_shown(told)}</td></tr>'
            for name, told in facts.items()
        )
        parts.append(f'<table style="border:0;margin:.3em 0">{lines}</table>')
    if rows:
        head = "".join(f'<th style="{CELL};border-bottom:{LINE}">{_shown(h)}</th>' for h in header)
        body = "".join(f'<tr style="background:none">{_cells(row)}</tr>' for row in rows)
        parts.append(f'<table style="border:0;margin:.3em 0"><tr>{head}</tr>{body}</table>')
    if note:
        parts.append(f'<div style="opacity:.7">{_shown(note)}</div>')
    return "".join([*parts, "</div>"])


def _cells(row: Row) -> str:
    return "".join(
        f'<td style="{NUMBER if _is_number(cell) else CELL}">{_shown(cell)}</td>' for cell in row
    )


def _is_number(cell: Any) -> bool:
    """Numbers, also those that were written as text with their sign."""
    text = str(cell)
    return bool(text) and text[0] in "+−-0123456789" and text[-1:] in "0123456789⁰¹²³⁴⁵⁶⁷⁸⁹"


def _shown(value: Any) -> str:
    return html.escape(str(value))

"""Draw what an index keeps by bytes, and write the table of docs/index_on_disk.md.

python scripts/draw_index.py

Both are benchmarks/results/index.json, which benchmarks/index.py makes.
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "index_on_disk.md"
IMAGE = ROOT / "docs" / "images" / "index-bytes.png"
BEGIN, END = "<!-- table of benchmarks/results/index.json -->\n\n", "\n\n<!-- end of it -->"
LABELS = {"LoGra": "C1", "low rank": "C2", "TrackStar": "C3", "bergson": "C4"}


def ordered(rows: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of the index first, then others, each by bytes."""
    return sorted(rows.items(), key=lambda r: (group(r[0]), r[1]["bits"] != 1, r[1]["bytes"]))


def group(name: str) -> int:
    """Whose row it is: 0 of the index."""
    known = [name.startswith(label) for label in LABELS]
    return 1 + known.index(True) if any(known) else 0


def table(rows: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| row | bytes | Spearman | in 100 | LDS | LDS, replaced | slope | rows, in plain epochs: "
        "seconds, multiply-adds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, told in ordered(rows):
        cells = [name, f"{told['bytes']:,}".replace(",", " ")]
        cells += [f"{told['spearman']:.2f}", f"{told['candidates']:.2f}", f"{told['lds'][0]:.2f}"]
        replaced = told.get("lds_reranked")
        cells.append("–" if replaced is None else f"{replaced[0]:.2f}")
        cells.append("–" if "slope" not in told else f"{told['slope']:.2f}")
        costs = (told.get(key) for key in ("rows_epochs", "rows_flops"))
        cells.append(", ".join(f"{x:.2f}" for x in costs if x is not None) or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> None:
    """Bytes against rank correlation and LDS."""
    rows, full = report["rows"], report["lds"][0]
    index = [told for name, told in ordered(rows) if group(name) == 0 and told["bits"] == 1]
    x = [told["bytes"] for told in index]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.3))
    axes[0].plot(x, [told["spearman"] for told in index], "o-", ms=4, label="index, 1 bit")
    axes[0].set_ylabel("Spearman with EK-FAC")
    axes[0].plot(
        x, [t["candidates"] for t in index], "o--", ms=4, color="0.6", label="first 10 in 100"
    )
    axes[1].plot(x, [told["lds"][0] for told in index], "o-", ms=4, label="index: scan")
    replaced = [told["lds_reranked"][0] for told in index]
    axes[1].plot(x, replaced, "s-", ms=4, color="C0", alpha=0.5, label="index: 100 replaced")
    axes[1].axhline(full, color="0.7", lw=1)
    axes[1].text(x[0], full, "EK-FAC", fontsize=8, color="0.5", va="bottom")
    axes[1].set_ylabel("LDS")
    for label, color in LABELS.items():
        told = [each for name, each in rows.items() if name.startswith(label)]
        for ax, key in ((axes[0], "spearman"), (axes[1], "lds")):
            y = [each[key] if key == "spearman" else each[key][0] for each in told]
            ax.scatter([each["bytes"] for each in told], y, s=18, color=color, label=label)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks([2**k for k in range(10, 17)], [str(2 ** (k - 10)) for k in range(10, 17)])
        ax.set_xlabel("kilobytes an example")
        ax.set_ylim(0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False, loc="lower right", ncol=2)
    axes[1].legend(fontsize=7, frameon=False, loc="lower right", ncol=2)
    figure.tight_layout()
    figure.savefig(IMAGE, dpi=110)


def main() -> None:
    """Both."""
    report = json.loads((ROOT / "benchmarks" / "results" / "index.json").read_text())
    draw(report)
    text = PAGE.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    filled = pattern.sub(lambda _: BEGIN + table(report["rows"]) + END, text)
    PAGE.write_text(filled)


if __name__ == "__main__":
    main()

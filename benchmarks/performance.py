"""Make docs/why/performance.md and its pictures of the records in benchmarks/results.

    python -m benchmarks.performance

The prose is in performance.md.jinja; tables, pictures and the figures within the prose come from the records, each of
one machine (`python -m benchmarks --full --out benchmarks/results/NAME.json` writes one). Look at the pictures, in
docs/images, before you commit them.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks import records
from patchbank.bench.machine import words

DOCS = Path(__file__).parents[1] / "docs"
_COLOURS = ["#3b82c4", "#d0691f", "#2e9e5b", "#9a6fd0", "#c9487a", "#808080"]  # seen on white and on black
_STYLE = {
    "svg.hashsalt": "patchbank",  # the same bytes each time
    "svg.fonttype": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.prop_cycle": mpl.cycler(color=_COLOURS),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#7d7d7d"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.titlesize": 9, "axes.titlelocation": "left", "legend.fontsize": 8},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#808080", "grid.alpha": 0.25},
    **{"lines.marker": "o", "lines.markersize": 3.5},
}
Lines = Mapping[str, Mapping[Any, float]]  # name -> x -> y


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and the pictures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    every = read()
    (DOCS / "why/performance.md").write_text(page(every))
    print(DOCS / "why/performance.md")
    for name, record in every.items():
        if picture := draw(record):
            (DOCS / "images" / f"{name}.svg").write_text(picture)
            print(DOCS / "images" / f"{name}.svg")


def read() -> dict[str, dict[str, Any]]:
    """The records by their names."""
    return {path.stem: records.load(path) for path in sorted(records.RESULTS.glob("*.json"))}


def page(every: Mapping[str, dict[str, Any]]) -> str:
    """The text of docs/why/performance.md."""

    def tables(benchmark: str) -> str:
        made = [
            f"**{words(record['machine'])}**: {records.section(benchmark, record['benchmarks'][benchmark])}"
            for record in every.values()
            if benchmark in record["benchmarks"]
        ]
        return "\n\n".join(made) or f"No record of this yet: `python -m benchmarks {benchmark} --full` makes one."

    def results(benchmark: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in every.values():
            found = record["benchmarks"].get(benchmark, {})
            if "result" in found:
                yield f"{words(record['machine'])}, {found['date']}", found["result"]

    text = (Path(__file__).parent / "performance.md.jinja").read_text()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    pictures = {name: words(record["machine"]) for name, record in every.items() if draw(record)}
    gpu = any(record["machine"]["gpu"] for record in every.values())
    return environment.from_string(text).render(tables=tables, results=results, pictures=pictures, gpu=gpu)


def draw(record: dict[str, Any]) -> str | None:
    """A record's curves as SVG; None if it has none."""
    found = {name: each["result"] for name, each in record["benchmarks"].items() if "result" in each}
    if not (panels := list(_panels(found))):
        return None
    with mpl.rc_context(_STYLE):
        rows = -(-len(panels) // 3)
        figure = Figure((9.6, 2.7 * rows), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        for number, (title, across, lines) in enumerate(panels):
            _panel(figure.add_subplot(rows, min(3, len(panels)), number + 1), title, across, lines)
        file = io.StringIO()
        metadata = {"Date": None, "Creator": f"Matplotlib {mpl.__version__}"}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return "".join(f"{line.strip()}\n" for line in file.getvalue().splitlines())  # without the indentation


def _panels(found: Mapping[str, Any]) -> Iterator[tuple[str, str, Lines]]:
    """(title, what is across, lines) of what a record has."""
    if curves := found.get("curves"):
        yield f"Encoder, {curves['model']}, images/s", "images in a batch", _by_number(curves["batches"])
        yield "Encoder and extraction, images/s", "cores", _by_number(_turned(curves["cores"]))
    if decode := found.get("decode"):
        rates = decode["images_per_second"]
        threads = {name.split()[0]: each for name, each in rates.items() if name.endswith("threads")}
        yield "Decoding, images/s", "threads", _by_number(_turned(threads))
    if loading := found.get("loading"):
        plain = {name: each for name, each in _turned(loading["samples_per_second"]).items() if "," not in name}
        yield "DataLoader, samples/s", "workers", _by_number(plain)
    if dtypes := found.get("dtypes"):
        sizes = {name: each["bytes"] / 1e3 for name, each in dtypes["dtypes"].items()}
        yield f"Shards, {dtypes['model']}, kB an image", "", {"": sizes}
    if growth := found.get("growth"):
        steps = {"extract": "make_peak_mb", "plan": "plan_peak_mb", "open": "open_peak_mb"}
        rows = growth["results"].get("shards", [])
        lines = {step: {row["keys"]: row[field] for row in rows if row.get(field)} for step, field in steps.items()}
        yield "Peak memory, MB", "images in the bank", lines


def _turned(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Rows as columns."""
    names = next(iter(table.values()))
    return {name: {row: values[name] for row, values in table.items()} for name in names}


def _by_number(table: Mapping[str, Mapping[str, float]]) -> Lines:
    return {name: {int(x): y for x, y in values.items()} for name, values in table.items()}


def _panel(axes: Axes, title: str, across: str, lines: Lines) -> None:
    axes.set_title(title)
    if not across:  # names, no numbers
        (bars,) = lines.values()
        axes.bar_label(axes.barh(list(bars), list(bars.values()), height=0.6), fmt=" {:.0f}")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.margins(x=0.15)
        return
    colours = {kind: _COLOURS[at] for at, kind in enumerate(dict.fromkeys(_kind(name) for name in lines))}
    for name, values in lines.items():
        style = "--" if name.startswith("extract,") else "-"
        axes.plot(list(values), list(values.values()), linestyle=style, color=colours[_kind(name)], label=name)
    every = sorted({x for values in lines.values() for x in values})
    _scale(axes, every)
    axes.set_xlabel(across)
    axes.set_ylim(0, 1.35 * max(max(values.values()) for values in lines.values()))  # room for the legend
    axes.legend(loc="upper left", ncols=2, columnspacing=1, handlelength=1.4)


def _kind(name: str) -> str:
    """What lines of one colour share: ``fp32`` of ``encoder, fp32`` and ``extract, fp32``."""
    return name.rpartition(", ")[2]


def _scale(axes: Axes, every: Sequence[int]) -> None:
    """Logarithmic from one, or from zero, with a tick at each number measured."""
    if len(every) > 1:
        axes.set_xscale("log", base=2) if every[0] else axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(every, labels=[f"{x:,}".replace(",000,000", "M").replace(",000", "k") for x in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


if __name__ == "__main__":
    main()

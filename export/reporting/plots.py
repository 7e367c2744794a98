"""Pictures of a report, as SVG that a page takes in: no background, and the colour of the page's own text."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from export.verification.comparison import Comparison

INK = "#010203"  # which the page replaces by the colour of its text
BAR, LIMIT = "#5b8def", "#d9534f"  # to be read on white and on black
WIDTH = 5.4  # inches: on a phone its texts are as large as the page's
STYLE: Any = {
    "svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
SIZES = re.compile(r'(<svg [^>]*?) width="[^"]*"')
HEIGHTS = re.compile(r'(<svg [^>]*?) height="[^"]*"')


def parts_plot(parts: Mapping[str, tuple[int, int]]) -> str:
    """Bytes of each part of the model, the largest on top."""
    names = sorted(parts, key=lambda name: parts[name][1])
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 0.5 + 0.4 * len(names)), layout="constrained")
        bars = axes.barh(names, [parts[name][1] / 1e6 for name in names], color=BAR)
        axes.bar_label(bars, [f"{parts[name][1] / 1e6:.2f} MB" for name in names], padding=4)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.2)
        return _svg(figure)


def comparisons_plot(comparisons: Sequence[Comparison]) -> str:
    """Of each comparison its figure as a share of its limit, which is a line; small shares on a logarithmic scale."""
    shares = [max(share_of_limit(each), 1e-6) for each in comparisons]
    spread = {"xscale": "log", "xlim": (min(shares) / 3, 3 * max(1, *shares))} if min(shares) < 0.01 else {}
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 0.8 + 0.26 * len(shares)), layout="constrained")
        axes.barh([str(index + 1) for index in range(len(shares))], shares, color=BAR)
        axes.axvline(1, color=LIMIT, linewidth=2)
        axes.set(xlabel="of the limit, which is 1", **spread)
        axes.invert_yaxis()
        return _svg(figure)


def share_of_limit(comparison: Comparison) -> float:
    """What was measured over what is allowed: the largest difference of a logit, or the mean KL divergence."""
    if comparison.kl_limit is not None:
        return comparison.mean_kl / comparison.kl_limit
    assert comparison.difference_limit is not None
    return comparison.max_difference / comparison.difference_limit


def _svg(figure: Figure) -> str:
    """The picture as an element of a page, the same bytes each time."""
    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    pyplot.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return HEIGHTS.sub(r"\1", SIZES.sub(r"\1", text, count=1), count=1)

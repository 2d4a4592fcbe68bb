"""Plots in the terminal, by plotext (extra `cli`); without it, the line that says what to install."""

from collections.abc import Sequence

#: Lines and columns of a plot.
_HEIGHT = 12
_WIDTH = 78

MISSING = 'for a plot: pip install "natsync[cli]" (plotext 5)'


def curve(title: str, xs: Sequence[float], ys: Sequence[float], *, xlabel: str) -> str:
    """A line through the points, as text; or what to install for it. Nothing where there are too few points."""
    if len(xs) < 2:
        return ""
    try:
        import plotext
    except ImportError:
        return MISSING
    if not hasattr(plotext, "plotsize"):  # plotext 6 has other names
        return MISSING
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(_WIDTH, _HEIGHT)
    plotext.plot(list(xs), list(ys))
    plotext.ylim(0, max(ys) * 1.05 or 1)
    plotext.title(title)
    plotext.xlabel(xlabel)
    text: str = plotext.uncolorize(plotext.build())
    return "\n".join(line.rstrip() for line in text.splitlines())

"""Reports: a page with plots of one run, or of several runs side by side.

    report.html     the page
    plots/          each plot as SVG and as PNG
    held_out.json   the analysis of the server's held-out images, for reports that are made without the data

May import everything up to runs.
"""

from fedclip_flwr.report.writing import at_end, make

__all__ = ["at_end", "make"]

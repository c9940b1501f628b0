"""A run as a page, with its plots; and several runs side by side.

    report.html     the page
    plots/          each plot as SVG and as PNG
    held_out.json   the analysis of what the server holds out, for reports that are made where the data is not

May import everything up to runs.
"""

from fedclip_flwr.report.writing import at_end, make

__all__ = ["at_end", "make"]

"""Federations within one process (`simulate`), and methods compared on them: baselines, the sweep, its tables.

May import everything up to report.
"""

"""Methods compared in one process: baselines, the sweep, its tables.

May import everything up to report.
"""

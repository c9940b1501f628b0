"""Federations started and looked after: simulation, runs on a SuperLink, keys, doctor, what would leave a site.

May import everything up to report.
"""

"""Federations started and maintained: simulation, runs on a SuperLink, keys, doctor, `--show-outgoing`, init, clean.

May import everything up to report.
"""

"""Everything that depends on Flower's private names, each with its reason; no other wing imports one.

Patched: supernode, superlink, pinned. Replaced: inbox, a grid. Only names: clientapp, serverapp, connections, crypto,
metadata, sizes. May import: base.
"""

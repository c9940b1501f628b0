"""Everything that depends on Flower's private names, each with its reason; no other wing imports one.

By line of Flower: lines, and the modules that end with _grpc or _http. Patched, by patching: supernode, superlink,
pinned, with refusing in place of other programs. Replaced: inbox, a grid. Only names: clientapp, serverapp,
connections, crypto, metadata, sizes. May import: base.
"""

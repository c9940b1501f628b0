"""Everything of Flower that is not public, each with the reason: the inbox, the pinned SuperNode, the SuperLink.

No other wing imports a private name of Flower. May import: base.
"""

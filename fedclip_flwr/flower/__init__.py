"""All uses of Flower's private names, each with its reason: the inbox, the pinned SuperNode, the SuperLink.

No other wing imports a private name of Flower. May import: base.
"""

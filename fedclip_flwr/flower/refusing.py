"""In place of the programs that a SuperNode starts for other tasks than a ClientApp's: a site has no use for them."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.exit("a server asked for another task than a ClientApp's: this site runs only its installed ClientApp")

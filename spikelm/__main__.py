"""python -m spikelm COMMAND"""

import sys

from spikelm.cli import main

if __name__ == "__main__":
    sys.exit(main())

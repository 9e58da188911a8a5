"""`python -m pipework.cli`, where the `pipework` script is not on the path."""

import sys

from pipework.cli import main

if __name__ == "__main__":
    sys.exit(main())

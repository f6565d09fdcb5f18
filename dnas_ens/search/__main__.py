"""``python -m dnas_ens.search``."""

import sys

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.search import main

if __name__ == "__main__":
    sys.exit(run_main(main, shared=True))

"""``python -m dnas_ens``."""

import sys

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.whole_way import main

if __name__ == "__main__":
    sys.exit(run_main(main, shared=True))

"""``python -m dnas_ens.compare``."""

import sys

from dnas_ens.commands.compare import main
from dnas_ens.commands.parse import run_main

if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))

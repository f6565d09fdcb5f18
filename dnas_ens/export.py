"""``python -m dnas_ens.export``."""

import sys

from dnas_ens.commands.export import main
from dnas_ens.commands.parse import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))

"""``python -m dnas_ens.retrain``."""

import sys

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.retrain import main

if __name__ == "__main__":
    sys.exit(run_main(main, shared=True))

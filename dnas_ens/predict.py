"""``python -m dnas_ens.predict``."""

import sys

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.predict import main

if __name__ == "__main__":
    sys.exit(run_main(main))

"""``python -m dnas_ens.distil``."""

import sys

from dnas_ens.commands.distil import main
from dnas_ens.commands.parse import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))

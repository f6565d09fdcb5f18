"""``python -m dnas_ens.report``."""

import sys

from dnas_ens.commands.evaluate import report_main
from dnas_ens.commands.parse import run_main

if __name__ == "__main__":
    sys.exit(run_main(report_main))

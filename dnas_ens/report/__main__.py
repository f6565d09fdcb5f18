"""``python -m dnas_ens.report``."""

import sys

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.report import main

sys.exit(run_main(main))

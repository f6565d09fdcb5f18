"""``python -m dnas_ens``."""

import sys

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.whole_way import main

sys.exit(run_main(main))

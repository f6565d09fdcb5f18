"""``python -m dnas_ens``."""

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.whole_way import main
from dnas_ens.run.ranks import end

if __name__ == "__main__":
    end(run_main(main, shared=True))

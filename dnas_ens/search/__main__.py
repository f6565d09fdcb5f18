"""``python -m dnas_ens.search``."""

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.search import main
from dnas_ens.run.ranks import end

if __name__ == "__main__":
    end(run_main(main, shared=True))

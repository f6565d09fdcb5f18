"""``python -m dnas_ens.retrain``."""

from dnas_ens.commands.parse import run_main
from dnas_ens.commands.retrain import main
from dnas_ens.run.ranks import end

if __name__ == "__main__":
    end(run_main(main, shared=True))

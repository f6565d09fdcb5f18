"""Is the searched ensemble better than the alternatives, for as many members and for the same cost?

    python experiments/compare_ensembles.py runs/001-digits
    python experiments/compare_ensembles.py runs/001-digits --methods ours base-cell
    python experiments/compare_ensembles.py runs/001-digits runs/002-digits runs/003-digits --epochs-grid 10 30 60
    python experiments/compare_ensembles.py runs/001-digits --methods base-cell best-cell random-cells --members-grid 10

This is ``python -m dnas_ens.compare`` under its name as a study: the methods are in ``dnas_ens/compare/methods/``, the
results of several runs in ``experiments/results/comparison-*``. The published comparison is EdgeNES's on CIFAR-100, see
``neural_ensemble_search.py``.

"""

from dnas_ens.commands.compare import DESCRIPTION, main
from dnas_ens.compare.study import run_script

PROG = "python experiments/compare_ensembles.py"

if __name__ == "__main__":
    run_script(lambda argv: main(argv, prog=PROG, description=f"{__doc__}{DESCRIPTION}"))

"""How long does a command take to print its help, beside an import of torch alone?

    python experiments/benchmarks/startup.py

Wall time of child processes in turn: `python -m dnas_ens.search --help`, `python -c "import torch"` and, as the floor,
`python -c pass`. Each then runs once more under `-X importtime`, which says whether it imported torch. A minute.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

from timing import Options, compared, in_turn, parse_benchmark, report, tell, tell_sides

from dnas_ens.commands.parse import run_main

OURS = "search --help"
#: What each side hands to the interpreter.
SIDES: dict[str, tuple[str, ...]] = {
    "bare interpreter": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    OURS: ("-m", "dnas_ens.search", "--help"),
}


def wall_time(arguments: tuple[str, ...]) -> float:
    """Run a child interpreter to its end and return the seconds from its start."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def imported_modules(arguments: tuple[str, ...]) -> set[str]:
    """Return the names of all modules a child interpreter imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("startup", __doc__, Options(), argv)
    sides = {name: partial(wall_time, arguments) for name, arguments in SIDES.items()}
    results = compared(in_turn(sides, rounds=options.rounds, warmup=options.warmup), {}, ours=OURS)
    tell_sides(results)
    for name, arguments in SIDES.items():
        modules = imported_modules(arguments)
        with_torch = "torch" in modules
        results["sides"][name] |= {"imports_torch": with_torch, "modules": len(modules)}
        tell(f"{name}: {'imports' if with_torch else 'does not import'} torch; {len(modules)} modules")
    report("startup", argv, options, results)


if __name__ == "__main__":
    sys.exit(run_main(main))

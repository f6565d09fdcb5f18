"""The rows of a training by name, and which of them are compared."""

from __future__ import annotations

SCHEDULES = ("constant", "cosine")
KINDS = {"equal": "equal", "linear": "linearly decaying", "exponential": "exponentially decaying"}

LAST = "last model"
AS_SAVED = "last model, running BatchNorm statistics"
BEST = "best single kept model"
EQUAL, LINEAR, EXPONENTIAL = (f"{name} average of the last n" for name in KINDS.values())
SWA = "SWA: equal average of all kept"
EMA = "EMA"
POLYAK = "Polyak, every step of the training"
POLYAK_LATE = "Polyak, every step of the kept epochs"
GREEDY_KEPT = "greedy soup of the kept models"
UNIFORM = "uniform soup of the branches"
GREEDY = "greedy soup of the branches"
ENSEMBLE = "ensemble of the last n (n of equal)"
ENSEMBLE_KEPT = "ensemble of all kept"
ENSEMBLE_BRANCHES = "ensemble of the branches"
#: Which pairs of one schedule are told in a sentence each.
PAIRS = (
    (BEST, LAST),
    (EQUAL, LAST),
    (EQUAL, BEST),
    (LINEAR, EQUAL),
    (EXPONENTIAL, EQUAL),
    (EQUAL, ENSEMBLE),
    (SWA, LAST),
    (SWA, ENSEMBLE_KEPT),
    (EMA, LAST),
    (POLYAK, LAST),
    (POLYAK_LATE, LAST),
    (GREEDY_KEPT, LAST),
    (GREEDY_KEPT, BEST),
    (UNIFORM, LAST),
    (GREEDY, LAST),
    (UNIFORM, ENSEMBLE_BRANCHES),
    (ENSEMBLE, LAST),
)
#: Methods under the constant rate that are held against the last model of the cosine.
ACROSS = (LAST, EQUAL, SWA, EMA, ENSEMBLE)

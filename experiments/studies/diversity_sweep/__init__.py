"""What diversity_sweep.py alone needs.

In the order of the study: `options`, `searching` (one search or training, predictions), `choosing` (what is chosen on
val and retrained), `records` (what is kept and what is missing), `results` (groups of predictors and their losses),
`measured` (their comparisons), `path_parts` and `search_parts` (the five questions as tables and sentences), `report`
and `figure`.
"""

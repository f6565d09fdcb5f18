"""What batchnorm_sharing.py alone needs.

In the order of the study: `options`, `worker` (a search or a training), `records` (what is kept and what is missing),
`measures` (of a search, and how far the settings differ) and `report`.
"""

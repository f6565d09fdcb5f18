"""What weight_averaging.py alone needs.

In the order of the study: `options` and `methods` (what is run, the rows and which are compared), `problem` (data and
models), `trainings`, `choice` (on val), `evaluation` (on test, once), `records` (finished trainings),
`report` and `figure`.
"""

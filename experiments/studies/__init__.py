"""What the studies in this folder stand on; every script beside it asks one question and runs as it is.

Shared: `options` (of the studies of reference models), `batches` (passes over images), `training` (one network,
epoch by epoch), `bench` (data and model on a device, trainings that go on where they stopped), `predictors` (the rows
of a seed: predictions, metrics, losses of every image), `records` (what is kept, and that nothing is mixed with it),
`comparisons` (paired, corrected together) and `report` (tables, where figures come from, files). What one study alone
needs is in the folder of its name.

The run folder of such a study holds, for every seed, one folder a training (its states and its cost, ``training.json``
written last), the rows' predictions (``predictions.npz``) and the rows themselves (``rows.json``, written last).
What is finished is not run again, and a training that was interrupted goes on from its newest checkpoint.

Legend: M networks, R rows, N images, K classes, S seeds.
"""

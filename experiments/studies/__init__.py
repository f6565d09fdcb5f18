"""What several studies share; every script beside this folder asks one question and runs as it is.

The engine is in the package, `dnas_ens.compare`: conditions × seeds × run_one, the store, tables and files. Here are
`reference_models` (options, trainings and rows of studies of one reference model), `search_studies` (searches,
genotypes trained from scratch, how lambda steers) and `plotting`. What one study alone needs is in its script or in
the folder of its name.
"""

"""The commands: one module each, started as ``python -m dnas_ens`` or ``python -m dnas_ens.NAME``."""

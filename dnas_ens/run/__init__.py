"""A run on disk and the machine it runs on: folder, checkpoints, files, log, progress, device."""

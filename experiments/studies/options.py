"""Presets of the studies of searches."""

#: Preset of searches and trainings from scratch on each data set.
PRESETS = {"digits": "smoke", "fashion-mnist": "micro"}

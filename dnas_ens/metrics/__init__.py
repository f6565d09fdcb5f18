"""Figures computed from arrays of probabilities and labels: scores, calibration, diversity, significance."""

"""Comparing: the study engine, and the methods that a searched ensemble is compared with."""

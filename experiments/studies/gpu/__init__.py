"""What ``gpu_session.py`` measures: `sections`, one function each, `comparison` (the longest of them) and `table`."""

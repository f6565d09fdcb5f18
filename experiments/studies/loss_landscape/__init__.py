"""Parts of ``loss_landscape.py``: solutions and their trajectories, what is measured on them, pictures, report."""

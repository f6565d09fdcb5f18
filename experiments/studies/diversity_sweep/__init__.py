"""What diversity_sweep.py alone needs: `searches` (what is run and chosen), `tables` (the five parts), `figure`."""

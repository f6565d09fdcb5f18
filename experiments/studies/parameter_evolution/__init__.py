"""What parameter_evolution.py alone needs: networks and evolution of a seed, then sentences and picture."""

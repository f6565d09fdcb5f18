"""Training networks: steps, epochs, members side by side, and prediction."""

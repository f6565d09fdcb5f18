"""A budget of time or epochs, spent where it pays: a valid ensemble after every training."""

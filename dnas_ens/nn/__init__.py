"""Networks: candidate operations, the supernet that mixes them and the discrete network that uses a genotype."""

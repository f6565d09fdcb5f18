"""What is searched: operations, cells and genotypes, and the space of them."""

"""Pictures: the house style, drawn cells, and the plots of searches and studies."""

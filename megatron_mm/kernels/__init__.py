"""The kernels of the project: `reference` is what each means, `ops` and `cross_entropy` run them."""

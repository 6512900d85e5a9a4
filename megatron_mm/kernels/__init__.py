"""The kernels of the project: `reference` is what each means, `ops` runs it."""

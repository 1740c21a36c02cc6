"""Examples to batches: packing, grouping, loaders that resume."""

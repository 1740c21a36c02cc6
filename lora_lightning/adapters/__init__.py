"""One layer: the base layer, its adapters, and the law that binds them."""

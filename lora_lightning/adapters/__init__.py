"""What sits on a frozen layer: the law, the bookkeeping, access to base weights, and the shared low-rank product."""

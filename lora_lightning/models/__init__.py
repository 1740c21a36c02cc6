"""A pretrained model: loading it, and what it is made of."""

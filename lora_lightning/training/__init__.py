"""Our LightningModule, and what it brings to a run."""

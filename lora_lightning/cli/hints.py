"""Hints of other libraries that do not concern an adapter run."""

from __future__ import annotations

import logging
import os
import warnings


def hide_hints() -> None:
    """Keep hints that do not concern an adapter run out of the terminal."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")
    # validation metrics are those of all processes already
    warnings.filterwarnings("ignore", message=r".*It is recommended to use `self.log\('(val|test)_.*sync_dist=True.*")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 under jsonargparse 4.53
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")  # Lightning 2.6 under torch 2.13

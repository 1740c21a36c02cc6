from __future__ import annotations

import datasets
import pytest

from lora_lightning.data.sources.silence_warnings import silence_warnings


@pytest.mark.parametrize("bars", [True, False])
def test_settings_come_back_after_an_error_too(bars):
    (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
    before = datasets.logging.get_verbosity()

    def fail() -> None:
        with silence_warnings():
            assert datasets.are_progress_bars_disabled()
            assert datasets.logging.get_verbosity() == datasets.logging.CRITICAL
            raise ValueError

    try:
        with pytest.raises(ValueError, match=r"^$"):
            fail()
        assert datasets.are_progress_bars_disabled() == (not bars)
        assert datasets.logging.get_verbosity() == before
    finally:
        datasets.enable_progress_bars()

"""Positions of a stream: exact resume anywhere, in every worker and process."""

from __future__ import annotations

import io
from itertools import islice

import pytest
import torch
from streams import plain

from lora_lightning.errors import ResumeError


@pytest.mark.parametrize(
    ("workers", "window", "packing"),
    [
        (0, 1, False),
        (2, 3, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(0, 1, True), (0, 3, False), (0, 3, True), (1, 2, False), (1, 2, True), (2, 3, False)]
        ),
    ],
)
def test_resume_goes_on_as_if_never_stopped(make_stream, workers, window, packing):
    """Over blocks, files and turns, and inside windows; the positions survive torch.save without pickled objects."""
    settings = {"packing": packing, "max_length": 20}
    whole = plain(islice(make_stream(workers, window=window, **settings).train_dataloader(), 60))
    for stop in (2, 9, 31) if workers == 0 else (4, 23):
        stopped = make_stream(workers, window=window, **settings).train_dataloader()
        batches = iter(stopped)
        assert plain(islice(batches, stop)) == whole[:stop]
        file = io.BytesIO()
        torch.save(stopped.state_dict(), file)
        file.seek(0)
        resumed = make_stream(workers, window=window, **settings).train_dataloader()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert plain(islice(resumed, 12)) == whole[stop : stop + 12]


def _one_process(rank: int, folder: str, make_stream, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole = plain(islice(make_stream(0, (2, rank)).train_dataloader(), 30))
    stopped, resumed = (make_stream(0, (2, rank)).train_dataloader() for _ in range(2))
    assert plain(islice(stopped, 17)) == whole[:17]
    written = [stopped.state_dict()]
    torch.distributed.broadcast_object_list(written, src=0)  # what the first process wrote is what all of them read
    resumed.load_state_dict(written[0])
    results.put((rank, plain(islice(resumed, 13)) == whole[17:]))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_each_process_goes_on_where_it_was(make_stream, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_one_process, args=(rank, str(tmp_path), make_stream, results)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert sorted(results.get(timeout=60) for _ in processes) == [(0, True), (1, True)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def test_another_number_of_workers(make_stream):
    state = make_stream(2).train_dataloader().state_dict()
    with pytest.raises(ResumeError, match=r"led to 2 readers of the stream .* and to 0 now; .* Resume with the same"):
        make_stream(0).train_dataloader().load_state_dict(state)

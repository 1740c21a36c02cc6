"""Tensors of all processes, with gradients back to each."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import metrics, update_metrics
from lora_lightning.models.tasks.gathering import alone, gather, mean_of_all


def _part_of_a_batch(rank: int, folder: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weight, sides, task = _problem()
    gradient, loss, metrics = _step(task, weight, sides[:, 3 * rank : 3 * rank + 3])
    torch.distributed.all_reduce(gradient)
    torch.distributed.all_reduce(loss)
    counts = torch.arange(4.0)[: 1 + 2 * rank]  # of 0, and of 0, 1, 2
    assert float(mean_of_all(counts)) == 0.75
    if rank == 1:  # the other one does not take part
        with alone():
            assert float(mean_of_all(counts)) == 1.0
            assert gather(counts)[0].shape == (1, 3)
    results.put((rank, gradient.div(2).tolist(), loss.div(2).item(), metrics))
    torch.distributed.destroy_process_group()


def _problem():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    sides = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    return weight, sides, find_task("sentence-embedding", {"temperature": 0.3})


def _step(task, weight, sides):
    """Gradient and mean loss of the vectors W x, as a process sees them, and metrics of all processes."""
    weight = weight.clone().requires_grad_()
    vectors = torch.nn.functional.normalize(sides @ weight.T, dim=-1)
    loss = task.loss(vectors, {})
    mean = loss.total / loss.count
    mean.backward()
    collection = metrics(task, torch.nn.Module())
    update_metrics(task, collection, vectors.detach(), {})
    return weight.grad, mean.detach(), {name: float(value) for name, value in collection.compute().items()}


@pytest.mark.multi
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_have_the_loss_gradient_and_metrics_of_the_joint_batch(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_part_of_a_batch, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=100) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    weight, sides, task = _problem()
    gradient, loss, metrics = _step(task, weight, sides)
    for _, theirs, mean, measured in found:
        torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float64), gradient, rtol=0, atol=1e-10)
        assert mean == pytest.approx(float(loss), abs=1e-10)
        assert measured == pytest.approx(metrics, abs=1e-6)
    alone = _step(task, weight, sides[:, :3])[0]
    assert float((alone - gradient).abs().max()) > 1e-3


def test_one_process_has_its_own_tensor_with_its_gradient():
    mine = torch.randn(2, 3, requires_grad=True)
    every, place = gather(mine)
    assert (tuple(every.shape), place) == ((1, 2, 3), 0)
    every.sum().backward()
    assert torch.equal(mine.grad, torch.ones(2, 3))


def test_the_mean_of_one_process_is_its_own_and_has_no_gradient():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert float(mean_of_all(values)) == 1.5
    assert not mean_of_all(values).requires_grad
    assert float(mean_of_all(torch.tensor([]))) == 0.0

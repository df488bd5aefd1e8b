"""What is released once, with one C: sums left by others, rules that change, edits that no counter sees, threads."""

import copy
import pickle
import threading

import pytest
import torch
from test_optimizer import backward, net, wrap
from torch import nn

import fastclip
from fastclip.clipping import Flat


def norm(model):
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


def test_a_new_optimizer_does_not_inherit_a_sum():
    model = net()
    optimizer = wrap(model)
    backward(model)
    with pytest.raises(ValueError, match="a clipped sum waits for its release"):
        wrap(model)
    optimizer.zero_grad()
    wrap(model)
    clipper = fastclip.attach(net(), max_grad_norm=1.0)
    clipper.model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(ValueError, match="a clipped sum waits for its release"):
        wrap(clipper.model, loss_reduction="sum")


def test_c_cannot_change_within_a_logical_batch_by_way_of_the_rule():
    rule, model = Flat(10.0), net()
    optimizer = wrap(model, clipping=rule, max_grad_norm=10.0)
    backward(model)
    rule.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match=r"clipped to 10\.0, but max_grad_norm is 1\.0 now"):
        backward(model)
    with pytest.raises(RuntimeError, match=r"clipped to 10\.0, but max_grad_norm is 1\.0 now"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def test_a_release_hook_cannot_change_c():
    rule, model = Flat(10.0), net()
    optimizer = wrap(model, clipping=rule, max_grad_norm=10.0)
    optimizer.attach_release_hook(lambda _: setattr(rule, "max_grad_norm", 1.0))
    backward(model)
    with pytest.raises(RuntimeError, match=r"clipped to 10\.0, but max_grad_norm is 1\.0 now"):
        optimizer.step()
    assert optimizer.noise.step == 0


EDITS = {
    "data": lambda p: p.grad.data.mul_(50),
    "numpy": lambda p: p.grad.numpy().__imul__(50),
    "other data": lambda p: setattr(p.grad, "data", p.grad.data * 50),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("big", [False, True])
def test_edits_that_no_version_counter_sees(edit, big):
    model = nn.Linear(300, 200) if big else net()
    optimizer = wrap(model)
    model(torch.randn(4, 300 if big else 3)).square().sum(1).mean().backward()
    edit(model.weight if big else model[0].weight)
    with pytest.raises(RuntimeError, match="was changed since it was clipped"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="was changed since it was clipped"):
        model(torch.randn(4, 300 if big else 3)).square().sum(1).mean().backward()


class Sly(Flat):
    """Writes into the norms that it is shown, so that a check against them would see nothing."""

    def factors(self, norms):
        return torch.ones_like(norms.zero_())


@pytest.mark.parametrize("secure", [False, True])
def test_a_rule_that_writes_into_the_norms_gets_no_further(secure):
    if secure:
        pytest.importorskip("fastclip._host", reason="no compiler at install")
    model = net()
    optimizer = wrap(
        model, clipping=Sly(1.0), loss_reduction="sum", secure=secure, noise_multiplier=1.0 if secure else 0.0
    )
    (1e3 * model(torch.randn(1, 3))).square().sum().backward()
    total = torch.stack([optimizer.clipper.sums.pending(p).norm() for p in model.parameters()]).norm()
    assert float(total) <= 1.0 + 1e-6


def test_one_unit_in_two_threads_enters_once():
    for _ in range(20):
        model = nn.Linear(30, 30)
        optimizer = wrap(model, loss_reduction="sum")
        losses, start, refused = [], threading.Barrier(2), []
        for _ in range(2):
            with optimizer.clipper.units(ids=[1]):
                losses.append((100 * model(torch.ones(1, 30))).square().sum())

        def run(loss, start=start, refused=refused):
            start.wait()
            try:
                loss.backward()
            except RuntimeError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=run, args=(loss,)) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1 and "unit 1 is in two backwards" in refused[0]
        assert norm(model) <= 1.0 + 1e-5


def test_after_a_secure_optimizer_a_plain_one_sums_plainly():
    pytest.importorskip("fastclip._host", reason="no compiler at install")
    model = net()
    wrap(model, secure=True, noise_multiplier=1.0)
    optimizer = wrap(model, base=torch.optim.AdamW)
    backward(model)
    assert optimizer.clipper.sums.pending(model[0].weight).dtype == torch.float32
    optimizer.step()


def physical(sampler):
    data = [torch.randn(3) for _ in range(40)]
    return fastclip.PoissonLoader(data, sampler, collate_fn=torch.stack, max_examples=4)


def test_a_part_of_a_draw_is_not_released():
    loader = physical(fastclip.PoissonSampler(40, steps=3, sample_rate=0.5))
    model = net()
    optimizer = wrap(model, sampler=loader, expected_batch_size=None, loss_reduction="sum")
    for x in loader:
        model(x).square().sum().backward()
        if not loader.last_of_draw:
            with pytest.raises(RuntimeError, match="is not its last"):
                optimizer.step()
        else:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_no_draw_to_release(duplicate):
    sampler = fastclip.PoissonSampler(40, steps=1, sample_rate=0.5)
    loader = fastclip.PoissonLoader([torch.randn(3) for _ in range(40)], sampler)
    for _ in loader:
        pass
    for original in (sampler, loader):
        other = duplicate(original)
        if other.current_draw is not None:  # a shallow copy of a loader is a view of the same sampler
            pytest.fail("the copy holds the original's draw")
        optimizer = wrap(net(), sampler=other, expected_batch_size=None)
        with pytest.raises(RuntimeError, match="no draw was handed out"):
            backward(optimizer.clipper.model)
        with pytest.raises(RuntimeError, match="no draw was handed out"):
            optimizer.step()
    assert duplicate(loader).current_indices is None


def test_a_sum_is_not_released_under_the_next_draws_id():
    sampler = fastclip.PoissonSampler(40, steps=3, sample_rate=1.0)
    model = net()
    optimizer = wrap(model, sampler=sampler, expected_batch_size=None)
    for _ in sampler:
        backward(model)
        break
    for _ in sampler:
        with pytest.raises(RuntimeError, match="the sum waits for draw 0, but draw 1"):
            optimizer.step()
        break

"""What linear layers keep under autocast, and that what they keep is what they read."""

import torch
from torch import nn

import fastclip


def saved_storages(run):
    """Bytes by address of what autograd keeps of a forward."""
    found = {}

    def keep(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run()
    return found, out


def test_under_autocast_one_copy_of_an_input_is_kept_and_none_of_a_weight():
    model = nn.ModuleList([nn.Linear(32, 16) for _ in range(3)])

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return sum(layer(x) for layer in self.layers).float()

    whole = Both()
    fastclip.attach(whole, max_grad_norm=1.0)
    x = torch.randn(4, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole(x)  # the trial
        found, out = saved_storages(lambda: whole(x))
    parameters = {p.untyped_storage().data_ptr() for p in whole.parameters()}
    kept = [size for address, size in found.items() if address not in parameters]
    assert sorted(kept) == [4 * 5 * 32 * 2]
    out.square().sum().backward()


def test_an_input_that_is_changed_between_two_layers_is_read_again():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            y = self.first(x).float()
            with torch.no_grad():
                x.add_(1)
            return y + self.second(x).float()

    torch.manual_seed(0)
    model, x = Changing(), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        fastclip.attach(model, max_grad_norm=1.0)
        assert torch.equal(model(x), expected)


def test_another_forward_reads_its_own_batch_from_the_same_tensor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    buffer, batches = torch.empty(4, 8), torch.randn(2, 4, 8)
    outs = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for k, batch in enumerate(batches):
            buffer.numpy()[:] = batch.numpy()  # no version counter sees it
            with clipper.units(ids=range(4 * k, 4 * k + 4)):
                outs.append(model(buffer).float())
        clipper.detach()
        for out, batch in zip(outs, batches, strict=True):
            assert torch.equal(out, model(batch).float())

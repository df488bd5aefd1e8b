"""Tensors with margins on both sides: what reads beyond an end meets NaN, what writes there is found out."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MARGIN = 67  # elements: odd, so that tensors begin at no round address
_FILL = {torch.int32: 2**31 - 1, torch.int64: 2**62}
_NAN = {
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
    torch.float64: (torch.int64, 0x7FF8 << 48),
}


class Guard:
    """Copies of tensors on the device under test, each amid a margin of its own."""

    def __init__(self):
        self._margins = []

    def __call__(self, x):
        count = x.numel() + 2 * _MARGIN
        if x.dtype in _NAN:
            # A NaN of its own, so that one read from another margin and written here is found out too.
            bits, quiet = _NAN[x.dtype]
            buffer = torch.full((count,), quiet + len(self._margins) + 1, dtype=bits, device=DEVICE).view(x.dtype)
        else:
            buffer = torch.full((count,), _FILL[x.dtype], dtype=x.dtype, device=DEVICE)
        inside = buffer[_MARGIN : buffer.numel() - _MARGIN].view(x.shape)
        inside.copy_(x)
        self._margins += [(m, m.clone()) for m in (buffer[:_MARGIN], buffer[buffer.numel() - _MARGIN :])]
        return inside

    def check(self):
        for margin, before in self._margins:
            assert torch.equal(margin.view(torch.uint8), before.view(torch.uint8)), "written beyond an end"

"""Where the noise of Opacus' optimizers comes from under fastclip.

Opacus draws from torch's generator, or from the one it is given: a run under ``torch.manual_seed`` can be repeated, and whoever
knows the seed can subtract the noise. That contract is kept where a seed is there to be seen, and said once; everywhere else
noise is ChaCha20's with a key from the operating system. ``secure_mode=True`` never looks at torch's generator.
"""

from __future__ import annotations

import warnings

import torch

from fastclip.noise import NoiseSource

# torch seeds itself with 53 bits from the operating system; what people pass to manual_seed is shorter.
_SEEDED_BELOW = 2**32


class OptimizerNoise:
    """One source for each release.

    generator: draw from this one. secure: from the operating system, whatever was seeded.
    """

    def __init__(self, generator: torch.Generator | None, secure: bool) -> None:
        self._secret = NoiseSource()
        self._generator, self._secure = generator, secure
        self._warned = False

    def of_release(self) -> NoiseSource:
        """A source whose elements were not drawn before. A seeded one is derived from the generator's next number."""
        generator = self._generator
        if generator is None and not self._secure and torch.initial_seed() < _SEEDED_BELOW:
            generator = torch.default_generator
            if not self._warned:
                warnings.warn(
                    f"torch.manual_seed({torch.initial_seed()}) makes the noise reproducible, and whoever knows the seed can "
                    "subtract it: the reported epsilon holds only with secure_mode=True, or without the seed",
                    stacklevel=2,
                )
                self._warned = True
        if generator is None:
            self._secret.advance()
            return self._secret
        word = torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device)
        return NoiseSource(seed=int(word))

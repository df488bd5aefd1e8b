"""`opacus.privacy_engine`: PrivacyEngine, on fastclip's engine, optimizers and samplers.

The default path keeps nothing per example: the model's backward keeps factors, or in ghost mode clips at once, and the
optimizer clips, adds noise and updates. ``secure_mode=True`` needs no other package: noise is keyed by the operating system,
and so is sampling. Without it, noise and sampling follow torch's generators, as in Opacus, where those were seeded.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable
from itertools import chain
from typing import IO, Any

import opacus.privacy_engine as theirs
import torch
from opacus.accountants import create_accountant
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fastclip.opacus import accountants, optimizers, validators
from fastclip.opacus import data_loader as loaders
from fastclip.opacus import grad_sample as modes
from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers.optimizer import DPOptimizer
from fastclip.opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping


class PrivacyEngine(theirs.PrivacyEngine):
    """Arguments, results and protected methods as Opacus'. Errors as Opacus' too; and ValueError before anything is wrapped for
    max_grad_norm or noise_multiplier that no noise fits.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        self.accountant = create_accountant(mechanism=accountant)
        self.secure_mode = secure_mode
        self.secure_rng: torch.Generator | None = None
        self.dataset: Any = None  # only to notice another one
        if secure_mode:
            self.secure_rng = torch.Generator().manual_seed(secrets.randbits(63))  # for sampling alone
        else:
            warnings.warn(
                "Secure RNG turned off: noise and sampling follow torch's seed if there is one, and who knows it knows them. "
                "Good for experiments; retrain with secure_mode=True before publishing a model",
                stacklevel=2,
            )

    def _prepare_optimizer(
        self,
        *,
        optimizer: Optimizer,
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        expected_batch_size: float,
        loss_reduction: str = "mean",
        distributed: bool = False,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        **kwargs: Any,
    ) -> DPOptimizer:
        cls = optimizers.get_optimizer_class(clipping, distributed, grad_sample_mode)
        return cls(
            optimizer=optimizer.original_optimizer if isinstance(optimizer, theirs.DPOptimizer) else optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=noise_generator,
            secure_mode=self.secure_mode,
            **kwargs,
        )

    def _prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        *,
        poisson_sampling: bool,
        distributed: bool,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> DataLoader[Any]:
        if self.dataset is None:
            self.dataset = data_loader.dataset
        elif self.dataset is not data_loader.dataset:
            warnings.warn(
                f"PrivacyEngine detected new dataset object. Was: {self.dataset}, got: {data_loader.dataset}. Privacy "
                "accounting works per dataset, please initialize new PrivacyEngine if you're using different dataset. You "
                "can ignore this warning if two datasets above represent the same logical dataset",
                stacklevel=3,
            )
        if poisson_sampling:
            return loaders.DPDataLoader.from_data_loader(
                data_loader,
                generator=self.secure_rng,
                distributed=distributed,
                batch_first=batch_first,
                rand_on_empty=rand_on_empty,
            )
        if self.secure_mode:
            return loaders.switch_generator(data_loader=data_loader, generator=self.secure_rng)
        return data_loader

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        max_grad_norm: float | list[float] = 1.0,
        loss_reduction: str = "mean",
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
    ) -> Any:
        self.validate(module=module, optimizer=None, data_loader=None)
        if wrap_model and isinstance(module, AbstractGradSampleModule):
            wanted = (batch_first, loss_reduction, modes.get_gsm_class(grad_sample_mode))
            if (module.batch_first, module.loss_reduction, type(module)) != wanted:
                raise ValueError(
                    "Pre-existing GradSampleModule doesn't match new arguments. Got: module.batch_first: "
                    f"{module.batch_first}, module.loss_reduction: {module.loss_reduction}, type(module): {type(module)}. "
                    f"Requested: batch_first: {batch_first}, loss_reduction: {loss_reduction}, grad_sample_mode: "
                    f"{grad_sample_mode}. Please pass vanilla nn.Module instead"
                )
            if hasattr(module, "max_grad_norm"):
                module.max_grad_norm = max_grad_norm  # one C, the one that noise is for
            return module
        own = {"max_grad_norm": max_grad_norm} if grad_sample_mode in ("ghost", "ghost_fsdp") else {}
        return modes.prepare_module(
            module,
            grad_sample_mode=grad_sample_mode,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            wrap_model=wrap_model,
            **own,
        )

    def _prepare_criterion(
        self, *, module: Any, optimizer: Any, criterion: Any, loss_reduction: str = "mean", **kwargs: Any
    ) -> DPLossFastGradientClipping:
        return DPLossFastGradientClipping(module, optimizer, criterion, loss_reduction)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy of the module with what cannot be private replaced, as ``ModuleValidator.fix`` does; validated."""
        return validators.ModuleValidator.fix_and_validate(module)

    def make_private(
        self,
        *,
        module: Any,
        optimizer: Optimizer,
        criterion: Callable[..., Any] | None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Wrap model, optimizer and loader; for modes with "ghost" the criterion too (cross entropy if None).

        Returns ``(module or hooks, optimizer, data_loader)``, with "ghost" ``(module or hooks, optimizer, criterion,
        data_loader)``. Arguments and errors as Opacus'.
        """
        if noise_generator is not None and self.secure_mode:
            raise ValueError("Passing seed is prohibited in secure mode")
        own = set(module.parameters())
        if not own.issuperset(chain.from_iterable(group["params"] for group in optimizer.param_groups)):
            raise ValueError(
                "Module parameters are different than optimizer Parameters: make the optimizer from this module's parameters, "
                "after ModuleValidator.fix"
            )
        if grad_sample_mode == "ghost_tp":
            raise ValueError(
                'grad_sample_mode="ghost_tp" would clip to another norm than the noise is for: build '
                "GradSampleHooksFastGradientClippingTP and DPOptimizerFastGradientClipping by hand, with one max_grad_norm"
            )
        distributed = isinstance(
            module, DifferentiallyPrivateDistributedDataParallel | DistributedDataParallel | FSDPModule
        )
        optimizers.get_optimizer_class(clipping, distributed, grad_sample_mode)  # refuses before anything is wrapped
        wrapped_before = isinstance(module, AbstractGradSampleModule)
        module = self._prepare_model(
            module,
            batch_first=batch_first,
            max_grad_norm=max_grad_norm,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
        )
        try:
            if poisson_sampling:
                module.forbid_grad_accumulation()
            if hasattr(module, "_tape"):
                module._tape.plain_gradients = False
            loader = self._prepare_data_loader(
                data_loader,
                distributed=distributed,
                poisson_sampling=poisson_sampling,
                batch_first=batch_first,
                rand_on_empty=rand_on_empty,
            )
            steps = len(loader)
            expected = len(loader.dataset) // steps if steps else 0  # type: ignore[arg-type]
            dp_optimizer = self._prepare_optimizer(
                optimizer=optimizer,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                expected_batch_size=expected / torch.distributed.get_world_size() if distributed else expected,
                loss_reduction=loss_reduction,
                noise_generator=noise_generator,
                distributed=distributed,
                clipping=clipping,
                grad_sample_mode=grad_sample_mode,
                **kwargs,
            )
            hook = self.accountant.get_optimizer_hook_fn(sample_rate=1 / steps)
            dp_optimizer.accounting_hook = hook  # looks at no gradient: the release may be one pass
            dp_optimizer.attach_step_hook(hook)
            if "ghost" not in grad_sample_mode:
                return module, dp_optimizer, loader
            private_criterion = self._prepare_criterion(
                module=module,
                optimizer=dp_optimizer,
                criterion=nn.CrossEntropyLoss(reduction=loss_reduction) if criterion is None else criterion,
                loss_reduction=loss_reduction,
                **kwargs,
            )
            return module, dp_optimizer, private_criterion, loader
        except BaseException:
            if not wrapped_before:
                module.cleanup()
            raise

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[..., Any] | None = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """:meth:`make_private` with the noise that spends ``target_epsilon`` at ``target_delta`` in ``epochs`` epochs."""
        if len(self.accountant) > 0:
            warnings.warn(
                "You're calling make_private_with_epsilon with non-zero privacy budget already spent. Returned "
                "noise_multiplier assumes zero starting point, so your overall privacy budget will be higher.",
                stacklevel=2,
            )
        extra = {name: value for name, value in kwargs.items() if name not in _NAMED}
        steps = len(data_loader)
        sigma = accountants.utils.get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=1 / steps,
            steps=round(epochs * steps),
            accountant=self.accountant.mechanism(),
            **extra,
        )
        return self.make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            **kwargs,
        )

    def load_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: nn.Module,
        optimizer: Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load what ``save_checkpoint`` saved, here or in Opacus; returns what is left of the dictionary.

        ``torch_load_kwargs={"weights_only": True}`` loads without running what a pickle says.
        """
        checkpoint = torch.load(path, **{"weights_only": False, **(torch_load_kwargs or {})})
        module.load_state_dict(checkpoint["module_state_dict"], **(module_load_dict_kwargs or {}))
        self.accountant.load_state_dict(checkpoint["privacy_accountant_state_dict"])
        state = checkpoint.pop("optimizer_state_dict", {})
        if (optimizer is not None) != bool(state):
            warnings.warn(
                f"optimizer_state_dict has {len(state)} items but optimizer is {'not ' if optimizer is None else ''}provided.",
                stacklevel=2,
            )
        parts = (
            (optimizer, state),
            (noise_scheduler, checkpoint.pop("noise_scheduler_state_dict", {})),
            (grad_clip_scheduler, checkpoint.pop("grad_clip_scheduler_state_dict", {})),
        )
        for part, saved in parts:
            if part is not None and saved:
                part.load_state_dict(saved)
        return checkpoint


_NAMED = (
    "batch_first",
    "loss_reduction",
    "poisson_sampling",
    "clipping",
    "noise_generator",
    "grad_sample_mode",
    "wrap_model",
    "rand_on_empty",
)

__getattr__, __dir__ = delegate(__name__)

"""The names that a drop-in for Opacus 1.6.0 must have, and the table in docs/from-opacus.md of whose each one is.

`python tests/opacus_face/names.py` writes the table anew from the installed packages; a test compares.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "from-opacus.md"
BEGIN, END = "<!-- names: begin -->\n", "<!-- names: end -->\n"

# Module below opacus, then its names; "Class.member" is a method or class attribute that scripts call or override.
NAMES: dict[str, str] = {
    "": "PrivacyEngine GradSampleModule GradSampleModuleFastGradientClipping utils __version__",
    "privacy_engine": "PrivacyEngine PrivacyEngine.make_private PrivacyEngine.make_private_with_epsilon "
    "PrivacyEngine.get_epsilon PrivacyEngine.is_compatible PrivacyEngine.validate PrivacyEngine.get_compatible_module "
    "PrivacyEngine.save_checkpoint PrivacyEngine.load_checkpoint PrivacyEngine._prepare_optimizer "
    "PrivacyEngine._prepare_data_loader PrivacyEngine._prepare_model PrivacyEngine._prepare_criterion",
    "grad_sample": "AbstractGradSampleModule AbstractGradSampleHooks GradSampleModule GradSampleHooks "
    "GradSampleModuleFastGradientClipping GradSampleHooksFastGradientClipping GradSampleModuleFastGradientClippingFSDP "
    "GradSampleHooksFastGradientClippingFSDP GradSampleModuleFastGradientClippingTP "
    "GradSampleHooksFastGradientClippingTP GradSampleModuleExpandedWeights GradSampleModuleNoOp GradSampleHooksNoOp "
    "register_grad_sampler register_norm_sampler create_or_accumulate_grad_sample prepare_module wrap_model get_gsm_class",
    "grad_sample.utils": "get_hooks_class get_gsm_class prepare_module wrap_model",
    "grad_sample.grad_sample_module": "GradSampleModule.add_hooks GradSampleModule.remove_hooks "
    "GradSampleModule.enable_hooks GradSampleModule.disable_hooks GradSampleModule.forbid_grad_accumulation "
    "GradSampleModule.allow_grad_accumulation GradSampleModule.set_grad_sample_to_none GradSampleModule.del_grad_sample "
    "GradSampleModule.zero_grad GradSampleModule.to_standard_module GradSampleModule.cleanup GradSampleModule.validate "
    "GradSampleModule.is_supported GradSampleModule.GRAD_SAMPLERS",
    "grad_sample.grad_sample_module_fast_gradient_clipping": "GradSampleModuleFastGradientClipping.NORM_SAMPLERS "
    "GradSampleModuleFastGradientClipping.get_norm_sample GradSampleModuleFastGradientClipping.get_clipping_coef "
    "GradSampleModuleFastGradientClipping.per_sample_gradient_norms",
    "optimizers": "DPOptimizer DPPerLayerOptimizer AdaClipDPOptimizer DPOptimizerFastGradientClipping "
    "DistributedDPOptimizer DistributedDPOptimizerFastGradientClipping FSDPOptimizerFastGradientClipping "
    "SimpleDistributedPerLayerOptimizer get_optimizer_class",
    "optimizers.optimizer": "DPOptimizer.grad_samples DPOptimizer.params DPOptimizer.accumulated_iterations "
    "DPOptimizer.param_groups DPOptimizer.state DPOptimizer.defaults DPOptimizer.attach_step_hook "
    "DPOptimizer.signal_skip_step DPOptimizer._check_skip_next_step DPOptimizer.clip_and_accumulate DPOptimizer.add_noise "
    "DPOptimizer.scale_grad DPOptimizer.zero_grad DPOptimizer.pre_step DPOptimizer.step DPOptimizer.state_dict "
    "DPOptimizer.load_state_dict _generate_noise",
    "optimizers.optimizer_fast_gradient_clipping": "DPOptimizerFastGradientClipping.accumulate",
    "optimizers.ddp_perlayeroptimizer": "DistributedPerLayerOptimizer _clip_and_accumulate_parameter",
    "optimizers.utils": "params",
    "data_loader": "DPDataLoader DPDataLoader.from_data_loader CollateFnWithEmpty wrap_collate_with_empty switch_generator",
    "utils.uniform_sampler": "UniformWithReplacementSampler DistributedUniformWithReplacementSampler "
    "DistributedUniformWithReplacementSampler.set_epoch",
    "utils.batch_memory_manager": "BatchMemoryManager BatchSplittingSampler wrap_data_loader",
    "utils.fast_gradient_clipping_utils": "DPLossFastGradientClipping DPTensorFastGradientClipping",
    "utils.adaptive_clipping.adaptive_clipping_utils": "PrivacyEngineAdaptiveClipping",
    "utils.fsdp_utils": "FSDP2Wrapper",
    "utils.per_sample_gradients_utils": "check_per_sample_gradients_are_correct compute_grad_samples_microbatch_and_opacus "
    "compute_microbatch_grad_sample compute_opacus_grad_sample",
    "utils.tensor_utils": "calc_sample_norms unfold2d unfold3d sum_over_all_but_batch_and_last_n",
    "utils.module_utils": "trainable_parameters trainable_modules parametrized_modules requires_grad clone_module "
    "get_submodule are_state_dict_equal",
    "utils.packed_sequences": "compute_seq_lengths",
    "schedulers": "ExponentialNoise LambdaNoise StepNoise ExponentialGradClip LambdaGradClip StepGradClip",
    "accountants": "IAccountant RDPAccountant GaussianAccountant PRVAccountant create_accountant register_accountant",
    "accountants.rdp": "RDPAccountant.DEFAULT_ALPHAS RDPAccountant.get_privacy_spent",
    "accountants.utils": "get_noise_multiplier",
    "validators": "ModuleValidator register_module_validator register_module_fixer",
    "validators.module_validator": "ModuleValidator.validate ModuleValidator.is_valid ModuleValidator.fix "
    "ModuleValidator.fix_and_validate ModuleValidator.VALIDATORS ModuleValidator.FIXERS",
    "validators.errors": "UnsupportedError UnsupportedModuleError UnsupportableModuleError NotYetSupportedModuleError "
    "ShouldReplaceModuleError IllegalModuleConfigurationError",
    "layers": "DPRNN DPGRU DPLSTM DPMultiheadAttention SequenceBias",
    "layers.param_rename": "RenameParamsMixin",
    "distributed": "DifferentiallyPrivateDistributedDataParallel average_gradients",
}


def all_names() -> list[tuple[str, str]]:
    return [(module, name) for module, names in NAMES.items() for name in names.split()]


def resolve(package: str, module: str, name: str) -> Any:
    """The object; of a class's member the descriptor, which is the same object for as long as nobody overrides it."""
    found = importlib.import_module(f"{package}.{module}" if module else package)
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
    return found


def state(module: str, name: str) -> str:
    same = resolve("fastclip.opacus", module, name) is resolve("opacus", module, name)
    return "Opacus' own" if same else "fastclip's"


def table() -> str:
    rows = ["| module | name | state |", "|---|---|---|"]
    for module, name in all_names():
        shown = f"`{module}`" if module else "`opacus` itself"
        rows.append(f"| {shown} | `{name}` | {state(module, name)} |")
    return "\n".join(rows) + "\n"


def table_on_the_page() -> str:
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()

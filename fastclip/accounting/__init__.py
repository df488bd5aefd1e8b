"""What the released steps cost in privacy, what noise buys a target, and the record of what was spent.

Knows no model: only noise multipliers, sampling rates and counts of steps.
"""

from fastclip.accounting import prv, rdp  # noqa: F401  they enter themselves by name
from fastclip.accounting.accountants import (
    ADJACENCIES,
    Accountant,
    AccountingWarning,
    StepEvent,
    epsilon_of,
    find,
    get_epsilon,
    register,
)
from fastclip.accounting.calibration import affordable_steps, get_noise_multiplier
from fastclip.accounting.curves import delta_of, deltas_of, epsilon_curve, gaussian_parameter, trade_off
from fastclip.accounting.edgeworth import EdgeworthEstimate, VerifiedNoise, calibrate_verified
from fastclip.accounting.fixed_size import fixed_size_epsilon
from fastclip.accounting.gdp import gdp_parameter
from fastclip.accounting.group import vadhan
from fastclip.accounting.guarantee import Guarantee, guarantee_of
from fastclip.accounting.ledger import BudgetExhausted, Ledger
from fastclip.accounting.pld import epsilon_by_direction
from fastclip.accounting.protocol import PrivacyAccountant, create_accountant
from fastclip.accounting.shuffle import shuffle_lower_bound
from fastclip.accounting.truncation import safe_max_batch

__all__ = [
    "ADJACENCIES",
    "Accountant",
    "AccountingWarning",
    "BudgetExhausted",
    "EdgeworthEstimate",
    "Guarantee",
    "Ledger",
    "PrivacyAccountant",
    "StepEvent",
    "VerifiedNoise",
    "affordable_steps",
    "calibrate_verified",
    "create_accountant",
    "delta_of",
    "deltas_of",
    "epsilon_by_direction",
    "epsilon_curve",
    "epsilon_of",
    "find",
    "fixed_size_epsilon",
    "gaussian_parameter",
    "gdp_parameter",
    "get_epsilon",
    "get_noise_multiplier",
    "guarantee_of",
    "register",
    "safe_max_batch",
    "shuffle_lower_bound",
    "trade_off",
    "vadhan",
]

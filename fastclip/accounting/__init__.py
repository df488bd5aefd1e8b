"""What the released steps cost in privacy, what noise buys a target, and the record of what was spent.

Knows no model: only noise multipliers, sampling rates and counts of steps.
"""

from fastclip.accounting import prv, rdp  # noqa: F401  they enter themselves by name
from fastclip.accounting.accountants import Accountant, StepEvent, epsilon_of, find, get_epsilon, register
from fastclip.accounting.calibration import affordable_steps, get_noise_multiplier
from fastclip.accounting.edgeworth import EdgeworthEstimate, VerifiedNoise, calibrate_verified
from fastclip.accounting.gdp import gdp_parameter
from fastclip.accounting.group import vadhan
from fastclip.accounting.guarantee import Guarantee, guarantee_of
from fastclip.accounting.ledger import BudgetExhausted, Ledger
from fastclip.accounting.pld import epsilon_curve
from fastclip.accounting.shuffle import shuffle_lower_bound

__all__ = [
    "Accountant",
    "BudgetExhausted",
    "EdgeworthEstimate",
    "Guarantee",
    "Ledger",
    "StepEvent",
    "VerifiedNoise",
    "affordable_steps",
    "calibrate_verified",
    "epsilon_curve",
    "epsilon_of",
    "find",
    "gdp_parameter",
    "get_epsilon",
    "get_noise_multiplier",
    "guarantee_of",
    "register",
    "shuffle_lower_bound",
    "vadhan",
]

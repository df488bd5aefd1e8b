"""What the released steps cost in privacy, what noise buys a target, and the record of what was spent.

Knows no model: only noise multipliers, sampling rates and counts of steps.
"""

from fastclip.accounting.accountants import Accountant, StepEvent, epsilon_of, find, get_epsilon, register
from fastclip.accounting.calibration import affordable_steps, get_noise_multiplier
from fastclip.accounting.guarantee import Guarantee, guarantee_of
from fastclip.accounting.ledger import BudgetExhausted, Ledger
from fastclip.accounting.pld import epsilon_curve

__all__ = [
    "Accountant",
    "BudgetExhausted",
    "Guarantee",
    "Ledger",
    "StepEvent",
    "affordable_steps",
    "epsilon_curve",
    "epsilon_of",
    "find",
    "get_epsilon",
    "get_noise_multiplier",
    "guarantee_of",
    "register",
]

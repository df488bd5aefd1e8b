"""Fine-tuning as it was published: named recipes on DPTrainer, each with the results that others reached.

One concept a file: `catalog` the recipes by name, `settings` what one is made of, `sources` their data, `prompts` and
`infilling`, `table_to_text` and `metrics`, `users` the tasks, `fit` one private run, `run` from a name to a report, `tables`
what it shows, `noise_table` the accountants side by side, `smoke` tiny models and rows.
"""

from fastclip.recipes.catalog import CATALOG
from fastclip.recipes.noise_table import noise_table
from fastclip.recipes.run import chosen, is_recipe, resume_recipe, start_recipe
from fastclip.recipes.settings import Settings, Source, Target

__all__ = [
    "CATALOG",
    "Settings",
    "Source",
    "Target",
    "chosen",
    "is_recipe",
    "noise_table",
    "resume_recipe",
    "start_recipe",
]

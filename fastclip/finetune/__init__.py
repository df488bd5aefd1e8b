"""The commands that train: real models on real text, with a guarantee in the report."""

from fastclip.finetune.models import MeanPooledClassifier, quiet
from fastclip.finetune.presets import AMAZON, MAIL, MOVIES, PRESETS, Recipe
from fastclip.finetune.run import Interrupted, check_task, resume_run, start_run
from fastclip.finetune.terminal import Display

__all__ = [
    "AMAZON",
    "MAIL",
    "MOVIES",
    "PRESETS",
    "Display",
    "Interrupted",
    "MeanPooledClassifier",
    "Recipe",
    "check_task",
    "quiet",
    "resume_run",
    "start_run",
]

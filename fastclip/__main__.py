"""`python -m fastclip`: the commands."""

from fastclip.cli import main

main()

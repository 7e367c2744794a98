"""`python -m export` is wm-export."""

from export.cli import main

main()

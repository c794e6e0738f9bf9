"""`python -m distriray` is the `distriray` command."""

from .cli import main

main()

"""`python -m distriray` is the `distriray` command."""

from distriray.cli import main

main()

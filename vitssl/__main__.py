"""`python -m vitssl` is the command `vitssl`."""

from vitssl import cli

cli.cli()

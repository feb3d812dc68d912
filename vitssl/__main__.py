"""`python -m vitssl` is the command `vitssl`."""

from vitssl import cli

if __name__ == "__main__":  # Importing it runs nothing.
    cli.cli()

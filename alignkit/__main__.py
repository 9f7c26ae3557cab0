"""`python -m alignkit`."""

from alignkit.cli.main import main

main()

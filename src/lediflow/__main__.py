"""`python -m lediflow`."""

from lediflow.cli.app import main

main()

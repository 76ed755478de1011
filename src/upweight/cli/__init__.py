"""The command line: parsing in `main.py`, one file per verb."""

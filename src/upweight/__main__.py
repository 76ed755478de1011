"""`python -m upweight`, which `torchrun -m upweight` starts: the same as the console script."""

from upweight.cli.main import main

if __name__ == "__main__":
    main()

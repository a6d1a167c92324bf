"""`python -m pdserve.cli` is the `pdserve` command."""

from pdserve.cli.app import main

if __name__ == "__main__":
    main()

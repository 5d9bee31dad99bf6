"""`python -m quire.cli`: the command line where no script is installed."""

from quire.cli.main import main

if __name__ == "__main__":
    main()

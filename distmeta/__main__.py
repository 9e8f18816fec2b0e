"""`python -m distmeta` runs the command line."""

from distmeta.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m regard`: the command line where its script is not on the path."""

from regard.cli import main

if __name__ == "__main__":
    main()

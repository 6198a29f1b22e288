"""``python -m nybble``: the command line."""

from nybble.cli import main

if __name__ == "__main__":
    main()

"""``python -m hvdlm``: the command line."""

from hvdlm.cli import main

if __name__ == "__main__":
    main()

"""`python -m dataflows` is `millrace`."""

from dataflows.cli import main

if __name__ == "__main__":
    main()

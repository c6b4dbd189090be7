"""`python -m fasttrace`: the command line."""

from fasttrace.cli.app import app

if __name__ == "__main__":
    app(prog_name="fasttrace")

"""``python -m unmask``: the command line."""

from unmask.cli.app import app

if __name__ == "__main__":
    app(prog_name="unmask")

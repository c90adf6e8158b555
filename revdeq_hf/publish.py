"""Command: check a saved model and publish it on the Hub (`revdeq_hf.publishing`)."""

import argparse
from collections.abc import Sequence

from .publishing import publish


def main(arguments: "Sequence[str] | None" = None) -> None:
    """The command; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(prog="python -m revdeq_hf.publish", description=__doc__)
    parser.add_argument("folder", help="of a saved model; it stays as it is")
    parser.add_argument("repo_id", help="USER/NAME")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--create_pr", "--draft-pull-request", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--revision", help="branch to commit to (default main)")
    parser.add_argument("--commit_message", default="Upload model")
    parser.add_argument("--dry_run", action="store_true", help="check, and show what would be sent; the network is not used")
    options = vars(parser.parse_args(arguments))
    try:
        print(publish(options.pop("folder"), options.pop("repo_id"), **options))
    except (ValueError, FileNotFoundError, PermissionError, ConnectionError) as error:
        parser.exit(1, f"not published: {error}\n")


if __name__ == "__main__":
    main()

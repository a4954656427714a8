"""Entry point of scripts/prepare.sh: check a data set and fill its cache."""

import argparse

from ratlip import commandline, errors


def main() -> None:
    """Read the command line, then step by step; what was done before is not done again."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="bash scripts/prepare.sh",
        description="Check a data set, list what is wrong with it, and compute once what training needs.\n"
        "Training does all this by itself when it begins, except --resize.",
        epilog="example:\n  bash scripts/prepare.sh cfg/bird.yml --resize data.num_workers=8",
    )
    commandline.add_settings(parser)
    parser.add_argument(
        "--resize",
        action="store_true",
        help="write copies of the training images, cropped and resized, for training to read: the same pixels, sooner",
    )
    parser.add_argument(
        "--captions-from-folders",
        metavar="TEXT",
        help='first caption pictures that have no captions by the folders they are in: "a photo of a {}"',
    )
    words, more = commandline.parse(parser)

    from ratlip import config  # not before: -h needs no package

    resolved = config.load(words.config, words.overrides + more)

    from ratlip import preparation  # takes seconds: a typo in the words above is answered at once

    if words.captions_from_folders:
        preparation.caption_by_folders(resolved, words.captions_from_folders)
    items = preparation.check(resolved)
    if words.resize:
        preparation.resize(resolved, items["train"])
    clip = preparation.embed_captions(resolved, items)
    preparation.write_statistics(resolved, clip, items["test"])


if __name__ == "__main__":
    errors.run(main)

"""Entry point of scripts/pretrain.sh: read the configuration, train DAMSM's encoders."""

import argparse

from ratlip import commandline, errors


def main() -> None:
    """Read the command line, train."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="bash scripts/pretrain.sh",
        description="Train DAMSM: a text encoder with its vocabulary, and an image encoder that matches it, from the\n"
        "captioned pictures of a configuration. A generator then reads them: text.encoder=damsm text.weights=FILE.\n"
        "One process, on the CPU or one GPU. Ctrl-C saves and leaves; the word train.resume=auto goes on.",
        epilog="examples:\n  bash scripts/pretrain.sh cfg/bird.yml\n"
        "  bash scripts/pretrain.sh cfg/demo.yml damsm.max_epoch=4 run=first-try",
    )
    commandline.add_settings(parser)
    words, more = commandline.parse(parser)
    overrides = words.overrides + more

    from ratlip import config  # not before: -h needs no package

    resolved = config.load(words.config, overrides)

    from ratlip.pretraining import pretrain  # takes seconds: a typo in the words above is answered at once

    pretrain(resolved, [word for word in overrides if not word.startswith("train.resume=")])


if __name__ == "__main__":
    errors.run(main)

"""Entry point of scripts/train.sh: read the configuration, train."""

import argparse
import re

from ratlip import commandline, errors


def main() -> None:
    """Read the command line, train."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="bash scripts/train.sh",
        description="Train a generator. Leaves checkpoints in saved_models/ and logs for TensorBoard in logs/.\n"
        "One process on the CPU or one GPU; torchrun over all GPUs where there are several (GPUS=1: over one).\n"
        "Ctrl-C saves and leaves; bash scripts/resume.sh goes on. The word run=NAME names the run.",
        epilog="examples:\n  bash scripts/train.sh cfg/demo.yml\n"
        "  GPUS=2 bash scripts/train.sh cfg/bird.yml train.batch_size=128 train.seed=1",
    )
    commandline.add_settings(parser)
    words, more = commandline.parse(parser)
    # scripts/resume.sh's state_epoch=120 picks the checkpoint of an epoch
    overrides = [re.sub("^state_epoch=", "train.resume=", word) for word in words.overrides + more]

    from ratlip import config  # not before: -h needs no package

    resolved = config.load(words.config, overrides)

    from ratlip.trainer import train  # takes seconds: a typo in the words above is answered at once

    train(resolved, [word for word in overrides if not word.startswith("train.resume=")])


if __name__ == "__main__":
    errors.run(main)

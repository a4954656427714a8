"""Entry point of scripts/sample.sh: captions to a folder of PNGs and one labelled overview."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ratlip import commandline, errors
from ratlip.errors import UserError
from ratlip.paths import typed

if TYPE_CHECKING:  # not when it runs: -h needs no package
    from easydict import EasyDict


def main() -> None:
    """Read the command line, draw, save."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="bash scripts/sample.sh",
        description="Draw captions. Uses the newest checkpoint trained with the configuration, else the shipped one.\n"
        "The same command again draws what is missing of its pictures; others never go into their folder.",
        epilog='examples:\n  bash scripts/sample.sh cfg/demo.yml "a large red ring at the top on a white background" '
        "--n 4 --out samples/ring\n  bash scripts/sample.sh cfg/bird.yml --captions captions.txt --n 1 --device auto\n"
        '  bash scripts/sample.sh cfg/bird.yml -- "- 5 = five birds"     captions that look like something else',
    )
    parser.add_argument("config", help="a YAML file such as cfg/demo.yml, or a run's folder")
    words_help = "captions to draw; settings to override; run=NAME"
    parser.add_argument("words", nargs="*", default=[], metavar="caption|key=value", help=words_help)
    parser.add_argument("--captions", type=typed, metavar="FILE", help="a text file with a caption a line")
    parser.add_argument("--checkpoint", type=typed, help="a checkpoint of ours, or a released GALIP or RATLIP file")
    parser.add_argument("--n", type=int, default=8, help="pictures of each caption (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", type=typed, help="folder for the pictures (default samples/<configuration>)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda", "auto"), help="where to compute (default cpu)"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16", "auto"),
        help="of the generator (default fp32; auto: the one it was trained in)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the generator: pays for thousands of pictures"
    )
    arguments, verbatim = commandline.parse(parser)
    if arguments.n < 1 or arguments.seed < 0:
        raise UserError("--n must be at least 1 and --seed at least 0")
    if arguments.captions and not arguments.captions.is_file():
        raise UserError(f"--captions: no file {arguments.captions}")

    from ratlip import config  # not before: -h needs no package, and a typo is answered at once

    overrides, captions = config.split_words(arguments.words, commandline.options(parser), "caption")
    captions += verbatim
    if captions and arguments.captions:
        raise UserError(
            f"captions are taken from {arguments.captions} or from the command line, not both: {captions[0]!r}"
        )
    if not captions and not arguments.captions:
        raise UserError("no caption given; add one in quotes after the configuration, or --captions FILE")
    if len(captions) > 2 and not any(" " in caption.strip() for caption in captions):
        print(f"{len(captions)} captions of one word each; a caption of several words stands in quotes")
    sys.exit(sample(config.load(arguments.config, overrides), arguments, captions))


def sample(resolved: "EasyDict", arguments: argparse.Namespace, captions: list[str]) -> int:
    """Draw `captions`, or those of the file that the options name, save them and say where; gives the exit code."""
    from ratlip import device, drawing  # takes seconds, like all below: mistakes above are told at once
    from ratlip.sampling import compiled, find_checkpoint, load_generator, own_precision

    if arguments.captions:
        order = drawing.read(arguments.captions, arguments.n, arguments.seed)
    else:
        order = drawing.given(captions, arguments.n, arguments.seed)
    place = device.choose(arguments.device)
    checkpoint = arguments.checkpoint or find_checkpoint(resolved)
    generator, clip, encoder, loaded = load_generator(resolved, checkpoint)
    precision = own_precision(checkpoint) if arguments.precision == "auto" else arguments.precision
    print(loaded)
    drawing.check_captions(order, encoder)
    record = drawing.record_of(order, generator, clip, encoder, precision)
    folder, clip.products = drawing.claim(arguments.out or Path("samples") / resolved.name, record)
    encoder.to(place)
    generator.to(place)
    if arguments.compile:
        generator = compiled(generator)
    cause = drawing.draw_into(folder, order, generator, encoder, precision, resolved.eval.batch_size)
    if cause:
        print(f"stopped by {cause}: {drawing.done(folder, order)}; the same command draws the others", file=sys.stderr)
        return 128 + signal.Signals[cause]
    print(f"{drawing.done(folder, order)}, each with its caption beside it")
    if order.pictures <= drawing.OVERVIEW:
        print(f"overview: {drawing.write_overview(folder, order)}")
    else:
        print(f"no overview: nobody looks at more than {drawing.OVERVIEW} pictures in one")
    return 0


if __name__ == "__main__":
    errors.run(main)

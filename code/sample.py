"""Entry point of scripts/sample.sh: captions to PNGs and one labelled grid."""

import argparse
import re
from pathlib import Path

from ratlip import errors
from ratlip.errors import UserError
from ratlip.paths import typed


def main() -> None:
    """Read the command line, draw, save."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="bash scripts/sample.sh",
        description="Draw captions. Uses the newest checkpoint trained with the configuration, else the shipped one.",
        epilog='example:\n  bash scripts/sample.sh cfg/demo.yml "a large red ring at the top on a white background" '
        "--n 4 --out samples",
    )
    parser.add_argument("config", help="a YAML file such as cfg/demo.yml")
    parser.add_argument("words", nargs="+", metavar="caption|key=value", help="captions to draw; settings to override")
    parser.add_argument("--checkpoint", type=typed, help="a checkpoint of ours, or a released GALIP or RATLIP file")
    parser.add_argument("--n", type=int, default=8, help="pictures of each caption (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", type=typed, default=Path("samples"), help="folder for the pictures (default samples)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda", "auto"), help="where to compute (default cpu)"
    )
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16", "fp16", "auto"), help="of the generator (default fp32)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the generator: pays for thousands of pictures"
    )
    arguments = parser.parse_intermixed_args()

    overrides = [word for word in arguments.words if re.match(r"[a-z_]+(\.[a-z_]+)+=", word)]
    captions = [word for word in arguments.words if word not in overrides]
    if not captions:
        raise UserError("no caption given; add one in quotes after the configuration")
    if arguments.n < 1 or arguments.seed < 0:
        raise UserError("--n must be at least 1 and --seed at least 0")
    if len(captions) > 2 and not any(" " in caption.strip() for caption in captions):
        print(f"{len(captions)} captions of one word each; a caption of several words stands in quotes")

    from ratlip import config  # not before: -h needs no package, and a typo is answered at once

    resolved = config.load(arguments.config, overrides)

    from ratlip import device
    from ratlip.pictures import captioned_grid, save_pictures
    from ratlip.sampling import compiled, draw, embed_captions, find_checkpoint, load_generator, seeded_noise

    place = device.choose(arguments.device)
    generator, clip, loaded = load_generator(resolved, arguments.checkpoint or find_checkpoint(resolved))
    print(loaded)
    clip.to(place)
    generator.to(place)

    # Picture k of a caption has the noise of (seed, k), whatever else is asked for.
    noise = seeded_noise(arguments.seed, range(arguments.n), generator.noise_dim).to(place)
    precision = device.choose_precision(arguments.precision, place)
    if arguments.compile:
        generator = compiled(generator)
    images = draw(generator, embed_captions(clip, captions), noise, precision)  # (C, N, 3, S, S)
    for number, (caption, own) in enumerate(zip(captions, images, strict=True), 1):
        words = re.sub(r"\W+", "-", caption.lower()).strip("-")[:60]
        save_pictures(own, arguments.out, f"{number:02}_{words}_seed{arguments.seed}")
    labels = [caption for caption in captions for _ in range(arguments.n)]
    grid = arguments.out / "grid.png"
    captioned_grid(images.flatten(0, 1), labels, arguments.n).save(grid)
    print(f"{len(labels)} pictures and {grid}")


if __name__ == "__main__":
    errors.run(main)

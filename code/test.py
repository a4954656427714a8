"""Entry point of scripts/test.sh: score a checkpoint's images, or a folder of pictures."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ratlip import commandline, errors
from ratlip.errors import UserError
from ratlip.paths import full, typed

if TYPE_CHECKING:  # not when it runs: -h needs no package
    from easydict import EasyDict

OPTIONS = ("images", "against", "real", "nearest")
MISSING_WEIGHTS = 3  # exit code: some metric could not be computed because its weights are not there


def main() -> None:
    """Read the command line, score, show."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="bash scripts/test.sh",
        description="Score a checkpoint on the test split: the newest one trained with the configuration unless one\n"
        "is named, else the shipped one. Or score a folder of pictures, whoever made them.",
        epilog="exit codes: 0 done, 2 a mistake, 3 weights of a metric in eval.metrics are missing (others are scored)"
        "\n\nexamples:\n  bash scripts/test.sh cfg/demo.yml\n  bash scripts/test.sh cfg/bird.yml galip_bird.pth "
        '"eval.metrics=[fid_released,clip_score]"',
    )
    parser.add_argument("config", help="a YAML file such as cfg/demo.yml, or a run's folder")
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="checkpoint|key=value",
        help="what to score; settings to override; run=NAME: the newest checkpoint of a run",
    )
    parser.add_argument("--images", type=typed, metavar="DIR", help="score these pictures; captions in .txt beside")
    parser.add_argument(
        "--real", action="store_true", help="score the test split's own pictures, one half against the other"
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="also draw nearest.png: samples, and the training pictures most like each",
    )
    parser.add_argument("--against", type=typed, metavar="DIR", help="compare with these pictures, not the test split")
    arguments, verbatim = commandline.parse(parser)

    from ratlip import config

    known = commandline.options(parser)
    overrides, checkpoints = config.split_words(arguments.words, known, "checkpoint", os.path.exists)
    checkpoints = [typed(word) for word in checkpoints + verbatim]
    if len(checkpoints) > 1:
        raise UserError(f"one checkpoint at a time, not {', '.join(map(str, checkpoints))}")
    if checkpoints and arguments.images:
        raise UserError(f"score either the checkpoint {checkpoints[0]} or the pictures of {arguments.images}")
    if arguments.real and (checkpoints or arguments.images):
        raise UserError(
            f"--real scores the test split's own pictures, not {checkpoints[0] if checkpoints else arguments.images}"
        )
    for folder in filter(None, (arguments.images, arguments.against)):
        if not folder.is_dir():
            raise UserError(f"no folder {full(folder)}")

    resolved = config.load(arguments.config, overrides)
    missing = evaluate(resolved, *checkpoints, **{key: getattr(arguments, key) for key in OPTIONS})
    sys.exit(MISSING_WEIGHTS if missing else 0)


def evaluate(
    resolved: "EasyDict",
    checkpoint: Path | None = None,
    images: Path | None = None,
    against: Path | None = None,
    real: bool = False,
    nearest: bool = False,
) -> list[str]:
    """Score, print the table, keep it in the logs; gives the metrics that could not be computed."""
    # Takes seconds, like all below: mistakes above are told at once.
    from ratlip import build, distributed, given, remembered, runs
    from ratlip import device as devices
    from ratlip.data.inventory import usable_items
    from ratlip.evaluation import Evaluator, Scorer, scores_table
    from ratlip.monitor import Board, write_scores
    from ratlip.pictures import save_picture
    from ratlip.sampling import choose_products, find_checkpoint, load_generator, own_precision

    place = devices.choose(resolved.train.device, distributed.start())
    if images or real:
        clip = build.clip_of(resolved)
        choose_products(clip, resolved)
        loaded = f"pictures of {images}" if images else f"the test split's own pictures, {resolved.data.dir}"
    else:
        checkpoint = checkpoint or find_checkpoint(resolved)
        generator, clip, encoder, loaded = load_generator(resolved, checkpoint)
        generator.to(place)
        if resolved.clip.preprocess == "released":  # the papers' CLIP score, of a checkpoint of ours too
            clip.preprocess = "released"
    distributed.say(loaded)
    items = None
    if nearest or not (images and against):
        with distributed.first_process_first():
            items = usable_items(resolved, "test")
    compared = given.folder_as_reference(against) if against else None
    if real and not against:
        compared = given.half_as_reference(resolved, items)
    scorer = Scorer(resolved, clip.to(place), items, compared)
    if images:
        scores, protocols = given.score_folder(scorer, images)
        shown = remembered.of_folder(resolved, images) if nearest else None
    elif real:
        scores, protocols = given.score_real(Evaluator(scorer, items), halved=not against)
        shown = remembered.of_items(resolved, items) if nearest else None
    else:
        side = generator.sizes[-1]
        if not against and side != resolved.model.imsize:
            distributed.say(f"it draws {side} px; the test images are taken at {resolved.model.imsize} (model.imsize)")
        precision = resolved.train.precision
        precision = own_precision(checkpoint) if precision == "auto" else precision
        evaluator = Evaluator(scorer, items, precision, encoder.to(place))
        scores, protocols = evaluator(generator), evaluator.protocols
        shown = remembered.of_generator(evaluator, generator) if nearest else None
    picture, words = remembered.look(resolved, scorer, shown, items) if nearest else (None, "")

    if distributed.rank() == 0:
        print(f"\n{scores_table({'score': scores}, protocols)}\n")
        for name, protocol in protocols.items():
            print(f"{name}: {protocol}")
        # When all has been shown: logs that cannot be written cost no scores.
        folder = runs.new_folder(Path(resolved.log.dir) / resolved.name, time.strftime(f"test_{runs.TIME}"))
        write_scores(folder, Board(folder), scores, {"scored": loaded}, protocols)
        if picture:
            save_picture(picture, folder / "nearest.png")
            print(words)
        print(f"kept in {folder}")
    distributed.stop()
    return scorer.missing


if __name__ == "__main__":
    errors.run(main)

"""Writes a released checkpoint as one of ours, to sample from or to train on from."""

import argparse
from types import SimpleNamespace

from ratlip import errors
from ratlip.errors import UserError
from ratlip.paths import typed

VIT_B32 = (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)  # arguments of clip.model.CLIP


def main() -> None:
    """Read the command line, translate, save."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python code/convert.py",
        description="Write a released checkpoint of any of the systems as one of ours, with fresh optimizers.",
        epilog="example:\n  source scripts/env.sh\n"
        "  python code/convert.py galip_coco.pth saved_models/coco/released/state_epoch_000.pth",
    )
    parser.add_argument("source", metavar="IN", type=typed, help="a released checkpoint")
    parser.add_argument("target", metavar="OUT", type=typed, help="the file to write; it must not be there yet")
    words = parser.parse_args()
    if words.target.exists():
        raise UserError(f"{words.target} is there already; it stays as it is")

    import torch  # not before: -h needs no package

    from ratlip import checkpoint, config, released
    from ratlip.data.loader import BATCH_SIZE
    from ratlip.encoders.clip_towers import FrozenClip, clip  # the package, its warnings silenced
    from ratlip.systems import SYSTEMS
    from ratlip.trainer import Training, save

    content = checkpoint.read(words.source)
    if content.get("format") == checkpoint.FORMAT:
        raise UserError(f"{words.source} is RATLIP's own already: use it as it is")
    if not released.is_released(content):
        raise UserError(checkpoint.UNKNOWN.format(words.source))

    with torch.device("meta"):  # only CLIP's shapes are needed here
        shapes = FrozenClip(clip.model.CLIP(*VIT_B32), preprocess="released")
    generator, discriminator, info = released.load_networks(content, shapes, words.source)
    if generator is None:
        raise UserError(f"{words.source} holds no netG; there is nothing to go on from")
    settings = released.settings(info)
    published = {"train.batch_size": BATCH_SIZE}
    resolved = config.load(config.DEFAULT, [f"{key}={value}" for key, value in (settings | published).items()])
    reader = SimpleNamespace(embedding_dim=info["cond_dim"])  # of captions; no more of it is needed here
    system = SYSTEMS[resolved.model.name].build(resolved, shapes, reader)
    system.generator.load_state_dict(generator.state_dict())
    if discriminator is None:
        print(f"{words.source} holds no whole discriminator: training on will begin with a new discriminator")
    else:
        system.networks["discriminator"].load_state_dict(discriminator.state_dict())

    # The averaged weights begin as the weights themselves: a released file holds one set.
    t = Training(system, system.generator, torch.empty(0), "fp32", total_steps=1, encoder=reader)
    t.epoch = info["epoch"] if isinstance(info["epoch"], int) else 0
    save(t, resolved, {}, 0, words.target)
    print(f"{words.source}: {released.describe(info)}\n{words.target}: the same as one of ours")
    print("to train on, set " + " ".join(f"{key}={value}" for key, value in settings.items()))


if __name__ == "__main__":
    errors.run(main)

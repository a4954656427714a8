"""How much faster ours is than the plain rendering of the same networks, or than without one of its savings, and how
much memory that saves."""

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "code")]

LISTING = ("listed, s", "checked, s", "again, s")
EXAMPLE = """example:
  source scripts/env.sh && python benchmarks/speed.py --what sample --batch 1 8 --rounds 5
  python benchmarks/speed.py --what train --batch 4
  python benchmarks/speed.py --what train --batch 4 --savings
  python benchmarks/speed.py --device cuda --what train --batch 64 --precision bf16 --plain-precision fp16

Random weights of the released size: ViT-B/32, nf 64, 224 pixels. Each round runs both in turn, twice, and times the
second time; the first round is not counted. Peak memory is that of a process of its own for each (resident memory on a
CPU, allocated on a GPU). Training is that of both networks, without averaged weights (train.ema), which the plain form
has not.
data: images a second of one process, from JPEGs of 500 x 375 (plain) and from prepare.sh's resized copies (ours); then
seconds to list folders of more and more pictures of one pixel, and to check them, for the first time and again.
"""


def parse(line: list[str]) -> argparse.Namespace:
    """The words of a command line, checked."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, epilog=EXAMPLE
    )
    parser.add_argument("--what", default="sample", choices=("sample", "train", "eval", "data"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--batch", type=at_least_one, nargs="+", default=[4], help="images at a time; several are tried in turn"
    )
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds that are counted (default 5)")
    precisions = ("fp32", "bf16", "fp16")
    parser.add_argument("--precision", default="fp32", choices=precisions, help="of ours")
    parser.add_argument("--plain-precision", default="fp32", choices=precisions)
    forms = ("auto", "linear", "convolution")
    parser.add_argument("--products", default="auto", choices=forms, help="form of CLIP's (default: measured)")
    parser.add_argument("--model", default="ratlip", choices=("ratlip", "galip"))
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    parser.add_argument("--threads", type=at_least_one, help="of the CPU; else as many as PyTorch takes")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--savings", action="store_true", help="against ours without each of its savings in turn, not against plain"
    )
    parser.add_argument("--brief", action="store_true", help="one line for each batch size")
    parser.add_argument("--smoke", action="store_true", help="tiny networks: whether it runs, not how fast")
    parser.add_argument(
        "--pictures",
        type=at_least_one,
        nargs="+",
        default=[10_000, 50_000, 200_000],
        help="data: in the folders listed",
    )
    parser.add_argument("--only", metavar="plain|ours|SAVING", help="peak memory of one, as JSON")
    words = parser.parse_args(line)
    words.line = tuple(line)
    if words.savings and (words.what not in ("sample", "train") or words.compile):
        parser.error("--savings are those of sample and train, not compiled")
    if words.only and words.what == "data":
        parser.error("--only gives peak memory, which is not measured for data")

    import torch
    from savings import SAVINGS

    if words.threads:
        torch.set_num_threads(words.threads)
    if words.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    if words.smoke:
        shrink()
    if words.only not in (None, "plain", "ours", *SAVINGS):
        parser.error(f"--only takes plain, ours or one of {', '.join(SAVINGS)}")
    return words


def main(line: list[str]) -> None:
    """Measure what a command line asks for, and print."""
    words = parse(line)
    import torch
    from savings import SAVINGS

    if words.only:
        print(json.dumps(alone(words)))
        return
    where = torch.cuda.get_device_name() if words.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rivals = ["plain"]
    if words.savings:
        rivals = [name for name, (where_it_counts, _) in SAVINGS.items() if words.what in where_it_counts]
    other = "ours without what is named" if words.savings else f"plain in {words.plain_precision}"
    if not words.brief:
        print(f"{words.what}, {words.model}, {where}, PyTorch {torch.__version__}; "
              f"{other}, ours in {words.precision}; medians of {words.rounds} rounds")  # fmt: skip
        columns = ("seconds", "images/s", "CPU s", "peak GiB", "at start")
        print(f"{'batch':>5}  {'':15}" + "".join(f"  {column:>8}" for column in columns))
    for batch in words.batch:
        for rival in rivals:
            compare(words, batch, rival)
    if words.what == "data":
        print(f"\n{'pictures':>10}" + "".join(f"  {column:>12}  {'CPU s':>6}" for column in LISTING))
        for count in words.pictures:
            cells = (f"  {clock:>12.2f}  {processor:>6.2f}" for clock, processor in listing(count))
            print(f"{count:>10,}" + "".join(cells), flush=True)


def at_least_one(text: str) -> int:
    """A number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def compare(words: argparse.Namespace, batch: int, rival: str) -> None:
    """Measure and print `rival`, ours and their ratios."""
    calls = data_calls() if words.what == "data" else {name: work(words, batch, name) for name in (rival, "ours")}
    seconds, processor = alternate(calls, words.rounds, words.device)
    del calls
    count = 256 if words.what == "data" else batch
    if words.brief:
        print(in_brief(words, batch, seconds), end="", flush=True)
    memory = {}
    if not words.no_memory and words.what != "data":
        memory = {name: alone_in_a_process(words.line, name, batch) for name in seconds}
    saved = f", memory 1/{memory[rival]['peak'] / memory['ours']['peak']:.2f}" if memory else ""
    if words.brief:
        peaks = f" ({' and '.join(format(held['peak'], '.2f') for held in memory.values())} GiB)" if memory else ""
        print(saved + peaks, flush=True)
        return
    for name in seconds:
        median = statistics.median(seconds[name])
        peak = [f"{memory[name][key]:.2f}" if memory else "" for key in ("peak", "before")]
        print(f"{batch:>5}  {name:15}  {median:>8.3f}  {count / median:>8.2f}  "
              f"{statistics.median(processor[name]):>8.2f}  {peak[0]:>8}  {peak[1]:>8}")  # fmt: skip
    ratios = [ratio(values[rival], values["ours"]) for values in (seconds, processor)]
    text = f"{ratios[0]:.2f}x by the clock, {ratios[1]:.2f}x of processor time{saved}"
    print(f"{batch:>5}  {'ratio':15}  {text}", flush=True)


def in_brief(words: argparse.Namespace, batch: int, seconds: dict[str, list[float]]) -> str:
    """The times that `compare` found, without an end of the line."""
    (rival, slow), (_, fast) = seconds.items()
    other = f"{rival} ({words.plain_precision})" if rival == "plain" else f"without {rival}"
    ours = f"ours ({words.precision}{', compiled' if words.compile else ''})"
    medians = statistics.median(slow), statistics.median(fast)
    return (
        f"{words.what}, batch {batch}: {other} {medians[0]:.4f} s, {ours} {medians[1]:.4f} s: {ratio(slow, fast):.2f}x"
    )


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median of the rounds' ratios: what disturbs one of a pair mostly disturbs the other too."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def alternate(
    work: dict[str, Callable[[], object]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds by the clock, and of processor time, of each round of each; a first round is not counted."""
    import torch

    clock, processor = {name: [] for name in work}, {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            allocate_as(name)
            call()  # not counted either: the other one's data is in the caches, and freed memory has to be mapped anew
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter(), time.process_time()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                clock[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    return clock, processor


def allocate_as(name: str) -> None:
    """Give freed memory back as the C library does by itself (plain, ours without kept memory), or keep it as our entry
    points do."""
    import ctypes
    import platform

    from ratlip.device import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory

    if name not in ("plain", "kept memory"):
        keep_freed_memory()
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)  # what it has come to by itself after blocks of 32 MiB
        libc.malloc_trim(0)


def alone(words: argparse.Namespace) -> dict[str, float]:
    """GiB held by one of them at most, and before its first pass."""
    import torch

    call = work(words, words.batch[0], words.only)
    allocate_as(words.only)  # from here on, as our entry points do it
    if words.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, is that from here on
        before = resident("VmRSS")
    for _ in range(2):  # optimisers keep their state from the first step on
        call()
    peak = torch.cuda.max_memory_allocated() if words.device == "cuda" else resident("VmHWM")
    return {"peak": peak / 2**30, "before": before / 2**30}


def resident(what: str) -> int:
    """Bytes of this process's memory, from Linux."""
    return int(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@functools.cache
def alone_in_a_process(line: tuple[str, ...], name: str, batch: int) -> dict[str, float]:
    """`alone`, of the same command line and one batch size."""
    command = [sys.executable, __file__, *line, "--only", name, "--batch", str(batch)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def work(words: argparse.Namespace, batch: int, name: str) -> Callable[[], object]:
    """One round's work of plain, ours, or ours without the saving `name`: all on the same weights and inputs."""
    import torch
    from savings import without

    from ratlip import choices, released
    from ratlip.device import autocast
    from ratlip.encoders.clip_towers import FrozenClip

    device = torch.device(words.device)
    torch.manual_seed(0)
    model = random_clip()
    net_g, net_d, net_c = random_networks(model, words.model == "ratlip")
    noise = torch.randn(batch, 100, device=device)
    sentences = torch.randn(batch, model.text_projection.shape[1], device=device)
    images = torch.rand(batch, 3, 224, 224, device=device) * 2 - 1
    if name == "plain":
        return plain_work(words, model.to(device), *(n.to(device) for n in (net_g, net_d, net_c)),
                          autocast(device, words.plain_precision), noise, sentences, images)  # fmt: skip
    networks = {"netG": net_g.state_dict(), "netD": net_d.state_dict(), "netC": net_c.state_dict()}
    with without(name):
        clip = FrozenClip(model, preprocess="released")
        choices.settle_products(clip, words.products, batch, device, learning=words.what == "train")
        if words.what == "train":
            clip.drop_text_tower()  # as training does: captions were encoded before
        ours = released.load_networks({"model": networks}, clip)[:2]
        call = ours_work(words, clip.to(device), *(n.to(device) for n in ours), noise, sentences, images)
    return without(name)(call)


def random_clip():
    """A CLIP of ViT-B/32's shapes, or of what `shrink` left of them, in float32, frozen."""
    import plain

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clip imports pkg_resources, which warns of its end
        import clip.model
    patch, width, dim = 32 * plain.WIDTH // 768, plain.WIDTH, plain.SENTENCE_DIM
    model = clip.model.CLIP(dim, 7 * patch, 12, width, patch, 77, 49408, dim, 8, 12)
    return model.float().eval().requires_grad_(False)


def shrink() -> None:
    """Make the plain networks, and with them ours, a quarter as wide; the maps keep their sizes."""
    import plain

    plain.CHANNELS = (128, 128, 128, 128, 64, 32, 16)
    plain.WIDTH, plain.SENTENCE_DIM, plain.CONDITION_DIM = 192, 64, 164


def random_networks(clip, ratlip: bool):
    """The plain netG, netD and netC, in eval mode."""
    import plain

    return plain.Generator(clip, ratlip).eval(), plain.NetD().eval(), plain.NetC().eval()


def ours_work(words, clip, generator, discriminator, noise, sentences, images) -> Callable[[], object]:
    """What ours does in a round."""
    import torch

    from ratlip import config
    from ratlip.data.loader import Batch
    from ratlip.sampling import compiled, generate
    from ratlip.systems.clip_gan import ClipGan
    from ratlip.trainer import Training, train_step

    if words.compile and words.what != "train":
        generator = compiled(generator)
    if words.what == "sample":
        return lambda: generate(generator, noise, sentences, words.precision)
    if words.what == "eval":
        return torch.no_grad()(lambda: clip.image(generate(generator, noise, sentences, words.precision))[1])
    settings = config.EasyDict(config.unflatten(config.default_settings())).train
    settings.compile = words.compile
    settings.lr_g = settings.lr_d = 0.0  # that no round differs from another
    system = ClipGan(settings, clip, generator.train(), discriminator)
    training = Training(system, None, sentences, words.precision, 10**9)
    rows = torch.arange(len(noise), device=noise.device)
    batch = Batch(images, rows, rows.roll(1))
    return lambda: train_step(training, batch)


def plain_work(words, clip, net_g, net_d, net_c, autocast, noise, sentences, images) -> Callable[[], object]:
    """What the plain rendering does in a round."""
    import plain
    import torch

    @torch.no_grad()
    def sample():
        with autocast:
            return net_g(noise, sentences).float().clamp(-1, 1)

    if words.what == "sample":
        return sample
    if words.what == "eval":
        return torch.no_grad()(lambda: plain.image_tower(clip, sample())[1])
    scaler = torch.amp.GradScaler(noise.device.type, enabled=words.plain_precision == "fp16")
    trainer = plain.Trainer(clip, net_g.train(), net_d, net_c, autocast, scaler)
    for optimizer in (trainer.optimizer_g, trainer.optimizer_d):
        optimizer.param_groups[0]["lr"] = 0.0
    tokens = torch.randint(1, 49407, (len(noise), 77), device=noise.device)
    return lambda: trainer.step(images, tokens, noise)


def pictures(root: Path, count: int = 288) -> None:
    """A data set in the folder layout below `root`: JPEGs of 500 x 375 with a caption each; a tenth is for testing."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("images", "text"):
        (root / kind).mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        levels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + rng.integers(-6, 7, (375, 500, 3))
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(root / f"images/{number}.jpg", quality=90)
        (root / f"text/{number}.txt").write_text(f"picture number {number}\n")


def data_calls() -> dict[str, Callable[[], object]]:
    """256 training images in one process: decoded from JPEG and resized (plain), and from the resized copies (ours)."""
    from ratlip import config
    from ratlip.data.inventory import usable_items, write_copies
    from ratlip.data.loader import Draw, TrainingImages

    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    pictures(root)
    settings = config.EasyDict({**config.unflatten(config.default_settings()), "name": "speed", "file": "speed.yml"})
    settings.data.update(dir=str(root), num_workers=1)
    made = {}
    for name in ("plain", "ours"):
        items = usable_items(settings, "train")[:256]
        images = TrainingImages(items, settings.model.imsize, settings.data.enlarge, settings.data.flip, seed=0)
        made[name] = lambda images=images: [images[Draw(0, n, n, 0)] for n in range(len(images))] and folder
        if name == "plain":
            write_copies(settings, items)  # which usable_items then finds
    return made


def listing(count: int) -> list[tuple[float, float]]:
    """Seconds by the clock, and of processor time: to list a folder of so many pictures with captions, both splits; to
    decode them besides, as when a run begins for the first time; and when one begins, or goes on, after that."""
    import io
    from contextlib import redirect_stdout

    from PIL import Image

    from ratlip import config
    from ratlip.data.inventory import take_stock
    from ratlip.data.layouts import read_items

    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    settings = config.EasyDict(config.unflatten(config.default_settings())).data
    seconds = []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        for number in range(count):
            for kind, suffix in (("images", "png"), ("text", "txt")):
                path = Path(folder, kind, f"{number // 1000:03}", f"{number:06}.{suffix}")
                if number % 1000 == 0:
                    path.parent.mkdir(parents=True)
                path.write_bytes(content.getvalue() if kind == "images" else b"picture number %d" % number)
        settings.update(dir=folder, num_workers=0)
        check = functools.partial(take_stock, settings)
        for call in (functools.partial(read_items, "folder", Path(folder)), check, check):
            start = time.perf_counter(), time.process_time()
            for split in ("train", "test"):
                call(split)
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])

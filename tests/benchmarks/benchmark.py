"""Compare our speed with that of public libraries and of a plainly written recipe of the same experiment.

    python tests/benchmarks/benchmark.py                         # built-in synthetic scenes; takes minutes
    python tests/benchmarks/benchmark.py --data /path/to/NYUv2   # epochs as in nyuv2_small
    python tests/benchmarks/benchmark.py --data /path/to/NYUv2 --large   # and as in exp061, on 32 images

Ratios compare medians over interleaved runs. Operations run on one thread and are timed in CPU seconds,
which other processes affect least. Epochs run on all threads and are timed by the clock.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# glibc adapts these limits to earlier frees, so a function's time would depend on what ran before it.
# With fixed limits, buffers as large as the logits always come fresh from the system, and smaller ones
# are reused.
if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    limits = {"MALLOC_MMAP_THRESHOLD_": str(2**24), "MALLOC_TRIM_THRESHOLD_": str(2**25)}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["RUNS_DIR"] = tempfile.mkdtemp(prefix="benchmark-")

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from plain_recipe import naive_soft_iou, plain_epochs
from torch.profiler import ProfilerActivity, profile

import lib  # noqa: F401
from lib.batches import TrainingSet, encode_batch, training_loader
from lib.classes import NYUV2_13
from lib.data import Samples, load_samples
from lib.device import choose_precision
from lib.losses import segmentation_loss
from lib.metrics import confusion_counts
from lib.model import build_model
from lib.runs import open_run
from lib.training import Objective, Optimisation, fit, training_step

ROUNDS = 9
LOSS = Objective(soft_iou_weight=0.5, soft_iou_pooling="batch", depth_weight=0.1)
SMALL = {
    "encoder": "resnet18", "size": (96, 128), "batch_size": 16, "augment": "crops", "learning_rate": 0.001,
    "schedule": "one_cycle", "limit": None,
}  # fmt: skip
LARGE = {
    "encoder": "resnet101", "size": (480, 640), "batch_size": 8, "augment": "exp061", "learning_rate": 0.0001,
    "schedule": "cosine", "limit": 40,
}  # fmt: skip


def peers(names: str) -> dict:
    """The installed ones of these modules. Prints how to install the others."""
    found = {}
    for name in names.split():
        try:
            found[name] = __import__(name)
        except ImportError:
            print(f"{name} is not installed and left out: pip install {name}")
    return found


def medians(functions: dict[str, Callable]) -> dict[str, float]:
    """Median CPU seconds of each function. The functions run in turn."""
    times = {name: [] for name in functions}
    for _ in range(ROUNDS + 2):
        for name, function in functions.items():
            started = time.process_time()
            function()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def peak_bytes(function: Callable) -> int:
    """Peak memory that torch allocates during the call, in addition to what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(
        np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max()
    )


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(
        f"\n{title}\n\n"
        + "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
    )


def benchmark_loss() -> None:
    """Cross-entropy + 0.5 soft IoU, forward and backward, against cross-entropy alone."""
    logits = torch.randn(2, 13, 480, 640, requires_grad=True)
    labels = torch.randint(0, 13, (2, 480, 640))
    found = peers("segmentation_models_pytorch monai")
    losses = {
        "F.cross_entropy alone": lambda: F.cross_entropy(logits, labels, ignore_index=255),
        "ours": lambda: segmentation_loss(logits, labels, 0.5),
        "+ one-hot soft IoU": lambda: (
            F.cross_entropy(logits, labels, ignore_index=255) + 0.5 * naive_soft_iou(logits, labels)
        ),
    }
    if "segmentation_models_pytorch" in found:
        jaccard = found["segmentation_models_pytorch"].losses.JaccardLoss("multiclass")
        losses["+ smp JaccardLoss"] = lambda: F.cross_entropy(logits, labels) + 0.5 * jaccard(logits, labels)
    if "monai" in found:
        from monai.losses import DiceLoss

        dice = DiceLoss(softmax=True, to_onehot_y=True, jaccard=True)
        losses["+ MONAI DiceLoss(jaccard)"] = lambda: (
            F.cross_entropy(logits, labels) + 0.5 * dice(logits, labels[:, None])
        )

    def forward_and_backward(loss: Callable) -> None:
        logits.grad = None
        loss().backward()

    functions = {name: lambda loss=loss: forward_and_backward(loss) for name, loss in losses.items()}
    seconds, rows = medians(functions), []
    for name, function in functions.items():
        logits.grad = None
        memory = peak_bytes(function) / (logits.numel() * logits.element_size())
        ratio = seconds[name] / seconds["F.cross_entropy alone"]
        rows.append([name, f"{1000 * seconds[name]:.0f} ms", f"{ratio:.2f}x", f"{memory:.2f}x"])
    table("Loss, 2x13x480x640, float32", ["loss", "time", "time", "extra peak memory / logits"], rows)


def benchmark_counts() -> None:
    """Confusion counts per image against torchmetrics, called once per image and once for all images."""
    labels = torch.randint(0, 13, (8, 480, 640))
    prediction = torch.where(torch.rand(labels.shape) < 0.6, labels, torch.randint(0, 13, labels.shape))
    labels[torch.rand(labels.shape) < 0.2] = 255
    functions = {"ours, per image": lambda: confusion_counts(prediction, labels, 13)}
    if peers("torchmetrics"):
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        def torchmetrics(*arrays: torch.Tensor) -> torch.Tensor:
            return multiclass_confusion_matrix(*arrays, 13, ignore_index=255, validate_args=False)

        functions["torchmetrics, per image"] = lambda: torch.stack(
            list(map(torchmetrics, prediction, labels))
        )
        functions["torchmetrics, pooled"] = lambda: torchmetrics(prediction, labels)
        assert torch.equal(functions["ours, per image"](), functions["torchmetrics, per image"]())
    seconds = medians(functions)
    rows = [
        [name, f"{1000 * t:.1f} ms", f"{t / seconds['ours, per image']:.1f}x"] for name, t in seconds.items()
    ]
    table("Confusion counts, 8x480x640, 13 classes, int64", ["counts", "time", "time"], rows)


def benchmark_augmentation() -> None:
    """Items of the training set against three bare warps per image."""
    rows = []
    for size in (SMALL["size"], LARGE["size"]):
        samples = load_samples("synthetic", "train", "none", size, 16)
        sets = {augment: TrainingSet(samples, augment, seed=0) for augment in ("exp061", "crops")}
        height, width = size
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 3, 1.05)
        epoch = iter(range(10**6))

        def bare(samples: Samples = samples, matrix=matrix, shape=(width, height)) -> None:
            for arrays in zip(samples.image, samples.depth, samples.label, strict=True):
                for array, flags in zip(
                    arrays, (cv2.INTER_LINEAR, cv2.INTER_NEAREST, cv2.INTER_NEAREST), strict=True
                ):
                    cv2.warpAffine(array, matrix, shape, flags=flags)

        def augmented(training: TrainingSet, epoch=epoch) -> None:
            for key in zip([next(epoch)] * 16, range(16), strict=True):
                training[key]

        functions = {"three bare cv2.warpAffine": bare}
        functions |= {name: lambda training=training: augmented(training) for name, training in sets.items()}
        seconds = medians(functions)
        for name, each in seconds.items():
            rate = seconds["three bare cv2.warpAffine"] / each
            rows.append([f"{height}x{width}", name, f"{1e6 / 16 * each:.0f} us", f"{rate:.2f}"])
    table("Augmentation of an image", ["size", "augment", "time", "rate"], rows)


def write_scenes(root: Path, limit: int | None) -> None:
    """Write the built-in synthetic scenes as a folder of PNGs, the usual form of user data."""
    scenes = load_samples("synthetic", "train", "none", limit=limit)
    for kind in ("image", "depth", "label"):
        (root / "train" / kind).mkdir(parents=True)
    for name, image, depth, label in zip(scenes.names, scenes.image, scenes.depth, scenes.label, strict=True):
        for kind, array in (("image", image[..., ::-1]), ("depth", depth), ("label", label)):
            cv2.imwrite(str(root / "train" / kind / f"{name}.png"), array)


def benchmark_epochs(data: str, settings: dict, epochs: int) -> None:
    """Alternating epochs of `fit` and of the plain recipe: training, validation and checkpoint."""
    encoder, size, batch_size = settings["encoder"], settings["size"], settings["batch_size"]
    started = time.perf_counter()
    train, valid = (
        load_samples(data, split, "random", size, settings["limit"]) for split in ("train", "valid")
    )
    reading = time.perf_counter() - started

    def build() -> torch.nn.Module:
        torch.manual_seed(42)
        return build_model(classes=NYUV2_13, encoder=encoder, size=size)

    plain = plain_epochs(
        build(), Path(data), train.names, valid.names, size, batch_size, settings["augment"], settings["learning_rate"],
    )  # fmt: skip
    loader = training_loader(train, settings["augment"], batch_size, num_workers=0, seed=42)
    optimisation = Optimisation(epochs, settings["learning_rate"], 0.0001, settings["schedule"])
    seconds = {"ours": [], "plain recipe": []}
    with open_run({"run_name": "benchmark"}) as run:
        for row in fit(build, loader, valid, run, LOSS, optimisation, device="cpu"):
            seconds["ours"].append(row["seconds"])
            seconds["plain recipe"].append(next(plain))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [[name, f"{median[name]:.1f} s", f"{median[name] / median['ours']:.2f}x"] for name in seconds]
    precision = choose_precision("auto", torch.device("cpu"))
    table(
        f"Epoch, {encoder}, {size[0]}x{size[1]}, {len(train)} images train and {len(valid)} validate, batches of "
        f"{batch_size}, {torch.get_num_threads()} threads; ours in {precision}, after reading all files once in "
        f"{reading:.1f} s; plain in float32",
        ["recipe", "time", "time"], rows,
    )  # fmt: skip


def benchmark_waiting(data: str, limit: int | None) -> None:
    """The share of an epoch that the loop spends waiting for batches."""
    size, batch_size, device = SMALL["size"], SMALL["batch_size"], torch.device("cpu")
    train = load_samples(data, "train", "random", size, limit or 200)
    model, precision, rows = (
        build_model(classes=NYUV2_13, encoder=SMALL["encoder"], size=size),
        choose_precision("auto", device),
        [],
    )
    optimizer = torch.optim.AdamW(model.parameters(), SMALL["learning_rate"], fused=True)
    for workers in (0, 1, 2):
        loader = training_loader(train, SMALL["augment"], batch_size, workers, seed=0)
        for epoch in range(2):  # the first epoch starts the workers; the second is reported
            loader.batch_sampler.epoch, waited = epoch, 0.0
            began = asked = time.perf_counter()
            for raw in loader:
                waited += time.perf_counter() - asked
                training_step(model, encode_batch(raw, model.config, device), LOSS, optimizer, precision)
                asked = time.perf_counter()
        rows.append([str(workers), f"{waited / (time.perf_counter() - began):.1%}"])
    table("Waiting for data, ResNet18, 96x128, batches of 16", ["num_workers", "share of the time"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a folder of PNGs; the built-in synthetic scenes without it")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each recipe")
    parser.add_argument("--limit", type=int, help="use only the first images of the data")
    parser.add_argument(
        "--large", action="store_true", help="also ResNet101 at 480x640 on 32 images: half an hour"
    )
    parser.add_argument("--only", choices=("operations", "epochs"), help="which half of it")
    arguments = parser.parse_args()
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    print(
        f"torch {torch.__version__}, {blas}, oneDNN {torch.backends.mkldnn.is_available()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for epochs, 1 for operations; "
        f"allocator {os.environ.get('LD_PRELOAD') or 'of the C library'}, "
        + ", ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_"))
    )
    threads = torch.get_num_threads()
    if arguments.only != "epochs":
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        benchmark_loss()
        benchmark_counts()
        benchmark_augmentation()
    if arguments.only != "operations":
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        with tempfile.TemporaryDirectory() as folder:
            if arguments.data is None:
                write_scenes(Path(folder), arguments.limit)
            data = arguments.data or folder
            benchmark_waiting(data, arguments.limit)
            benchmark_epochs(data, SMALL | {"limit": arguments.limit}, arguments.epochs)
            if arguments.large:
                benchmark_epochs(data, LARGE, 1)

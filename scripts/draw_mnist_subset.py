"""Draw the digits that the package bundles: 5 000 for training and 1 000 for tests, by class.

    python scripts/draw_mnist_subset.py --data mnist.npz

The source is MNIST (LeCun, Cortes and Burges) as an .npz file with X, y, Xt, yt; the arrays are the
60 000 training and 10 000 test images in their published order. The draw is fixed by its seed, so a
second run writes the same bytes.
"""

import argparse
import csv
import lzma
from pathlib import Path

import numpy as np

SEED = 20170306  # the day the influence-functions paper went online
TARGET = Path(__file__).resolve().parents[1] / "src" / "upweight" / "data"


def draw(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` examples of each digit, in their published order."""
    chosen = [
        generator.permutation(np.flatnonzero(labels == digit))[:per_class] for digit in range(10)
    ]
    return np.sort(np.concatenate(chosen))


def main() -> None:
    """Write digits.xz (raw bytes of the images) and digits.csv (split, index, label)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz: X, y, Xt, yt")
    source = np.load(parser.parse_args().data, allow_pickle=False)
    generator = np.random.default_rng(SEED)
    train = draw(source["y"], 500, generator)
    test = draw(source["yt"], 100, generator)
    images = np.concatenate([source["X"][train], source["Xt"][test]])
    packed = lzma.compress(images.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    (TARGET / "digits.xz").write_bytes(packed)
    with (TARGET / "digits.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "index", "label"])
        writer.writerows(("train", i, source["y"][i]) for i in train)
        writer.writerows(("test", i, source["yt"][i]) for i in test)
    print(f"{len(images)} images, {len(packed) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

"""Images and tokens a second that the host prepares for a step: threads against worker processes, by kind of source.

    OMP_NUM_THREADS=1 python experiments/benchmarks/loading.py [--images=512] [--seconds=15] [--workers=1,2]

Images: JPEGs of about ImageNet's size (500 x 375, 105 KB), made in a temporary folder, kept there as files, as Parquet
shards (100 rows to a group, as Hugging Face writes them) and as ArrayRecord shards. They fit in the page cache, so that
decoding is measured and not a disk; Parquet has them 16 times, so that few row groups are still in memory. Random
resized crop to 224, flip, batches of 64. Arrays: 50,000 images of CIFAR's size in memory, shifted and mirrored, batches
of 128. Tokens: windows of a memory-mapped uint16 file of 1 GB, in a random order.
Readers take turns, and the batches that they made while they waited are not counted.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from PIL import Image, features

from cdl.data import images, text
from cdl.data.image_files import write_array_records
from cdl.data.image_sources import Arrays
from cdl.machine import processor

HEIGHT, WIDTH, SIZE, BATCH = 375, 500, 224, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=15.0)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", default=f"1,{cores}", help="numbers of worker processes")
    arguments = parser.parse_args()
    workers = [int(n) for n in arguments.workers.split(",")]
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        sources = image_sources(Path(folder), arguments.images)
        for name, path in sources.items():
            section = ConfigDict(images.data_arguments() | dict(path=str(path), augment="inception", image_size=SIZE))
            section.batch_size = BATCH
            dataset = images.batches(images.read_images(section.path, 0.1), section, seed=0)
            for reader, rate in rates(dataset, workers, arguments.seconds).items():
                print(f"{name:16s} {reader:28s} {rate * BATCH:12,.0f} images/s")
        section = ConfigDict(images.data_arguments() | dict(augment="crop_flip", batch_size=128))
        for reader, rate in rates(images.batches(in_memory(), section, seed=0), workers, arguments.seconds).items():
            print(f"{'arrays':16s} {reader:28s} {rate * section.batch_size:12,.0f} images/s")
        tokens = Path(folder, "tokens.bin")
        np.random.default_rng(0).integers(0, 50257, 2**29, dtype=np.uint16).tofile(tokens)
        for B, S in ((8, 256), (512, 1024)):
            section = ConfigDict(text.data_arguments() | dict(path=str(tokens), batch_size=B, seq_len=S))
            dataset = text.batches(text.read_corpus(section.path, 0.1), section, seed=0)
            for reader, rate in rates(dataset, workers, arguments.seconds).items():
                print(f"{f'tokens {B} x {S}':16s} {reader:28s} {rate * B * S:12,.0f} tokens/s")


def image_sources(folder: Path, n: int) -> dict[str, Path]:
    """The same JPEGs as class folders, Parquet and ArrayRecord shards."""
    rng = np.random.default_rng(0)
    encoded = []
    for i in range(n):
        file = folder / "files" / f"class{i % 8}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(rng)).save(file, quality=95)
        encoded.append(file.read_bytes())
    print(f"{n} JPEGs of {WIDTH} x {HEIGHT}, {np.mean([len(e) for e in encoded]) / 1000:.0f} KB on average")
    (folder / "parquet").mkdir()
    rows = [{"bytes": e, "path": ""} for e in encoded] * 16
    table = pa.table({"image": rows, "label": [i % 8 for i in range(len(rows))]})
    pq.write_table(table, folder / "parquet" / "train-0.parquet", row_group_size=100)
    write_array_records(images.read_images(str(folder / "files"), 0.1), folder / "records")
    return {"files": folder / "files", "Parquet": folder / "parquet", "ArrayRecord": folder / "records"}


def in_memory() -> images.Images:
    """Noise in the shape of CIFAR-10."""
    rng = np.random.default_rng(0)
    source = Arrays(rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 50_000))
    return images.Images(source, source, 10, "")


def picture(rng: np.random.Generator) -> np.ndarray:
    """Noise with less of it at finer scales, as photographs have."""
    image_HxWxC = np.zeros((HEIGHT, WIDTH, 3))
    for scale in (4, 8, 16, 32, 64, 128, 250, 500):
        noise = Image.fromarray(rng.integers(0, 256, (scale * 3 // 4, scale, 3), dtype=np.uint8))
        image_HxWxC += (np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) - 127.5) / scale**0.45
    image_HxWxC *= 55 / image_HxWxC.std()
    return np.clip(image_HxWxC + 127.5, 0, 255).astype(np.uint8)


def rates(dataset: grain.MapDataset, workers: list[int], seconds: float) -> dict[str, float]:
    """Batches a second of each way to read: the median of three turns, so that all meet the same other load."""
    readers: dict[str, Any] = {"no reading ahead": (dataset[k] for k in range(2**62))}
    for n in (0, *workers):
        readers[f"{n} worker processes" if n else "threads in this process"] = images.iterate(dataset, 0, n)
    turns = [{name: rate(reader, seconds / 3) for name, reader in readers.items()} for _ in range(3)]
    for reader in readers.values():
        reader.close()
    return {name: float(np.median([turn[name] for turn in turns])) for name in readers}


def rate(batches: Iterator[Any], seconds: float) -> float:
    for _ in range(8):  # those that were made while others had their turn
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - start)


def machine() -> str:
    return (
        f"{processor()}; "
        f"Python {platform.python_version()}, grain {grain.__version__}, pyarrow {pa.__version__}, "
        f"Pillow {PIL.__version__} with libjpeg-turbo {features.version('libjpeg_turbo')}"
    )


if __name__ == "__main__":
    main()

"""Images from disk: finding them, reading them, and batches of crops for training.

Images are uint8 (height, width, channels), RGB or one grey channel; `gt` is the clean image and `lq` the
degraded one, and sizes are `scale` times apart. Only NumPy, ml_dtypes, Pillow, Grain, ArrayRecord and, for 16-bit
colour pictures, libvips are used here, so that worker processes can import this package without touching an
accelerator. Degrading images and converting them to float happen on the device, elsewhere.

Two programs belong to it: `kdjax.data.check` looks at a data set before a run does, and `kdjax.data.pack` makes a
folder fast to read.
"""

from kdjax.data.cached import Cache, open_cache
from kdjax.data.images import IMAGE_SUFFIXES, WRITTEN_SUFFIXES, ImageError, read_image, write_image
from kdjax.data.pipeline import (
    TrainingData,
    ValidationImage,
    cached_batches,
    load_images,
    spread,
    training_batches,
)
from kdjax.data.sources import DataError, ImagePair, find_pairs, find_unlabelled

__all__ = [
    "IMAGE_SUFFIXES",
    "WRITTEN_SUFFIXES",
    "Cache",
    "DataError",
    "ImageError",
    "ImagePair",
    "TrainingData",
    "ValidationImage",
    "cached_batches",
    "find_pairs",
    "find_unlabelled",
    "load_images",
    "open_cache",
    "read_image",
    "spread",
    "training_batches",
    "write_image",
]

"""Images on disk: finding them, reading them, and batches of crops for training.

Images are uint8 (height, width, channels), RGB or one grey channel. `gt` is the clean image, `scale` times as large as
`lq`, the degraded one. This package imports only NumPy, ml_dtypes, Pillow, Grain, ArrayRecord and, for 16-bit colour
pictures, libvips, so that worker processes never touch an accelerator. Degradation and conversion to float happen on
the device, elsewhere.

Two programs belong to it: `kdjax.data.check` checks a data set before training, and `kdjax.data.pack` packs a folder
for fast reading.
"""

from kdjax.data.cache import Cache, open_cache
from kdjax.data.images import IMAGE_SUFFIXES, WRITTEN_SUFFIXES, ImageError, read_image, write_image
from kdjax.data.pairs import ImagePair, find_pairs, find_unlabelled, with_answers
from kdjax.data.pipeline import (
    TrainingData,
    ValidationImage,
    cached_batches,
    load_images,
    spread,
    training_batches,
)
from kdjax.data.sources import DataError

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
    "with_answers",
    "write_image",
]

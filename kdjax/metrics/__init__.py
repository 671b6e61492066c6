"""How good an image is: uint8 (h, w, c) arrays in, one number out.

    psnr, ssim              against the clean image, as BasicSR defines them
    kdjax.metrics.niqe      how natural an image looks, without the clean one
    kdjax.metrics.lpips     the distance between the features that a trained network sees
    kdjax.metrics.named     all of them by the names that a command line uses: "psnr_y", "lpips", ...

Clipping and rounding to 8 bit comes before: it changes the numbers. Only `lpips` needs JAX.
"""

from kdjax.metrics.psnr_ssim import TooSmallError, luma, psnr, ssim

__all__ = ["TooSmallError", "luma", "psnr", "ssim"]

"""Image quality metrics: uint8 (h, w, c) arrays in, one number out.

    psnr, ssim              against the clean image, as BasicSR defines them
    kdjax.metrics.niqe      how natural an image looks, without the clean one
    kdjax.metrics.lpips     distance between the features of a trained network
    kdjax.metrics.named     all of them by the names used on the command line: "psnr_y", "lpips", ...

Clip and round to 8 bits before calling them: it changes the numbers. Only `lpips` needs JAX.
"""

from kdjax.metrics.psnr_ssim import TooSmallError, luma, psnr, ssim

__all__ = ["TooSmallError", "luma", "psnr", "ssim"]

"""The guide's full YAML: real-world restoration from pairs and from clean images degraded as in Real-ESRGAN.

    python -m kdjax.train --config configs/realworld.py --config.teacher.weights=teacher.pth \\
        --config.data.gt=PAIRS/gt --config.data.lq=PAIRS/lq --config.data.unpaired=FOLDER \\
        --config.val.gt=VAL/gt --config.val.lq=VAL/lq

Without files it uses the photographs in the package, all of them degraded, with the teacher in the package. That
teacher only removes Gaussian noise, so this only checks that everything runs: the student can learn about blur and JPEG
from the task loss alone. `:quick` is a real run of a few minutes on two CPU cores; `:debug` makes four steps, which
take as long as compiling the degradation does.

Keys not set here are as in `denoise.py`. `configs/basicsr.py:FILE` runs the guide's YAML itself and says how every key
was translated.
"""

from denoise import cosine, shorten
from denoise import get_config as get_denoise
from ml_collections import ConfigDict

from kdjax.degradations import preset


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise()
    if variant not in ("", "quick", "debug"):
        raise ValueError(f"there is no variant {variant!r}; there are :quick and :debug, or none")
    config.name = f"realworld_{variant}" if variant else "realworld"
    # perceptual_opt is 1.0 in the guide. Off here: it lowers PSNR and needs torchvision's file, as `vgg`.
    config.terms.perceptual = dict(
        vgg="",
        layer_weights=dict(conv1_2=0.1, conv2_2=0.1, conv3_4=1.0, conv4_4=1.0, conv5_4=1.0),
        vgg_type="vgg19",
        use_input_norm=True,
        range_norm=False,
        criterion="l1",
        weight=0.0,
    )
    # The guide's degradation keys. Those of the second kernel and the last filter are missing there and come from
    # Real-ESRGAN.
    config.degrade = preset(
        "realesrgan",
        blur_kernel_size=21,
        kernel_list=("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"),
        kernel_prob=(0.45, 0.25, 0.12, 0.03, 0.12, 0.03),
        sinc_prob=0.1,
        blur_sigma=(0.2, 3.0),
        betag_range=(0.5, 4.0),
        betap_range=(1.0, 2.0),
        resize_prob=(0.2, 0.7, 0.1),  # up, down, keep
        resize_range=(0.15, 1.5),
        gaussian_noise_prob=0.5,
        noise_range=(1.0, 30.0),
        poisson_scale_range=(0.05, 3.0),
        gray_noise_prob=0.4,
        jpeg_range=(30.0, 95.0),
        second_blur_prob=0.8,
        resize_prob2=(0.3, 0.4, 0.3),
        resize_range2=(0.3, 1.2),
        gaussian_noise_prob2=0.5,
        noise_range2=(1.0, 25.0),
        poisson_scale_range2=(0.05, 2.5),
        gray_noise_prob2=0.4,
        jpeg_range2=(30.0, 95.0),
    )
    config.data.canvas = 400  # clean images are degraded at this size, then cropped, as in Real-ESRGAN
    # Without val.lq, gt is degraded as in training, the same way each time; this compiles again for every image size.
    config.val.update(degrade=config.degrade, crop=512)

    if variant == "quick":
        config.student.hparams.update(num_feat=16, num_conv=4)
        config.data.update(canvas=128, crop=64, batch_size=4, workers=0)
        config.val.update(crop=256, every=200)
        config.train.update(steps=400, ema_decay=0.99)
        config.train.lr = cosine(config, 1e-3)
        config.log.every = 50
        config.checkpoint.every = 200
    if variant == "debug":
        config.student.hparams.update(num_feat=8, num_conv=2)
        shorten(config)
        config.data.update(canvas=96, crop=32, batch_size=2)
        config.log.diagnose = False  # would compile the degradation, the slowest part, a second time
    return config

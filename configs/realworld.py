"""The guide's YAML, complete: real-world restoration from pairs and from clean images that Real-ESRGAN's way degrades.

    python -m kdjax.train --config configs/realworld.py --config.teacher.weights=teacher.pth \\
        --config.data.gt=PAIRS/gt --config.data.lq=PAIRS/lq --config.data.unpaired=FOLDER \\
        --config.val.gt=VAL/gt --config.val.lq=VAL/lq

Without files it runs on the photographs inside the package, all of them degraded, with the teacher inside the package.
That one removes Gaussian noise only, so this proves that everything runs; what a student can learn about blur and JPEG
then comes from the task loss. `:quick` is a real run of a few minutes on two CPU cores; `:debug` is four steps, which
take as long as compiling the degradation does.

The comments on the right name the keys of the guide's YAML; `configs/basicsr.py:FILE` runs such a YAML itself, and says
what became of every key. Not here, because nothing takes their place: model_type, num_gpu, dist_params, the type of the
sets, io_backend, prefetch_mode, dataset_enlarge_ratio, strict_load_*, resume_state and val.metrics.
"""

from ml_collections import ConfigDict

from kdjax.degradations import preset


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "quick", "debug"):
        raise ValueError(f"configs/realworld.py has no variant {variant!r}; it has :quick and :debug, or none")
    config = ConfigDict()
    config.name = "realworld"  # name
    config.seed = 0  # manual_seed

    config.student = dict(  # network_g: the guide has a placeholder of 32 features, its scale is `upscale`
        arch="srvggnetcompact",
        hparams=dict(num_in_ch=3, num_out_ch=3, num_feat=32, num_conv=8, upscale=1),
        weights="",  # pretrain_network_g
        remat=False,
        dtype="float32",
    )
    config.teacher = dict(  # network_teacher: an RRDBNet of 64 features and 23 blocks, or what else the file holds
        weights="embedded",  # pretrain_network_teacher
        key="auto",
        also=(),
        mix=(),
        self_ensemble=False,
        cache="",
        dtype="float32",
    )
    config.terms = dict(
        task=dict(criterion="charbonnier", eps=1e-12, weight=1.0),  # pixel_opt
        # distillation_opt. The guide has l2 at 2.0, 4 % of the gradient; docs/distillation.md advises this.
        output=dict(criterion="l1", weight=1.0),
        # perceptual_opt, at 1.0 in the guide. Off: it lowers PSNR and needs torchvision's file, as `vgg`.
        perceptual=dict(
            vgg="",
            layer_weights=dict(conv1_2=0.1, conv2_2=0.1, conv3_4=1.0, conv4_4=1.0, conv5_4=1.0),
            vgg_type="vgg19",
            use_input_norm=True,
            range_norm=False,
            criterion="l1",
            weight=0.0,  # perceptual_weight
        ),
    )
    # The degradation keys of the guide; those of the second kernel and the last filter, which it lacks, are of
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

    config.data = dict(
        gt="embedded",  # dataroot_gt_paired; without lq clean images, all of which are degraded
        lq="",  # dataroot_lq_paired
        filename_tmpl="{}",
        meta_info="",  # meta_info_paired
        limit=0,
        unpaired="",  # dataroot_gt_unpaired: clean images beside pairs
        unpaired_meta_info="",  # meta_info_unpaired
        unpaired_part=0.5,
        canvas=400,  # clean images are degraded at this size and cropped after that, as in Real-ESRGAN
        gt_usm=False,
        crop=128,  # gt_size; 400 in the guide, where the teacher's memory is the limit
        batch_size=16,  # batch_size_per_gpu, but of all devices together
        per_device=False,  # batch_size and workers are those of each accelerator: num_gpu: auto
        hflip=True,  # use_hflip
        rot=True,  # use_rot
        workers=4,  # num_worker_per_gpu
        cache_mb=512,
        unlabelled="",
        unlabelled_part=0.5,
    )
    config.val = dict(  # datasets.val and val
        gt="embedded",
        lq="",  # dataroot_lq: without it, gt degraded as in training, the same way each time
        filename_tmpl="{}",
        meta_info="",
        sigma=25.0,
        degrade=config.degrade,
        crop=512,  # every size of image compiles the degradation anew
        limit=0,
        every=5_000,  # val_freq
        save_images=4,  # save_img
    )
    config.train = dict(
        steps=250_000,  # total_iter
        optimizer="adam",  # optim_g
        lr=dict(name="multistep", value=2e-4, milestones=(50_000, 100_000, 150_000, 200_000), gamma=0.5, warmup=0),
        betas=(0.9, 0.99),
        weight_decay=0.0,
        grad_clip=0.0,
        ema_decay=0.999,  # ema_decay
        accumulate=1,  # parts of a batch, one after another, where memory is short
    )
    config.log = dict(every=100, diagnose=True, tensorboard=False, wandb="")  # print_freq, use_tb_logger, wandb
    config.checkpoint = dict(every=5_000, keep=2)  # save_checkpoint_freq

    if variant == "quick":
        config.name = "realworld_quick"
        config.student.hparams.update(num_feat=16, num_conv=4)
        config.data.update(canvas=128, crop=64, batch_size=4, workers=0)
        config.val.update(crop=256, every=200)
        config.train.update(steps=400, ema_decay=0.99)
        # The end of the cosine follows --config.train.steps.
        steps = config.train.get_oneway_ref("steps")
        del config.train.lr
        config.train.lr = dict(name="cosine", value=1e-3, steps=steps, final=1e-5, warmup=50)
        config.log.every = 50
        config.checkpoint.every = 200
    if variant == "debug":
        config.name = "realworld_debug"
        config.student.hparams.update(num_feat=8, num_conv=2)
        config.data.update(canvas=96, crop=32, batch_size=2, workers=0)
        config.val.update(crop=32, limit=1, every=2, save_images=1)
        config.train.steps = 4
        config.log.every = config.checkpoint.every = 2
        config.log.diagnose = False  # compiles the degradation a second time, which takes longest here
    return config

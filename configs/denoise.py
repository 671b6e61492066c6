"""The guide's recipe: a large pretrained RRDBNet teaches a small SRVGGNetCompact to remove noise.

    python -m kdjax.train --config configs/denoise.py \\
        --config.teacher.weights=teacher.pth --config.data.gt=FOLDER --config.val.gt=FOLDER

Without those three it runs on the photographs and the teacher inside the package. Any key can be set on the command
line. `:quick` is a real run in a few minutes on two CPU cores; `:debug` takes seconds and proves only that all runs.

The comments on the right name the keys of the guide's YAML. Of those without a line here:
  scale                     the student's `scale` or `upscale`, said once; the teacher's file must agree
  num_gpu, dist_params      all devices are used; batch_size is divided among them
  model_type, type of sets  one program; paired data are those with `lq`
  io_backend, prefetch_mode files are read directly and ahead of time
  dataset_enlarge_ratio     the stream of crops has no end, epochs have no cost
  strict_load_*             always strict: a missing or unexpected weight is an error
  resume_state              automatic
  warmup_iter               `warmup` in any schedule, e.g. --config.train.lr.warmup=500
  perceptual_opt            configs/perceptual.py: it lowers PSNR and needs a VGG file
  blur .. jpeg_range2       "denoising" with blur and resizing trains another task; here the degradation is noise
  metrics                   PSNR and SSIM on RGB, no border left out, always
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "quick", "debug"):
        raise ValueError(f"configs/denoise.py has no variant {variant!r}; it has :quick and :debug, or none")
    config = ConfigDict()
    config.name = "denoise"  # name
    config.seed = 0  # manual_seed

    config.student = dict(  # network_g
        arch="srvggnetcompact",
        hparams=dict(num_feat=32, num_conv=8, upscale=1),
        weights="",  # pretrain_network_g; or "teacher", a slice of it
        remat=False,
        dtype="float32",
    )
    config.teacher = dict(  # network_teacher: everything about it is read from its file
        weights="embedded",  # pretrain_network_teacher
        key="auto",  # the guide insists on "params"; published files have params_ema
        also=(),  # more teachers, whose images are averaged with the first one's
        mix=(),
        self_ensemble=False,
        cache="",  # its answers, kept by kdjax.cache
        dtype="float32",
    )
    config.terms = dict(
        task=dict(criterion="charbonnier", eps=1e-12, weight=1.0),  # pixel_opt
        # distillation_opt. The guide has l2 at 2.0: at |student - teacher| = 0.01 that is 4 % of the gradient.
        # Its distillation_scheduler is weight=dict(name="multistep", value=5.0, milestones=(50_000, ...), gamma=0.5).
        output=dict(criterion="l1", weight=1.0),
    )
    config.degrade = dict(name="awgn", sigma=25.0)

    config.data = dict(
        gt="embedded",  # dataroot_gt_*
        lq="",  # dataroot_lq_paired
        filename_tmpl="{}",
        meta_info="",  # meta_info_*
        limit=0,
        crop=128,  # gt_size; 400 in the guide, where the teacher's memory is the limit
        canvas=0,
        gt_usm=False,  # use_usm_gt of Real-ESRGAN
        batch_size=16,  # batch_size_per_gpu, but of all devices together
        per_device=False,  # batch_size and workers are those of each accelerator: num_gpu: auto
        hflip=True,  # use_hflip
        rot=True,  # use_rot
        workers=4,  # num_worker_per_gpu
        cache_mb=512,
        unlabelled="",
        unlabelled_part=0.5,
        unpaired="",  # dataroot_gt_unpaired
        unpaired_meta_info="",  # meta_info_unpaired
        unpaired_part=0.5,  # unpaired_prob
    )
    config.val = dict(  # datasets.val and val
        gt="embedded",
        lq="",
        filename_tmpl="{}",
        meta_info="",
        sigma=25.0,
        degrade={},
        crop=0,
        limit=0,
        every=5_000,  # val_freq
        save_images=4,  # save_img
    )
    config.train = dict(
        steps=250_000,  # total_iter
        optimizer="adam",  # optim_g.type
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
        config.name = "denoise_quick"
        config.student.arch = "dncnn"
        config.student.hparams = ConfigDict(dict(num_feat=16, depth=7))
        config.data.update(crop=64, batch_size=8, workers=0)
        config.val.update(crop=256, every=400)
        config.train = ConfigDict(dict(steps=1_200, optimizer="adam", betas=(0.9, 0.99), ema_decay=0.99, accumulate=1))
        # The end of the cosine follows --config.train.steps.
        steps = config.train.get_oneway_ref("steps")
        config.train.lr = dict(name="cosine", value=2e-3, steps=steps, final=1e-5, warmup=50)
        config.log.every = 50
        config.checkpoint.every = 200
    if variant == "debug":
        config.name = "denoise_debug"
        config.student.hparams.update(num_feat=8, num_conv=2)
        config.data.update(crop=16, batch_size=4, workers=0)
        config.val.update(crop=32, limit=1, every=2, save_images=1)
        config.train.steps = 4
        config.log.every = config.checkpoint.every = 2
    return config

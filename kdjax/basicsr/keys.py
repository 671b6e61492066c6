"""Every key of a training YAML of BasicSR, Real-ESRGAN and the guide: what it becomes here, and its allowed values.

KEYS is the table. Above it are the functions that read one value each and raise an error saying what they wanted.
Numbers may be text, because YAML 1.1 reads `1e-4` as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kdjax.config import check_name
from kdjax.degradations import preset
from kdjax.models import MODELS, architecture
from kdjax.models.custom import is_custom
from kdjax.names import nearest, pick

Read = Callable[[Any], Any]  # YAML value -> config value; raises ValueError with what was wanted


# ---- what a value may be ---------------------------------------------------------------------------------------


def anything(value: Any) -> Any:
    return value


def text(value: Any) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError("wanted text")


def plain_name(value: Any) -> str:
    """Reads the name of a run, which is also its folder's name."""
    check_name(text(value), "name")
    return text(value)


def number(value: Any) -> float:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError("wanted a number")


def whole(value: Any) -> int:
    if number(value) != int(number(value)):
        raise ValueError("wanted a whole number")
    return int(number(value))


def flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("wanted true or false")


def several(read: Read) -> Read:
    """Reads a list, each value with `read`."""

    def read_all(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError("wanted a list")
        return tuple(read(value) for value in values)

    return read_all


def named(read: Read) -> Read:
    """Reads a group, each value with `read`."""

    def read_all(values: Any) -> dict[str, Any]:
        if not isinstance(values, Mapping) or not values:
            raise ValueError("wanted a group of names and values")
        return {str(name): read(value) for name, value in values.items()}

    return read_all


def one_of(what: str, **names: Any) -> Read:
    """Reads a name and returns what it stands for here."""
    return lambda value: pick(names, text(value), what)


def only(*allowed: Any, why: str) -> Read:
    """Accepts only values that describe what kdjax does anyway."""

    def read(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(why)
        return value

    return read


def never(why: str) -> Read:
    """Rejects the key unless it is switched off."""
    return only(False, 0, "", why=why)


def network(value: Any) -> str:
    """Returns the architecture's name here; "" for "module:Class", because a YAML must not cause an import."""
    name = text(value)
    if is_custom(name):
        return ""
    try:
        return architecture(name).name
    except ValueError:
        names = [known.module.__name__ for known in MODELS.values()]
        raise ValueError(
            f"there is no such architecture{nearest(name, names)}. Write the type and the keys of one of"
            f" {', '.join(names)} (EDSR takes num_in_ch, num_out_ch, num_feat and num_block). Or, for your own network"
            " in Flax, write `type: my_package.my_net:MyNet` and start with"
            " --config.student.arch=my_package.my_net:MyNet, see docs/your_own_student.md"
        ) from None


# ---- the keys --------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A key of the YAML.

    Attributes:
      becomes: the config key, "-" if none is needed; a * is the key's own name.
      note: what differs here, or why nothing replaces the key.
      read: reads and checks the value.
      direct: whether the value of `becomes` is simply this value; otherwise it contributes to it in `_finish_*`.
    """

    becomes: str
    note: str = ""
    read: Read = anything
    direct: bool = True


def ignored(note: str, read: Read = anything) -> Key:
    return Key("-", note, read, direct=False)


_DISK = only("disk", why="only files in folders are read; unpack the lmdb store into one")
_GAN = "GAN training is not supported; remove network_d and gan_opt, and set model_type to SRModel or RealESRNetModel"
_MEAN = only("mean", why="losses are means; write `mean` and adjust loss_weight")
_MEAN_COLOUR = only([0.4488, 0.4371, 0.4040], why="EDSR uses the mean of DIV2K, [0.4488, 0.4371, 0.4040]")
_RAW = "images stay in [0, 1]; networks here subtract their own mean"
STRICT = "weights are loaded strictly: all of them or none"
_WHOLE_RGB = "PSNR and SSIM of the whole RGB image; kdjax.evaluate has crop_border, psnr_y, ssim_y, niqe, lpips"
_CRITERIA = {"l1": "l1", "l2": "mse", "smooth_l1": "smooth_l1"}


def _like(default: Any) -> Read:
    """Returns a reader for values of the default's type."""
    if isinstance(default, tuple):
        return several(_like(default[0]))
    return {str: text, float: number, int: whole}[type(default)]


# Real-ESRGAN's keys, for clean images. Its own files have some at the root; the guide has all in datasets.train.
DEGRADATION = {name: _like(default) for name, default in preset("realesrgan").items() if name != "name"}

DATASETS = {
    "PairedImageDataset": "pairs",
    "RealESRGANPairedDataset": "pairs",
    "RealESRGANDataset": "clean",
    "RealESRGANHybridDataset": "both",
}

# "datasets.val" stands for the first validation set, whatever its name; "datasets.*" for the others.
KEYS: dict[str, Key] = {
    "name": Key("name", "the run's folder is runs/NAME, or --workdir", plain_name),
    "model_type": ignored(
        "the same program trains every kind",
        only(
            "DistillationModel",
            "SRModel",
            "RealESRNetModel",
            why=f"wanted DistillationModel, SRModel or RealESRNetModel: {_GAN}",
        ),
    ),
    "scale": Key("student.hparams", "must equal upscale or scale of network_g", whole, direct=False),
    "num_gpu": Key(
        "data.batch_size",
        "all devices are used; this multiplies batch_size_per_gpu, auto sets data.per_device",
        direct=False,
        read=lambda value: value if value == "auto" else whole(value),
    ),
    "manual_seed": Key("seed", read=whole),
    "gt_usm": Key("data.gt_usm", "sharpens every clean image, those of pairs included", flag),
    "l1_gt_usm": ignored("see gt_usm", never("gt_usm decides about sharpening, for input and target together")),
    "percep_gt_usm": ignored("see gt_usm", never("gt_usm decides about sharpening")),
    "gan_gt_usm": ignored("no discriminator is trained"),
    "high_order_degradation": Key("degrade", "false uses pairs only", flag, direct=False),
    "gt_size": Key("data.crop", read=whole),
    "queue_size": ignored("not needed: every sample draws its own degradation"),
    "dist_params.*": ignored("one process drives all devices"),
    "find_unused_parameters": ignored("one process drives all devices"),
    # ---- data
    "datasets.train.name": ignored("only a label"),
    "datasets.train.type": Key(
        "data", "decides which of the folders are used", one_of("data set", **DATASETS), direct=False
    ),
    "datasets.train.dataroot_gt": Key("data.gt", read=text),
    "datasets.train.dataroot_lq": Key("data.lq", read=text),
    "datasets.train.dataroot_gt_paired": Key("data.gt", read=text),
    "datasets.train.dataroot_lq_paired": Key("data.lq", read=text),
    "datasets.train.dataroot_paired": Key(
        "data.gt, data.lq", "with meta_info_paired the folder of both, else its GT and LQ", text, direct=False
    ),
    "datasets.train.dataroot_gt_unpaired": Key("data.unpaired", "data.gt where there are no pairs", text),
    "datasets.train.meta_info": Key("data.meta_info", read=text),
    "datasets.train.meta_info_file": Key("data.meta_info", read=text),
    "datasets.train.meta_info_paired": Key("data.meta_info", read=text),
    "datasets.train.meta_info_unpaired": Key(
        "data.unpaired_meta_info", "data.meta_info where there are no pairs", text
    ),
    "datasets.train.unpaired_prob": Key(
        "data.unpaired_part", "a fixed part of every batch, not a coin toss per image", number
    ),
    "datasets.train.filename_tmpl": Key("data.filename_tmpl", read=text),
    "datasets.train.io_backend.type": ignored("files are read directly", _DISK),
    "datasets.train.gt_size": Key(
        "data.crop", "clean images are degraded at 400 and cropped after that, as in Real-ESRGAN", whole
    ),
    "datasets.train.use_hflip": Key("data.hflip", read=flag),
    "datasets.train.use_rot": Key("data.rot", read=flag),
    "datasets.train.use_shuffle": ignored(
        "the order is always shuffled", only(True, why="the order is always shuffled")
    ),
    "datasets.train.num_worker_per_gpu": Key("data.workers", "times num_gpu", whole),
    "datasets.train.batch_size_per_gpu": Key("data.batch_size", "times num_gpu: the batch of all devices", whole),
    "datasets.train.dataset_enlarge_ratio": ignored("samples are an endless stream; epochs cost nothing"),
    "datasets.train.prefetch_mode": ignored("batches are always prefetched"),
    "datasets.train.num_prefetch_queue": ignored("batches are always prefetched"),
    "datasets.train.pin_memory": ignored("batches are always prefetched"),
    "datasets.train.persistent_workers": ignored("workers always live as long as the run"),
    "datasets.train.scale": ignored("see scale"),
    "datasets.train.color": ignored(
        "networks with one channel read grey", never("training on Y alone is not supported; use RGB or grey")
    ),
    "datasets.train.mean": ignored(_RAW, never(_RAW)),
    "datasets.train.std": ignored(_RAW, never(_RAW)),
    "datasets.val.name": ignored("only a label"),
    "datasets.val.type": ignored(
        "pairs",
        only(
            "PairedImageDataset",
            "RealESRGANPairedDataset",
            why="wanted PairedImageDataset: nothing can be measured without clean images",
        ),
    ),
    "datasets.val.dataroot_gt": Key("val.gt", read=text),
    "datasets.val.dataroot_lq": Key("val.lq", "without it clean images are degraded as in training", text),
    "datasets.val.meta_info": Key("val.meta_info", read=text),
    "datasets.val.meta_info_file": Key("val.meta_info", read=text),
    "datasets.val.filename_tmpl": Key("val.filename_tmpl", read=text),
    "datasets.val.io_backend.type": ignored("files are read directly", _DISK),
    "datasets.val.color": ignored("networks with one channel read grey", never("validation uses RGB or grey, not Y")),
    "datasets.val.mean": ignored(_RAW, never(_RAW)),
    "datasets.val.std": ignored(_RAW, never(_RAW)),
    "datasets.*": ignored("only one set is used; python -m kdjax.evaluate measures others"),
    # ---- networks
    "network_g.type": Key("student.arch", "one of your own is imported only with --config.student.arch", network),
    "network_g.rgb_mean": ignored("EDSR's, always", _MEAN_COLOUR),
    "network_g.*": Key("student.hparams.*"),
    "network_teacher.type": ignored(
        "recognised from the weights; one of your own is imported only with --config.teacher.hparams.arch", network
    ),
    "network_teacher.rgb_mean": ignored("EDSR's, always", _MEAN_COLOUR),
    "network_teacher.*": Key("teacher.hparams.*", "recognised from the weights, which must agree"),
    "network_d": ignored("no discriminator is trained", never(_GAN)),
    "path.pretrain_network_g": Key("student.weights", "its params_ema, if the file has it", text),
    "path.param_key_g": ignored("params_ema before params"),
    "path.strict_load_g": ignored(STRICT),
    "path.pretrain_network_teacher": Key(
        "teacher.weights", "the guide takes its params; here params_ema if the file has it", text
    ),
    "path.param_key_teacher": Key("teacher.key", read=text),
    "path.strict_load_teacher": ignored(STRICT),
    "path.pretrain_network_d": ignored("no discriminator is trained", never(_GAN)),
    "path.strict_load_d": ignored("no discriminator is trained"),
    "path.param_key_d": ignored("no discriminator is trained"),
    "path.ignore_resume_networks": ignored("the teacher is never in a checkpoint"),
    "path.experiments_root": ignored("say --workdir"),
    "path.resume_state": ignored(
        "run the same command to resume",
        never(
            "a .state file of PyTorch cannot be resumed; to start from its weights, give its net_g file as"
            " pretrain_network_g"
        ),
    ),
    # ---- training
    "train.ema_decay": Key("train.ema_decay", read=number),
    "train.optim_g.type": Key("train.optimizer", read=one_of("optimizer", Adam="adam", AdamW="adamw")),
    "train.optim_g.lr": Key("train.lr.value", read=number),
    "train.optim_g.weight_decay": Key("train.weight_decay", read=number),
    "train.optim_g.betas": Key("train.betas", read=several(number)),
    "train.optim_g.eps": ignored("1e-8", lambda value: only(1e-8, why="Adam's eps is 1e-8")(number(value))),
    "train.optim_g.amsgrad": ignored("AMSGrad is not supported", never("AMSGrad is not supported")),
    "train.optim_d.*": ignored("no discriminator is trained"),
    "train.scheduler.type": Key(
        "train.lr.name",
        read=one_of(
            "scheduler", MultiStepLR="multistep", MultiStepRestartLR="multistep", CosineAnnealingRestartLR="cosine"
        ),
    ),
    "train.scheduler.milestones": Key("train.lr.milestones", read=several(whole)),
    "train.scheduler.gamma": Key("train.lr.gamma", read=number),
    "train.scheduler.restarts": Key("train.lr", "phases of a piecewise schedule", several(whole), direct=False),
    "train.scheduler.periods": Key(
        "train.lr.steps", "one; after it the rate stays constant", several(whole), direct=False
    ),
    "train.scheduler.restart_weights": Key("train.lr", read=several(number), direct=False),
    "train.scheduler.eta_min": Key("train.lr.final", read=number),
    "train.total_iter": Key("train.steps", read=whole),
    "train.warmup_iter": Key(
        "train.lr.warmup",
        "reaches the full rate; BasicSR's MultiStep stops just short of it",
        lambda value: max(0, whole(value)),
    ),
    "train.pixel_opt.type": Key(
        "terms.task.criterion",
        read=one_of("pixel loss", L1Loss="l1", MSELoss="mse", CharbonnierLoss="charbonnier", SmoothL1Loss="smooth_l1"),
    ),
    "train.pixel_opt.loss_weight": Key("terms.task.weight", read=number),
    "train.pixel_opt.reduction": ignored("losses are means", _MEAN),
    "train.pixel_opt.eps": Key("terms.task.eps", read=number),
    "train.pixel_opt.beta": Key("terms.task.beta", read=number),
    "train.perceptual_opt.type": Key(
        "terms.perceptual", "and terms.style", direct=False, read=only("PerceptualLoss", why="wanted PerceptualLoss")
    ),
    "train.perceptual_opt.layer_weights": Key("terms.perceptual.layer_weights", read=named(number)),
    "train.perceptual_opt.vgg_type": Key("terms.perceptual.vgg_type", read=text),
    "train.perceptual_opt.vgg_file": Key("terms.perceptual.vgg", "not a key of BasicSR", text),
    "train.perceptual_opt.use_input_norm": Key("terms.perceptual.use_input_norm", read=flag),
    "train.perceptual_opt.range_norm": Key("terms.perceptual.range_norm", read=flag),
    "train.perceptual_opt.criterion": Key(
        "terms.perceptual.criterion", read=one_of("criterion", l1="l1", l2="l2", fro="fro")
    ),
    "train.perceptual_opt.perceptual_weight": Key(
        "terms.perceptual.weight",
        "needs the VGG file: vgg_file, --config.terms.perceptual.vgg or BasicSR's place",
        number,
    ),
    "train.perceptual_opt.style_weight": Key("terms.style.weight", "also needs the VGG file", number),
    "train.distillation_opt.type": Key(
        "terms.output",
        "both types compare images, as in the guide",
        direct=False,
        read=only(
            "OutputDistillation",
            "FeatureDistillation",
            why="wanted OutputDistillation or FeatureDistillation; other kinds are loss terms of a config, see"
            " docs/distillation.md",
        ),
    ),
    "train.distillation_opt.loss_weight": Key("terms.output.weight.value", read=number),
    "train.distillation_opt.criterion": Key(
        "terms.output.criterion",
        "l2 at 2.0 is 4 % of the gradient; l1 at 1.0 is advised",
        one_of("criterion", **_CRITERIA),
    ),
    "train.distillation_opt.reduction": ignored("losses are means", _MEAN),
    "train.distillation_opt.feature_layers": ignored("the guide never reads it; features: configs/hint.py"),
    "train.distillation_scheduler.milestones": Key("terms.output.weight.milestones", read=several(whole)),
    "train.distillation_scheduler.gamma": Key("terms.output.weight.gamma", read=number),
    "train.gan_opt": ignored("no discriminator is trained", never(_GAN)),
    "train.net_d_iters": ignored("no discriminator is trained"),
    "train.net_d_init_iters": ignored("no discriminator is trained"),
    # ---- validation and logging
    "val.val_freq": Key("val.every", read=whole),
    "val.save_img": Key(
        "val.save_images", "4 images side by side: input, student, teacher, clean", lambda value: 4 * flag(value)
    ),
    "val.suffix": ignored("images are val/STEP/NAME.png"),
    "val.pbar": ignored("progress is logged line by line"),
    "val.metrics.*": ignored(_WHOLE_RGB),
    "logger.print_freq": Key("log.every", read=whole),
    "logger.save_checkpoint_freq": Key("checkpoint.every", read=whole),
    "logger.use_tb_logger": Key("log.tensorboard", "needs the extra tb", flag),
    "logger.wandb.project": Key("log.wandb", "needs the extra wandb", text),
    "logger.wandb.resume_id": ignored("the run's folder decides which run is resumed"),
} | {
    f"{place}{name}": Key("degrade.*", "of clean images without a pair", read)
    for place in ("datasets.train.", "")
    for name, read in DEGRADATION.items()
}

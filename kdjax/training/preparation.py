"""Turns a config into what a run needs: data, networks, losses and the step's recipe, all checked.

`prepare` rejects whatever does not fit. The programs that train, show samples and cache a teacher start with it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import assets, cost, data, distill, losses, models, ops, sharding
from kdjax.batch import Batch
from kdjax.config import Config, ConfigError
from kdjax.degradations import make_degrade, make_sigma
from kdjax.models import shrinking
from kdjax.schedules import make_schedule
from kdjax.streams import Stream
from kdjax.teacher import cache as teacher_cache
from kdjax.teacher.load import Teacher, load_teacher
from kdjax.terms import make_terms, needs_teacher
from kdjax.weights import load_weights

log = logging.getLogger("kdjax")

_CHECKED = 8  # samples at most whose answers are checked: one device has to hold them


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run needs; all of it has been checked."""

    config: Config
    mesh: jax.sharding.Mesh
    student: models.Model
    teacher: Teacher | None  # None if no loss needs it
    recipe: distill.Recipe
    pairs: list[data.ImagePair]
    unlabelled: list[data.ImagePair]
    unpaired: list[data.ImagePair]
    cache: data.Cache | None = None  # with config.teacher.cache: where batches and the teacher's outputs come from


def prepare(config: Config) -> Setup:
    """Prepares data, networks and recipe of a run.

    Raises:
      ValueError, OSError: if something is missing or does not fit; the message is meant for the user.
    """
    mesh = sharding.data_mesh()
    parts = config.train.accumulate
    unit = mesh.size * parts
    if config.data.batch_size % unit:
        each = f" and the {parts} parts of config.train.accumulate" if parts > 1 else ""
        raise ConfigError(
            f"config.data.batch_size={config.data.batch_size} does not divide by the {mesh.size} devices{each}; use"
            f" {max(1, config.data.batch_size // unit) * unit} or another multiple of {unit}"
        )
    for wanted, package, extra in (
        (config.log.tensorboard, "tensorboardX", "tb"),
        (config.log.wandb, "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"config.log asks for {package}, which is not installed: pip install 'kdjax[{extra}]'")
    student, teacher = make_networks(config)
    scale = student.network.scale
    cost.check_data_fits(config, channels=student.network.channels, scale=scale, process_count=jax.process_count())
    for name, side in (("crop", config.data.crop), ("canvas", config.data.canvas)):
        if side % scale:
            raise ConfigError(
                f"config.data.{name}={side} is not a multiple of the student's scale {scale}; use"
                f" {-(-side // scale) * scale}"
            )
    student_apply = student.network.make_apply(remat=config.student.remat, dtype=jnp.dtype(config.student.dtype))
    lq_side = config.data.crop // scale
    setting = distill.make_setting(
        student_apply,
        student.params,
        teacher and teacher.apply,
        teacher and teacher.params,
        (config.data.batch_size, lq_side, lq_side, student.network.channels),
        jax.random.fold_in(jax.random.key(config.seed), Stream.ADAPTERS),
        sigma=0.0,
    )
    learning_rate = make_schedule(config.train.lr)
    makes_lq = not config.data.lq or bool(config.data.unpaired)
    recipe = distill.Recipe(
        student=student_apply,
        teacher=teacher and teacher.apply,
        terms=make_terms(config.terms, setting),
        optimizer=distill.make_optimizer(
            config.train.optimizer,
            learning_rate,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            grad_clip=config.train.grad_clip,
        ),
        learning_rate=learning_rate,
        ema_decay=config.train.ema_decay,
        ema_warmup=config.train.ema_warmup,
        degrade=make_degrade(config.degrade, scale=scale) if makes_lq else None,
        sigma=None if config.data.lq else make_sigma(config.degrade),
        crop=config.data.crop,
        sharpen=config.data.gt_usm,
        accumulate=parts,
    )
    _check_sigma_is_known(config, recipe, student, teacher)
    whole = [term.name for term in recipe.terms if not term.loss.is_mean]
    if parts > 1 and whole:
        raise ConfigError(
            f'the loss term {whole[0]!r} has criterion="fro", a norm over the whole batch, which cannot be summed'
            f' from config.train.accumulate={parts} parts; use criterion="l1" or "l2", or accumulate=1'
        )
    pairs = data.find_pairs(
        gt=assets.locate(config.data.gt, assets.TRAIN_PHOTOGRAPHS),
        lq=config.data.lq or None,
        filename_tmpl=config.data.filename_tmpl,
        meta_info=config.data.meta_info or None,
        what="training",
    )
    pairs = data.spread(pairs, config.data.limit)
    if config.teacher.outputs and teacher:
        teacher_cache.features_read(recipe.terms)  # refuses what asks the teacher about other images
        pairs = data.with_answers(pairs, config.teacher.outputs, config.data.lq)
        recipe = dataclasses.replace(recipe, teacher=None)
    unlabelled = []
    if config.data.unlabelled:
        folder = assets.locate(config.data.unlabelled, assets.TRAIN_PHOTOGRAPHS)
        unlabelled = data.find_unlabelled(folder, degraded=bool(config.data.lq))
    unpaired = []
    if config.data.unpaired:
        unpaired = data.find_pairs(
            gt=assets.locate(config.data.unpaired, assets.TRAIN_PHOTOGRAPHS),
            meta_info=config.data.unpaired_meta_info or None,
            what="unpaired",
        )
    setup = Setup(config, mesh, student, teacher, recipe, pairs, unlabelled, unpaired)
    if config.teacher.cache:
        cache, recipe = teacher_cache.open_for(config, recipe, teacher, sample_settings(setup))
        setup = dataclasses.replace(setup, cache=cache, recipe=recipe)
    return _shrunk(setup) if config.student.weights == "teacher" else setup


def _check_sigma_is_known(
    config: Config, recipe: distill.Recipe, student: models.Model, teacher: Teacher | None
) -> None:
    """Raises a ConfigError if a network is told the noise level, and the run does not know it."""
    if recipe.sigma:
        return
    told = {f"the student ({student.arch})": student.network.takes_sigma}
    if teacher:
        told |= {f"the teacher {file.path}": file.model.network.takes_sigma for file in teacher.files}
    if teacher and teacher.foreign:
        told[f"the teacher {teacher.foreign.path}"] = teacher.foreign.takes_sigma
    for name, is_told in told.items():
        if is_told:
            what = f"config.data.lq={config.data.lq!r}" if config.data.lq else f"degrade={config.degrade['name']!r}"
            raise ConfigError(
                f"{name} is told the noise level of its input, which is not known for {what}; use"
                ' degrade=dict(name="awgn_blind", sigma=(0.0, 50.0)), or a network without a noise map'
            )


def on_these_devices(config: Config) -> Config:
    """Resolves `data.per_device`: returns the config with `data.batch_size` as the total over all devices.

    A CPU counts as one device, whatever number of devices its cores are presented as.
    """
    if not config.data.per_device:
        return config
    here, everywhere = jax.local_device_count(), jax.device_count()
    if jax.default_backend() == "cpu":
        here, everywhere = 1, jax.process_count()
    options = config.data
    whole = dataclasses.replace(
        options, batch_size=options.batch_size * everywhere, workers=options.workers * here, per_device=False
    )
    return dataclasses.replace(config, data=whole)


def sample_settings(setup: Setup) -> dict[str, object]:
    """Returns everything that determines this run's samples; see `kdjax.teacher.cache`."""
    kinds = {"gt": setup.pairs, "unlabelled": setup.unlabelled, "unpaired": setup.unpaired}
    return teacher_cache.settings(setup.config, setup.student, setup.teacher, kinds, side=loaded_side(setup))


def make_networks(config: Config) -> tuple[models.Model, Teacher | None]:
    """Returns the student, and the teacher if a loss term needs it.

    The student starts from scratch, from a file whose architecture and hyper-parameters must match the config, or from
    the (first) teacher, which is then returned in any case; see `kdjax.models.shrinking`.
    """
    network = models.network(config.student.arch, config.student.hparams)
    cost.check_network_fits(network)
    student = network.init(jax.random.fold_in(jax.random.key(config.seed), Stream.STUDENT))
    is_shrunk = config.student.weights == "teacher"
    teacher = load_teacher(config.teacher, student) if is_shrunk or needs_teacher(config.terms) else None
    if is_shrunk:
        assert teacher is not None
        shrinking.check(teacher.model, network.hparams)
    elif config.student.weights:
        student = load_weights(config.student.weights, arch=network.arch, **config.student.hparams).model
        if student.network != network:
            raise ConfigError(
                f"config.student.weights={config.student.weights!r} holds {student.arch} with {student.hparams};"
                f" config.student asks for {network.hparams}"
            )
    return student, teacher


def _shrunk(setup: Setup) -> Setup:
    """Returns the setup with a student that approximates the teacher on the first degraded images of the run."""
    assert setup.teacher is not None
    log.info("shrinking the teacher to the student")
    student = shrinking.fit(setup.teacher.model, setup.student.network, *first_images(setup))
    return dataclasses.replace(
        setup, student=student, teacher=setup.teacher if needs_teacher(setup.config.terms) else None
    )


def first_images(setup: Setup) -> tuple[jax.Array, jax.Array | None]:
    """Returns the degraded crops of the run's first steps and their noise levels, if known; the same in every process.

    There are as many as `shrinking.num_images` says.
    """
    assert setup.teacher is not None
    side = setup.config.data.crop // setup.student.network.scale
    count = shrinking.num_images(setup.teacher.model, side)
    recipe, key = dataclasses.replace(setup.recipe, teacher=None), jax.random.key(setup.config.seed)
    make_lq = jax.jit(lambda batch: distill.make_pair(recipe, batch, key)[1])
    images: list[jax.Array] = []
    sigmas: list[jax.Array] = []
    with open_batches(setup, start_step=0, is_whole=True) as batches:
        while sum(map(len, images)) < count:
            batch: Any = {name: array for name, array in next(batches).items() if name != "teacher"}
            images.append(make_lq(batch))
            if (sigma := distill.noise_levels(recipe, batch, key)) is not None:
                sigmas.append(sigma)
    return jnp.concatenate(images)[:count], jnp.concatenate(sigmas)[:count] if sigmas else None


def check_answers(setup: Setup) -> None:
    """Logs how good the teacher's answers to the run's first samples are, and warns if they do not improve the input.

    They come from the cache, or from the teacher. Of networks that enlarge, nothing is compared.
    """
    if setup.teacher is None or setup.student.network.scale > 1:
        return
    recipe, key = dataclasses.replace(setup.recipe, teacher=None), jax.random.key(setup.config.seed)
    with open_batches(setup, start_step=0, is_whole=True) as batches:
        batch: Any = jax.tree.map(lambda array: array[:_CHECKED], next(batches))
    answers = batch.pop("teacher", None)
    gt, lq = jax.jit(lambda batch: distill.make_pair(recipe, batch, key))(batch)
    if answers:
        output = ops.to_float(jnp.asarray(answers["output"]))
    else:
        apply = setup.teacher.apply
        run = jax.jit(lambda params, x, sigma: distill.forward(apply, params, x, sigma).output)
        output = run(setup.teacher.params, lq, distill.noise_levels(recipe, batch, key))
    labelled = jnp.asarray(batch.get("labelled", jnp.ones(len(gt), bool)))
    if not labelled.any():
        return
    teacher, given = (float(losses.psnr_between(image[labelled], gt[labelled])) for image in (output, lq))
    log.info(f"teacher on the first {int(labelled.sum())} samples: {teacher:.2f} dB, its input {given:.2f} dB")
    if not teacher > given:
        log.warning(
            "WARNING: THE TEACHER DOES NOT IMPROVE ITS INPUT. A student will learn just that. Is it a model for this"
            " noise (config.degrade), and are its weights the right ones (config.teacher)?"
        )


def open_batches(setup: Setup, *, start_step: int, is_whole: bool = False) -> data.TrainingData:
    """Opens the training batches from step `start_step` on: this process's part of them, or whole ones."""
    config = setup.config.data
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    if is_whole:
        process = dict(process_index=0, process_count=1)
    if setup.cache:
        return data.cached_batches(
            setup.cache,
            batch_size=config.batch_size,
            seed=setup.config.seed,
            start_step=start_step,
            workers=config.workers,
            **process,
        )
    return data.training_batches(
        setup.pairs,
        unlabelled=setup.unlabelled,
        unlabelled_part=config.unlabelled_part,
        unpaired=setup.unpaired,
        unpaired_part=config.unpaired_part,
        crop=loaded_side(setup),
        batch_size=config.batch_size,
        seed=setup.config.seed,
        start_step=start_step,
        scale=setup.student.network.scale,
        channels=setup.student.network.channels,
        hflip=config.hflip,
        rot=config.rot,
        workers=config.workers,
        cache_mb=config.cache_mb,
        **process,
    )


def loaded_side(setup: Setup) -> int:
    """Returns the side of the gt squares to load: the canvas if anything is degraded on it, otherwise the crop."""
    options = setup.config.data
    return options.canvas if options.canvas and setup.recipe.degrade else options.crop


def batch_shapes(setup: Setup) -> Batch:
    """Returns the shapes of a training batch."""
    return teacher_cache.batch_shapes(setup.config, setup.student, side=loaded_side(setup), cache=setup.cache)


def report(setup: Setup) -> None:
    """Logs, once, what this run is about to do."""
    config, mesh = setup.config, setup.mesh
    device = mesh.devices.flat[0]
    log.info(
        f"devices: {mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es);"
        f" batch {config.data.batch_size} = {config.data.batch_size // mesh.size} per device"
    )
    side = loaded_side(setup)
    squares = f", cut from squares of {side}" if side != config.data.crop else ""
    log.info(f"training images: {len(setup.pairs)} from {config.data.gt}; crops of {config.data.crop} pixels{squares}")
    if setup.unlabelled:
        log.info(f"unlabelled images: {len(setup.unlabelled)} from {config.data.unlabelled}")
    if setup.unpaired:
        log.info(f"unpaired images: {len(setup.unpaired)} from {config.data.unpaired}")
    if setup.teacher:
        log.info(f"teacher: {setup.teacher.identity}")
        log.info(f"teacher: {describe_teacher(setup.teacher)}")
    if setup.cache:
        rounds = config.train.steps * config.data.batch_size / setup.cache.samples
        log.info(f"the teacher's answers: {setup.cache.samples:,} samples of {setup.cache.folder}, {rounds:.1f} times")
    log.info(f"student: {describe(setup.student)}")
    warn_of_other_degradation(setup)


def warn_of_other_degradation(setup: Setup) -> None:
    """Warns if validation uses plain noise (`val.sigma`) that training does not have."""
    val, degrade = setup.config.val, setup.config.degrade
    if val.lq or val.degrade:
        return
    trained = f"the pairs of config.data.lq={setup.config.data.lq!r}"
    if setup.recipe.degrade:
        trained = f"config.degrade={degrade['name']!r}"
        if degrade["name"] in ("awgn", "awgn_blind"):
            sigma = degrade["sigma"]
            low, high = sigma if degrade["name"] == "awgn_blind" else (sigma, sigma)
            if low <= val.sigma <= high:
                return
            trained += f" of sigma {sigma}"
    log.warning(
        f"WARNING: VALIDATION IS NOT ON WHAT THE RUN TRAINS ON, which is {trained}, but on noise of"
        f" config.val.sigma={val.sigma:g}. Set config.val.lq or config.val.sigma, or write"
        " config.val.degrade = config.degrade in the config file"
    )


def describe_teacher(teacher: Teacher) -> str:
    """Describes a teacher's networks in a few words."""
    if teacher.foreign:
        return f"{teacher.foreign.path}, {teacher.foreign.about}"
    return "; ".join(
        f"{file.path}, {file.layout} layout, weights under {file.key!r}, {describe(file.model)}"
        for file in teacher.files
    )


def describe(model: models.Model) -> str:
    """Describes a model's architecture, size and cost in a few words."""
    macs = model.network.count_macs(256, 256)
    hparams = ", ".join(f"{name}={value}" for name, value in model.hparams.items())
    return (
        f"{model.arch}({hparams}), {models.count_params(model.params):,} parameters, {macs / 1e9:.2f} GMAC at 256x256"
    )

"""Validation during training: the student, compared with its teacher and the unrestored input.

Input and teacher do not change during a run, so they are measured once and kept in `baseline.json`. Several processes
share the images among them; the first one writes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import assets, data, models, ops, sharding, validation
from kdjax.config import BASELINE, ConfigError, Val, deciding
from kdjax.files import read_json, write_json
from kdjax.models import regression
from kdjax.names import png_name
from kdjax.ops.convolution import plain
from kdjax.teacher.load import Teacher
from kdjax.training.logbook import Logbook
from kdjax.validation import Sample, Score

log = logging.getLogger("kdjax")

_CHECK_IMAGES, _CHECK_CROP = 4, 128  # size of the sanity check of the teacher before training starts
_FILTER_IMAGES = 16  # images, of the same size of crop, for which a linear filter is found
_PATIENCE = 500  # steps after which a student should do better than a linear filter
_PICTURE_SIDE = 512  # maximum side of each image in a comparison picture


class Monitor:
    """A run's validation set and the measurements made on it.

    Raises:
      ValueError: if the images are missing or damaged, or if a student that enlarges has no small images to start from.
    """

    def __init__(self, options: Val, student: models.Model, teacher: Teacher | None) -> None:
        self._options, self._teacher = options, teacher
        self._scale = student.network.scale
        self._student_apply = student.network.make_apply()
        self._scores: dict[str, Score] = {}
        if self._scale != 1 and not (options.lq or options.degrade):
            raise ConfigError(
                "config.val.lq is empty; a student that enlarges needs a folder of small images, or config.val.degrade"
                " to make them"
            )
        images = data.load_images(
            data.find_pairs(
                gt=assets.locate(options.gt, assets.VAL_PHOTOGRAPHS),
                lq=options.lq or None,
                filename_tmpl=options.filename_tmpl,
                meta_info=options.meta_info or None,
                what="validation",
            ),
            channels=student.network.channels,
            scale=self._scale,
            crop=options.crop,
            limit=options.limit,
        )
        if options.degrade and not options.lq:
            sizes = {image.gt.shape for image in images}
            log.info(f"degrading {len(images)} validation images of {len(sizes)} sizes; each size is compiled")
            self.samples = validation.degraded_samples(
                [image.name for image in images], [image.gt for image in images], options.degrade, self._scale
            )
        else:
            self.samples = [validation.make_sample(image.name, image.gt, image.lq, options.sigma) for image in images]
        self._pictures = range(min(options.save_images, len(images)))

    def report(self) -> None:
        """Reports what is validated, and warns if the teacher does not improve on its input."""
        noise = self._options.degrade.get("name") or f"noise sigma {self._options.sigma:g}"
        degraded = f"inputs {self._options.lq}" if self._options.lq else f"degraded by {noise}"
        log.info(f"validation images: {len(self.samples)} from {self._options.gt}, {degraded}")
        if not self._teacher:
            return
        crops = [_centre(sample, _CHECK_CROP, self._scale) for sample in self.samples[:_CHECK_IMAGES]]
        images, sigmas = [crop.lq for crop in crops], [crop.sigma for crop in crops]
        outputs = dict(validation.restore(self._teacher.apply_float32, self._teacher.params, images, sigmas))
        teacher = validation.mean_score([validation.score(outputs[i], crop.gt) for i, crop in enumerate(crops)])
        before = validation.input_score(crops)
        log.info(f"teacher on {len(crops)} validation crops: {teacher.psnr:.2f} dB, its input {before.psnr:.2f} dB")
        if not teacher.psnr > before.psnr:
            log.warning(
                "WARNING: THE TEACHER DOES NOT IMPROVE ITS INPUT. A student will learn just that. Is it a model for"
                " this noise (config.val.sigma, config.degrade), and are its weights the right ones (config.teacher)?"
            )

    def validate(
        self,
        step: int,
        params: models.Params,
        workdir: Path,
        logbook: Logbook,
        *,
        keep_going: Callable[[], bool] = lambda: True,
    ) -> float | None:
        """Measures the student, logs it against teacher and input, and saves pictures in `workdir/val/STEP`.

        Returns:
          The student's PSNR, or None if `keep_going` ended the validation early; equal on all processes.
        """
        started = time.monotonic()
        self._measure_baseline(workdir, keep_going)
        student = self._measure(self._student_apply, jax.device_get(params), keep_going)
        if student is None or "input" not in self._scores:
            return None
        score, outputs = student
        self._scores["student"] = score
        values = {
            f"val/{who}_{metric}": value
            for who, score in self._scores.items()
            for metric, value in dataclasses.asdict(score).items()
        }
        logbook.write(step, values)
        log.info(f"validation at step {step:,}: {self.summary()} ({time.monotonic() - started:.0f} s)")
        self._warn_if_stuck(step)
        self._save_pictures(step, outputs, workdir, logbook)
        return score.psnr

    def _warn_if_stuck(self, step: int) -> None:
        """Warns if the student does no better than a blur: optimisation can stay there for a thousand steps."""
        if step < _PATIENCE or self._scale != 1:
            return
        gain, linear = self._scores["student"].psnr - self._scores["input"].psnr, self._gain_of_linear_filter
        if gain < linear:
            log.warning(
                f"WARNING: THE STUDENT IS STUCK: after {step:,} steps it improves its input by {gain:.2f} dB, a linear"
                f" filter of 5x5 pixels by {linear:.2f} dB. Try another learning rate (configs/study_lr.py compares"
                " some), clipping (config.train.grad_clip=0.1), or a student that starts as its shrunk teacher"
                ' (config.student.weights="teacher")'
            )

    @functools.cached_property
    def _gain_of_linear_filter(self) -> float:
        """The dB by which the best linear filter for some of the images improves them."""
        every = -(-len(self.samples) // _FILTER_IMAGES)
        crops = [_centre(sample, _CHECK_CROP, self._scale) for sample in self.samples[::every]]
        crops = [crop for crop in crops if crop.lq.shape == crops[0].lq.shape]
        inputs = np.stack([crop.lq for crop in crops])
        wanted = np.stack([crop.gt for crop in crops]) / np.float32(255)
        best = regression.fit(inputs, wanted, 5)
        filtered = np.asarray(ops.to_uint8(plain(jnp.asarray(inputs), jnp.asarray(best.kernel)) + best.bias))
        scores = [validation.score(image, crop.gt) for image, crop in zip(filtered, crops, strict=True)]
        return validation.mean_score(scores).psnr - validation.input_score(crops).psnr

    def summary(self) -> str:
        """Summarises in one line who reached how many dB."""
        return ", ".join(
            f"{who} {self._scores[who].psnr:.2f} dB / {self._scores[who].ssim:.4f}"
            for who in ("student", "teacher", "input")
            if who in self._scores
        )

    def _measure_baseline(self, workdir: Path, keep_going: Callable[[], bool]) -> None:
        """Sets the scores of the input and the teacher: from memory, from the run's folder, or by measuring."""
        if "input" in self._scores:
            return
        path = workdir / "baseline.json"
        of = json.loads(json.dumps(deciding(self._options, BASELINE)))  # as it is read back
        of["teacher"] = self._teacher and self._teacher.identity
        known = sharding.exchange(_read_known(path) if sharding.is_first() else {})[0]
        if known.get("of") == of:
            self._scores = {who: Score(**values) for who, values in known["scores"].items()}
            return
        scores = {}
        if self._teacher:
            teacher = self._measure(self._teacher.apply_float32, self._teacher.params, keep_going)
            if teacher is None:
                return
            scores["teacher"] = teacher[0]
        scores["input"] = validation.input_score(self.samples)
        self._scores = scores
        if sharding.is_first():
            write_json(path, {"of": of, "scores": {who: dataclasses.asdict(score) for who, score in scores.items()}})

    def _measure(
        self, apply: models.Apply, params: models.Params, keep_going: Callable[[], bool]
    ) -> tuple[Score, dict[int, np.ndarray]] | None:
        """Returns the mean score and the outputs to be shown in pictures; None if ended early."""
        here = sorted({*sharding.share(len(self.samples)), *(self._pictures if sharding.is_first() else ())})
        rows, outputs = [], {}
        images, sigmas = [self.samples[i].lq for i in here], [self.samples[i].sigma for i in here]
        for i, output in validation.restore(apply, params, images, sigmas, keep_going=keep_going):
            score = validation.score(output, self.samples[here[i]].gt)
            rows.append([here[i], score.psnr, score.ssim])
            if here[i] in self._pictures:
                outputs[here[i]] = output
        scores = {position: Score(*values) for part in sharding.exchange(rows) for position, *values in part}
        if len(scores) < len(self.samples):
            return None
        return validation.mean_score([scores[position] for position in sorted(scores)]), outputs

    def _save_pictures(self, step: int, outputs: dict[int, np.ndarray], workdir: Path, logbook: Logbook) -> None:
        if not outputs or not sharding.is_first():
            return
        folder = workdir / "val" / f"{step:07}"
        folder.mkdir(parents=True, exist_ok=True)
        teacher_outputs = {}
        if self._teacher:
            images, sigmas = [self.samples[i].lq for i in outputs], [self.samples[i].sigma for i in outputs]
            restored = dict(validation.restore(self._teacher.apply_float32, self._teacher.params, images, sigmas))
            teacher_outputs = {position: restored[i] for i, position in enumerate(outputs)}
        for position, output in outputs.items():
            sample = self.samples[position]
            images = [validation.input_picture(sample), output, teacher_outputs.get(position), sample.gt]
            picture = _side_by_side([image for image in images if image is not None])
            path = folder / png_name(sample.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            data.write_image(path, picture)
            logbook.image(step, f"val/{sample.name}", picture)


def _read_known(path: Path) -> dict[str, Any]:
    """Returns earlier measurements; empty if the file is damaged, so that they are repeated."""
    try:
        return read_json(path)
    except ValueError as error:
        log.warning(f"WARNING: {error}. It is measured again")
        return {}


def _centre(sample: Sample, side: int, scale: int) -> Sample:
    """Crops the central `side` x `side` pixels of the lq, and the matching part of gt."""
    top, left = (max(0, (size - side) // 2) for size in sample.lq.shape[:2])
    lq = sample.lq[top : top + side, left : left + side]
    gt = sample.gt[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
    return Sample(sample.name, lq, gt, sample.sigma)


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Places the centres of equally large images in a row, separated by white lines."""
    height, width = (min(_PICTURE_SIDE, size) for size in images[0].shape[:2])
    top, left = (images[0].shape[0] - height) // 2, (images[0].shape[1] - width) // 2
    line = np.full((height, 4, images[0].shape[2]), 255, np.uint8)
    row: list[np.ndarray] = []
    for image in images:
        row += [image[top : top + height, left : left + width], line]
    return np.concatenate(row[:-1], axis=1)

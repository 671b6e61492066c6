"""What does distillation add? A ladder of methods for Gaussian noise, several seeds each, against no teacher at all.

    python -m kdjax.study --config configs/study_denoise.py \\
        --config.base.teacher.weights=cdncnn_sigma25.pth --config.base.data.gt=FOLDER --config.base.val.gt=FOLDER

The feature pairs are from DnCNN to DnCNN, so the teacher must be one (KAIR's CDnCNN is). `:quick` does the same in a
few minutes with the embedded RRDBNet teacher and photographs; `:debug` only checks that everything runs, which still
takes minutes the first time: every method is compiled.
"""

from denoise import cosine
from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    base = get_denoise(variant)
    study = ConfigDict(type_safe=False)
    study.name = "study_denoise" + (f"_{variant}" if variant else "")
    study.seeds = (0, 1, 2)
    study.curve_images = 8  # number of validation images for the curve; results use all of them

    base.student.arch = "dncnn"
    base.student.hparams = dict(num_feat=16, depth=8)
    base.terms = dict(task=dict(criterion="l1", weight=1.0))
    student, teacher = "model.7", "model.19"  # the middle of either DnCNN
    layers = (("model.3", 1.0), ("model.7", 1.0))
    if variant:  # the embedded teacher is an RRDBNet
        teacher, layers = "body.1", (("body.0", 1.0), ("body.1", 1.0))
        base.student.hparams.depth = 7
    if variant != "debug":
        base.data.update(crop=40, batch_size=4, workers=0)
        base.train.update(steps=1_500, ema_decay=0.99, grad_clip=0.1)
        base.train.lr = cosine(base, 2e-3)
        base.val.update(crop=0, limit=0, every=250)
        base.log.update(every=250, diagnose=False)  # shares of the update would compile every column a second time
        base.checkpoint.every = 250
    if variant == "quick":
        base.train.steps = 300
        base.val.update(crop=256, every=100)
        base.log.every = base.checkpoint.every = 100
        study.seeds = (0,)
    if variant == "debug":
        study.seeds = (0, 1)

    output = dict(criterion="l1", weight=1.0)
    pairs = ((student, teacher, 1.0),)
    study.base = base
    study.columns = dict(
        scratch=dict(),
        output=dict(terms=dict(output=output)),
        output_only=dict(terms=dict(task=dict(weight=0.0), output=output)),
        gated_output=dict(terms=dict(output=dict(criterion="l1", weight=1.0, gate=True))),
        hint=dict(terms=dict(output=output, hint=dict(pairs=pairs, normalise="instance", weight=dict(share=0.02)))),
        attention=dict(terms=dict(output=output, attention=dict(pairs=pairs, mode="paper", weight=dict(share=0.02)))),
        affinity=dict(terms=dict(output=output, affinity=dict(pairs=pairs, weight=dict(share=0.02)))),
        laplace=dict(terms=dict(output=output, laplace=dict(pairs=pairs, weight=dict(share=0.02)))),
        soft_target=dict(terms=dict(output=output, soft_target=dict(space="spatial", weight=dict(share=0.1)))),
        wavelet=dict(terms=dict(output=output, wavelet=dict(levels=2, weight=dict(share=0.2)))),
        fft=dict(terms=dict(output=output, fft=dict(weight=dict(share=0.2)))),
        contrastive=dict(terms=dict(output=output, contrastive=dict(layers=layers, weight=dict(share=0.2)))),
        label_consistency=dict(terms=dict(output=output, label_consistency=dict(criterion="l1", weight=1.0))),
        shrunk=dict(student=dict(weights="teacher"), terms=dict(output=output)),
        scratch_equal_compute=dict(compute_of="output"),
    )
    if variant:  # a DnCNN is not a smaller RRDBNet
        del study.columns["shrunk"]
    return study

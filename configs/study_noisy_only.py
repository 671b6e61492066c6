"""What can be learnt from noisy images alone, with a teacher and without?

    python -m kdjax.study --config configs/study_noisy_only.py \\
        --config.base.teacher.weights=cdncnn_sigma25.pth --config.base.data.gt=NOISY \\
        --config.columns.scratch.data.gt=CLEAN --config.base.val.gt=FOLDER

NOISY has photographs with noise of sigma 25. `answers` learns what the teacher makes of them, from random weights, and
`shrunk_answers` from the shrunk teacher. Two columns do without a teacher: `recorrupted`, which has to know the noise,
and `noisy_as_clean`, which takes the noisy images for clean ones. `scratch`, for comparison, has clean images, and as
much noise as it likes. The student is that of `study_start.py`, including `:quick` and `:debug`.
"""

from ml_collections import ConfigDict
from study_start import get_config as get_study

SIGMA = 25.0


def get_config(variant: str = "") -> ConfigDict:
    study = get_study(variant)
    study.name = study.name.replace("start", "noisy_only")
    study.base.degrade = dict(name="awgn", sigma=SIGMA)

    as_it_is = dict(sigma=0.0)
    learn_from_teacher = dict(task=dict(weight=0.0), output=dict(criterion="l1", weight=1.0))
    shrunk = study.columns.shrunk.to_dict()
    study.columns = dict(
        scratch=dict(data=dict(gt="embedded")),
        answers=dict(terms=learn_from_teacher, degrade=as_it_is),
        shrunk_answers=dict(**shrunk, terms=learn_from_teacher, degrade=as_it_is),
        recorrupted=dict(
            terms=dict(task=dict(weight=0.0), recorrupted=dict(sigma=SIGMA, weight=1.0)),
            degrade=dict(sigma=SIGMA / 2),
        ),
        noisy_as_clean=dict(),
    )
    return study

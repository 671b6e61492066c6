"""What is a teacher worth if few images have a clean partner and many have none?

    python -m kdjax.study --config configs/study_few_labels.py \\
        --config.base.teacher.weights=cdncnn_sigma25.pth --config.base.data.gt=FOLDER --config.base.val.gt=FOLDER

Four images have labels. `unlabelled` adds all images of the folder to every batch, half and half; for those only the
teacher provides a target. The rest is `study_denoise.py`, including `:quick` and `:debug`.
"""

from ml_collections import ConfigDict
from study_denoise import get_config as get_study


def get_config(variant: str = "") -> ConfigDict:
    study = get_study(variant)
    study.name = study.name.replace("denoise", "few_labels")
    study.base.data.limit = 4
    study.base.data.unlabelled_part = 0.5
    output = dict(criterion="l1", weight=1.0)
    study.columns = dict(
        scratch=dict(),
        output=dict(terms=dict(output=output)),
        unlabelled=dict(terms=dict(output=output), data=dict(unlabelled=study.base.data.get_ref("gt"))),
        all_labels=dict(data=dict(limit=0)),
    )
    return study

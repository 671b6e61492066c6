"""Training, around the step: a config becomes a `preparation.Setup`, which `loop` trains and `monitor` validates.

`checkpoint`, `logbook` and `folder` store a run on disk, `agreement` keeps its processes consistent, `columns` holds
the configs of a study, and `advice` says how to reduce memory.
"""

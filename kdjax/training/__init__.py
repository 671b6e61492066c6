"""Training, around the step: a config becomes a `preparation.Setup`, which `loop` trains and `monitor` validates.

`checkpoint`, `logbook` and `folder` keep a run on the disk, `agreement` keeps the processes of one run together,
`columns` are the configs of a study, and `advice` is what helps when memory does not suffice.
"""

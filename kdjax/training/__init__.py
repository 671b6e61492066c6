"""What a training run is made of, beside the step: `preparation` makes it from a config, `monitor` validates it.

`checkpoint` and `logbook` keep it on the disk, and `agreement` keeps the processes of one run together.
"""

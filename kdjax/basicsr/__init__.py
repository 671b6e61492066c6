"""Converts training YAMLs of BasicSR, Real-ESRGAN and the guide to configs, with an account of every key.

`keys.KEYS` is the translation table: every key of those files, what it becomes here, and its allowed values.
`translate` reads a file's keys one by one, then combines the config values that depend on several of them
(`_finish_*`). A key that is not in KEYS, or whose value cannot be honoured, is an error; all errors are reported
together. Nothing is read from disk and nothing is imported. `reader.read_yaml` parses a file into the mapping that
`translate` takes.

A YAML is data. A user-defined network, `type: my_package.my_net:MyNet`, becomes an empty `student.arch`, which
`kdjax.config` rejects until the command line names the class.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kdjax import config as config_lib
from kdjax.basicsr.keys import KEYS, STRICT, ignored, number
from kdjax.config import ConfigError
from kdjax.degradations import preset
from kdjax.models import architecture, network
from kdjax.names import brief, nearest
from kdjax.schedules import make_schedule


class Row(NamedTuple):
    """What became of one key of a file."""

    key: str
    value: Any
    becomes: str
    note: str


class Translation(NamedTuple):
    """The complete values for `kdjax.config.parse`, and what became of every key, in the file's order."""

    config: dict[str, Any]
    account: tuple[Row, ...]


# BasicSR's and torch's defaults, where they differ from the config's own.
_DEFAULTS = {
    "data.hflip": False,
    "data.rot": False,
    "train.ema_decay": 0.0,
    "train.ema_warmup": False,
    "train.betas": (0.9, 0.999),
}
_REQUIRED = (  # one of each
    ("network_g.type",),
    ("datasets.train.type",),
    ("datasets.train.gt_size", "gt_size"),
    ("datasets.train.batch_size_per_gpu",),
    ("train.optim_g.type",),
    ("train.optim_g.lr",),
    ("train.total_iter",),
)
# Where BasicSR looks for VGG19 before downloading it.
_VGG19 = "experiments/pretrained_models/vgg19-dcbb9e9d.pth"

MISSING = "missing, and needed"
_MOST_FAULTS, _LONGEST_FAULT = 50, 600  # per message; in characters

Options = dict[str, Any]
Faults = dict[str, str]  # what is wrong, by YAML key


def translate(options: Any) -> Translation:
    """Converts a training YAML to a config.

    Args:
      options: the parsed YAML.

    Raises:
      ConfigError: keys that are unknown, missing, or cannot be honoured; all of them in one message.
    """
    if not isinstance(options, Mapping) or not options:
        raise ConfigError(
            f"the file holds {brief(options)}; wanted a training YAML of BasicSR, with its groups of keys"
        )
    if "train" not in options:
        raise ConfigError("the file has no group `train`, so it is for testing; measure with python -m kdjax.evaluate")
    rows: list[Row] = []
    values: Options = {}  # by their key in KEYS, without nulls
    config: Options = {}
    set_by: dict[str, str] = {}
    faults: Faults = {}
    for path, rule, value in _leaves(options):
        if len(faults) == _MOST_FAULTS:
            break
        key = KEYS.get(rule)
        if key is None and _is_group(rule) and not value:
            key = ignored("an empty group")
        elif key is None:
            faults[path] = (
                "it must be a group of keys" if _is_group(rule) else f"there is no such key{nearest(rule, KEYS)}"
            )
            continue
        becomes = key.becomes.replace("*", path.rpartition(".")[2])
        rows.append(Row(path, value, becomes, key.note))
        if value is None:
            continue
        try:
            read = key.read(value)
        except ValueError as error:
            faults[path] = f"{brief(value)}: {error}"
            continue
        values[path if "*" in rule else rule] = read
        if key.direct:
            if becomes in set_by and _get(config, becomes) != read:
                said = f"{brief(value)}, but {set_by[becomes]} says {brief(_get(config, becomes))}"
                faults[path] = f"{said}; keep one of them"
            set_by[becomes] = path
            _set(config, becomes, read)
    for names in _REQUIRED if len(faults) < _MOST_FAULTS else ():
        if not any(name in values or name in faults for name in names):
            faults[names[0]] = MISSING
    unread = tuple(faults)
    for finish, groups in (
        (_finish_data, ("datasets.", "gt_size")),
        (_finish_networks, ("network_",)),
        (_finish_terms, ("train.",)),
        (_finish_train, ("train.",)),
    ):
        if not any(key.startswith(groups) for key in unread):  # only if everything it needs could be read
            finish(config, values, faults)
    if faults:
        raise ConfigError(_told(faults))
    finished = config_lib.to_dict(config_lib.Config())
    for path, value in _DEFAULTS.items():
        _set(finished, path, value)
    for section, given in config.items():
        is_group = isinstance(given, dict) and section not in ("terms", "degrade")
        finished[section] = finished[section] | given if is_group else given
    # As if the command line had named the user's classes.
    student, teacher = finished["student"], finished["teacher"]
    teacher = teacher | {"hparams": {name: value for name, value in teacher["hparams"].items() if name != "arch"}}
    student = student | {"arch": student["arch"] or config_lib.Student().arch}
    config_lib.parse(finished | {"student": student, "teacher": teacher})
    return Translation(finished, tuple(rows))


def format_account(rows: Sequence[Row]) -> str:
    """Formats the account as a table, one line per key."""
    cells = [("key", "value", "becomes", "note")]
    cells += [(_shortened(row.key, 80), _shortened(row.value), _shortened(row.becomes, 80), row.note) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in cells)


_PATTERNS = [pattern for pattern in KEYS if "*" in pattern and pattern != "datasets.*"]
_GROUPS = {".".join(key.split(".")[:length]) for key in KEYS for length in range(1, key.count(".") + 1)} - set(KEYS)


def _leaves(options: Mapping[Any, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields every key as (its path, its key in KEYS or else its path, its value).

    A group is entered only if KEYS has keys inside it, so an unknown group counts as one unknown key.
    """
    datasets = options.get("datasets")
    sets = [str(name) for name in datasets] if isinstance(datasets, Mapping) else []
    first_val = next((name for name in sets if name.split("_")[0] == "val"), None)

    def rule_of(path: str) -> str:
        parts = path.split(".")
        if parts[0] == "datasets" and len(parts) > 1:
            if parts[1] == first_val:
                path = ".".join(["datasets.val", *parts[2:]])
            elif parts[1] != "train":
                return "datasets.*" if parts[1].split("_")[0] in ("val", "test") else path
        return path if path in KEYS else next((p for p in _PATTERNS if fnmatch.fnmatchcase(path, p)), path)

    def walk(group: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, str, Any]]:
        for name, value in group.items():
            path = f"{prefix}{name}"
            rule = rule_of(path)
            if _is_group(rule) and isinstance(value, Mapping) and value:
                yield from walk(value, f"{path}.")
            else:
                yield path, rule, value

    yield from walk(options, "")


def _is_group(rule: str) -> bool:
    """Whether KEYS has keys inside this key, but not the key itself."""
    return rule in _GROUPS


def _finish_data(config: Options, values: Options, faults: Faults) -> None:
    """Sets the data folders for the data set's type, the canvas, the batch over all devices, and the validation set."""
    data, train = config["data"], "datasets.train."
    gpus = values.get("num_gpu", 1)
    if gpus == "auto":  # their number is known when the run starts, not when its config is read
        data["per_device"], gpus = True, 1
    gpus = max(1, gpus)
    data |= {name: data[name] * gpus for name in ("batch_size", "workers") if name in data}
    if folder := values.get(f"{train}dataroot_paired"):
        if "gt" in data or "lq" in data:
            faults[f"{train}dataroot_paired"] = "dataroot_gt and dataroot_lq already give the folders; keep one"
        parts = ("", "") if "meta_info" in data else ("/GT", "/LQ")
        data["gt"], data["lq"] = folder + parts[0], folder + parts[1]
    kind, degrades = values[f"{train}type"], values.get("high_order_degradation", True)
    unpaired = [data.pop(name, "") for name in ("unpaired", "unpaired_meta_info")]
    if kind == "pairs" and not ("gt" in data and "lq" in data):
        faults[f"{train}dataroot_lq"] = "a data set of pairs needs dataroot_gt and dataroot_lq; write both"
    if kind == "clean":
        if "gt" not in data:
            faults[f"{train}dataroot_gt"] = MISSING
        if "lq" in data:
            faults[f"{train}dataroot_lq"] = (
                "RealESRGANDataset does not read it; use RealESRGANPairedDataset, or remove it"
            )
        if not degrades:
            faults["high_order_degradation"] = (
                "false leaves RealESRGANDataset nothing to train on; use pairs, or remove it"
            )
    if kind == "both":
        if ("gt" in data) != ("lq" in data):
            faults[f"{train}dataroot_lq_paired"] = (
                "pairs need dataroot_gt_paired and dataroot_lq_paired; write both or none"
            )
        if unpaired[0] and degrades and "gt" in data:
            data["unpaired"], data["unpaired_meta_info"] = unpaired
        elif unpaired[0] and degrades:
            data["gt"], data["meta_info"] = unpaired
        elif "gt" not in data:
            faults[f"{train}dataroot_gt_unpaired"] = "neither this nor pairs are given; give one of them"
    elif unpaired[0]:
        faults[f"{train}dataroot_gt_unpaired"] = "only RealESRGANHybridDataset reads it; use that type, or remove it"
    if "lq" not in data or "unpaired" in data:
        scale = max(1, values.get("scale", 1))
        data["canvas"] = -(-max(400, data["crop"]) // scale) * scale  # rounded up to a multiple of `scale`
        config.setdefault("degrade", {})
    elif data.get("gt_usm"):
        faults["gt_usm"] = "true, but pairs are used unchanged; remove it"
    if "degrade" in config:
        try:
            config["degrade"] = preset("realesrgan", **config["degrade"])
        except ValueError as error:
            faults["the degradation"] = str(error)
    val = config.setdefault("val", {})
    if "gt" not in val:  # BasicSR then skips validation; here some training images are measured
        val |= {name: data[name] for name in ("gt", "lq", "meta_info", "filename_tmpl") if name in data} | {"limit": 8}
        val["crop"] = 0 if "lq" in val else data["canvas"]  # one size: each size compiles the degradation anew
    if "lq" not in val and "canvas" in data:
        val["degrade"] = config["degrade"]  # the same object, so that the command line sets both
    elif "lq" not in val:
        faults["datasets.val.dataroot_lq"] = f"{MISSING}: training would not degrade anything"


def _finish_networks(config: Options, values: Options, faults: Faults) -> None:
    """Checks both networks' hyper-parameters, and that the options for weights match how kdjax reads them."""
    scale = values.get("scale", 1)
    student, teacher = config["student"], config.setdefault("teacher", {})
    hparams = _hparams(student["arch"], "network_g", student.get("hparams", {}), faults)
    if not student["arch"]:  # user-defined: its arguments are known once it is imported
        if (said := hparams.get("upscale", hparams.get("scale", 1))) != scale:
            faults["network_g.scale"] = (
                f"{said}, but scale is {scale}; use the name that the class uses, scale or upscale"
            )
        student["hparams"] = hparams
    else:
        known = architecture(student["arch"]).defaults
        name = next((name for name in ("scale", "upscale") if name in known), None)
        if name and hparams.setdefault(name, scale) != scale:
            faults[f"network_g.{name}"] = f"{brief(hparams[name])}, but scale is {scale}; they must be equal"
        if not name and scale != 1:
            faults["scale"] = (
                f"{scale}: {student['arch']} does not upscale; write `scale: 1`, or choose another network_g"
            )
        try:
            student["hparams"] = network(student["arch"], hparams).hparams
        except ValueError as error:
            faults.setdefault("network_g", str(error))
    if "hparams" in teacher or "network_teacher.type" in values:
        arch = values.get("network_teacher.type")
        if arch is None:
            faults["network_teacher.type"] = MISSING
        else:
            teacher["hparams"] = _hparams(arch, "network_teacher", teacher.get("hparams", {}), faults)
            teacher["hparams"] |= {} if arch else {"arch": ""}
    for whose, weights in (("g", student.get("weights")), ("teacher", teacher.get("weights"))):
        if weights and values.get(f"path.strict_load_{whose}") is False:
            faults[f"path.strict_load_{whose}"] = f"false: {STRICT}; name a file of this network, or remove the file"
    if student.get("weights") and values.get("path.param_key_g", "params_ema") != "params_ema":
        faults["path.param_key_g"] = (
            f"{brief(values['path.param_key_g'])}: a student starts from params_ema where a file has it. Write"
            " `params_ema`, or take the other weights out first: tools/convert_torch_weights.py --key"
        )


def _hparams(arch: str, group: str, given: Mapping[str, Any], faults: Faults) -> Options:
    """Returns the given hyper-parameters in the architecture's form; for a user-defined one, anything goes."""
    kept = {}
    for name, value in given.items():
        value = _number_if_any(value)
        try:
            if not name.isidentifier() or name in ("arch", "key", "rngs"):
                raise ValueError("no network takes an argument of this name")
            kept[name] = network(arch, {name: value}).hparams[name] if arch else value
        except ValueError as error:
            faults[f"{group}.{name}"] = str(error)
        if len(faults) >= _MOST_FAULTS:
            break
    return kept


def _finish_terms(config: Options, values: Options, faults: Faults) -> None:
    """Sets the loss terms; those with weight 0 are kept, so that the command line can enable them."""
    terms = config.setdefault("terms", {})
    for name, kind, defaults in (
        ("task", "train.pixel_opt", {"weight": 1.0}),
        ("perceptual", "train.perceptual_opt", {"weight": 1.0, "vgg_type": "vgg19", "vgg": ""}),
        ("output", "train.distillation_opt", {"criterion": "mse", "weight": {}}),
    ):
        if any(key.startswith(f"{kind}.") for key in values) and f"{kind}.type" not in values:
            faults[f"{kind}.type"] = MISSING
        elif f"{kind}.type" in values:
            terms[name] = defaults | terms.get(name, {})
        elif name == "output" and name in terms:
            faults["train.distillation_scheduler"] = "there is no distillation_opt to schedule; add one, or remove this"
    if "train.distillation_opt.type" in values:
        weight = {"value": 1.0} | terms["output"]["weight"]
        terms["output"]["weight"] = {"name": "multistep"} | weight if len(weight) > 1 else weight["value"]
        _check_schedule(terms["output"]["weight"], "train.distillation_scheduler", faults)
    if "train.perceptual_opt.type" in values:
        perceptual = terms["perceptual"]
        if "layer_weights" not in perceptual:
            faults["train.perceptual_opt.layer_weights"] = MISSING
        if not perceptual["vgg"] and perceptual["vgg_type"] == "vgg19":
            perceptual["vgg"] = _VGG19
        if not perceptual["vgg"] and (perceptual["weight"] or terms.get("style", {}).get("weight")):
            faults["train.perceptual_opt.vgg_file"] = (
                f"missing; name torchvision's file of {perceptual['vgg_type']}, or set the weights to 0"
            )
        terms["style"] = perceptual | {"weight": 0.0} | terms.get("style", {})
    if not any(term.get("weight") for term in terms.values()):
        faults["train.pixel_opt"] = "no loss has a weight above 0; add pixel_opt"


def _finish_train(config: Options, values: Options, faults: Faults) -> None:
    """Merges the learning rate into one schedule, and sets torch's default for AdamW."""
    train = config["train"]
    if train["optimizer"] == "adamw":
        train.setdefault("weight_decay", 0.01)
    lr, scheduler = train["lr"], "train.scheduler."
    weights, warmup = values.get(f"{scheduler}restart_weights", (1.0,)), {"warmup": lr.pop("warmup", 0)}
    name = lr.get("name", "constant")
    if name == "constant":
        lr = {"name": name, "value": lr["value"]}
        if any(key.startswith(scheduler) for key in values):
            faults[f"{scheduler}type"] = MISSING
    elif name == "cosine":
        periods = values.get(f"{scheduler}periods", ())
        if len(periods) != 1 or len(weights) != 1:
            faults[f"{scheduler}periods"] = (
                f"{list(periods)}: a cosine here has one period and no restarts; write one, such as"
                f" `periods: [{sum(periods) or train['steps']}]` and `restart_weights: [1]`"
            )
        else:
            final = lr.get("final", 0.0)
            value = weights[0] * lr["value"] + (1 - weights[0]) * final
            lr = lr | {"value": value, "steps": periods[0], "final": final}
    else:
        lr = {"gamma": 0.1} | lr  # the default of BasicSR's class
        restarts = values.get(f"{scheduler}restarts", (0,))
        if len(restarts) != len(weights):
            faults[f"{scheduler}restarts"] = (
                f"{len(restarts)} restarts and {len(weights)} restart_weights; their numbers must be equal"
            )
        elif (restarts, weights) != ((0,), (1.0,)) and "milestones" in lr:
            lr = _with_restarts(lr, dict(zip(restarts, weights, strict=True)))
    train["lr"] = lr | warmup
    if not any(key.startswith(scheduler) for key in faults):
        _check_schedule(train["lr"], "train.scheduler", faults)


def _with_restarts(lr: Options, restarts: Mapping[int, float]) -> Options:
    """MultiStepRestartLR: `gamma` at every milestone, and weight x the initial rate at every restart."""
    milestones = lr["milestones"]
    boundaries = sorted({*restarts, *milestones})
    levels = [lr["value"]]
    for step in boundaries:
        decayed = levels[-1] * lr["gamma"] ** milestones.count(step)
        levels.append(lr["value"] * restarts[step] if step in restarts else decayed)
    return {"name": "piecewise", "values": tuple(levels), "boundaries": tuple(boundaries)}


def _check_schedule(spec: Any, group: str, faults: Faults) -> None:
    try:
        make_schedule(spec)
    except (TypeError, ValueError) as error:
        faults[group] = str(error)


def _number_if_any(value: Any) -> Any:
    """Returns the number in text that YAML 1.1 does not parse as one."""
    try:
        return number(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _set(tree: Options, path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[name] = value


def _get(tree: Options, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _shortened(value: Any, length: int = 40) -> str:
    """Formats a value on one line; text appears as in the file, as far as it is printable."""
    if isinstance(value, str) and value.isprintable():
        return value if len(value) <= length else f"{value[: length - 3]}..."
    return "~" if value is None else brief(value, length)


def _told(faults: Faults) -> str:
    """Returns one message with a line per fault; keys with the same fault share a line."""
    keys: dict[str, list[str]] = {}
    for key, fault in faults.items():
        fault = fault if len(fault) <= _LONGEST_FAULT else f"{fault[:_LONGEST_FAULT]}..."
        keys.setdefault(fault, []).append(_shortened(key, 80))
    return "\n  ".join(["it cannot be run as written:", *(f"{', '.join(keys[fault])}: {fault}" for fault in keys)])

"""Runs a network of spandrel in a process of its own, for `kdjax.teacher.foreign`: torch and JAX do not share one.

    python spandrel_worker.py FILE [MODULE ...]

It first writes what the network is, then answers batches until its input ends. A message is a line of JSON and the
arrays that it announces, float32. Each MODULE is a path in the network, whose output is returned as well.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

import numpy as np


def send(stream: IO[bytes], about: dict[str, Any], arrays: list[np.ndarray]) -> None:
    """Writes a message; `about` must not have the key "shapes"."""
    stream.write(json.dumps(about | {"shapes": [array.shape for array in arrays]}).encode() + b"\n")
    for array in arrays:
        stream.write(np.ascontiguousarray(array, np.float32).tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads a message.

    Raises:
      EOFError: the stream has ended.
    """
    line = stream.readline()
    if not line:
        raise EOFError
    about, arrays = json.loads(line), []
    for shape in about["shapes"]:
        size = 4 * int(np.prod(shape))
        content = stream.read(size)
        if len(content) < size:
            raise EOFError
        arrays.append(np.frombuffer(content, np.float32).reshape(shape))
    return about, arrays


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not meet the messages
    path, *names = sys.argv[1:]
    try:
        run, kind = load(path, names)
    except Exception as error:  # the other process tells it
        return send(answers, {"error": f"{type(error).__name__}: {error}"}, [])
    send(answers, kind, [])
    while True:
        try:
            _, (images,) = receive(sys.stdin.buffer)
        except EOFError:
            return None
        try:
            send(answers, {}, run(images))
        except Exception as error:
            send(answers, {"error": f"{type(error).__name__}: {error}"}, [])


def load(path: str, names: list[str]) -> tuple[Any, dict[str, Any]]:
    """Returns a function of a batch (b, h, w, c), and what the network is."""
    import spandrel
    import torch

    try:
        import spandrel_extra_arches

        spandrel.MAIN_REGISTRY.add(*spandrel_extra_arches.EXTRA_REGISTRY, ignore_duplicates=True)
    except ImportError:
        pass
    found = spandrel.ModelLoader("cuda" if torch.cuda.is_available() else "cpu").load_from_file(path)
    if not isinstance(found, spandrel.ImageModelDescriptor):
        raise ValueError(f"{found.architecture.name} takes more than one image")
    found.eval()
    modules, features = dict(found.model.named_modules()), {}
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(
            f"{found.architecture.name} has no module {unknown[0]!r}; it has {', '.join(filter(None, modules))[:2000]}"
        )

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            # A copy, since an activation in place may follow.
            features[name] = output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    for name in ("", *names):  # "" is the whole network
        modules[name].register_forward_hook(keep(name))

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            output = found(torch.tensor(images.transpose(0, 3, 1, 2), device=found.device))
            # spandrel cuts the output off at 0 and 1; what the network itself gave is the better target.
            whole = features[""]
            if isinstance(whole, torch.Tensor) and whole.ndim == 4:
                whole = whole[:, :, : output.shape[2], : output.shape[3]]
                output = whole if torch.equal(whole.clamp(0, 1), output) else output
        made = [output, *(features[name] for name in names)]
        if wrong := [name for name, array in zip(["", *names], made, strict=True) if np.ndim(array) != 4]:
            raise ValueError(f"the output of the module {wrong[0]!r} is not an image of features (b, c, h, w)")
        return [array.float().cpu().numpy().transpose(0, 2, 3, 1) for array in made]

    return run, {"arch": found.architecture.name, "scale": found.scale, "channels": found.input_channels}


if __name__ == "__main__":
    main()

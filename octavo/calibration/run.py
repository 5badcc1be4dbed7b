"""Calibration: run example data through a model and let an observer watch the input of every layer that asks for it.

What a batch shows is gathered apart and added when the whole batch has passed, so that statistics always cover whole
batches: after an error or Ctrl-C they can be saved, resumed with the batches that remain, or merged with those of other
processes. Merging equals one pass over all of it, because the observers' ``merge`` does.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Call, Track, eagerly, enter, evaluating, several
from octavo.calibration.observer import Observer, from_settings
from octavo.errors import OctavoError


class CalibrationInterrupted(OctavoError):
    """The data ended in an error; ``calibration`` keeps what the whole batches before it have shown."""

    def __init__(self, message: str, calibration: "Calibration") -> None:
        super().__init__(message)
        self.calibration = calibration


class Calibration:
    """What observers have seen of the inputs of a model's layers, by layer name, and over how many batches."""

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self.observers = dict(observers)
        self.batches = 0

    @property
    def unreached(self) -> list[str]:
        """The layers that saw no data."""
        return [name for name, observer in self.observers.items() if observer.count == 0]

    def run(
        self, model: nn.Module, batches: Iterable[Any], *, call: Call | None = None, track: Track | None = None
    ) -> "Calibration":
        """Pass batches through the model in eval mode, without gradients; returns itself.

        A batch is what ``batches.enter`` takes, or anything with ``call(model, batch)``. Modes and hooks are restored.
        Raises ``OctavoError`` for a layer that the model does not have or for no data, and ``CalibrationInterrupted``,
        which keeps the statistics, for NaN or Inf in a layer's input (with layer and batch) or if the data or the model
        raises.
        """
        several(batches)
        modules = dict(model.named_modules(remove_duplicate=False))
        if missing := [name for name in self.observers if name not in modules]:
            raise OctavoError(f"{type(model).__name__} has no layer {', '.join(missing[:3])} to calibrate")
        watch = _Watch(self.observers)
        handles = [modules[n].register_forward_pre_hook(watch.hook(n), with_kwargs=True) for n in self.observers]
        before = self.batches
        try:
            with evaluating(model), eagerly(model), torch.no_grad():
                for batch in track(batches, "calibrating") if track else batches:
                    watch.begin()
                    enter(model, batch, call)
                    watch.commit()
                    self.batches += 1
        except OctavoError as error:
            raise CalibrationInterrupted(f"calibration batch {self.batches}: {error}", self) from error
        except Exception as error:
            raise CalibrationInterrupted(
                f"calibration stopped in batch {self.batches} with {type(error).__name__}: {error}. The statistics of "
                f"{self.batches} whole batches are kept in this error's .calibration, to save or to go on with",
                self,
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if self.batches == before:
            raise OctavoError("the calibration data held no batch; a generator can be read only once")
        return self

    def merge(self, later: "Calibration") -> None:
        """Add what another process saw, as if its batches had come after these."""
        if self.observers.keys() != later.observers.keys():
            odd = sorted(self.observers.keys() ^ later.observers.keys())
            raise OctavoError(f"these calibrations are not of the same layers: {', '.join(odd[:3])} is in one only")
        for name, observer in self.observers.items():
            try:  # in a trial first: either all merge or none
                observer.fresh().merge(later.observers[name])
            except OctavoError as error:
                raise OctavoError(f"{name}: {error}") from error
        for name, observer in self.observers.items():
            observer.merge(later.observers[name])
        self.batches += later.batches

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write everything seen to one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        told = {name: observer.settings() for name, observer in self.observers.items()}
        tensors = {
            f"{name}|{part}": tensor.clone()
            for name, observer in self.observers.items()
            for part, tensor in observer.state_dict().items()
        }
        path = Path(file)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"octavo": "calibration", "batches": str(self.batches), "observers": json.dumps(told)}
        try:
            save_file(tensors, unfinished, metadata)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> "Calibration":
        """Read what ``save`` wrote. Raises ``OctavoError`` for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                told = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
            if told.get("octavo") != "calibration":
                raise OctavoError("it is a safetensors file, but of something else")
            settings = json.loads(told["observers"])
            calibration = Calibration({name: from_settings(content) for name, content in settings.items()})
            calibration.batches = int(told["batches"])
            states: dict[str, dict[str, Tensor]] = {name: {} for name in settings}
            for key, tensor in tensors.items():
                name, _, part = key.rpartition("|")
                states[name][part] = tensor
            for name, observer in calibration.observers.items():
                observer.load_state_dict(states[name])
        except FileNotFoundError as error:
            raise OctavoError(f"{file}: no such file") from error
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, OctavoError) as error:
            raise OctavoError(f"{file} is not a calibration that Octavo saved: {error}") from error
        return calibration


class _Watch:
    """The hooks of one run. Layers that get the very same tensor (q, k and v) share one look at it."""

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self.observers = observers
        self.begin()

    def begin(self) -> None:
        """Forget the batch before, if it did not come to its end."""
        self.seen: list[tuple[str, Observer]] = []
        self.last: tuple[Tensor, int | None, Observer] | None = None

    def commit(self) -> None:
        """Add what this batch has shown."""
        for name, part in self.seen:
            self.observers[name].merge(part)
        self.begin()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        like = self.observers[name]

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None:
                raise OctavoError(f"layer {name} was called without a tensor")
            version = None if x.is_inference() else x._version  # those of inference mode do not tell what changes them
            if self.last is not None and version is not None and self.last[0] is x and self.last[1] == version:
                part = self.last[2]
                if part.settings() == like.settings():
                    self.seen.append((name, part))
                    return
            part = like.fresh()
            try:
                part.update(x)
            except OctavoError as error:
                raise OctavoError(f"the input of layer {name}: {error}") from error
            self.last = (x, version, part)
            self.seen.append((name, part))

        return look

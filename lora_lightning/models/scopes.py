"""Which part of a network a layer belongs to: the words that `targets` and `exclude` understand.

    attention, mixer, mlp, experts    parts of a block
    language, vision, audio, projector    towers of a vision-language or audio-language model
    vision.attention, ...             a part of one tower

Such a model is a Hugging Face model that takes images or sound and text and holds a model that takes only text and one
that takes only images or sound: its language and its vision or audio tower. A speech model whose decoder reads its
encoder (Whisper) is one network and has none. What lies outside the towers is the projector, and so is a merger at the
end of a vision tower. There "all-linear" and the parts of a block mean the language tower; other towers
are reached only by naming them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lora_lightning.models.paths import inside, join

PARTS = ("attention", "mixer", "mlp", "experts")
TOWERS = ("language", "vision", "audio", "projector")
SCOPES = (*PARTS, *TOWERS)
ALL = "all-linear"
NONE = "none"
"""In place of targets: no layer is adapted, and what `also_train` names trains alone."""
_NAMES = {
    "language_model": "language",
    "text_model": "language",
    "text_encoder": "language",
    "text_decoder": "language",
    "vision_tower": "vision",
    "vision_model": "vision",
    "vision_encoder": "vision",
    "visual": "vision",
    "image_tower": "vision",
    "image_encoder": "vision",
    "video_tower": "vision",
    "video_model": "vision",
    "audio_tower": "audio",
    "audio_encoder": "audio",
    "speech_encoder": "audio",
}
_MODALITIES = {"text": "language", "image": "vision", "video": "vision", "audio": "audio"}
_BETWEEN_TOWERS = ("merger", "projector", "connector")
_BETWEEN_STAGES = "downsample"


class Scopes:
    """Parts and towers of one model.

    Args:
        pretrained: Hugging Face models by path, outermost only.
        modules: every module by path.

    Attributes:
        towers: path of each tower, and which one it is; empty unless the model is of several kinds of input.
        unused: path of each block whose output nothing reads, and why; an adapter there would get no gradient.
    """

    def __init__(self, pretrained: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
        self.towers: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self._whole: list[str] = []
        for path, hf_model in pretrained.items():
            own = _below(modules, path)
            found = _towers(hf_model, own)
            if "language" in found.values() and not {"vision", "audio"}.isdisjoint(found.values()):
                self.towers |= {join(path, name): tower for name, tower in found.items()}
                self.unused |= {join(path, name): why for name, why in _unused(hf_model, own, found).items()}
                self._whole.append(path)
        self._blocks = tuple(f"{p}." for p, module in modules.items() if isinstance(module, nn.ModuleList))
        self._mixers = {
            path
            for path, module in modules.items()
            if path.startswith(self._blocks) and any(isinstance(child, nn.Conv1d) for child in module.children())
        }

    def part(self, path: str) -> str | None:
        """The part of a block that the layer at `path` belongs to, by the names of the architecture."""
        parts = [part.lower() for part in path.split(".")]
        if "experts" in parts:
            return "experts"
        if any("attn" in part or "attention" in part for part in parts):
            return "attention"
        if path.rpartition(".")[0] in self._mixers:
            return "mixer"
        return "mlp" if path.startswith(self._blocks) and _BETWEEN_STAGES not in parts else None

    def tower(self, path: str) -> str | None:
        """The tower that the layer at `path` belongs to; None in models without any."""
        if not any(inside(path, whole) for whole in self._whole):
            return None
        prefix = max((prefix for prefix in self.towers if inside(path, prefix)), key=len, default=None)
        if prefix is None or (_between_towers(path) and not (prefix and self.towers[prefix] == "language")):
            return "projector"
        return self.towers[prefix]

    def means(self, word: str, path: str) -> bool:
        """Whether a scope, or "all-linear", means the layer at `path`."""
        tower, part = self.tower(path), self.part(path)
        if word in TOWERS:
            return tower == word
        if word in PARTS or word == ALL:
            return tower in (None, "language") and word in (part, ALL)
        return word == f"{tower}.{part}"

    def reach(self, pattern: str, paths: Sequence[str]) -> list[str]:
        """Of the layers that a pattern fits, those it reaches.

        Those of the language tower; those of another one where the pattern fits nothing in the language tower, or
        names the other one.
        """
        language = {path for path in paths if self.tower(path) in (None, "language")}
        return [path for path in paths if not language or path in language or self._named(pattern, path)]

    def _named(self, pattern: str, path: str) -> bool:
        return str(self.tower(path)) in pattern or self.block(path).rpartition(".")[2] in pattern

    def block(self, path: str) -> str:
        """The tower around the layer at `path`, or the largest block of the projector around it."""
        tower = self.tower(path)
        parts = path.split(".")
        prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return next(
            p for p in prefixes if self.towers.get(p) == tower or not any(inside(t, p) for t in self.towers if t)
        )

    def left_out(self, paths: Iterable[str]) -> dict[str, str]:
        """Towers that hold `paths`, each with how many there are and the scope that adapts them."""
        counts = Counter((self.block(path), self.tower(path)) for path in paths)
        return {
            block: f"{tower}{'' if tower == 'projector' else ' tower'}, {count} linear layer{'s' * (count > 1)}; "
            f'the scope "{tower}" adapts {"them" if count > 1 else "it"}'
            for (block, tower), count in counts.items()
        }

    def present(self, paths: Iterable[str]) -> list[str]:
        """Scopes that mean any of `paths`, parts first."""
        paths = list(paths)
        return [word for word in (*PARTS, *TOWERS) if any(self.means(word, path) for path in paths)]


def is_scope(word: str) -> bool:
    """Whether `word` is "all-linear", a part, a tower, or a part of a tower."""
    tower, _, part = word.partition(".")
    return word == ALL or word in SCOPES or (tower in TOWERS and part in PARTS)


def pretrained_models(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Hugging Face models among the modules of a model, outermost only, by path ("" is the model itself)."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        # asked of the class: torch.compile's wrapper answers for the model inside it
        if hasattr(type(module), "base_model_prefix") and not any(inside(path, outer) for outer in found):
            found[path] = module
    return found


def _below(modules: Mapping[str, nn.Module], prefix: str) -> Mapping[str, nn.Module]:
    """The modules at or below `prefix`, by the rest of their path."""
    if not prefix:
        return modules
    return {path[len(prefix) + 1 :]: module for path, module in modules.items() if inside(path, prefix)}


def _towers(hf_model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Towers of a Hugging Face model by path, outermost only: by name, else by the one kind of input they take.

    Where a language model holds its vision tower, the rest of it is the language tower.
    """
    if getattr(getattr(hf_model, "config", None), "is_encoder_decoder", False) and not _sees(hf_model):
        return {}
    outside = (hf_model, getattr(hf_model, "base_model", None))
    models = {n: module for n, module in modules.items() if module not in outside and not _between_towers(n)}
    found = {name: tower for name in models if (tower := _NAMES.get(name.rpartition(".")[2]))}
    named = set(found.values())
    for name, module in models.items():
        tower = _takes(module)
        # a class that says nothing takes text, so that alone makes no second language tower
        if tower and (tower not in named or tower != "language") and not _within_any(name, found):
            found[name] = tower
    found |= _written_by(hf_model, models, found)
    return {name: tower for name, tower in found.items() if not _within_any(name, found.keys() - {name, ""})}


def _sees(hf_model: nn.Module) -> bool:
    return bool({"image", "video"} & set(getattr(hf_model, "input_modalities", ())))


def _written_by(hf_model: nn.Module, models: Mapping[str, nn.Module], found: Mapping[str, str]) -> dict[str, str]:
    """What gives words: the decoder of a Hugging Face model and its output layer."""
    if {"vision", "audio"}.isdisjoint(found.values()):
        return {}
    words = getattr(hf_model, "get_output_embeddings", lambda: None)()
    decoder = getattr(hf_model, "get_decoder", lambda: None)()
    writers = {
        name: "language"
        for name, module in models.items()
        if module is decoder and not any(inside(tower, name) for tower in found)
    }
    if words is None or "language" in (*found.values(), *writers.values()):
        return writers | {name: "language" for name, module in models.items() if module is words}
    return {"": "language"}


def _unused(hf_model: nn.Module, modules: Mapping[str, nn.Module], towers: Mapping[str, str]) -> dict[str, str]:
    """Last blocks of a vision tower behind the one that the projector reads, with the setting that says so."""
    layer = getattr(getattr(hf_model, "config", None), "vision_feature_layer", None)
    if layer is None:
        return {}
    found: dict[str, str] = {}
    for tower in (path for path, kind in towers.items() if kind == "vision"):
        count = getattr(getattr(modules[tower], "config", None), "num_hidden_layers", 0)
        read = max(one if one >= 0 else count + 1 + one for one in ([layer] if isinstance(layer, int) else layer))
        for name, blocks in _below(modules, tower).items():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == count:
                why = f"its output is not used: vision_feature_layer is {layer}"
                found |= {join(tower, name, str(index)): why for index in range(read, count)}
    return found


def _within_any(name: str, towers: Iterable[str]) -> bool:
    return any(inside(name, tower) for tower in towers)


def _takes(module: nn.Module) -> str | None:
    """The tower that all inputs of a Hugging Face model would go to; None where there are several, or it is none."""
    modalities = getattr(module, "input_modalities", ())
    modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if modalities == ("text",) and str(getattr(module, "main_input_name", "")).startswith("pixel_values"):
        modalities = ("image",)
    towers = {_MODALITIES[modality] for modality in modalities if modality in _MODALITIES}
    return towers.pop() if len(towers) == 1 and hasattr(module, "base_model_prefix") else None


def _between_towers(path: str) -> bool:
    return any(word in path.lower() for word in _BETWEEN_TOWERS)

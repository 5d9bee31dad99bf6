"""From a model folder to a ready `tokenizers.Tokenizer`, its special tokens and its chat template.

Understood are tokenizer.json, or vocab.json + merges.txt as GPT-2, OPT and Qwen2 ship them, together with
tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja and config.json (for the model type and
token ids only). Where the files leave something open, the answer is what `transformers` does for that model. This file knows no
model and no template engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from quire.errors import ModelError

# Qwen2 splits text otherwise than GPT-2 before its merges; a repository without tokenizer.json does not say so.
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What the tokenizer classes of `transformers` assume when the files name no special tokens.
_ASSUMED = {
    "gpt2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "opt": {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
    "qwen2": dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>"),
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
_PREPENDING = ("Llama", "CodeLlama", "Gemma")  # tokenizer classes that put the BOS token first unless told otherwise

Templates = str | dict[str, str] | None


@dataclass
class TokenizerFiles:
    """What the files say: the tokenizer itself, special tokens by role (`bos_token`, ...), one or several chat templates."""

    backend: Backend
    special_tokens: dict[str, str]
    chat_template: Templates


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of a model folder. ModelError when there is none, or when its files are damaged or contradict."""
    config = _read_json(folder / "tokenizer_config.json")
    model_config = _read_json(folder / "config.json")
    family = _family(config, model_config)
    backend = _read_backend(folder, config, family)
    named = _named_tokens(folder, config, model_config, family, backend)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra_names = [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    special = {*named.values(), *extra_names}
    _add_listed_tokens(folder, config, backend, special)
    _mark_special(backend, special)
    _prepend_and_append(backend, config, named, family)
    backend.no_truncation()  # a tokenizer.json saved while it was truncating would cut prompts silently
    backend.no_padding()
    return TokenizerFiles(backend, named, _read_templates(folder, config))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no such file."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(read, dict):
        raise ModelError(f"{path.name} must hold a JSON object, got {type(read).__name__}.")
    return read


def _family(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The tokenizer's family: of the model type where it has one of its own (OPT uses GPT-2's class), else of the class."""
    model_type = str(model_config.get("model_type") or "").lower()
    if model_type == "opt":
        return model_type
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    if named in ("", "pretrained", "tokenizersbackend"):
        named = model_type
    for family in _ASSUMED:
        if named == family or (named.startswith(family) and family != "opt"):
            return family
    return "qwen2" if named.startswith("qwen") else named


def _read_backend(folder: Path, config: Mapping[str, Any], family: str) -> Backend:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Backend.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            return _byte_level(BPE.from_file(str(vocabulary), str(merges)), config, family)
    except ModelError:
        raise
    except Exception as error:  # the library raises a bare Exception for whatever it cannot parse
        name = whole.name if whole.is_file() else f"{vocabulary.name} or {merges.name}"
        raise ModelError(f"{name} is damaged: {error}") from None
    if (folder / "tokenizer.model").is_file():
        raise ModelError(
            "the folder has only a SentencePiece tokenizer.model. Convert it once, where sentencepiece and transformers are "
            "installed: python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('FOLDER')"
            ".save_pretrained('FOLDER')\""
        )
    raise ModelError(f"no tokenizer in {folder.name}: need tokenizer.json, or vocab.json and merges.txt.")


def _byte_level(model: BPE, config: Mapping[str, Any], family: str) -> Backend:
    backend = Backend(model)
    prefix = bool(config.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    if family in ("gpt2", "opt", ""):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    elif family == "qwen2":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
    else:
        raise ModelError(
            f"vocab.json and merges.txt alone do not say how a {family!r} tokenizer splits text; a tokenizer.json is needed."
        )
    return backend


def _content(token: Any) -> str:
    """The text of a special token, which the files write as a string or as an object."""
    return token["content"] if isinstance(token, dict) else str(token)


def _named_tokens(
    folder: Path, config: Mapping[str, Any], model_config: Mapping[str, Any], family: str, backend: Backend
) -> dict[str, str]:
    """Special tokens by role. Older repositories keep them in special_tokens_map.json, which then counts more."""
    mapped = _read_json(folder / "special_tokens_map.json")
    sources = (mapped, config) if "added_tokens_decoder" in config else (config, mapped)
    named = {role: text for role, text in _ASSUMED.get(family, {}).items() if backend.token_to_id(text) is not None}
    for role in ("bos", "eos", "pad"):
        token = model_config.get(f"{role}_token_id")
        if f"{role}_token" not in named and type(token) is int and token >= 0:
            text = backend.id_to_token(token)
            named |= {f"{role}_token": text} if text is not None else {}
    for source in sources:
        for role, token in source.items():
            if role.endswith("_token") and (isinstance(token, str) or (isinstance(token, dict) and "content" in token)):
                named[role] = _content(token)
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= {role: _content(token) for role, token in extra.items()}
    return named


def _add_listed_tokens(folder: Path, config: Mapping[str, Any], backend: Backend, special: set[str]) -> None:
    """Add the tokens that tokenizer_config.json or added_tokens.json list, at the ids that they list."""
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        for token, facts in config["added_tokens_decoder"].items():
            listed[int(token)] = AddedToken(**{key: value for key, value in facts.items() if key != "__type"})
    else:
        for text, token in _read_json(folder / "added_tokens.json").items():
            listed[int(token)] = AddedToken(text, normalized=text not in special, special=text in special)
    present = {str(token.content): repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token, added in sorted(listed.items(), key=lambda entry: entry[0]):
        if present.get(added.content) == repr(added):
            continue
        if added.content in present and "added_tokens_decoder" not in config:
            continue  # tokenizer.json is the newer of the two files
        (backend.add_special_tokens if added.special else backend.add_tokens)([added])
        given = backend.token_to_id(added.content)
        if given != token:
            raise ModelError(
                f"the tokenizer files contradict each other: token {added.content!r} is listed with id {token}, "
                f"but the vocabulary has room for it at id {given}."
            )


def _mark_special(backend: Backend, special: set[str]) -> None:
    """Named special tokens of the vocabulary are split off in a text and skipped when decoding, listed as such or not.

    A special token that the vocabulary does not have is not given an id: the model has no embedding for it.
    """
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in sorted(special):
        token = present.get(text)
        if token is not None and not token.special:
            token.special = True
            backend.add_special_tokens([token])
        elif token is None and text and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _has_template(processor: Mapping[str, Any]) -> bool:
    """Whether a post-processor decides about tokens around the text; ByteLevel only mends offsets."""
    return processor.get("type") != "ByteLevel" and (
        processor.get("type") != "Sequence" or any(_has_template(one) for one in processor["processors"])
    )


def _prepend_and_append(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str], family: str) -> None:
    """add_bos_token and add_eos_token of tokenizer_config.json, unless tokenizer.json says itself what goes around a text."""
    if backend.post_processor is not None and _has_template(json.loads(backend.post_processor.__getstate__())):
        return
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
    elif backend.post_processor is None and (family == "opt" or str(config.get("tokenizer_class")).startswith(_PREPENDING)):
        bos, eos = True, False
    else:
        return
    before, after = named.get("bos_token") if bos else None, named.get("eos_token") if eos else None
    used = [(text, backend.token_to_id(text)) for text in (before, after) if text]
    if any(token is None for _, token in used):
        raise ModelError(f"the tokenizer is to add {[text for text, token in used if token is None]}, which it does not have.")
    single = [part for part in (before and f"{before}:0", "$A:0", after and f"{after}:0") if part]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(dict(used).items()))


def _read_templates(folder: Path, config: Mapping[str, Any]) -> Templates:
    """chat_template.jinja (with additional_chat_templates/) before chat_template.json before tokenizer_config.json."""
    try:
        extra = {path.stem: path.read_text(encoding="utf-8") for path in (folder / "additional_chat_templates").glob("*.jinja")}
        main = folder / "chat_template.jinja"
        if main.is_file():
            text = main.read_text(encoding="utf-8")
            return {"default": text, **extra} if extra else text
    except (OSError, ValueError) as error:
        raise ModelError(f"the chat template cannot be read: {error}") from None
    listed = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(listed, list):
        listed = {entry["name"]: entry["template"] for entry in listed}
    if isinstance(listed, str) and extra:
        listed = {"default": listed}
    return {**listed, **extra} if isinstance(listed, dict) else listed or extra or None

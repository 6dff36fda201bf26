"""The content of a tokenizer.json: a copy that reads every spelling as text, and what it cannot give back."""

import functools
import secrets
import string
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]
UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))  # no UTF-8 text has others
_BYTE_TOKEN = "<(?=0x[0-9A-F]{2}>)"


def parts(step: Spec | None) -> Iterator[Spec]:
    """The members of a normaliser, pre-tokenizer or decoder, those of sequences one by one."""
    if step is None:
        return
    members = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders")
    if members is None:
        yield step
    for member in members or ():
        yield from parts(member)


def types(step: Spec | None) -> list[str]:
    """The types of the members."""
    return [part["type"] for part in parts(step)]


def prepends(spec: Spec) -> bool:
    """Whether a space is put before a text."""
    return any(
        part.get("add_prefix_space") or part.get("prepend_scheme") in ("always", "first") or part["type"] == "Prepend"
        for step in (spec["normalizer"], spec["pre_tokenizer"])
        for part in parts(step)
    )


def unknown_token(model: Spec) -> str | None:
    """The token that stands for what the vocabulary lacks, if there is one."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    name = model.get("unk_token")
    return name if name in model["vocab"] else None


def control_names(spec: Spec) -> set[str]:
    """The unknown token, and all added tokens but plain runs of white space."""
    names = {added["content"] for added in spec["added_tokens"] if not _is_white_space(added)}
    return names | ({unknown} if (unknown := unknown_token(spec["model"])) is not None else set())


def _is_white_space(added: Spec) -> bool:
    altering = any(added[flag] for flag in ("special", "lstrip", "rstrip", "single_word"))
    return added["content"].isspace() and not altering


def text_only(spec: Spec, controls: set[str]) -> Spec:
    """A copy in which no text becomes a control token, nothing is put around a text, and all ids are the same.

    The library itself would take a control token from the text if it is not marked special, or if the model's own
    vocabulary has its spelling as a piece or word. So the copy gives control tokens names that nobody can guess.
    """
    secret = secrets.token_hex(16)
    renamed = {name: f"\ufdd0{secret}-{number}" for number, name in enumerate(sorted(controls))}
    hidden = {"special": True, "normalized": False}
    added_tokens = [
        {**added, "content": renamed[added["content"]], **hidden} if added["content"] in renamed else added
        for added in spec["added_tokens"]
    ]
    pre_tokenizer = _without_prefix(spec["pre_tokenizer"])
    if spec["model"].get("byte_fallback") and (_is_unigram(spec) or spec["model"].get("ignore_merges")):
        # the spelling of a byte token is text as well: cut it, so that it is not found as a whole
        cut = {"type": "Split", "pattern": {"Regex": _BYTE_TOKEN}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*parts(pre_tokenizer), cut]}
    return {
        **spec,
        "added_tokens": added_tokens,
        "normalizer": _without_prefix(spec["normalizer"]),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "model": _renamed(spec["model"], renamed),
        "truncation": None,
        "padding": None,
    }


def exact_decoder(spec: Spec) -> Spec:
    """A copy whose decoder takes one space away before a text, where the library's takes all of the first token's."""
    steps = [*parts(spec["decoder"])]
    strips = [step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps]
    if not any(strips):
        return spec
    pattern = {"String": steps[strips.index(True)]["replacement"]}
    replace = {"type": "Replace", "pattern": pattern, "content": " "}
    steps = [replace if strip else step for step, strip in zip(steps, strips, strict=True)]
    steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {**spec, "decoder": {"type": "Sequence", "decoders": steps}}


def _is_unigram(spec: Spec) -> bool:
    return isinstance(spec["model"]["vocab"], list)


def _renamed(model: Spec, renamed: dict[str, str]) -> Spec:
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    changed: Spec
    if isinstance(vocabulary, list):
        changed = {"vocab": [[renamed.get(token, token), score] for token, score in vocabulary]}
    else:
        changed = {"vocab": {renamed.get(token, token): index for token, index in vocabulary.items()}}
    if unknown is not None:
        changed["unk_token"] = renamed.get(unknown, unknown)
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        changed["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not {left, right, left + right.removeprefix(prefix)} & renamed.keys()
        ]
    return {**model, **changed}


def _without_prefix(step: Spec | None) -> Spec | None:
    if step is None or step["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            return {**step, key: [kept for member in step[key] if (kept := _without_prefix(member)) is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character by which a byte-level vocabulary writes each byte, as in GPT-2."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return tuple(chr(byte) if byte in own else chr(256 + others.index(byte)) for byte in range(256))


def is_byte_level(spec: Spec) -> bool:
    """Whether the vocabulary is written in the byte alphabet."""
    return "ByteLevel" in types(spec["decoder"])


def known_units(spec: Spec, controls: set[str]) -> set[str] | None:
    """The characters that a BPE can write, or the bytes as characters of Latin-1 if it is byte-level.

    None if nothing is left out in silence: it knows all, or has an unknown token, or is another model, which refuses.
    """
    model = spec["model"]
    names = model["vocab"].keys() - controls if model["type"] == "BPE" else set()
    fallback = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in names for byte in range(256))
    if model["type"] != "BPE" or model.get("unk_token") is not None or fallback:
        return None
    if is_byte_level(spec):
        known = {chr(byte) for byte, letter in enumerate(byte_alphabet()) if letter in names}
        return None if known >= {chr(byte) for byte in UTF8_BYTES} else known
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    known = {name.removeprefix(prefix).removesuffix(suffix) for name in names}
    return known | ({" "} if "▁" in known else set()) | (set(string.whitespace) if _drops_space(spec) else set())


def _drops_space(spec: Spec) -> bool:
    """Whether white space is not part of any token, as the words of a pre-tokenizer leave it out."""
    return not {"Metaspace", "ByteLevel"} & {*types(spec["pre_tokenizer"])} and spec["pre_tokenizer"] is not None


def lacking(spec: Spec, controls: set[str], known: set[str] | None) -> str | None:
    """What becomes of text for which there is no token, in a few words; None if there is a token for any text."""
    model, unknown = spec["model"], unknown_token(spec["model"])
    if is_byte_level(spec):
        names = {*(model["vocab"] if isinstance(model["vocab"], dict) else dict(model["vocab"]))} - controls
        absent = [byte for byte in UTF8_BYTES if byte_alphabet()[byte] not in names]
        if not absent:
            return None
        what = f"{len(absent)} of the {len(UTF8_BYTES)} bytes that UTF-8 uses"
    else:
        if model.get("byte_fallback"):
            return None
        what = "the characters that its vocabulary lacks"
    if unknown is not None:
        return f"{what} become {unknown}"
    return f"{what} are left out" if known is not None else f"{what} are refused"


def normalizers(spec: Spec) -> list[str]:
    """The normalisers that decoding does not undo."""
    undone = ("Prepend", "ByteLevel")
    found = [part for part in parts(spec["normalizer"]) if part["type"] not in undone]
    return [part["type"] for part in found if part.get("pattern") != {"String": " "}]

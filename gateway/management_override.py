"""What a load request may bring along: a configuration, and files that stand in for the repository's.

Rules: parameters are `config` (JSON text of a model configuration) and `file:<version>/<name>` (base64 text, or bytes);
any other is refused. Files need a configuration with them and then are all the model has: nothing of the repository is
mixed in. They are written into a new directory that only this process can read, and are gone when the load has ended.
The configuration outranks what config.pbtxt and the model's entry in the gateway's own file say of the same keys, for
whoever loads with one wants what it says; entry keys that it does not state hold on, and `--instances` holds for all.
A path is made of plain names: it cannot leave the directory, hide, or name a version that is none. The number of files
is bounded here, their size by the bound on a request.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from gateway.errors import ConfigError, InvalidRequest, Malformed
from gateway.protocol.model_config import ModelConfig
from gateway.protocol.model_config_json import parse_json
from gateway.registry.directory import CONFIG_FILE, FoundModel, configured

FILE_PREFIX: Final = "file:"
MAX_FILES: Final = 256
UPLOADED: Final = "uploaded with the load request"
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")
_PART: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_MAX_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class Override:
    """What is loaded instead of what the repository says."""

    config: ModelConfig
    text: str
    """The configuration as config.pbtxt."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Path below the model's directory → content; empty: the repository's files."""


def read_override(parameters: Mapping[str, object]) -> Override | None:
    """The override that a load request asks for; None: it asks for the model as the repository has it.

    Raises:
        InvalidRequest: an unknown parameter, a path or content that cannot be used, files without `config`.
        ConfigError: `config` is no configuration that can be obeyed.
    """
    files: dict[str, bytes] = {}
    text: str | None = None
    for name, value in parameters.items():
        if name == "config":
            if not isinstance(value, str):
                raise Malformed(
                    "invalid value type for load parameter 'config', expected string_param: the JSON text of a model "
                    "configuration"
                )
            text = value
        elif name.startswith(FILE_PREFIX):
            if len(files) >= MAX_FILES:
                raise InvalidRequest(f"a load request may bring at most {MAX_FILES} files")
            files[_path(name)] = _content(name, value)
        else:
            raise Malformed(
                f"unrecognized load parameter '{name[:64]}'; known are 'config' and 'file:<version>/<name>'"
            )
    if text is None:
        if files:
            raise InvalidRequest(
                "override model config ('config') must be provided when loading model with override files"
            )
        return None
    config, canonical = parse_json(text)
    return Override(config, canonical, files)


def _path(parameter: str) -> str:
    parts = parameter.removeprefix(FILE_PREFIX).split("/")
    if len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidRequest(
            f"load parameter '{parameter[:64]}': a file is named <version>/<name>, A-Z a-z 0-9 . _ -, no leading dot"
        )
    if len(parts) > 1 and parts[0].isdecimal() and not _VERSION.fullmatch(parts[0]):
        raise InvalidRequest(f"load parameter '{parameter[:64]}': a version is a number from 1, without leading zero")
    if parts == [CONFIG_FILE]:
        raise InvalidRequest(f"load parameter '{parameter}': write the configuration as parameter 'config'")
    return "/".join(parts)


def _content(parameter: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Malformed(f"load parameter '{parameter[:64]}' must be a string: the file in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"load parameter '{parameter[:64]}' is not base64") from None


@contextlib.contextmanager
def overridden(name: str, place: Path | None, override: Override) -> Iterator[FoundModel]:
    """The model as `override` says; its uploaded files exist inside the block. Blocks on the disk.

    `place`: where the repository has the model, None if it has none of this name.

    Raises:
        ConfigError: the model cannot be like this.
    """
    if override.config.name not in (None, "", name):
        raise ConfigError(f"config: name is '{override.config.name}', but the model is '{name}'; leave it out")
    config = replace(override.config, name=None)
    if not override.files:
        if place is None:
            raise ConfigError(f"no source has a model '{name}', and the request brings no files")
        yield configured(place, name, config, "config")
        return
    with tempfile.TemporaryDirectory(prefix="gateway-load-") as temporary:
        root = Path(temporary) / name
        try:
            root.mkdir()
            for path, content in override.files.items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            (root / CONFIG_FILE).write_text(override.text)
        except OSError as error:
            raise ConfigError(f"the uploaded files cannot be written: {error.strerror}") from None
        yield replace(configured(root, name, config, "config"), source=UPLOADED)

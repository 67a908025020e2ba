"""What others document: options of ONNX Runtime's providers, operators that TensorRT takes."""

import tomllib
from pathlib import Path
from typing import Any

TABLES: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
OPTIONS: dict[str, set[str]] = {
    provider: set(table["names"]) for provider, table in TABLES["options"].items()
}
TENSORRT_OPERATORS: set[str] = set(TABLES["operators"]["tensorrt"]["names"])
TENSORRT_OPSETS: dict[str, int] = TABLES["operators"]["tensorrt"]["opsets"]

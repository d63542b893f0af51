"""For fuzz.py: what a user types or writes, in Hypothesis' strategies, and what is done with it."""

import os
from pathlib import Path
from typing import Any

from fuzz_pictures import cut, flip
from hypothesis import strategies as st

ARGUMENTS = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=20).map(os.fsdecode),
    st.from_regex(r"[\w.~/-]{0,8}(\{\d{0,12}\.\.\d{0,12}\}|\*|\[a-z\]|:|::|://)?[\w./-]{0,8}(\.tar|\.parquet)?",
                  fullmatch=True),
)  # fmt: skip


def check_argument(case: str, folder: Path) -> None:
    import datasets

    from lediflow.data.images import open_dataset

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network in this script")

    original = datasets.get_dataset_split_names, datasets.load_dataset
    datasets.get_dataset_split_names = unreachable
    if "://" in case:
        datasets.load_dataset = unreachable
    here = os.getcwd()
    os.chdir(folder)
    try:
        if not Path("/", case.lstrip("~")).is_dir():  # a folder of this machine is no made-up name
            open_dataset(case)
    except (OSError, ValueError):
        open_dataset(case)
    finally:
        os.chdir(here)
        datasets.get_dataset_split_names, datasets.load_dataset = original


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from(
        [10**4, 10**9, 2**63, 2**64, -(2**70), 0.5, -0.1, 1e-9, 1e300, float("nan"), float("inf")]
    ),
    st.text(max_size=8),
    st.sampled_from(["auto", "digits", "flow", "./x.yaml", "1e-3", "cosine", "2024-01-01"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _tree() -> dict[str, Any]:
    from lediflow.training.config import load_config

    tree: dict[str, Any] = load_config("digits").model_dump(mode="json")
    return tree


def _keys(tree: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((*before, key))
        found += _keys(value, (*before, key)) if isinstance(value, dict) else []
    return found


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


@st.composite
def config_case(draw: Any) -> bytes:
    import yaml

    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(
            st.one_of(
                st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))
            )
        )
    tree = _tree()
    for key in draw(st.lists(st.sampled_from(_keys(tree)), min_size=1, max_size=3)):
        node: Any = tree
        for part in key[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            name = key[-1] if draw(st.integers(0, 4)) else draw(st.text(max_size=6))
            node[name] = draw(VALUES)
    if draw(st.integers(0, 5)) == 0:
        tree["extends"] = draw(
            st.one_of(st.just("case.yaml"), st.just("./case.yaml"), st.just("digits"), VALUES)
        )
    text = yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return flip(draw, text) if kind == 1 else cut(draw, text) if kind == 2 else text


def check_config(case: bytes, folder: Path) -> None:
    from lediflow.training.builders import count_parameters
    from lediflow.training.config import load_config

    path = folder / "case.yaml"
    path.write_bytes(case)
    config = load_config(path)
    again = folder / "again.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config, "written and read, it is another"
    count_parameters(config)


@st.composite
def setting_case(draw: Any) -> list[str]:
    import yaml

    def one() -> str:
        if draw(st.integers(0, 4)) == 0:
            return draw(st.text(max_size=20))
        key = ".".join(draw(st.sampled_from(_keys(_tree()))))
        if draw(st.integers(0, 5)) == 0:
            key += draw(st.sampled_from([".x", ".", "..y", "-z", " ", "\0", "[0]"]))
        value = draw(VALUES)
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        return f"{key}={draw(st.text(max_size=10)) if draw(st.integers(0, 3)) == 0 else text}"

    return [one() for _ in range(draw(st.integers(1, 3)))]


def check_setting(case: list[str], folder: Path) -> None:
    from lediflow.training.builders import count_parameters
    from lediflow.training.config import load_config

    count_parameters(load_config("digits", case))

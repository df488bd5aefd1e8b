"""What pytest-benchmark writes down: the processor and the figures, without what tells machines or checkouts apart."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    import torch

    cpu = machine_info["cpu"].get("brand_raw", "")
    machine_info.clear()
    machine_info.update(cpu={"brand_raw": cpu}, torch=torch.__version__, threads=torch.get_num_threads())


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info.clear()


def pytest_benchmark_update_json(config: Any, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    for found in output_json["benchmarks"]:
        for name in ("options", "params", "param", "group", "fullname"):
            found.pop(name, None)
        found["stats"] = {name: found["stats"][name] for name in ("min", "median", "max", "iqr", "rounds")}

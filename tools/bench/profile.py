"""What a decode step's time goes to: its launches in order, and by how much each moves the step's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastdms.runtime import CompiledModel
from fastdms.sampling_params import SamplingParams
from fastdms.tools.bench.figures import bucket_name
from fastdms.tools.bench.timeline import Launch, median_step

__all__ = ["Launch", "by_kernel", "profile_steps", "table"]

_WARM_UP_STEPS = 5


def profile_steps(
    model: CompiledModel, prompts: Sequence[list[int]], steps: int, params: SamplingParams
) -> dict[str, Any]:
    """``by_kernel`` of ``steps`` decode steps of all ``prompts`` together, after their prefill, sampled by ``params``.

    None is decoded before all are prefilled, so that all rows are about as long, and need room for the steps alone.

    step_us: from the first launch to the end of the last, for each step. idle_us: of it, with nothing running.
    live_tokens: of all rows, layers and KV heads together, mean of before and after. timeline: ``median_step``, left
    out where there is none.
    Raises ValueError where the prompts leave too little of ``max_context`` for so many steps, or don't fit into the
    cache together.
    """
    engine = model._open_engine()
    room = model.options.max_context - max(map(len, prompts))
    if room < steps + 2 * _WARM_UP_STEPS:
        raise ValueError(
            f"{steps} steps take {steps + 2 * _WARM_UP_STEPS} new tokens of a context with room for {room}"
        )
    params = replace(params, max_tokens=room)  # as many as fit: none may end before the steps do
    requests = [model._request(list(prompt), params, answers=False) for prompt in prompts]
    try:
        for request in requests:
            engine.add(request)
        engine.prefill()
        while not all(len(request.output_ids) >= _WARM_UP_STEPS for request in requests):
            engine.step()
        before = model.kv_report()
        engine.step()  # reading the lengths has waited for the step under way: have one again
        on_cuda = model.options.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as recorded:
            for _ in range(steps):
                engine.step()
            engine.settle()
        after, left = model.kv_report(), len(engine.running)
    finally:
        for request in requests:
            engine.cancel(request)
    if left < len(prompts):
        raise ValueError(
            f"{left} of {len(prompts)} rows were left after {steps} steps: kv_memory is too small for all of them"
        )
    launches = _launches(recorded.events(), on_cuda)
    kernels = by_kernel(launches, steps)
    whole = (max(launch.end_us for launch in launches) - launches[0].begin_us) / steps
    added = sum(kernel["added_us"] for kernel in kernels)
    timeline = median_step(launches, steps)
    return {
        "steps": steps,
        "step_us": round(whole, 3),
        "idle_us": round(whole - added, 3),
        "live_tokens": round(sum(float(report.live_tokens.sum()) * report.rows for report in (before, after)) / 2),
        "kernels": kernels,
        **({} if timeline is None else {"timeline": timeline}),
    }


def by_kernel(launches: Sequence[Launch], steps: int) -> list[dict[str, Any]]:
    """The launches of each name, the costliest first.

    launches: of a step, not always whole. us: of one, the time that it waits for the kernel ahead included. added_us:
    of all in a step, by how much they moved the end of all work so far, so that what overlaps counts once.
    """
    found: dict[str, list[float]] = {}
    end = float("-inf")
    for launch in sorted(launches, key=lambda launch: launch.begin_us):
        added = max(0.0, launch.end_us - max(end, launch.begin_us))
        end = max(end, launch.end_us)
        sums = found.setdefault(launch.name, [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, launch.end_us - launch.begin_us, added)):
            sums[i] += value
    rows = [
        {
            "name": name,
            "launches": round(count / steps, 3),
            "us": round(us / count, 3),
            "added_us": round(added / steps, 3),
        }
        for name, (count, us, added) in found.items()
    ]
    return sorted(rows, key=lambda row: -float(row["added_us"]))


def table(measured: Sequence[dict[str, Any]]) -> str:
    """The kernels of each measurement, one under the other."""
    parts = []
    for row in measured:
        lines = [
            f"{bucket_name(row)}: {row['step_us']:,.1f} us a step, {row['idle_us']:,.1f} of it idle",
            f"{'added us':>10} {'launches':>9} {'us each':>9}  kernel",
        ]
        lines += [
            f"{kernel['added_us']:>10,.1f} {kernel['launches']:>9,.1f} {kernel['us']:>9,.2f}  {kernel['name'][:80]}"
            for kernel in row["kernels"]
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _launches(events: Any, on_cuda: bool) -> list[Launch]:
    """What ran, in order of its begin: on CUDA the device's events, else the operations that no other called."""
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    found = [
        Launch(event.name, float(event.time_range.start), float(event.time_range.end))
        for event in events
        if event.device_type == wanted and event.cpu_parent is None
    ]
    return sorted(found, key=lambda launch: launch.begin_us)

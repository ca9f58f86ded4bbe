"""`replace_sdpa`: where it holds, what it leaves behind, and who else may stand in its place."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import flash_attn
from flash_attn import explain, replace_sdpa
from flash_attn import scaled_dot_product_attention as sdpa
from introspection import needs_introspection

pytestmark = needs_introspection
TORCHS = F.scaled_dot_product_attention
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _x() -> Tensor:
    return torch.randn(1, 2, 5, 8)


def _ours_runs() -> bool:
    x = _x()
    return bool(explain(lambda: F.scaled_dot_product_attention(x, x, x)).calls)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    left, F.scaled_dot_product_attention = F.scaled_dot_product_attention, TORCHS
    assert left is TORCHS


class _Thread:
    """A thread that runs functions one after another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)

    def __call__(self, function: Callable[[], Any]) -> Any:
        return self._executor.submit(function).result(timeout=60)


def test_threads_may_leave_in_the_order_they_came() -> None:
    first, second = _Thread(), _Thread()
    blocks = replace_sdpa(), replace_sdpa()
    for block in blocks:
        block.restore()
    first(blocks[0].__enter__)
    second(blocks[1].__enter__)
    assert first(_ours_runs) and second(_ours_runs) and not _ours_runs()
    first(lambda: blocks[0].__exit__(None, None, None))
    assert second(_ours_runs) and not first(_ours_runs)
    second(lambda: blocks[1].__exit__(None, None, None))
    assert F.scaled_dot_product_attention is TORCHS


def test_one_replacement_may_be_entered_by_several_threads() -> None:
    first, second = _Thread(), _Thread()
    block = replace_sdpa()
    block.restore()
    first(block.__enter__)
    second(block.__enter__)
    first(lambda: block.__exit__(None, None, None))
    assert second(_ours_runs) and not first(_ours_runs)
    second(lambda: block.__exit__(None, None, None))


def test_the_whole_process_is_replaced_until_restored() -> None:
    other = _Thread()
    replaced = replace_sdpa()
    assert _ours_runs() and other(_ours_runs)
    with replace_sdpa():
        replaced.restore()
        assert _ours_runs() and not other(_ours_runs)
    assert not _ours_runs()


def test_other_threads_get_what_torch_gives_while_one_is_replaced() -> None:
    q, k, bias = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 9, 8), causal_lower_right(4, 9)
    calls: list[Callable[[], Tensor]] = [
        lambda: F.scaled_dot_product_attention(q, k, k),
        lambda: F.scaled_dot_product_attention(q, k, k, bias),
        lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.5),
    ]
    expected = [call() for call in calls]
    other = _Thread()
    with replace_sdpa():
        for call, result in zip(calls, expected, strict=True):
            explanation = other(lambda call=call: explain(call))
            assert not explanation.calls
            assert torch.equal(other(call), result)


def test_async_tasks_are_apart_and_hand_it_on() -> None:
    async def main() -> None:
        inside, leave, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def inner() -> tuple[bool, bool]:
            before = _ours_runs()
            await left.wait()
            return before, _ours_runs()

        async def enters() -> asyncio.Task[tuple[bool, bool]]:
            with replace_sdpa():
                task = asyncio.create_task(inner())
                await asyncio.sleep(0)
                inside.set()
                await leave.wait()
                assert _ours_runs()
                assert await asyncio.to_thread(_ours_runs)
            return task

        entered = asyncio.create_task(enters())
        await inside.wait()
        assert not _ours_runs()
        leave.set()
        task = await entered
        left.set()
        assert await task == (True, False)  # a task that outlives the block

    asyncio.run(main())


def test_generators_may_be_left_in_any_order_and_elsewhere() -> None:
    def holds() -> Iterator[bool]:
        with replace_sdpa():
            while True:
                yield _ours_runs()

    first, second, other = holds(), holds(), _Thread()
    assert next(first) and next(second)
    first.close()
    assert next(second)
    other(second.close)
    assert F.scaled_dot_product_attention is TORCHS and not _ours_runs()
    third = holds()
    contextvars.copy_context().run(next, third)
    assert not _ours_runs()
    third.close()


@contextmanager
def _patched(function: Any) -> Iterator[None]:
    with mock.patch.object(F, "scaled_dot_product_attention", function):
        yield


def test_functions_of_others_stay_where_they_stood() -> None:
    def theirs(*args: Any, **kwargs: Any) -> str:
        return "theirs"

    def wraps(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    other = _Thread()
    call = lambda: F.scaled_dot_product_attention(*[_x()] * 3)  # noqa: E731
    with _patched(theirs):
        with replace_sdpa():
            assert _ours_runs() and other(call) == "theirs"
            with replace_sdpa():
                pass
            assert _ours_runs()
            assert pickle.loads(pickle.dumps(F.scaled_dot_product_attention)) is F.scaled_dot_product_attention
        assert call() == "theirs"
    with replace_sdpa():
        function = F.scaled_dot_product_attention
        with _patched(wraps):
            assert _ours_runs() and not other(_ours_runs)
            with replace_sdpa():  # once more, on top
                assert _ours_runs() and not other(_ours_runs)
            assert F.scaled_dot_product_attention is wraps
        assert F.scaled_dot_product_attention is function


def test_what_others_put_back_too_late_goes_when_it_is_called() -> None:
    with replace_sdpa():
        patch = mock.patch.object(F, "scaled_dot_product_attention", lambda *args, **kwargs: None)
        patch.start()
    patch.stop()
    assert F.scaled_dot_product_attention is not TORCHS
    x = _x()
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), TORCHS(x, x, x))
    assert F.scaled_dot_product_attention is TORCHS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_context_parallel_raises_whichever_comes_first() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, x, other = init_device_mesh("cpu", (1,)), torch.randn(1, 2, 8, 8), _Thread()
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
            torchs = F.scaled_dot_product_attention
            for enter in (replace_sdpa, lambda: other(replace_sdpa().__enter__)):
                with pytest.raises(NotImplementedError, match="context_parallel"):
                    enter()
            assert F.scaled_dot_product_attention is torchs
            with pytest.raises(NotImplementedError, match="context_parallel"):
                sdpa(x, x, x)
            with pytest.raises(NotImplementedError, match="context_parallel"):
                flash_attn.FlashMHA(8, 2)(x[0])
        with replace_sdpa(), context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
            with pytest.raises(NotImplementedError, match="context_parallel"):
                F.scaled_dot_product_attention(x, x, x)
            with pytest.raises(NotImplementedError, match="context_parallel"):
                replace_sdpa()
        with replace_sdpa() as block, context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
            block.restore()
        assert not _ours_runs()
    finally:
        dist.destroy_process_group()


def test_torchs_kernels_run_where_sdpa_kernel_puts_them_first() -> None:
    _, flash, efficient, math = CUDNN_FIRST
    with replace_sdpa():
        for backends, ours in (([flash, math], True), ([math, flash], False), ([efficient, flash, math], False)):
            with sdpa_kernel(backends, set_priority=True):
                assert _ours_runs() == ours
            with sdpa_kernel(backends):  # in no order
                assert _ours_runs()
        with sdpa_kernel([math, efficient], set_priority=True):
            assert not _ours_runs()
        assert _ours_runs()


@pytest.mark.parametrize(("capability", "ours"), [((9, 0), True), ((8, 0), False), (None, False)])
def test_the_order_that_torch_itself_chooses_changes_nothing(
    capability: tuple[int, int] | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    replacement = flash_attn.sdpa.replacement
    monkeypatch.setattr(replacement, "_any_prefers_cudnn", replacement._any_prefers_cudnn.__wrapped__)
    with replace_sdpa(), sdpa_kernel(CUDNN_FIRST, set_priority=True):
        assert _ours_runs() == ours


@pytest.mark.gpu
def test_ours_runs_on_a_gpu_after_torchs_has() -> None:
    x = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
    F.scaled_dot_product_attention(x, x, x)  # torch chooses its order
    with replace_sdpa():
        assert len(flash_attn.explain(lambda: F.scaled_dot_product_attention(x, x, x)).calls) == 1


def test_a_backward_pass_takes_it_to_the_threads_that_autograd_starts() -> None:
    # torch takes a new thread for backward passes nested that deep, and the process then ends by an abort.
    code = """if True:
        import os, threading, torch
        import torch.nn.functional as F
        from flash_attn import explain, replace_sdpa

        class Deep(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, depth):
                ctx.depth = depth
                return x * 1

            @staticmethod
            def backward(ctx, dx):
                if ctx.depth > 0:
                    with torch.enable_grad():
                        x = torch.ones(1, requires_grad=True)
                        with_threads.add(threading.get_ident())
                        q = torch.randn(1, 1, 2, 8)
                        runs.append(len(explain(lambda: F.scaled_dot_product_attention(q, q, q)).calls))
                        Deep.apply(x, ctx.depth - 1).sum().backward()
                return dx, None

        runs, with_threads = [], set()
        def run():
            runs.clear(), with_threads.clear()
            Deep.apply(torch.ones(1, requires_grad=True), 70).sum().backward()
            assert len(with_threads) > 1
            return set(runs)
        with replace_sdpa():
            inside = run()
            other = []
            thread = threading.Thread(target=lambda: other.append(run()))
            thread.start(), thread.join()
        print(inside, *other, run(), flush=True)
        os._exit(0)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.stdout.split() == ["{1}", "{0}", "{0}"], result.stderr


def test_compiled_code_keeps_to_what_held_when_it_was_traced() -> None:
    graphs: list[bool] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append("flash_attn" in str(module.graph))
        return module.forward

    def block_inside(x: Tensor) -> Tensor:
        with replace_sdpa():
            y = F.scaled_dot_product_attention(x, x, x)
        return y

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x, other = _x(), _Thread()
    for function, ours in ((block_inside, True), (attend, False)):
        torch._dynamo.reset()
        graphs.clear()
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=backend)(x), TORCHS(x, x, x))
        assert graphs == [ours] and F.scaled_dot_product_attention is TORCHS
    with replace_sdpa():
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(attend, fullgraph=True, backend=backend)
        compiled(x)
        assert graphs == [True]
        torch._dynamo.reset()
        graphs.clear()
        other(lambda: torch.compile(attend, fullgraph=True, backend=backend)(x))
        assert graphs == [False]
        torch._dynamo.reset()
        graphs.clear()
        torch.compile(block_inside, fullgraph=True, backend=backend)(x)
        assert graphs == [True] and _ours_runs()


@pytest.mark.parametrize("left", [False, True])
def test_the_function_can_be_pickled_and_means_what_holds_where_it_is_called(left: bool) -> None:
    x = _x()
    with replace_sdpa():
        function = F.scaled_dot_product_attention
        if not left:
            assert explain(pickle.loads(pickle.dumps(function)), x, x, x).calls
    data = pickle.dumps(function)
    assert not explain(pickle.loads(data), x, x, x).calls
    with replace_sdpa():
        assert explain(pickle.loads(data), x, x, x).calls


def test_whatever_has_torch_function_is_asked() -> None:
    class Fake:
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function, len(args), sorted(kwargs or {})

    x = _x()
    for arguments in ((Fake(), x, x), (x, x, Fake()), (x, x, x, Fake())):
        assert sdpa(*arguments)[0] is sdpa  # type: ignore[arg-type]
        with replace_sdpa():
            assert F.scaled_dot_product_attention(*arguments)[0] is F.scaled_dot_product_attention  # type: ignore


def test_torchs_modules_are_reached_as_the_readme_says() -> None:
    layer, mha = nn.TransformerEncoderLayer(16, 2, batch_first=True), nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)

    def calls(need_weights: bool) -> list[int]:
        functions = (lambda: layer(x), lambda: mha(x, x, x, need_weights=need_weights))
        return [len(explain(function).calls) for function in functions]

    with replace_sdpa():
        assert calls(need_weights=False) == [1, 1]
        assert calls(need_weights=True) == [1, 0]
        layer.eval(), mha.eval()
        with torch.no_grad():
            assert calls(need_weights=False) == [0, 0]
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                assert calls(need_weights=False) == [1, 1]
            finally:
                torch.backends.mha.set_fastpath_enabled(True)


def test_a_restored_block_ends_once() -> None:
    with replace_sdpa() as block:
        block.restore()
        assert F.scaled_dot_product_attention is TORCHS
        with block:
            assert _ours_runs()
    assert flash_attn.replace_sdpa is replace_sdpa

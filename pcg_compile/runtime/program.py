"""A program: everything one step runs, as a flat list of calls with all arguments bound."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import PCGError
from ..graph.contexts import Autocast
from ..graph.facts import storage_of
from ..graph.plan import CallSite, InputSpec, PieceSite, Site
from ..graph.scalars import evaluate, expr_of, is_scalar, shape_at, strides_at, symbols_of
from ..report.stats import Counters
from ..torch_internals import foreach_copy, unowned_alias
from .agreement import RankFailed
from .binding import Binding, wants_static
from .buffers import extent
from .capture import StaticReplay
from .probe import Argument, probe
from .views import assign, copier, looks_like, real_rows, tails
from .whole import WholeStep, why_not_whole

__all__ = ["Program", "build_and_run"]

Op = Callable[[], Any]

#: A recording keeps its results: logits of 4,096 tokens would hold a gigabyte.
_RESULT_LIMIT = 256 << 20


@dataclass(frozen=True)
class _Late:
    """An argument that is only known when the step runs: a position in the frame."""

    slot: int


@dataclass(frozen=True)
class _LateNumber:
    """A number that depends on data of the step."""

    value: Any


@dataclass
class Program:
    """What a step of certain sizes runs.

    Attributes:
        bucket: the size of every symbol in the recordings, None where the step runs at its exact sizes.
        ops: replays and calls, in order.
        targets, sources: static memory for the inputs, and the arguments to copy there.
        late_inputs: (frame slot, argument) of inputs that are read where they lie.
        frame: results of calls that nothing static holds, emptied after the step.
        emit: makes the outputs.
        replays: recordings that a step replays.
    """

    bucket: tuple[int, ...] | None
    counters: Counters
    ops: list[Op] = field(default_factory=list)
    #: For each op the index of the site that it belongs to, for reports.
    op_sites: list[int] = field(default_factory=list)
    #: What is done to the copied inputs before anything reads them.
    prologue: list[Op] = field(default_factory=list)
    #: The same step as one recording, or None.
    whole: WholeStep | None = None
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    late_inputs: list[tuple[int, int]] = field(default_factory=list)
    frame: list[Any] = field(default_factory=list)
    #: Sizes, and sizes that only the data tell, as the step goes on.
    sizes: dict[sympy.Symbol, int] = field(default_factory=dict)
    emit: Callable[[Sequence[Any]], Any] = lambda args: ()
    replays: int = 0
    recording_keys: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    #: Fallbacks to count at each step: (reason, where).
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    #: Whether the program can serve again; not after a failed recording.
    complete: bool = True

    def load(self, args: Sequence[Any]) -> None:
        """Puts the arguments where the program reads them."""
        if self.targets:
            foreach_copy(self.targets, [args[i] for i in self.sources])
        for slot, position in self.late_inputs:
            self.frame[slot] = args[position]

    def start(self, args: Sequence[Any]) -> None:
        """Puts the arguments in place, as the pieces expect them."""
        self.load(args)
        for op in self.prologue:
            op()

    def run_pieces(self) -> None:
        """Replays and calls, in order."""
        for op in self.ops:
            op()
        self.counters.replays += self.replays

    def run(self, args: Sequence[Any]) -> Any:
        """One step."""
        self.start(args)
        try:
            if self.whole is None or not self.whole.wanted or not self.whole.run():
                self.run_pieces()
            return self.emit(args)
        finally:
            if self.frame:
                self.frame[:] = [None] * len(self.frame)


@dataclass(frozen=True)
class Body:
    """What the programs of a bucket have in common, where everything runs at the bucket's size."""

    static: dict[fx.Node, torch.Tensor]
    ops: list[Op]
    op_sites: list[int]
    replays: int
    recording_keys: list[tuple[int, tuple[int, ...]]]
    whole: WholeStep | None


def build_and_run(
    binding: Binding,
    sizes: Mapping[sympy.Symbol, int],
    bucket: Mapping[sympy.Symbol, int] | None,
    args: Sequence[Any],
    step: Any,
    *,
    compiled: bool = True,
) -> tuple[Program, Any]:
    """Builds the program of a step and runs the step on the way, recording what is not recorded yet.

    Args:
        sizes: the real sizes. bucket: the sizes to record at, None to run everything at its exact size.
        args: the call's arguments. step: the state of ``pcg.step()``, or None.
        compiled: False runs pieces eagerly (arguments that overlap in memory).

    Recording and running go together because a piece that is warmed up, or run on a CPU to record it, must see
    real data: rubbish in an index would be an illegal memory access.
    """
    builder = _Builder(binding, sizes, bucket, args, step, compiled)
    try:
        outputs = builder.build()
    except BaseException:
        builder.drop_new_recordings()
        raise
    finally:
        builder.program.frame[:] = [None] * len(builder.program.frame)
    if not builder.program.complete:
        builder.drop_new_recordings()
    return builder.program, outputs


class _Builder:
    def __init__(
        self,
        binding: Binding,
        sizes: Mapping[sympy.Symbol, int],
        bucket: Mapping[sympy.Symbol, int] | None,
        args: Sequence[Any],
        step: Any,
        compiled: bool,
    ) -> None:
        self.binding, self.shared, self.plan = binding, binding.shared, binding.shared.plan
        self.sizes, self.bucket, self.args, self.step, self.compiled = sizes, bucket, args, step, compiled
        self.at = bucket if bucket is not None else sizes
        self.program = Program(
            None if bucket is None else tuple(bucket[s] for s in self.plan.symbols), self.shared.counters
        )
        self.program.sizes.update(sizes)
        self.static: dict[fx.Node, torch.Tensor] = {}
        self.slots: dict[fx.Node, int] = {}
        self.new: list[tuple[int, tuple[int, ...]]] = []
        self.keep: dict[int, list[Any]] = {}
        self.copied: list[InputSpec] = []

    # -- building ---------------------------------------------------------------------------------------------

    def build(self) -> Any:
        body = self.binding.bodies.get(self.program.bucket) if self.compiled and self.program.bucket else None
        if body is not None:
            self.static.update(body.static)
        self._bind_inputs()
        if body is not None:
            return self._build_on(body)
        self.program.start(self.args)
        with self.shared.engine.session():
            for site in self.plan.sites:
                self._run_site(site)
                self.program.op_sites += [site.index] * (len(self.program.ops) - len(self.program.op_sites))
                self.keep.pop(site.index, None)
        self.program.emit = self._emitter()
        self.program.counters.replays += self.program.replays
        if self.bucket is not None and self.shared.options.attention != "eager" and self.program.complete:
            self._find_whole()
        if self.bucket is not None and self._is_the_buckets():
            program = self.program
            self.binding.bodies[program.bucket] = Body(  # type: ignore[index]
                dict(self.static),
                program.ops,
                program.op_sites,
                program.replays,
                program.recording_keys,
                program.whole,
            )
        return self.program.emit(self.args)

    def _build_on(self, body: Body) -> Any:
        """A program for other real sizes in a bucket that has one: only inputs and outputs differ."""
        program = self.program
        program.ops, program.replays, program.whole = body.ops, body.replays, body.whole
        program.op_sites, program.recording_keys = body.op_sites, body.recording_keys
        program.emit = self._emitter()
        return program.run(self.args)

    def _is_the_buckets(self) -> bool:
        """Whether nothing between inputs and outputs depends on the real sizes."""
        return (
            self.compiled
            and self.program.complete
            and not self.program.frame
            and not self.program.fallbacks
            and all(site.mode == "request" for site in self.plan.sites if isinstance(site, CallSite))
        )

    def _find_whole(self) -> None:
        """The whole step as one recording, shared by all programs of the bucket."""
        assert self.program.bucket is not None
        captured = self.shared.options.attention == "captured"
        reason = why_not_whole(self.plan.sites, self._is_recorded)
        if not self.compiled:
            reason = "pieces run eagerly"
        if reason is not None:
            if reason and captured:
                self.program.fallbacks.append((f"attention between pieces: {reason}", ""))
            return
        wholes = self.binding.wholes
        if self.program.bucket not in wholes:
            leaves, _ = tree_flatten(self.plan.outputs, is_leaf=lambda x: isinstance(x, fx.Node))
            made = [n for n in leaves if isinstance(n, fx.Node) and n in self.static and n.op != "placeholder"]
            wholes[self.program.bucket] = WholeStep(
                self.shared,
                dict(self.at),
                self._bucket_name(),
                {s.node: self.static[s.node] for s in self.plan.inputs if s.node in self.static},
                {node: self.static[node] for node in made},
                {s.index: self._whole_piece(s) for s in self.plan.sites if isinstance(s, PieceSite)},
                self._whole_call,
                True if captured else None,
            )
        self.program.whole = wholes[self.program.bucket]

    def _is_recorded(self, site: PieceSite) -> bool:
        if any(node not in self.static for node in (*site.reads, *site.outputs)):
            return False
        assert self.bucket is not None
        key = (site.index, tuple(self.bucket[s] for s in site.piece.symbols))
        return key in self.binding.recordings

    def _whole_piece(self, site: PieceSite) -> Callable[..., Sequence[torch.Tensor]]:
        function, conform = site.compiled.function, self._conformer(site.piece)
        return lambda *args: conform(function(*args))

    def _whole_call(self, site: CallSite) -> Callable[..., Any]:
        function = _function_of(site)
        return _in_autocast(function, site.autocast) if site.autocast else function

    def drop_new_recordings(self) -> None:
        for key in self.new:
            self.binding.recordings.pop(key, None)
        self.new.clear()

    def _add(self, op: Op) -> Any:
        self.program.ops.append(op)
        return op()

    def _late(self, node: fx.Node) -> int:
        if node not in self.slots:
            self.slots[node] = len(self.program.frame)
            self.program.frame.append(None)
        return self.slots[node]

    def _bind_inputs(self) -> None:
        for spec in self.plan.inputs:
            if spec.kind == "step":
                if spec.node not in self.static:
                    self._bind_step_input(spec)
            elif not isinstance(spec.value, torch.Tensor):
                continue
            elif self.bucket is None or (spec.kind == "user" and not wants_static(self.plan, spec.node)):
                # Read where it lies; what lies on another device than the recordings does so always.
                self.program.late_inputs.append((self._late(spec.node), spec.position))
            elif spec.kind in ("static", "bound"):
                self.static[spec.node] = self.args[spec.position]
            else:
                self._copy_in(spec)

    def _bind_step_input(self, spec: InputSpec) -> None:
        assert spec.step is not None
        tensor = spec.step.get(self.step, int(evaluate(spec.step.size, self.at)))
        if not looks_like(tensor, spec.value, self.at):
            # Another cache than the one that the pieces were compiled with: their code may hold its sizes.
            self.compiled = False
            self.program.fallbacks.append(
                (f"{spec.step.name} has other sizes than when compiled: pieces run eagerly", "")
            )
        self.static[spec.node] = tensor

    def _copy_in(self, spec: InputSpec) -> None:
        shape, strides = shape_at(spec.value, self.at), strides_at(spec.value, self.at)
        target = self.binding.place(spec.node, ("input", spec.position), shape, strides, spec.value.dtype)
        self.static[spec.node] = target
        self.program.targets.append(real_rows(target, spec.value, self.sizes))
        self.program.sources.append(spec.position)
        self.copied.append(spec)
        pad_value = 0 if spec.node in self.plan.row_indices else spec.pad_value
        if pad_value is not None:
            self.program.prologue.extend(partial(t.fill_, pad_value) for t in tails(target, spec.value, self.sizes))
        if spec.node in self.plan.row_indices:
            self._count_from_the_real_size(self.program.targets[-1], self.sizes[self.plan.row_indices[spec.node]])

    def _count_from_the_real_size(self, indices: torch.Tensor, size: int) -> None:
        with torch.inference_mode(False):
            negative = torch.empty(indices.shape, dtype=torch.bool, device=indices.device)
        self.program.prologue.append(partial(torch.lt, indices, 0, out=negative))
        self.program.prologue.append(partial(indices.add_, negative, alpha=size))

    def _run_site(self, site: Site) -> None:
        if isinstance(site, CallSite):
            self._run_call(site)
        elif self.bucket is None or not self._run_static(site):
            self._run_exact(site)

    # -- pieces -----------------------------------------------------------------------------------------------

    def _run_static(self, site: PieceSite) -> bool:
        """Runs a piece from a recording, making it where there is none. False: it must run at its exact size."""
        assert self.bucket is not None
        if site.refusal is not None:
            if site.is_piece:
                self.program.fallbacks.append((site.refusal, site.where))
            return False
        if any(node not in self.static for node in site.reads):
            return False
        weight = self._result_bytes(site)
        if weight > self._result_limit():
            reason = f"the results of a piece would hold {weight >> 20} MiB; it runs without a recording"
            self.program.fallbacks.append((reason, site.where))
            return self._run_unrecorded(site)
        key = (site.index, tuple(self.bucket[s] for s in site.piece.symbols))
        if self.binding.failures.get(key, 0) > 1:
            self.program.fallbacks.append(
                ("a piece could not be recorded, twice; it runs without a recording", site.where)
            )
            return self._run_unrecorded(site)
        if site.needs_probe and site.probed is None and not self._probe(site):
            return False
        if site.probed:
            self.program.fallbacks.append((f"opaque, and by the probe mixing: {site.probed}", site.where))
            return False
        recording = self.binding.recordings.get(key)
        if recording is not None:
            recording.replay()
        else:
            recording = self._record(site, key)
            if recording is None:
                return self._run_unrecorded(site)
        self.static.update(zip(site.outputs, recording.outputs, strict=True))
        if not site.idle:
            self.program.ops.append(recording.replay)
        if not site.trivial:
            self.program.recording_keys.append(key)
            self.program.replays += 1
        return True

    def _run_unrecorded(self, site: PieceSite) -> bool:
        """False where a piece may run at its exact size; else runs it at the bucket, as a replay that nothing holds.

        Its results share memory with something that is written later, of which exact results would be copies.
        """
        if not site.shares_written:
            return False
        piece = site.piece
        inputs = [self.static[node] for node in piece.inputs]
        numbers = [self.at[s] for s in piece.symbols]
        function = site.compiled.function if self.compiled else piece.gm.forward
        with torch.inference_mode(False), torch.no_grad():
            made = StaticReplay().record(lambda: function(*numbers, *inputs), self._placer(site, inputs), None)
        self.static.update(zip(site.outputs, made.outputs, strict=True))
        self.program.ops.append(made.replay)
        return True

    def _probe(self, site: PieceSite) -> bool:
        """Probes a piece once, with this step's rows; False where this bucket leaves no room for padding."""
        assert self.bucket is not None
        piece = site.piece
        # Where the step fills its bucket, its last row plays the padding.
        sizes = {s: n - 1 if n == self.bucket[s] and s in piece.symbols else n for s, n in self.sizes.items()}
        if any(sizes[s] < 1 for s in piece.symbols):
            reason = f"opaque: {site.safety.reason}; too small a bucket to probe it"
            self.program.fallbacks.append((reason, site.where))
            return False
        fixed = {
            s.node for s in self.plan.inputs if s.pad_value is not None or s.kind == "step"
        } | self.plan.row_indices.keys()
        arguments = [
            Argument(self.static[node], self.plan.value(node), i in piece.writes, node in fixed)
            for i, node in enumerate(piece.inputs)
        ]

        def run(tensors: Sequence[Any], at: Mapping[sympy.Symbol, int]) -> Sequence[torch.Tensor]:
            return site.compiled.function(*(at[s] for s in piece.symbols), *tensors)

        with _rng_unchanged(self.shared.device):
            verdict = probe(run, arguments, [self.plan.value(node) for node in piece.outputs], sizes, self.bucket)
        site.compiled.warm = True
        # "" once the probe found nothing.
        site.probed = verdict or ""
        return True

    def _result_bytes(self, site: PieceSite) -> int:
        fakes = [self.plan.value(node) for node in site.outputs]
        return sum(extent(shape_at(f, self.at), strides_at(f, self.at)) * f.element_size() for f in fakes)

    def _result_limit(self) -> int:
        budget = self.shared.options.memory_budget
        return _RESULT_LIMIT if budget is None else budget // 8

    def _record(self, site: PieceSite, key: tuple[int, tuple[int, ...]]) -> Any:
        piece, compiled = site.piece, site.compiled
        function = compiled.function if self.compiled else piece.gm.forward
        inputs = [self.static[node] for node in piece.inputs]
        numbers = [self.at[s] for s in piece.symbols]
        conform = self._conformer(piece)
        engine = StaticReplay() if site.trivial else self.shared.engine

        def run() -> Sequence[torch.Tensor]:
            return conform(function(*numbers, *inputs))

        # What comes from the step is written at the step's slots, so that writing twice is writing once.
        step_inputs = {s.node for s in self.plan.inputs if s.kind == "step"}
        written = [inputs[i] for i in piece.writes if piece.inputs[i] not in step_inputs]
        before = [t.clone() for t in written]

        def restore() -> None:
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(old)

        def warm_up() -> None:
            with _rng_unchanged(self.shared.device):
                run()
            restore()

        agreement = self.shared.agreement if not site.trivial else None
        started = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
                recording = engine.record(
                    run,
                    self._placer(site, inputs),
                    None if compiled.warm else warm_up,
                    frozenset(piece.symbols),
                    agreement.all_ready if agreement is not None else lambda: None,
                )
        except PCGError:
            raise
        except Exception as error:
            restore()
            if agreement is not None and not isinstance(error, RankFailed):
                agreement.all_ready(False)
            self.binding.failures[key] = self.binding.failures.get(key, 0) + 1
            self.program.complete = False
            reason = f"recording failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.shared.counters.fall_back(reason, site.where)
            return None
        compiled.warm = True
        if recording.nbytes >= 0 and not isinstance(engine, StaticReplay):
            self.keep.setdefault(self._release_after(site), []).extend(recording.outputs)
            recording.outputs = [unowned_alias(t) for t in recording.outputs]
        self.binding.recordings[key] = recording
        self.new.append(key)
        if not site.trivial:
            self.shared.counters.captured += 1
            use = self.shared.counters.bucket(self._bucket_name())
            use.seconds += time.perf_counter() - started
            use.bytes += recording.nbytes
        return recording

    def _release_after(self, site: PieceSite) -> int:
        """The site after which later recordings may reuse the memory of this one's results."""
        ends = [self.plan.last_use.get(node, len(self.plan.sites)) for node in site.outputs]
        return max(ends, default=site.index)

    def _bucket_name(self) -> Any:
        names = [self.at[s] for s in self.plan.symbols if s in self.plan.dims]
        return names[0] if len(names) == 1 else tuple(names)

    def _conformer(self, piece: Any) -> Callable[[Any], Sequence[torch.Tensor]]:
        """Makes results look as the next piece was compiled for, where a compiler chose other strides."""
        fakes = [self.plan.value(node) for node in piece.outputs]
        at = self.at

        def conform(results: Any) -> Sequence[torch.Tensor]:
            checked = []
            for result, fake in zip(results, fakes, strict=True):
                if not looks_like(result, fake, at):
                    shaped = torch.empty_strided(
                        shape_at(fake, at), strides_at(fake, at), dtype=fake.dtype, device=result.device
                    )
                    result = assign(shaped, result)
                checked.append(result)
            return checked

        return conform

    def _placer(self, site: PieceSite, inputs: Sequence[torch.Tensor]) -> Callable[[int, torch.Tensor], torch.Tensor]:
        owned = {t.untyped_storage().data_ptr() for t in inputs}
        groups: dict[int, list[fx.Node]] = {}
        for node in site.outputs:
            groups.setdefault(storage_of(self.plan.value(node)), []).append(node)

        def place(i: int, result: torch.Tensor) -> torch.Tensor:
            node = site.outputs[i]
            fake = self.plan.value(node)
            shape, strides = shape_at(fake, self.at), strides_at(fake, self.at)
            if result.untyped_storage().data_ptr() in owned and result.numel():
                return result
            group = groups[storage_of(fake)]
            if len(group) == 1:
                return self.binding.place(node, ("value", self.plan.slots[node]), shape, strides, fake.dtype)
            offset = int(evaluate(fake.storage_offset(), self.at))
            size = int(evaluate(fake.untyped_storage().nbytes(), self.at))
            base = self.binding.place((site.index, group[0], "group"), ("group", group[0]), (size,), (1,), torch.uint8)
            if all(s > 0 or n <= 1 for n, s in zip(shape, strides, strict=True)):
                usable = base[: size // fake.dtype.itemsize * fake.dtype.itemsize].view(fake.dtype)
                return usable.as_strided(shape, strides, offset)
            return self.binding.place(node, ("value", self.plan.slots[node]), shape, strides, fake.dtype)

        return place

    def _run_exact(self, site: PieceSite) -> None:
        piece = site.piece
        numbers = [self.sizes.get(s, _LateNumber(v)) for s, v in zip(piece.symbols, piece.example, strict=False)]
        function = site.compiled.function if self.compiled else piece.gm.forward
        if site.compiled.failure is None and self.compiled:
            site.compiled.warm = True
        before: list[Op] = []
        after: list[Op] = []
        arguments = [self._real(node, i in piece.writes, site, before, after) for i, node in enumerate(piece.inputs)]
        written = [piece.inputs[i] for i in piece.writes]
        call = self._caller(function, (*numbers, *arguments), {})
        self._finish(site, call, before, after, written, [(node, (i,)) for i, node in enumerate(piece.outputs)], False)

    # -- calls ------------------------------------------------------------------------------------------------

    def _run_call(self, site: CallSite) -> None:
        request = site.mode == "request" and self.bucket is not None
        sizes = self.at if request else self.sizes
        before: list[Op] = []
        after: list[Op] = []
        written = set(site.writes)
        done: dict[fx.Node, Any] = {}

        def resolve(node: fx.Node) -> Any:
            if node.op == "get_attr":
                return _attribute(self.plan.gm, str(node.target))
            value = self.plan.value(node)
            if is_scalar(value):
                return evaluate(value, sizes) if symbols_of(value) <= sizes.keys() else _LateNumber(value)
            if node not in done:
                if request and node in self.static:
                    done[node] = self.static[node]
                else:
                    done[node] = self._real(node, node in written, site, before, after)
            return done[node]

        arguments = fx.node.map_arg(site.node.args, resolve)
        keywords = fx.node.map_arg(site.node.kwargs, resolve)
        extra: dict[str, Any] = {}
        if site.op.bucket_args:
            arguments = tuple(
                self._at_bucket(site.node.args[i]) if i in site.op.bucket_args else a for i, a in enumerate(arguments)
            )
            extra["mode"] = site.mode
        if site.op.bind is not None:
            call = self._binder(site.op.bind, arguments, {**keywords, **extra})
        else:
            call = self._caller(_function_of(site), arguments, keywords)
        if site.autocast:
            call = _in_autocast(call, site.autocast)
        paths = [(node, _path(node, site.node)) for node in site.outputs]
        self._finish(site, call, before, after, [] if request else list(site.writes), paths, request)

    def _at_bucket(self, argument: Any) -> Any:
        return evaluate(self.plan.value(argument), self.at) if isinstance(argument, fx.Node) else argument

    def _real(self, node: fx.Node, written: bool, site: Site, before: list[Op], after: list[Op]) -> Any:
        """A tensor argument at its real size, looking exactly as eager's."""
        if node not in self.static:
            return _Late(self._late(node))
        fake = self.plan.value(node)
        view = real_rows(self.static[node], fake, self.sizes)
        if looks_like(view, fake, self.sizes) or (isinstance(site, CallSite) and site.op.any_strides):
            return view
        shape, strides = shape_at(fake, self.sizes), strides_at(fake, self.sizes)
        with torch.inference_mode(False), torch.no_grad():
            exact = torch.empty_strided(shape, strides, dtype=view.dtype, device=view.device)
        before.append(partial(exact.copy_, view))
        if written:
            after.append(partial(view.copy_, exact))
        return exact

    def _caller(self, function: Callable[..., Any], arguments: Any, keywords: Mapping[str, Any]) -> Op:
        flat, spec = tree_flatten((tuple(arguments), dict(keywords)))
        late = [(i, leaf.slot) for i, leaf in enumerate(flat) if isinstance(leaf, _Late)]
        numbers = [(i, leaf.value) for i, leaf in enumerate(flat) if isinstance(leaf, _LateNumber)]
        if not late and not numbers:
            return partial(function, *arguments, **keywords)
        frame, sizes = self.program.frame, self.program.sizes

        def call() -> Any:
            leaves = list(flat)
            for i, slot in late:
                leaves[i] = frame[slot]
            for i, value in numbers:
                leaves[i] = evaluate(value, sizes)
            args, kwargs = tree_unflatten(leaves, spec)
            return function(*args, **kwargs)

        return call

    def _binder(self, bind: Callable[..., Op], arguments: Any, keywords: Mapping[str, Any]) -> Op:
        flat, _ = tree_flatten((tuple(arguments), dict(keywords)))
        if any(isinstance(leaf, (_Late, _LateNumber)) for leaf in flat):
            late = self._caller(bind, arguments, keywords)
            return lambda: late()()
        return bind(*arguments, **keywords)

    def _finish(
        self,
        site: Site,
        call: Op,
        before: list[Op],
        after: list[Op],
        written: Sequence[fx.Node],
        paths: Sequence[tuple[fx.Node, tuple[int, ...]]],
        request: bool,
    ) -> None:
        """Adds a call and what its results need: copies into static memory, zeroed padding rows."""
        for node in written:
            if node in self.static:
                after.extend(partial(t.zero_) for t in tails(self.static[node], self.plan.value(node), self.sizes))
        late_results = isinstance(site, CallSite) and site.op.late
        stores = [self._store(node, path, request, late_results, after) for node, path in paths]
        for op in before:
            self._add(op)
        if not stores:
            self._add(call)
        else:

            def call_and_store() -> None:
                result = call()
                for store in stores:
                    store(result)

            self._add(call_and_store)
        for op in after:
            self._add(op)

    def _store(
        self, node: fx.Node, path: tuple[int, ...], request: bool, late: bool, after: list[Op]
    ) -> Callable[[Any], None]:
        fake = self.plan.value(node)
        learn = self._learner(fake)
        if not isinstance(fake, torch.Tensor):
            return lambda result: learn(_follow(result, path))
        if self.bucket is None or late or not (request or wants_static(self.plan, node)):
            slot, frame = self._late(node), self.program.frame

            def keep(result: Any) -> None:
                frame[slot] = value = _follow(result, path)
                learn(value)

            return keep
        shape, strides = shape_at(fake, self.at), strides_at(fake, self.at)
        place = self.binding.place(node, ("value", self.plan.slots[node]), shape, strides, fake.dtype)
        self.static[node] = place
        target = place if request else real_rows(place, fake, self.sizes)
        if not request:
            after.extend(partial(t.zero_) for t in tails(place, fake, self.sizes))
        if not path and 0 not in target.stride():
            return target.copy_
        return lambda result: assign(target, _follow(result, path))  # type: ignore[func-returns-value]

    def _learner(self, fake: Any) -> Callable[[Any], None]:
        """Notes the sizes that only a result tells."""
        sizes = self.program.sizes
        if not isinstance(fake, torch.Tensor):
            symbol = expr_of(fake)

            def note(value: Any) -> None:
                sizes[symbol] = value

            return note
        unknown = [(read, expr_of(n)) for read, n in _layout_of(fake) if not symbols_of(n) <= self.sizes.keys()]
        if not unknown:
            return lambda value: None

        def note_shape(value: Any) -> None:
            for read, expr in unknown:
                if isinstance(expr, sympy.Symbol):
                    sizes[expr] = read(value)

        return note_shape

    # -- outputs ----------------------------------------------------------------------------------------------

    def _emitter(self) -> Callable[[Sequence[Any]], Any]:
        leaves, spec = tree_flatten(self.plan.outputs, is_leaf=lambda x: isinstance(x, fx.Node))
        positions = {s.node: s.position for s in self.plan.inputs if s.position >= 0}
        bases = {storage_of(s.value): s for s in self.copied}
        groups: dict[int, list[int]] = {}
        makers: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
        constants = list(leaves)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, fx.Node):
                continue
            if leaf.op == "get_attr":
                constants[i] = _attribute(self.plan.gm, str(leaf.target))
                continue
            value = self.plan.value(leaf)
            if leaf in positions and isinstance(value, torch.Tensor):
                makers.append((i, itemgetter(positions[leaf])))
            elif is_scalar(value):
                if symbols_of(value) <= self.sizes.keys():
                    constants[i] = evaluate(value, self.sizes)
                else:
                    makers.append((i, self._late_number(value)))
            elif storage_of(value) in bases:
                makers.append((i, self._view_of_argument(value, bases[storage_of(value)])))
            elif leaf in self.static:
                if self.shared.options.outputs == "view" or self._is_users_memory(value):
                    constants[i] = real_rows(self.static[leaf], value, self.sizes)
                else:
                    groups.setdefault(storage_of(value), []).append(i)
            else:
                makers.append((i, self._from_frame(leaf)))
        copies = [(indices, self._copier([leaves[i] for i in indices])) for indices in groups.values()]
        back = [
            (spec.position, real_rows(self.static[spec.node], spec.value, self.sizes))
            for spec in self.copied
            if spec.node in self.plan.mutated
        ]

        def emit(args: Sequence[Any]) -> Any:
            for position, static in back:
                args[position].copy_(static)
            results = list(constants)
            for indices, copy in copies:
                for i, result in zip(indices, copy(), strict=True):
                    results[i] = result
            for i, make in makers:
                results[i] = make(args)
            return tree_unflatten(results, spec)

        return emit

    def _copier(self, nodes: Sequence[fx.Node]) -> Callable[[], list[torch.Tensor]]:
        fakes = [self.plan.value(node) for node in nodes]
        views = [real_rows(self.static[node], fake, self.sizes) for node, fake in zip(nodes, fakes, strict=True)]
        return copier(list(zip(views, fakes, strict=True)), self.sizes)

    def _late_number(self, value: Any) -> Callable[[Sequence[Any]], Any]:
        sizes = self.program.sizes
        return lambda args: evaluate(value, sizes)

    def _view_of_argument(self, fake: torch.Tensor, base: InputSpec) -> Callable[[Sequence[Any]], torch.Tensor]:
        """A result that is a view of an argument in eager is one here, after what was written came back."""
        shape, strides = shape_at(fake, self.sizes), strides_at(fake, self.sizes)
        first = int(evaluate(base.value.storage_offset(), self.sizes)) * base.value.itemsize // fake.itemsize
        offset = int(evaluate(fake.storage_offset(), self.sizes)) - first

        def view(args: Sequence[Any]) -> torch.Tensor:
            argument = args[base.position]
            if argument.dtype == fake.dtype:
                return argument.as_strided(shape, strides, argument.storage_offset() + offset)
            # Counted in the result's elements, as torch.real's are.
            start = argument.storage_offset() * argument.itemsize // fake.itemsize + offset
            typed = torch.empty(0, dtype=fake.dtype, device=argument.device)
            return typed.set_(argument.untyped_storage(), start, shape, strides)

        return view

    def _is_users_memory(self, fake: torch.Tensor) -> bool:
        return storage_of(fake) in self.plan.users_memory

    def _from_frame(self, node: fx.Node) -> Callable[[Sequence[Any]], Any]:
        slot, frame = self._late(node), self.program.frame
        ours = {t.untyped_storage().data_ptr() for t in self.static.values()} if self.bucket is not None else set()
        users = {
            self.args[s.position].untyped_storage().data_ptr()
            for s in self.plan.inputs
            if s.position >= 0 and isinstance(s.value, torch.Tensor)
        }
        value = frame[slot]
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in ours - users:
            return lambda args: frame[slot].clone()
        return lambda args: frame[slot]


def _function_of(site: CallSite) -> Callable[..., Any]:
    target: Any = site.node.target
    if site.op.function is not None:
        return site.op.function
    if site.node.op == "call_method":
        name = str(target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    return target


def _path(node: fx.Node, source: fx.Node) -> tuple[int, ...]:
    path: list[int] = []
    while node is not source:
        path.insert(0, node.args[1])  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return tuple(path)


def _layout_of(tensor: torch.Tensor) -> list[tuple[Callable[[torch.Tensor], int], Any]]:
    """Every number of a tensor's layout, and how to read it from a tensor like it."""
    numbers: list[tuple[Callable[[torch.Tensor], int], Any]] = []
    for d, size in enumerate(tensor.shape):
        numbers.append((lambda t, d=d: t.shape[d], size))  # type: ignore[misc]
    if tensor.layout == torch.strided:
        for d, stride in enumerate(tensor.stride()):
            numbers.append((lambda t, d=d: t.stride(d), stride))  # type: ignore[misc]
        numbers.append((torch.Tensor.storage_offset, tensor.storage_offset()))
    return numbers


def _follow(result: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        result = result[index]
    return result


def _attribute(owner: Any, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def _in_autocast(call: Callable[..., Any], regions: Autocast) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cache in regions:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            return call(*args, **kwargs)

    return run


@contextlib.contextmanager
def _rng_unchanged(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A cast weight in autocast's cache would be freed under a recording that reads it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)

"""Turn in-place ops on activations into functional ones, so that every tensor of the graph has one value.

Tensors that share storage form a family: a root, and views of it, each made from its parent by a view op. Writing to a
member gives the member a new value, from it the parent (`put_back`, the inverse of the view), and so on up to the
root; other members are made again from the new root when they are next read. Buffers are the exception: they are state,
so that ops which update them (and their views) stay as they are, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..graph import Op, Ref, Tensor, map_refs
from ..ops import bind, is_aten, mutated_inputs, resolve
from .draft import CaptureError, Draft
from .observe import Form, Observer, Survey

# These change the tensor's own shape or gradient, not the memory that others see.
_METADATA_ONLY = {"detach_", "unsqueeze_", "squeeze_", "t_", "transpose_", "swapdims_", "swapaxes_"}


def functionalise(draft: Draft, observer: Observer) -> None:
    """Remove in-place ops on activations, inputs and constants; ValueError for one that has no functional form."""
    if any(mutated_inputs(op) for op in draft.ops):
        survey = observer.survey(draft, grad=False)
        draft.ops = _Functionaliser(draft, observer, survey).run()


@dataclass(frozen=True)
class _View:
    parent: str
    op: Op
    position: int


class _Functionaliser:
    """now[name]: (version of its family, the functional tensor that holds its value).

    same[name]: the tensor that an in-place op returned under another name.
    """

    def __init__(self, draft: Draft, observer: Observer, survey: Survey) -> None:
        self.draft, self.observer, self.survey = draft, observer, survey
        self.forms: dict[str, Form] = dict(survey.forms)
        self.views: dict[str, _View] = {}
        self.version: dict[str, int] = {}
        self.now: dict[str, tuple[int, str]] = {}
        self.same: dict[str, str] = {}
        self.frozen: set[str] = set()
        self.learned = self.depend_on_trainable()
        self.ops: list[Op] = []

    def run(self) -> list[Op]:
        for op in self.draft.ops:
            written = dict.fromkeys(mutated_inputs(op))
            roles = {self.draft.tensors[self.root(name)].role for name in written}
            if not written or roles == {"buffer"}:
                self.keep(op)
            elif len(written) > 1 or "parameter" in roles or not is_aten(op):
                raise self.unsupported(op, "writes to a parameter, or to several tensors at once")
            else:
                self.write(op, next(iter(written)))
        self.draft.loss = self.read(self.draft.loss)
        self.draft.outputs = [(path, self.read(name)) for path, name in self.draft.outputs]
        return self.ops

    def depend_on_trainable(self) -> set[str]:
        """Roots of the families in which a trainable parameter has a part at any time, by whatever way."""
        found = {t.name for t in self.draft.tensors.values() if t.requires_grad}
        for op in self.draft.ops:
            if any(self.root(name) in found for name in op.inputs):
                found.update(self.root(name) for name in (*op.outputs, *mutated_inputs(op)))
        return found

    def root(self, name: str) -> str:
        return self.survey.base.get(name, name)

    def canonical(self, name: str) -> str:
        while name in self.same:
            name = self.same[name]
        return name

    def keep(self, op: Op) -> None:
        read = self.reading(op)
        self.ops.append(read)
        aliased = {self.root(name): self.canonical(name) for name in reversed(op.inputs)}
        for position, name in enumerate(op.outputs):
            self.now[name] = (self.version.get(self.root(name), 0), name)
            if name in self.survey.base and self.root(name) in aliased:
                self.views[name] = _View(aliased[self.root(name)], op, position)

    def reading(self, op: Op) -> Op:
        current = {name: self.read(name) for name in dict.fromkeys(op.inputs)}
        args, kwargs = (map_refs(v, lambda ref: Ref(current[ref.name])) for v in (op.args, op.kwargs))
        return replace(op, args=args, kwargs=kwargs)

    def read(self, name: str) -> str:
        """The functional tensor with the value that `name` has now; views are made again where their family changed."""
        name = self.canonical(name)
        version = self.version.get(self.root(name), 0)
        seen, current = self.now.get(name, (0, name))
        if seen != version:
            view = self.views[name]
            parent = self.read(view.parent)
            made = self.replay(view, parent)
            self.now[name] = (version, made)
            return made
        return current

    def replay(self, view: _View, parent: str) -> str:
        """Another op like the view's, on the family's new value."""
        outputs = tuple(self.draft.fresh(name) for name in view.op.outputs)
        for old, new in zip(view.op.outputs, outputs, strict=True):
            t = self.draft.tensors[old]
            self.draft.add_tensor(new, t.shape, t.dtype)
            self.forms[new] = self.forms[old]
        args, kwargs = (
            map_refs(v, lambda ref: Ref(parent if self.canonical(ref.name) == view.parent else self.read(ref.name)))
            for v in (view.op.args, view.op.kwargs)
        )
        self.ops.append(replace(view.op, name=outputs[0], outputs=outputs, args=args, kwargs=kwargs))
        return outputs[view.position]

    def write(self, op: Op, name: str) -> None:
        """`name` gets a new value, and with it its family."""
        bare = op.target.split(".")[1]
        read = self.reading(op)
        if bare in _METADATA_ONLY:
            self.emit(replace(read, target=op.target.replace(bare, bare[:-1])))
            self.now[self.canonical(name)] = (self.version.get(self.root(name), 0), op.outputs[0])
            self.same[op.outputs[0]] = self.canonical(name)
            self.frozen.add(self.root(name))
            return
        if self.root(name) in self.frozen:
            raise self.unsupported(op, "writes to a tensor whose shape or gradient was changed in place before")
        if op.no_grad and self.draft.tensors[name].dtype.is_floating_point and self.root(name) in self.learned:
            raise self.unsupported(op, "writes to an activation under no_grad")
        name, root = self.canonical(name), self.root(name)
        self.same[op.outputs[0]] = name
        # From the written tensor up to the root, each with its value before the write.
        chain: list[tuple[_View, str]] = []
        member = name
        while member != root:
            view = self.views.get(member)
            if view is None:
                raise self.unsupported(op, "writes to a view of unknown origin")
            chain.append((view, self.read(view.parent)))
            member = view.parent
        value = self.functional(read, self.read(name), bare)
        self.version[root] = version = self.version.get(root, 0) + 1
        self.now[name] = (version, value)
        for view, old in chain:
            value = self.put_back(op, view, old, value)
            self.now[view.parent] = (version, value)

    def functional(self, op: Op, target: str, bare: str) -> str:
        """The value that the written tensor gets, of its old shape and dtype."""
        old = self.draft.tensors[target]
        bound = bind(op)
        if bare == "copy_":
            return self.fitted(op, bound["src"].name, old)
        if bare == "zero_":
            return self.emit_new(op, "aten.zeros_like.default", (Ref(target),), old)
        if bare == "fill_":
            value = bound["value"]
            if isinstance(value, Ref):
                return self.fitted(op, value.name, old)
            return self.emit_new(op, "aten.full_like.default", (Ref(target), value), old)
        namespace, _, overload = op.target.split(".")
        overload = "p" if bare == "bernoulli_" and overload == "float" else overload
        for candidate in (bare[:-1], bare[:-1] + "_functional"):
            functional = f"{namespace}.{candidate}.{overload}"
            try:
                resolve(functional)
            except ValueError:
                continue
            made = self.emit(replace(op, target=functional))
            return self.fitted(op, made, old)
        raise self.unsupported(op, f"uses {op.target}, which has no functional form")

    def fitted(self, op: Op, name: str, like: Tensor) -> str:
        """`name` cast and expanded to the dtype and shape of `like`."""
        t = self.draft.tensors[name]
        if t.dtype != like.dtype:
            name = self.emit_new(op, "aten.to.dtype", (Ref(name), like.dtype), replace(t, dtype=like.dtype))
        if t.shape != like.shape:
            name = self.emit_new(op, "aten.expand.default", (Ref(name), like.shape), like)
        return name

    def emit(self, op: Op) -> str:
        """Append `op`, with its outputs as observed."""
        form, _ = self.observer.observe(op, self.forms).outputs[0]
        name = op.outputs[0]
        self.draft.add_tensor(name, form.shape, form.dtype)
        self.forms[name] = form
        self.ops.append(op)
        return name

    def emit_new(self, like: Op, target: str, args: tuple[Any, ...], shaped: Tensor) -> str:
        op = self.draft.new_op(like, target, args, shaped.shape, shaped.dtype, target.split(".")[1])
        return self.emit(op)

    def put_back(self, op: Op, view: _View, parent: str, child: str) -> str:
        """The parent's value after its view got the value `child`."""
        target, bound = view.op.target, bind(view.op)
        whole = self.draft.tensors[parent]
        bare = target.split(".")[1]
        args: tuple[Any, ...]
        if bare in ("select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind"):
            return self.scatter(op, view, parent, child)
        if self.survey.forms[view.op.outputs[view.position]] == self.survey.forms[view.parent] and bare != "detach":
            return child
        if bare in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"):
            back, args = "aten.reshape.default", (Ref(child), whole.shape)
        elif bare in ("transpose", "t", "swapaxes", "swapdims"):
            back, args = target, (Ref(child), *view.op.args[1:])
        elif bare == "permute":
            dims = [d % len(whole.shape) for d in bound["dims"]]
            back, args = target, (Ref(child), tuple(dims.index(d) for d in range(len(dims))))
        elif bare == "diagonal":
            back, args = "aten.diagonal_scatter.default", (Ref(parent), Ref(child), *view.op.args[1:])
        else:
            raise self.unsupported(op, f"writes through a view made by {target}, while the whole is in use elsewhere")
        return self.emit_new(op, back, args, whole)

    def scatter(self, op: Op, view: _View, parent: str, child: str) -> str:
        whole, bound = self.draft.tensors[parent], bind(view.op)
        bare = view.op.target.split(".")[1]
        dim = bound["dim"]
        if bare == "select":
            target, rest = "aten.select_scatter.default", (dim, bound["index"])
        elif bare == "unbind":
            target, rest = "aten.select_scatter.default", (dim, view.position)
        elif bare == "slice":
            target, rest = "aten.slice_scatter.default", (dim, bound["start"], bound["end"], bound["step"])
        else:
            sizes = [self.draft.tensors[name].shape[dim] for name in view.op.outputs]
            start = bound["start"] if bare == "narrow" else sum(sizes[: view.position])
            if not isinstance(start, int):
                raise self.unsupported(op, "writes through a view whose start is a tensor")
            target, rest = "aten.slice_scatter.default", (dim, start, start + sizes[view.position], 1)
        return self.emit_new(op, target, (Ref(parent), Ref(child), *rest), whole)

    def unsupported(self, op: Op, what: str) -> CaptureError:
        line = self.draft.sources.get(op.name, "")
        return CaptureError(
            f"cannot be captured: {line or op.target} in module {op.module!r} {what}. Write it without the in-place "
            "update (y = x + 1 in place of x += 1), or keep the module whole with autopar.opaque(...)"
        )

"""From torch.export's fx graph to a Draft: sub-graphs inlined, tuples unpacked, bookkeeping ops left out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from ..graph import DEVICE, Op, Ref
from ..ops import OPAQUE, draws_random
from ..torch_private import known_value
from .draft import Draft, Untraceable
from .example import Call
from .opaque import Slot
from .trace import Trace, user_line

# Checks that the tracer adds; with static shapes they hold or the trace had failed.
_CHECKS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range")
# What a rank decides for itself.
_DROPPED_KWARGS = {"pin_memory": (False, None), "layout": (torch.strided, None)}


_VALUES = "makes a number, or a shape, that depends on the values of a tensor"


@dataclass(frozen=True)
class _Number:
    """What `tensor.item()` gives, made at `node`. An assertion may look at it, which no step repeats; an op may not."""

    node: torch.fx.Node


def lower(trace: Trace, call: Call) -> Draft:
    """Tensors are named after the module's fully qualified names, the example's keys, and torch's op names."""
    draft = Draft()
    lowering = _Lowering(draft, trace)
    env = lowering.placeholders(call)
    results = lowering.inline(trace.program.graph_module, env, no_grad=False)
    draft.loss = _name_of(results[0])
    draft.outputs = [
        (path, _name_of(ref)) for path, ref in zip(trace.output_paths, results[1:], strict=True) if isinstance(ref, Ref)
    ]
    return draft


class _Lowering:
    def __init__(self, draft: Draft, trace: Trace) -> None:
        self.draft, self.trace = draft, trace

    def placeholders(self, call: Call) -> dict[torch.fx.Node, Any]:
        draft, program = self.draft, self.trace.program
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        specs = program.graph_signature.input_specs
        # Names of the module come first: they must stay as they are.
        for name in dict.fromkeys(self.trace.fqns.values()):
            draft.fresh(name)
        env: dict[torch.fx.Node, Any] = {}
        pending = iter(call.names)
        for node, spec in zip(nodes, specs, strict=True):
            value = node.meta["val"]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                name = self.trace.fqns[spec.target]
                role = "parameter" if spec.kind is InputKind.PARAMETER else "buffer"
                trainable = name in self.trace.trainable
                if name not in draft.tensors:
                    rest = self.trace.rest_dtypes.get(name)
                    fields = dict(requires_grad=trainable, fqn=name, rest_dtype=rest)
                    draft.add_tensor(name, value.shape, value.dtype, role, **fields)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                name = self.constant(spec.target, program.constants[spec.target])
            elif spec.kind is InputKind.USER_INPUT and isinstance(value, torch.Tensor):
                name = draft.fresh(next(pending))
                draft.add_tensor(name, value.shape, value.dtype, "input")
                draft.inputs.append(name)
            else:
                raise ValueError(
                    f"the module uses {spec.target or node.name}, a {spec.kind.name}; only tensors can be captured"
                )
            env[node] = Ref(name)
        return env

    def constant(self, target: str, value: torch.Tensor) -> str:
        target = target.removeprefix("module.")
        value = known_value(value)
        if value.is_meta or type(value) is not torch.Tensor:
            raise ValueError(
                f"the module uses the tensor {target!r} ({type(value).__name__} on {value.device}), which is neither a "
                "parameter nor a buffer and has no value; register it with register_buffer, or build the module on a "
                "real device"
            )
        name = self.draft.fresh("constant_" + target.rpartition(".")[2])
        self.draft.add_tensor(name, value.shape, value.dtype, "constant")
        self.draft.constants[name] = value.detach().cpu().contiguous()
        return name

    def inline(self, module: torch.fx.GraphModule, env: dict[torch.fx.Node, Any], no_grad: bool) -> tuple[Any, ...]:
        """Add the ops of `module`'s graph; returns what its output node holds."""
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return tuple(self.value(v, env) for v in node.args[0])
            if node.op == "get_attr":
                env[node] = self.attribute(module, node.target)
            elif node.target is operator.getitem:
                env[node] = env[node.args[0]][node.args[1]]
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = self.region(node, env, no_grad)
            elif isinstance(node.target, torch._ops.OpOverload):
                env[node] = self.operator(node, env, no_grad)
            elif any(isinstance(self.value(v, env), _Number) for v in node.args):
                env[node] = _Number(node)
            else:
                what = getattr(node.target, "__name__", node.target)
                raise self.unsupported(node, f"computes {what} of sizes that depend on the values of a tensor")
        raise AssertionError("a graph without an output node")

    def attribute(self, module: torch.fx.GraphModule, target: str) -> Any:
        value = operator.attrgetter(target)(module)
        return Ref(self.constant(target, value)) if isinstance(value, torch.Tensor) else value

    def region(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], no_grad: bool) -> tuple[Any, ...]:
        """Inline what torch.export wraps: no-grad regions, and regions with autocast switched off."""
        kind = node.target.name()
        args = [self.value(v, env) for v in node.args]
        if kind == "wrap_with_set_grad_enabled":
            enabled, body, *operands = args
            no_grad = not enabled
        elif kind == "wrap_with_autocast":
            device, dtype, enabled, _cache, body, *operands = args
            if enabled:
                first = next((n for n in body.graph.nodes if n.meta.get("stack_trace")), node)
                raise self.unsupported(first, f"runs under torch.autocast({device!r}, {dtype}) opened in the module")
        else:
            raise self.unsupported(node, f"uses {kind}, a control-flow or wrapper operator")
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self.inline(body, dict(zip(inner, operands, strict=True)), no_grad)

    def operator(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], no_grad: bool) -> Any:
        target = node.target
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
        if name.startswith(_CHECKS):
            return None
        args = tuple(self.value(v, env) for v in node.args)
        kwargs = tuple((k, self.value(v, env)) for k, v in node.kwargs.items())
        kwargs = tuple((k, v) for k, v in kwargs if not (k in _DROPPED_KWARGS and v in _DROPPED_KWARGS[k]))
        value = node.meta.get("val")
        if name == "aten.item.default":
            return _Number(node)
        for number in (v for v in (*args, *(v for _, v in kwargs)) if isinstance(v, _Number)):
            raise self.unsupported(number.node, _VALUES)
        sequence = isinstance(value, tuple | list)
        values = tuple(value) if sequence else (value,)
        for item in values:
            if not isinstance(item, torch.Tensor) or any(not isinstance(n, int) for n in item.shape):
                raise self.unsupported(node, _VALUES)
        draft = self.draft
        # Opaque calls are named by their module, like everything else that a message or a plan shows.
        op_name = draft.fresh("opaque" if name == "autopar.opaque.default" else node.name)
        outputs = tuple(draft.fresh(f"{op_name}.{i}") for i in range(len(values))) if sequence else (op_name,)
        for output, item in zip(outputs, values, strict=True):
            draft.add_tensor(output, item.shape, item.dtype)
        draft.sources[op_name] = user_line(node.meta.get("stack_trace"))
        op = Op(op_name, name, args, kwargs, outputs, _module_path(node), sequence, no_grad=no_grad)
        is_opaque = name == "autopar.opaque.default"
        op = self.opaque(op) if is_opaque else Op(*_fields(op), random=draws_random(op), no_grad=no_grad)
        draft.ops.append(op)
        return tuple(map(Ref, outputs)) if sequence else Ref(op_name)

    def opaque(self, op: Op) -> Op:
        """args: (fqn, positional, keyword, names of parameters and buffers, these); see `ops.run_opaque`."""
        index, _, tensors, state = op.args
        call = self.trace.opaque.calls[index]

        def fill(value: Any) -> Any:
            if isinstance(value, Slot):
                return tensors[value.index]
            return tuple(fill(v) for v in value) if isinstance(value, tuple) else value

        positional, keyword = fill(call.args), tuple((k, fill(v)) for k, v in call.kwargs)
        saved = [tensors[i].name for i in call.saved_inputs] + [op.outputs[i] for i in call.saved_outputs]
        return Op(
            op.name,
            OPAQUE,
            (call.fqn, positional, keyword, call.state_names, state),
            (),
            op.outputs,
            call.fqn,
            # A single output comes back as a tensor, several as a tuple.
            returns_sequence=len(op.outputs) > 1,
            random=True,  # nobody can tell, so it is treated as if it did
            no_grad=op.no_grad,
            saves=tuple(dict.fromkeys(saved)),
            saved_extra_bytes=call.saved_extra_bytes,
        )

    def value(self, value: Any, env: dict[torch.fx.Node, Any]) -> Any:
        if isinstance(value, torch.fx.Node):
            return env[value]
        if isinstance(value, torch.device):
            return DEVICE
        if isinstance(value, tuple | list):
            return tuple(self.value(v, env) for v in value)
        return value

    def unsupported(self, node: torch.fx.Node, what: str) -> Untraceable:
        module = _module_path(node)
        return Untraceable(
            f"cannot be captured: {user_line(node.meta.get('stack_trace'))} in module {module!r} {what}. Rewrite it "
            "without, or keep that module whole: autopar.opaque(module.that_submodule), or @autopar.opaque on its class",
            module,
        )


def _fields(op: Op) -> tuple[Any, ...]:
    return op.name, op.target, op.args, op.kwargs, op.outputs, op.module, op.returns_sequence


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return (paths[-1] if paths else "").removeprefix("module").removeprefix(".")


def _name_of(value: Any) -> str:
    assert isinstance(value, Ref), f"a tensor expected, found {value!r}"
    return value.name

"""Making the linear layers of any torch model low-bit, in place."""

import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any, Literal

from torch import nn

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.nn.linear import NORMS, BitLinear, Norm
from thrifty.nn.packing import PackedBitLinear, Where
from thrifty.nn.replacements import Layer, Replacements
from thrifty.ops.ternary_matmul import FORMAT

#: Where a norm goes: in every layer the same, "sub_ln" for an RMSNorm in the layers that write to the residual stream
#: alone, or a choice for each (its dotted name, the module).
NormPlacement = Norm | Literal["sub_ln"] | Callable[[str, nn.Module], Norm]

#: Output heads, by a part of their dotted names, by how a part ends, and by the whole name.
HEADS = {
    *("score", "qa_outputs", "embed_out", "head", "heads", "predictions", "seq_relationship", "proj_out", "lm_loss"),
    *("logits_proj", "vocab_projector", "vocab_transform", "lm_logits", "output_projection", "summary"),
    *("text_projection", "visual_projection"),
}
HEAD_ENDINGS = ("_head", "_predictions", "_prediction", "classifier", "predictor")
ROOT_HEADS = {"fc", "output", "decoder", "generator"}
#: Low-rank matrices that peft adds to a layer.
ADAPTERS = {"lora_A", "lora_B"}
#: What chooses experts, or scales a state: a last bit there decides what is computed.
ROUTERS = {"router", "router_gate", "shared_expert_gate", "dt_proj", "queries", "to_queries"}
#: Layers whose output is added to the residual stream, by the last parts of their names.
RESIDUAL = re.compile(
    r"(^|\.)(o_proj|out_proj|down_proj|c_proj|fc2|wo|w2|o|out_lin|lin2|linear2|dense_4h_to_h|to_out\.0|"
    r"(attn|attention)\.proj|output\.dense|(attention|self_attention)\.dense)$"
)
#: Code in which an owner may name a layer's weight without computing with it.
_HARMLESS = re.compile(r"init|reset|tie|set_|load|prune|resize")


def ternarize(
    model: nn.Module,
    where: Where | None = None,
    *,
    weight: ops.Kind = "ternary",
    norm: NormPlacement = "rms",
    also: Collection[str] = (),
) -> Replacements:
    """Every `nn.Linear`, and `Conv1D` of GPT-2, becomes a `BitLinear`, in place: y = W x + b is then b1.58's product.

    The layers stay the objects they are, with their very parameters: tied ones stay tied, sharded ones sharded (FSDP,
    DTensor), a model on the meta device stays there, optimizers, hooks and training mode stay, and a state dict keeps
    its names and shapes, so that `save_pretrained` writes a folder of latent weights which plain transformers loads.
    `pack` makes the small copy. Returns a record, whose `print` is a table of what was replaced, what was not and why,
    and bytes; rich shows it too.

    where(name, module) says which of the layers are replaced. It is not asked about those that are left as they are
    unless `also` has their names: the output head, a layer tied to an embedding, routers, and layers whose owner
    reads the weight itself. Layers with a forward of their own and low-bit ones are never replaced.
    weight: "ternary" (arXiv 2402.17764) or "binary" (arXiv 2310.11453). norm: what the layers apply to their input
    first, "rms" or "layer" (both without gain) or None; "sub_ln" for "rms" in projections to the residual stream and
    None elsewhere (arXiv 2504.12285); or a function of name and module.
    Raises ThriftyError where there is nothing to replace; then, as for wrong options, the model is untouched.
    """
    if not isinstance(model, nn.Module):
        raise ThriftyError(f"[ternarize] model must be a torch.nn.Module; got {type(model).__name__}")
    if weight not in ops.KINDS:
        raise ThriftyError(f"[ternarize] weight must be one of {', '.join(ops.KINDS)}; got '{weight}'")
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ThriftyError(
            f"[ternarize] every parameter must have its shape; got '{lazy[0]}' without; run the model once"
        )
    if where is not None and not callable(where):
        raise ThriftyError(f"[ternarize] where must be a function of name and module; got {type(where).__name__}")
    if isinstance(also, str):
        raise ThriftyError(f"[ternarize] also must be a collection of names; got the text '{also}'; write ['{also}']")
    chosen, skipped = _choose(model, where, norm, also)
    if norm == "sub_ln" and chosen and not any(place for _, place in chosen.values()):
        raise ThriftyError(
            "[ternarize] 'sub_ln' norms the input of projections to the residual stream, known by their names; none "
            f"has one here (got {min(chosen)}, ...); give a function of name and module"
        )
    replaced = []
    for name, (module, place) in chosen.items():
        _become_low_bit(module, weight, place)
        replaced.append(Layer.of(name, module, f"norm {place}" if place else "no norm", FORMAT))
    _keep_off_fast_paths(model)
    return Replacements.of(model, weight, replaced, skipped)


def replace_linears_in_hf(model: nn.Module) -> Replacements:
    """`ternarize(model)`: the name that the function has in BitNet's own package.

    In place, as there. There it returns None, draws the weights anew, drops biases, dtype and device, and replaces the
    output head too; here they are kept, and the record of `ternarize` is returned.
    """
    return ternarize(model)


def _choose(
    model: nn.Module, where: Where | None, norm: NormPlacement, also: Collection[str]
) -> tuple[dict[str, tuple[nn.Module, Norm]], list[Layer]]:
    """The layers to replace with their norms, and the others."""
    chosen, skipped, asked = {}, [], False
    unknown = set(also)
    for name, module, reason, final in _candidates(model):
        unknown.discard(name)
        if reason is not None and name in also:
            if final:
                raise ThriftyError(f"[ternarize] '{name}' cannot be replaced; {reason}; leave it out of `also`")
            reason = None
        elif reason is None:
            asked = True
            if where is not None and not where(name, module):
                reason = "left by the predicate"
        if reason is None:
            chosen[name] = (module, _norm_of(norm, name, module))
        else:
            skipped.append(Layer.of(name, module, reason))
    if unknown:
        raise ThriftyError(f"[ternarize] also must name linear layers of the model; got '{min(unknown)}'")
    if not chosen and not asked:
        raise ThriftyError(f"[ternarize] a model must have a linear layer to replace; got {_found(model, skipped)}")
    return chosen, skipped


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None, bool]]:
    """Linear layers: name, module, why it is left as it is (None: it need not be), and whether that is final."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in model.modules():
        for leaf, child in owner._modules.items():
            owners.setdefault(id(child), []).append((owner, leaf))
    heads = _output_embeddings(model)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for name, module in model.named_modules():
        places = owners.get(id(module), [])
        if not _is_linear(module):
            reason = _not_a_layer(name, module)
            if reason is not None:
                yield name, module, reason, True
            continue
        reason = _impossible(module)
        if reason is not None:
            yield name, module, reason, True
        elif ADAPTERS & set(name.split(".")):
            yield name, module, "low-rank adapter", False
        elif _is_router(name, module):
            yield name, module, "router", False
        elif id(module) in heads or _is_head(name):
            yield name, module, "output head", False
        elif id(module._parameters["weight"]) in tables:
            yield name, module, "tied to an embedding", False
        else:
            readers = [type(owner).__name__ for owner, leaf in places if reads_weight(type(owner), leaf)]
            yield name, module, f"{readers[0]} reads its weight" if readers else None, False


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | BitLinear | PackedBitLinear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, which there cannot be where transformers was never imported."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def _not_a_layer(name: str, module: nn.Module) -> str | None:
    """What to say of weights that a reader of the record would look for, and that lie in no linear layer."""
    own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies by its input projection itself"
    if own and _is_router(name, module):
        return "router"
    if any(p.ndim == 3 for p in own) and "expert" in type(module).__name__.lower():
        return "weights of all experts in one tensor"
    return None


def _impossible(module: nn.Module) -> str | None:
    """Why a linear layer cannot become a BitLinear, if so."""
    if isinstance(module, BitLinear | PackedBitLinear):
        return "low-bit already"
    kind = type(module)
    base = nn.Linear if isinstance(module, nn.Linear) else sys.modules["transformers.pytorch_utils"].Conv1D
    if kind.forward is not base.forward or "forward" in vars(module):
        return f"{kind.__name__} has a forward of its own"
    if any(parent.__name__ == "FSDPModule" for parent in kind.__mro__):
        return "sharded as a module of its own; ternarize first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed"
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"weight is {weight.dtype} {tuple(weight.shape)}"
    return None


def _output_embeddings(model: nn.Module) -> set[int]:
    """Modules that transformers calls output embeddings."""
    found = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                found.add(id(getter()))
            except (NotImplementedError, AttributeError):
                continue
    return found


def _is_head(name: str) -> bool:
    parts = name.split(".")
    return name in ROOT_HEADS or any(part in HEADS or part.endswith(HEAD_ENDINGS) for part in parts)


def _is_router(name: str, module: nn.Module) -> bool:
    parts = name.split(".")
    if parts[-1] != "gate":
        return any(part in ROUTERS for part in parts)
    # A gate of a GLU has as many outputs as the layer is wide, or more.
    outputs, inputs = next(iter(p for p in module.parameters(recurse=False) if p.ndim > 1)).shape[-2:]
    return outputs < inputs


@cache
def reads_weight(owner: type, leaf: str) -> bool:
    """Whether a class computes with `self.<leaf>.weight` in some method, so that the layer's forward is not all.

    It is read in the source: `F.linear(x, layer.weight)` with a local name counts for every layer of the class.
    """
    if issubclass(owner, nn.TransformerEncoderLayer):
        return False  # its fast path alone, which `ternarize` turns off
    read = re.compile(
        rf"(?<!isinstance\()\bself\.{re.escape(leaf)}\.(weight|bias)\b"
        r"(?!\s*=[^=])(?!\.(dtype|device|shape|size|ndim|requires_grad)\b)"
        # Of a layer under a local name, which may be any of its own.
        r"|\blinear\([^()]*,\s*(?!self\b)\w+\.weight\b"
    )
    for kind in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not _HARMLESS.search(name):
                try:
                    source = inspect.getsource(method)
                except (OSError, TypeError):
                    continue
                if read.search(source):
                    return True
    return False


def _norm_of(norm: NormPlacement, name: str, module: nn.Module) -> Norm:
    if norm == "sub_ln":
        return "rms" if RESIDUAL.search(name) else None
    found = norm(name, module) if callable(norm) else norm
    if found not in NORMS:
        raise ThriftyError(
            f"[ternarize] norm must be 'rms', 'layer', None, 'sub_ln' or a function that returns one of the first "
            f"three; got {found!r}"
        )
    return found


def _become_low_bit(module: Any, weight: ops.Kind, norm: Norm) -> None:
    # The object stays, and with it whatever refers to it: hooks, FSDP's shards, lists, second names.
    transposed = not isinstance(module, nn.Linear)
    if transposed:
        module.in_features, module.out_features = module.weight.shape
    module.__class__ = BitLinear
    module.rms_norm = None
    module.kind, module.norm, module.transposed = weight, norm, transposed


def _keep_off_fast_paths(model: nn.Module) -> None:
    """torch's fused encoder layer, used in evaluation, reads the weights and never calls the layers."""
    for module in model.modules():
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for layer in layers:
            if isinstance(layer, nn.TransformerEncoderLayer) and isinstance(layer.linear1, BitLinear):
                layer.activation_relu_or_gelu = 0
                if isinstance(module, nn.TransformerEncoder):
                    module.use_nested_tensor = False


def _found(model: nn.Module, skipped: list[Layer]) -> str:
    if skipped:
        names = ", ".join(f"{layer.name or type(model).__name__} ({layer.note})" for layer in skipped[:5])
        return f"{names}; `also` takes some by their names"
    kinds = sorted({type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None})
    return f"layers of the kinds {', '.join(kinds)}" if kinds else "a model without parameters"

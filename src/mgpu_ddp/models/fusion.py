"""Fewer, larger kernels for the same model: batch norms inside convolutions, activations too.

Both are rewrites of the graph that torch.fx traces; a model that it cannot trace stays as it is.
"""

import operator
import warnings

import torch
from torch import fx, nn

FUSED = ("resnet", "resnext", "densenet")
"""Models whose rows keep their bits when cuDNN fuses, wherever they stand in a batch, as `tests/gpu` checks in half
precision. Others (vgg, squeezenet), and fp32, do not."""
RELUS = (torch.relu, nn.functional.relu)
ADDS = (operator.add, operator.iadd, torch.add)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it."""
    with warnings.catch_warnings():
        # Some releases of torch deprecate an import of this module's own.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse

    try:
        folded: nn.Module = fuse(module)
    except Exception:
        # Control flow depends on data (a TraceError, or whatever forward raises for a proxy of a tensor). Such models
        # have few batch norms, and only speed is lost.
        return module
    return folded


def fuse_activations(module: nn.Module, head: nn.Module | None) -> nn.Module:
    """Let cuDNN's convolutions apply the ReLU after them, and the addition between the two. CUDA, half precision.

    The head stays a module of its own, so that its input can be read.
    """
    if not isinstance(module, fx.GraphModule):
        return module
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        if not _is_relu(node, modules) or not isinstance(before := node.args[0], fx.Node) or len(before.users) > 1:
            continue
        if _is_convolution(before, modules, head):
            _replace_relu(module, modules, node, before, added=None)
            module.graph.erase_node(before)
        elif before.op == "call_function" and before.target in ADDS:
            terms = [term for term in before.args[:2] if isinstance(term, fx.Node)]
            found = [term for term in terms if _is_convolution(term, modules, head) and len(term.users) == 1]
            if len(terms) == 2 and found:
                _replace_relu(module, modules, node, found[0], added=terms[1 - terms.index(found[0])])
                module.graph.erase_node(before)
                module.graph.erase_node(found[0])
    module.graph.lint()
    module.recompile()
    return module


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return node.op == "call_function" and node.target in RELUS


def _is_convolution(node: fx.Node, modules: dict[str, nn.Module], head: nn.Module | None) -> bool:
    if node.op != "call_module":
        return False
    layer = modules[str(node.target)]
    return (
        isinstance(layer, nn.Conv2d)
        and layer is not head
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _replace_relu(
    module: fx.GraphModule,
    modules: dict[str, nn.Module],
    relu: fx.Node,
    convolution: fx.Node,
    *,
    added: fx.Node | None,
) -> None:
    """Replace a ReLU by one call of cuDNN. The caller erases the nodes that it no longer needs."""
    layer, graph = modules[str(convolution.target)], module.graph
    assert isinstance(layer, nn.Conv2d)
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    with graph.inserting_before(relu):
        weight = graph.get_attr(f"{convolution.target}.weight")
        bias = graph.get_attr(f"{convolution.target}.bias") if layer.bias is not None else None
        images = convolution.args[0]
        if added is None:
            fused = graph.call_function(torch.cudnn_convolution_relu, (images, weight, bias, *how))
        else:
            fused = graph.call_function(torch.cudnn_convolution_add_relu, (images, weight, added, 1.0, bias, *how))
    relu.replace_all_uses_with(fused)
    graph.erase_node(relu)

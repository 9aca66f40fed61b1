"""A whole model under torch.compile, forward and backward."""

import pytest
import torch
from test_lora import adapted_model
from whole_model import HEADS, gradients_of, loss_of, make_batch, make_model

from nvembed_fast import ops


@pytest.mark.slow
@pytest.mark.parametrize("head", (HEADS[0], HEADS[1], HEADS[4]), ids=lambda h: h[1] or h[0])
def test_compiles_as_one_graph_for_all_lengths(head, device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return aot_eager(graph, examples)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    model = make_model(head, device, layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for seed, lengths in enumerate(((9, 1, 17), (3, 4), (8, 8, 2), (5, 2))):
        batch = make_batch(device, lengths, seed)
        wanted = gradients_of(model, batch, "triton")
        with ops.use_impl("triton"):
            model.zero_grad()
            loss_of(compiled, batch).backward()
        for name, parameter in model.named_parameters():
            # the compiler may reorder what stands between the kernels
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
        if seed == 1:
            settled = len(graphs)
    assert len(graphs) == settled, f"{len(graphs) - settled} recompilations for other lengths"


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_checkpointed_layers_compile_as_one_graph(impl, device):
    torch._dynamo.reset()
    model, batch, targets = make_model(HEADS[2], device), make_batch(device), []

    def look(graph, examples):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    wanted = {name: g.clone() for name, g in gradients_of(model, batch, impl).items()}
    model.checkpoint_layers()
    compiled = torch.compile(model, fullgraph=True, backend=look)
    model.zero_grad()
    with ops.use_impl(impl):
        loss_of(compiled, batch).backward()
    assert targets.count("tag_activation_checkpoint") == 2, "nothing runs again"
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_compiled_model_overwrites_nothing_that_a_hook_holds(impl, device):
    model, batch = make_model(HEADS[1], device).requires_grad_(False), make_batch(device)
    everything = [
        name for name, module in model.named_modules() if not isinstance(module, torch.nn.ModuleList)
    ]
    held = {}

    def hook(name, module):
        def hold(module, inputs, out):
            held[name] = [(t, t.clone()) for t in (*inputs, out) if isinstance(t, torch.Tensor)]

        module.register_forward_hook(hold)

    with ops.use_impl(impl):
        wanted = model(batch)
        for hooked in (["embedding_model.layers.1.self_attn.qkv_proj", "head.to_q"], everything):
            torch._dynamo.reset()
            held.clear()
            for name in hooked:
                hook(name, model.get_submodule(name))
            got = torch.compile(model, backend="eager")(batch)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
            assert set(held) >= set(hooked)
            for name, tensors in held.items():
                assert all(torch.equal(t, then) for t, then in tensors), name


@pytest.mark.slow
def test_adapters_compile_as_one_graph(device):
    torch._dynamo.reset()
    model, batch = adapted_model(layers=1).to(device), make_batch(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use_impl("torch"):
        wanted = {name: g.clone() for name, g in gradients_of(model, batch, "torch").items()}
        model.zero_grad()
        loss_of(compiled, batch).backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
